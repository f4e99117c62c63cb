"""Least squares for the weights of a layer that write to the residual stream, and for those that read it.

A writer (`o_proj`, `down_proj`) is corrected for the error of the stream behind it, see `reconstruction`.

The readers (q, k and v, or gate and up) get a linear map from the pruned norm outputs to the unpruned ones: with n the
norm output that attention (or MLP) of the pruned model reads and m that of the unpruned model, sum_t w_t |m_t - n_t -
D^T n_t|^2 is minimised over D, and the matrix I + D^T is merged into the weights. No parameter is added. It pays once
so much is removed that the writers alone cannot bring the stream back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import BRANCHES, WRITERS
from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.ridge import (
    Solution,
    Sums,
    best_ridge,
    count_tokens,
    solved,
    token_scale,
    token_sums,
    total_sums,
)
from vlmprune_jax.core.prune.stream import LayerStream

READER_OF = dict(zip(WRITERS, BRANCHES, strict=True))  # writer -> the branch that it ends


class Targets(NamedTuple):
    """Residual streams of the unpruned model for each batch, which a repaired layer should reproduce."""

    before: Sequence[jax.Array]
    """Stream at the layer's input; () if input projections are not repaired."""

    middle: Sequence[Any]
    """Stream between the layer's attention and MLP; None if no repair needs it."""

    after: Sequence[jax.Array]
    """Stream after the layer and the removed layers that follow it."""

    statistics: Sequence[dict[str, jax.Array]]
    """Norm statistics of the output projections, see `Layer.run`."""


def norm_name(layer: Layer, module: str) -> str:
    """Return the name of the input norm of the branch that ends in a writer; some blocks have no norm of this name."""
    return layer.block.names.norms[WRITERS.index(module)]


@functools.partial(jax.jit, static_argnames="module")
def _reader_sums(layer: Layer, rows: Rows, unpruned: jax.Array, *, module: str) -> Sums:
    reader = READER_OF[module]
    block, _, values = layer.compute(rows, (reader,))
    target = getattr(block, norm_name(layer, module))(unpruned)
    scale, missing = token_scale(rows.weight, target), target - values[reader]
    return Sums(*token_sums(scale, rows.weight > 0, values[reader], missing))


def repair_readers(
    layer: Layer, stream: LayerStream, targets: Targets, *, module: str, lost: bool, refit: bool
) -> tuple[Layer, Solution]:
    """Map the input of the branch that ends in `module`; return the layer, unchanged unless the held-out error falls.

    The errors with and without the map are compared after least squares for the writer. Without the map, the writer is
    repaired only if it `lost` heads or neurons. `refit`: see `repair_writer`.
    """
    reader, unpruned = READER_OF[module], targets.before if module == "o_proj" else targets.middle
    compute = functools.partial(_reader_sums, layer, module=module)
    fit, held = (total_sums(stream, held_out, compute, unpruned, title=reader) for held_out in (False, True))
    best = best_ridge(fit, held)
    solution = repair_writer(layer, stream, targets, module=module, refit=refit)[1]
    solution.ridge, solution.error_before = None, solution.error_after if lost else solution.error_before
    solution.error_after = solution.error_before
    if best is None:
        return layer, solution
    mapped = layer.reading(solved(fit, held, best[0], refit=refit), reader)
    error = repair_writer(mapped, stream, targets, module=module, refit=refit)[1].error_after
    if error >= solution.error_before:
        return layer, solution
    solution.ridge, solution.error_after = best[0], error
    return mapped, solution


@functools.partial(jax.jit, static_argnames="module")
def writer_sums(layer: Layer, rows: Rows, target: jax.Array, statistics: jax.Array | None, *, module: str) -> Sums:
    block, after, values = layer.compute(rows, (module, f"{module}_out", "middle"))
    missing = residual = target - (values["middle"] if module == "o_proj" else after.x)
    read = values[module].reshape(*rows.x.shape[:2], -1)
    if f"{block.writers[module]}/bias" in layer.params:
        read = jnp.concatenate([read, jnp.ones_like(read[..., :1])], axis=-1)
    out, factor = values[f"{module}_out"], jnp.float32(1)
    if module == "down_proj" and block.scalar is not None:
        # fitted where it writes, before the per-layer branch and the layer's scale
        factor, hidden_pruned = block.scalar, values["middle"] + block.follow(module, out)
        missing = (block.before_extra(target, rows.embeds.per_layer_embeds, hidden_pruned) - hidden_pruned) * factor
        read = read * factor
    if statistics is not None:
        # At the unpruned output's statistics the norm is an affine map: what enters it is fitted to the unpruned one.
        missing = missing + block.follow(module, out) * factor - block.follow(module, out, statistics) * factor
        read = read * statistics[..., 1:]
    used, scale = rows.weight > 0, token_scale(rows.weight, target)
    residual = jnp.where(used[..., None], residual, 0.0)
    energy = jnp.sum(scale * jnp.sum(residual * residual, axis=-1), axis=-1)
    gram, cross = token_sums(scale, used, read, missing)
    return Sums(constrain(gram, ("mlp", None)), constrain(cross, ("mlp", None)), constrain(energy, ()))


def repair_writer(
    layer: Layer, stream: LayerStream, targets: Targets, *, module: str, refit: bool = True
) -> tuple[Layer, Solution]:
    """Correct an output projection by ridge regression; return the layer, unchanged unless the held-out error falls.

    `refit`: solve again on all rows after choosing the penalty.
    """
    target = targets.middle if module == "o_proj" else targets.after
    statistics = [arrays.get(module) for arrays in targets.statistics]

    def total(layer: Layer, held_out: bool) -> Sums:
        compute = functools.partial(writer_sums, layer, module=module)
        title = f"outputs of {module} in layer {layer.number}"
        return total_sums(stream, held_out, compute, target, statistics, title=title)

    fit, held = total(layer, False), total(layer, True)
    weight = layer.cfg.hidden_size * float(sum(batch.weight.sum() for batch in stream.batches if batch.held_out))
    best, before = best_ridge(fit, held), float(held.energy) / weight
    solution = Solution(before, before, None, count_tokens(stream), len(fit.gram))
    if best is None:
        return layer, solution
    ridge, difference = best
    after = before + difference / weight
    if layer.block.norm_after(module) is not None:  # the norm's statistics change with the weight: measure
        trial = layer.changed(solved(fit, held, ridge, refit=False), module)
        after = float(total(trial, True).energy) / weight
        if after >= before:
            return layer, solution
    solution.ridge, solution.error_after = ridge, after
    return layer.changed(solved(fit, held, ridge, refit=refit), module), solution
