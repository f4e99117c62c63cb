"""Repair of the weights that read the residual stream: a linear map from the pruned norm outputs to the unpruned ones.

With n the norm output that attention (or MLP) of the pruned model reads and m that of the unpruned model, sum_t w_t
|m_t - n_t - D^T n_t|^2 is minimised over D, and the matrix I + D^T is merged into q, k and v (or gate and up). No
parameter is added. It pays once so much is removed that the writers alone cannot bring the stream back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.ridge import Sums, best_ridge, solved, token_scale, token_sums, total_sums
from vlmprune_jax.core.prune.stream import LayerStream

READER_OF = {"o_proj": "self_attn", "down_proj": "mlp"}  # the input of the branch that ends in a writer


def norm_name(layer: Layer, reader: str) -> str:
    """Return the name of the input norm of a branch, "self_attn" or "mlp"; some blocks have no norm of this name."""
    return layer.block.names.norms[[*READER_OF.values()].index(reader)]


@functools.partial(jax.jit, static_argnames=("reader", "norm"))
def _sums(layer: Layer, rows: Rows, unpruned: jax.Array, *, reader: str, norm: str) -> Sums:
    block, _, values = layer.compute(rows, (reader,))
    target = getattr(block, norm)(unpruned)
    scale, missing = token_scale(rows.weight, target), target - values[reader]
    gram, cross = token_sums(scale, rows.weight > 0, values[reader], missing)
    return Sums(gram, cross, jnp.zeros(len(missing)))


def reader_change(
    layer: Layer, reader: str, stream: LayerStream, unpruned: Sequence[jax.Array], *, refit: bool
) -> tuple[np.ndarray, float] | None:
    """Solve for a linear change of a branch's normalised input; return the change and its ridge penalty.

    The result is None if no ridge penalty lowers the held-out error.

    Args:
      stream: calibration rows at the layer's input.
      unpruned: the unpruned model's residual stream before the branch's norm, for each batch.
      refit: solve again on all rows after the ridge penalty is chosen.
    """
    compute = functools.partial(_sums, layer, reader=reader, norm=norm_name(layer, reader))
    fit, held = (total_sums(stream, held_out, compute, unpruned, title=reader) for held_out in (False, True))
    best = best_ridge(fit, held)
    return None if best is None else (solved(fit, held, best[0], refit=refit), best[0])
