"""Scores of heads and neurons from norms of their weights, and random numbers as a control.

`l1`, `l2`: sums of |W|^p over the axis that is not pruned, without calibration.

`activation`: the norm of a channel's values over the tokens times the norm of the weights that they are multiplied with
(Wanda's product, arXiv 2306.11695, for whole units). `fluctuation`: the variance of the values times the squared norm
(FLAP, arXiv 2312.11983): a bias could replace a channel that hardly varies.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of, use_mesh
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.activations import LayerSums, LayerValues, Tokens
from vlmprune_jax.core.prune.calibration import positive
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.criteria.groups import Channels, reduce_groups, reduce_inputs, scored_axes, summed_axes
from vlmprune_jax.core.prune.layers import Layer


def magnitude(model: Model, *, power: int, reduction: str, gqa: str, stack: str) -> Values:
    """Return magnitude scores: sums of |W|^power per channel over the weights that are pruned together."""
    axes = summed_axes(model.cfg, stack)
    channels = [
        {n: np.asarray(_summed(layer.params[n], None, power, axes[n])) for n in axes if n in layer.params}
        for layer in _layers(model, stack)
    ]
    return reduce_groups(channels, model.cfg, reduction=reduction, gqa=gqa, stack=stack)


def input_weights(model: Model, *, power: int, stack: str = "text") -> list[Channels]:
    """Return sums of |W|^power over outputs, for the input channels of o_proj and down_proj of every layer.

    The weights are multiplied by the gains of their outputs (`Block.gain`), as in the sum to the residual stream. The
    sums can weight the inputs of these projections that a criterion receives.
    """
    return [
        {
            name: np.asarray(_summed(layer.params[f"{path}/weight"], layer.block.gain(name), power, 0))
            for name, path in layer.block.writers.items()
        }
        for layer in _layers(model, stack)
    ]


def _layers(model: Model, stack: str) -> Iterator[Layer]:
    with use_mesh(mesh_of(model.params)):
        for number in range(len(model.cfg.stack(stack).layers)):
            yield Layer.of(model, stack, number, None)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _summed(weight: jax.Array, gain: jax.Array | None, power: int, axis: int) -> jax.Array:
    full = jnp.abs(weight.astype(jnp.float32))
    if gain is not None:  # [out], of weights [out, in...]
        full = full * jnp.abs(gain.astype(jnp.float32)).reshape(-1, *(1,) * (full.ndim - 1))
    return jnp.sum(full if power == 1 else full * full, axis=axis)


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


def contribution(sums: Sequence[LayerSums], model: Model, *, variance: bool, gqa: str, stack: str) -> Values:
    """Return head and neuron scores: the sum over channels of the norm of the values times that of the weights.

    `variance`: instead, the sum of the variance of the values times the squared norm of the weights.
    """
    count, layers = positive(sums[0]["weight"]), list[Channels]()
    for weights, layer in zip(input_weights(model, power=2, stack=stack), sums, strict=True):
        layers.append({})
        for name, squares in weights.items():
            mean, of_squares = layer[name] / count
            fluctuation = squares * np.maximum(of_squares - mean**2, 0)
            layers[-1][name] = fluctuation if variance else np.sqrt(squares) * np.sqrt(of_squares)
    return reduce_inputs(layers, model.cfg, gqa=gqa, stack=stack)


def random(model: Model, *, seed: int, gqa: str, stack: str) -> Values:
    """Return random scores, as a control experiment for other criteria."""
    return random_scores(model.cfg, seed=seed, gqa=gqa, stack=stack)


def random_scores(cfg: ModelConfig, *, seed: int, gqa: str, stack: str = "text") -> Values:
    """Return random layer, head and neuron scores; a head's score is the sum over its channels of U(0, 1)."""
    draw, component = np.random.default_rng(seed), cfg.stack(stack)
    importance = draw.random(len(component.layers))
    axes = [(i, axis) for i, layer in enumerate(component.layers) for axis in scored_axes(layer, gqa)]
    units = {
        Key(stack, i, axis.name): draw.random(component.layers[i].shape_of(axis)).sum(axis=1)
        for i, axis in sorted(axes, key=lambda item: not item[1].channels)  # all heads are drawn before all neurons
    }
    return {Key(stack, None, LAYERS): importance, **dict(sorted(units.items(), key=lambda item: item[0].layer or 0))}


ACTIVATION, FLUCTUATION = (
    Criterion(
        scores=("widths",),
        needs="activations",
        function=moments,
        finish=functools.partial(contribution, variance=variance),
        options=declared("gqa"),
        inputs=WRITERS,
        stacks=STACKS,
        splits=True,
    )
    for variance in (False, True)
)
L1, L2 = (
    Criterion(
        scores=("widths",),
        needs="weights",
        function=functools.partial(magnitude, power=power),
        options={**declared("gqa"), "reduction": "mean"},
        stacks=STACKS,
    )
    for power in (1, 2)
)
RANDOM = Criterion(
    scores=("layers", "widths"), needs="weights", function=random, options=declared("seed", "gqa"), stacks=STACKS
)
