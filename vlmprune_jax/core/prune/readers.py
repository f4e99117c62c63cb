"""Repair of the weights that read the residual stream: a linear map from the pruned norm outputs to the unpruned ones.

With n the norm output that attention (or MLP) of the pruned model reads and m that of the unpruned model, sum_t w_t
|m_t - n_t - D^T n_t|^2 is minimised over D, and the matrix I + D^T is merged into q, k and v (or gate and up). No
parameter is added. It pays once so much is removed that the writers alone cannot bring the stream back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import Stack
from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.prune.layers import Given, Layer, Rows, run_block
from vlmprune_jax.core.prune.ridge import Sums, best_ridge, total_sums
from vlmprune_jax.core.prune.ridge import change as solve
from vlmprune_jax.core.prune.walk import LayerStream

READER_OF = {"o_proj": "self_attn", "down_proj": "mlp"}  # the input of the branch that ends in a writer


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "reader"))
def _sums(
    params: Any, x: Any, weight: Any, given: Given, unpruned: Any, *, stack: str, cfg: Stack, reader: str
) -> Sums:
    block, _, values = run_block(stack, cfg, params, x, given, (reader,))
    target = getattr(block, block.names.norms[list(READER_OF.values()).index(reader)])(unpruned)
    read, counts = values[reader], weight[..., None] > 0
    read, missing = jnp.where(counts, read, 0.0), jnp.where(counts, target - read, 0.0)
    scaled = read * jnp.where(weight > 0, weight / jnp.mean(target * target, axis=-1), 0.0)[..., None]
    gram = jnp.einsum("bsi,bsj->ij", scaled, read, precision="highest")
    cross = jnp.einsum("bsi,bse->ie", scaled, missing, precision="highest")
    return Sums(gram, cross, jnp.zeros(len(x)))


def can_read(layer: Layer, reader: str) -> bool:
    """Return True if the attention or MLP has a separate input norm, so that its input projections can be repaired."""
    norms = list(READER_OF.values())
    return hasattr(layer.block, layer.block.names.norms[norms.index(reader)])


def reader_change(
    layer: Layer, reader: str, stream: LayerStream, place: int, unpruned: Sequence[jax.Array], *, refit: bool
) -> tuple[np.ndarray, float] | None:
    """Solve for a linear change of a branch's normalised input; return the change and its ridge penalty.

    The result is None if no ridge penalty lowers the held-out error.

    Args:
      stream: calibration rows at the layer's input.
      place: the layer's number among the remaining layers.
      unpruned: the unpruned model's residual stream before the branch's norm, for each batch.
      refit: solve again on all rows after the ridge penalty is chosen.
    """

    def sums(rows: Rows, unpruned: jax.Array) -> Sums:
        return _sums(layer.params, *rows, unpruned, stack=layer.stack, cfg=layer.cfg, reader=reader)

    fit, held = (total_sums(stream, place, held_out, sums, unpruned, what=reader) for held_out in (False, True))
    best = best_ridge(fit, held)
    if best is None:
        return None
    change = solve(jax.tree.map(jnp.add, fit, held) if refit else fit, best[0])
    return np.array(gather_to_host(change)), best[0]
