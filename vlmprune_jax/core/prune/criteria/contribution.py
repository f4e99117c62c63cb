"""Contribution of heads and neurons to the residual stream, from a forward pass alone.

`activation`: the norm of a channel's values over the tokens times the norm of the weights that they are multiplied with
(Wanda's product, arXiv 2306.11695, for whole units). `fluctuation`: the variance of the values times the squared norm
(FLAP, arXiv 2312.11983): a bias could replace a channel that hardly varies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.activations import LayerSums, LayerValues, Tokens
from vlmprune_jax.core.prune.calibration import positive
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.criteria.groups import reduce_inputs
from vlmprune_jax.core.prune.criteria.weights import input_weights

Moments = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of means of x and of x^2


def moments(layer: LayerValues, tokens: Tokens) -> dict[str, jax.Array]:
    """Return weighted sums over tokens of x and x^2, [2, ...], where x are the input channels of o_proj and down_proj.

    "weight" is the sum of the weights.
    """
    sums = {"weight": jnp.sum(tokens.weight)}
    for name, read in layer.inputs.items():
        x = read.astype(jnp.float32)
        if name in layer.scales:
            scale = layer.scales[name]
            x = x * scale.reshape(*scale.shape, *(1,) * (x.ndim - 3))
        counts = tokens.weight.reshape(*tokens.weight.shape, *(1,) * (x.ndim - 2))
        x = jnp.where(counts > 0, x, jnp.zeros_like(x))  # padding may hold anything
        sums[name] = jnp.stack([jnp.sum(counts * x, (0, 1)), jnp.sum(counts * x * x, (0, 1))])
    return sums


def weighted(sums: Sequence[LayerSums], model: Model, *, moment: Moments, power: int, gqa: str, stack: str) -> Values:
    """Return head and neuron scores: the sum over channels of `moment` x (norm of the channel's weights)^`power`."""
    count = positive(sums[0]["weight"])
    scores = [
        {name: total ** (power / 2) * moment(*layer[name] / count) for name, total in squares.items()}
        for squares, layer in zip(input_weights(model, power=2, stack=stack), sums, strict=True)
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
        inputs=WRITERS,
        stacks=STACKS,
        splits=True,
    )
    for moment, power in _MOMENTS
)
