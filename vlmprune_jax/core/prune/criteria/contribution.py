"""Contribution of heads and neurons to the residual stream, from a forward pass alone.

`activation`: the norm of a channel's values over the tokens times the norm of the weights that they are multiplied with
(Wanda's product, arXiv 2306.11695, for whole units). `fluctuation`: the variance of the values times the squared norm
(FLAP, arXiv 2312.11983): a bias could replace a channel that hardly varies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.context import WRITERS, BlockValues
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.activations import Blocks, Tokens
from vlmprune_jax.core.prune.calibration import positive
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.criteria.groups import reduce_inputs
from vlmprune_jax.core.prune.criteria.weights import input_weights

Moments = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of means of x and of x^2


def moments(blocks: Blocks, tokens: Tokens) -> tuple[list[Any], jax.Array]:
    """Return weighted sums over tokens of x and x^2, where x are the input channels of o_proj and down_proj."""
    weight = tokens.weight

    def hook(block: BlockValues) -> dict[str, tuple[jax.Array, jax.Array]]:
        sums = {}
        for name, read in block.inputs.items():
            x = read.astype(jnp.float32)
            if name in block.scales:
                scale = block.scales[name]
                x = x * scale.reshape(*scale.shape, *(1,) * (x.ndim - 3))
            counts = weight.reshape(*weight.shape, *(1,) * (x.ndim - 2))
            x = jnp.where(counts > 0, x, jnp.zeros_like(x))  # padding may hold anything
            sums[name] = jnp.sum(counts * x, (0, 1)), jnp.sum(counts * x * x, (0, 1))
        return sums

    return blocks(hook, inputs=WRITERS), jnp.sum(weight)


def weighted(sums: Any, model: Model, *, moment: Moments, power: int, gqa: str, stack: str) -> Values:
    """Return head and neuron scores: the sum over channels of `moment` x (norm of the channel's weights)^`power`."""
    layers, total = sums
    count = positive(total)
    norms = [
        {name: squared_norm ** (power / 2) for name, squared_norm in layer.items()}
        for layer in input_weights(model, power=2, stack=stack)
    ]
    scores = [
        {name: norm[name] * moment(first / count, second / count) for name, (first, second) in layer.items()}
        for norm, layer in zip(norms, layers, strict=True)
    ]
    return reduce_inputs(scores, model.cfg, gqa=gqa, stack=stack)


_MOMENTS: tuple[tuple[Moments, int], ...] = (
    (lambda mean, of_squares: np.sqrt(of_squares), 1),
    (lambda mean, of_squares: np.maximum(of_squares - mean**2, 0), 2),
)
ACTIVATION, FLUCTUATION = (
    Criterion(
        scores=("widths",),
        needs="activations",
        function=moments,
        finish=functools.partial(weighted, moment=moment, power=power),
        options=declared("gqa"),
        stacks=STACKS,
        splits=True,
    )
    for moment, power in _MOMENTS
)
