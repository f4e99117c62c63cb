"""Scores without calibration: sums of |W|^p over the axis that is not pruned, and random numbers as a control."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.models.placement import mesh_of
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.criteria.groups import Channels, reduce_groups, scored_axes, summed_axes
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


RANDOM = Criterion(
    scores=("layers", "widths"),
    needs="weights",
    function=random,
    options=declared("seed", "gqa"),
    stacks=STACKS,
)
