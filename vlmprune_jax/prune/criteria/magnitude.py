"""Width scores from the weights alone: sums of |W|^p over the axis that is not pruned."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.config import runs
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model, mesh_of
from vlmprune_jax.prune.criteria.groups import Widths, coupled, reduce_groups


def magnitude(model: Model, *, power: int, reduction: str, gqa: str) -> Widths:
    """(heads, mlp) scores: channel scores sum |W|^power without a root, as the reference's L1 and L2."""
    attention, mlp = coupled(model.cfg)
    mesh = mesh_of(model.params)
    channels = {}
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for run in range(len(runs(model.cfg.text.layers))):
            flat = flatten(model.params["text"]["layers"][str(run)])
            channels[run] = {
                name: np.asarray(_summed(flat[name], power, axis + 1)) for name, axis in (attention | mlp).items()
            }
    return reduce_groups(channels, model.cfg, reduction=reduction, gqa=gqa)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _summed(weight: jax.Array, power: int, axis: int) -> jax.Array:
    full = jnp.abs(weight.astype(jnp.float32))
    return jnp.sum(full if power == 1 else full * full, axis=axis)
