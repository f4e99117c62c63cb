"""Width scores from the weights alone: sums of |W|^p over the axis that is not pruned."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import STACKS, runs
from vlmprune_jax.distributed.mesh import use_mesh
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vision import SCALES
from vlmprune_jax.models.vlm import Model, mesh_of
from vlmprune_jax.prune.criteria.criterion import Criterion, Parts, declared
from vlmprune_jax.prune.criteria.groups import Channels, coupled, reduce_groups


def magnitude(model: Model, *, power: int, reduction: str, gqa: str, stack: str) -> Parts:
    """Channel scores sum |W|^power without a root, as the reference's L1 and L2, reduced over coupled groups."""
    attention, mlp = coupled(model.cfg, stack)
    channels = channel_sums(model, attention | mlp, power=power, stack=stack)
    return reduce_groups(channels, model.cfg, reduction=reduction, gqa=gqa, stack=stack)


def channel_sums(
    model: Model, weights: dict[str, int], *, power: int, stack: str = "text", scaled: bool = False
) -> list[Channels]:
    """Per layer, the sum of |W|^power of these weights (path -> axis of the layer's own array) over that axis.

    `scaled`: of weights as they write to the residual stream, that is times the layer scale of towers that have one.
    """
    mesh, layers = mesh_of(model.params), list[Channels]()
    with use_mesh(mesh):
        for run, (_, length, _) in enumerate(runs(model.cfg.stack(stack).layers)):
            flat = flatten(model.params[stack]["layers"][str(run)])
            scales = {name: flat.get(SCALES.get(name, "")) if scaled else None for name in weights}
            sums = {
                name: np.asarray(_summed(flat[name], scales[name], power, axis + 1)) for name, axis in weights.items()
            }
            layers += [{name: values[i] for name, values in sums.items()} for i in range(length)]
    return layers


def input_weights(model: Model, *, power: int, stack: str = "text") -> list[Channels]:
    """Per layer, the sum over outputs of |W|^power: "o_proj" float32[q_heads, head] and "down_proj" float32[mlp].

    It weighs what a tap sees of the inputs of these projections, in every family and stack by these names.
    """
    attention, mlp = coupled(model.cfg, stack)
    (o_proj,), (down_proj,) = ([name for name, axis in group.items() if axis == 0] for group in (attention, mlp))
    sums = channel_sums(model, {o_proj: 0, down_proj: 0}, power=power, stack=stack, scaled=True)
    return [{"o_proj": layer[o_proj], "down_proj": layer[down_proj]} for layer in sums]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _summed(weight: jax.Array, scale: jax.Array | None, power: int, axis: int) -> jax.Array:
    full = jnp.abs(weight.astype(jnp.float32))
    if scale is not None:  # [layer, out], of weights [layer, out, in...]
        full = full * jnp.abs(scale.astype(jnp.float32)).reshape(*scale.shape, *(1,) * (full.ndim - 2))
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
