"""Least-squares repair of the weights that write to the residual stream or read it, from sums over tokens.

sum_t w_t |r_t - D^T x_t|^2 over changes D of a weight depends on the tokens through G = sum w x x^T and C = sum w x r^T
alone: D = (G + ridge diag G)^-1 C, and the error on other tokens, with their G and C, differs from that of D = 0 by <D,
G D> - 2 <D, C>. A ridge relative to the diagonal has no scale; one relative to its mean would depend on the few largest
entries.

A writer (`o_proj`, `down_proj`) is corrected for the error of the stream behind it, see `reconstruction`.

The readers (q, k and v, or gate and up) get a linear map from the pruned norm outputs to the unpruned ones: with n the
norm output that attention (or MLP) of the pruned model reads and m that of the unpruned model, sum_t w_t |m_t - n_t -
D^T n_t|^2 is minimised over D, and the matrix I + D^T is merged into the weights. No parameter is added. It pays once
so much is removed that the writers alone cannot bring the stream back.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import PartitionSpec

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import BRANCHES, WRITERS
from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.stream import LayerStream

READER_OF = dict(zip(WRITERS, BRANCHES, strict=True))  # writer -> the branch that it ends
# Ridge penalties to try. With 4,096 tokens and 1,000 unknowns, 0.3 to 3 have the lowest held-out error; with more
# tokens or fewer unknowns, smaller penalties do. An unchanged weight is always a candidate as well.
RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_FLOOR = 1e-6  # smallest diagonal entry of G, as a share of the mean, for neurons that are never active
_BLOCK = 256
_PARTS = 4  # parts into which rows and columns are divided, so that products skip most zeros of a triangular factor
_PRODUCT: Any = {"precision": "highest"}


class Sums(NamedTuple):
    """Sums over weighted tokens for least squares; of experts, each with a leading axis [experts]."""

    gram: jax.Array
    """Sum of w x x^T, float32[in, in]."""

    cross: Any = None
    """Sum of w x r^T, float32[in, out]; None if there is no r."""

    energy: Any = 0.0
    """Sum of w |r|^2, of each row in a batch or of all rows; 0 if it is not needed."""

    tokens: Any = 0.0
    """Number of tokens of each expert."""


def token_scale(weight: jax.Array, stream: jax.Array) -> jax.Array:
    """Return each token's weight divided by the mean square of a residual stream, the factor of the next norm."""
    return jnp.where(weight > 0, weight / jnp.mean(stream * stream, axis=-1), 0.0)


def token_sums(scale: jax.Array, used: jax.Array, read: jax.Array, missing: jax.Array | None = None) -> Sums:
    """Return the sums over tokens of w x x^T, and of w x r^T if `missing` is passed.

    Args:
      scale: weights w, float32[..., tokens].
      used: bool, True for tokens that contribute; other tokens (padding) may hold anything.
      read, missing: x float32[..., tokens, in] and r float32[..., tokens, out].
    """
    tokens = tuple(range(scale.ndim))
    # where, not a product: NaN * 0 is NaN
    read = jnp.where(used[..., None], read, 0.0)
    weighted = read * jnp.where(used, scale, 0.0)[..., None]

    def product(right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(weighted, right, ((tokens, tokens), ((), ())), **_PRODUCT)

    return Sums(product(read), None if missing is None else product(jnp.where(used[..., None], missing, 0.0)))


@functools.partial(jax.jit, donate_argnums=0)
def _add_into(totals: Any, terms: Any) -> Any:
    return jax.tree.map(jnp.add, totals, terms)


def check_finite(title: str, names: Sequence[str]) -> None:
    """Raise a UserError that begins with `title` if there are `names` of calibration rows with non-finite values."""
    if names:
        raise UserError(
            f"{title} are not finite in {', '.join(sorted(names)[:5])} of the calibration batches: check these records "
            "and the weights"
        )


def count_tokens(stream: LayerStream) -> int:
    """Return the number of calibration tokens with a weight above 0, fitted and held-out."""
    return sum(int((batch.weight > 0).sum()) for batch in stream.batches)


def total_sums(
    stream: LayerStream, held_out: bool, compute: Callable[..., Sums], *targets: Sequence[Any], title: str
) -> Sums:
    """Return the sum of `compute(rows, *targets)` over calibration batches, fitted or held-out.

    Raises a UserError that begins with "reconstruct: " and `title` if the energies of a row are not finite.
    """
    totals, energy = None, np.float32(0)

    def add(*arguments: Any) -> jax.Array:
        nonlocal totals
        sums = compute(*arguments)
        products = sums._replace(energy=0.0)
        totals = products if totals is None else _add_into(totals, products)
        return sums.energy

    for batch, energies in stream.visit(add, *targets, held_out=held_out):
        by_row = np.atleast_1d(np.asarray(energies))
        check_finite(f"reconstruct: {title}", [batch.names[row] for row in np.flatnonzero(~np.isfinite(by_row))])
        energy += by_row.sum()
    assert totals is not None
    return totals._replace(energy=energy)


def both_sums(
    stream: LayerStream, compute: Callable[..., Sums], *targets: Sequence[Any], title: str
) -> tuple[Sums, Sums]:
    """Return `total_sums` over the fitted and over the held-out batches."""
    fit, held = (total_sums(stream, held_out, compute, *targets, title=title) for held_out in (False, True))
    return fit, held


class Solution(msgspec.Struct):
    """Result of one repair, as it is cached; the changed parameters of the layer are arrays beside it."""

    error_before: float
    """Relative error of the residual stream on held-out rows."""

    error_after: float
    ridge: float | None = None
    """Ridge penalty; None if the weight is unchanged, 0 if it is trained."""

    tokens: int = 0
    """Number of calibration tokens."""

    unknowns: int = 0
    """Number of unknowns for each output."""


def best_ridge(fit: Sums, held: Sums) -> tuple[float, float] | None:
    """Return the ridge penalty with the lowest held-out error, and the error's change; None if no penalty lowers it."""
    errors = np.asarray(gather_to_host(held_out_errors(fit, held, np.asarray(RIDGES, np.float32))), np.float64)
    best = int(np.nanargmin(np.append(errors, 0.0)))
    return None if best == len(RIDGES) else (RIDGES[best], float(errors[best]))


def solved(fit: Sums, held: Sums, ridge: float, *, refit: bool) -> np.ndarray:
    """Return the change for a ridge penalty on the host, from fitted rows, or with `refit` from all rows."""
    sums = jax.tree.map(jnp.add, fit, held) if refit else fit
    return np.array(gather_to_host(change(sums, ridge)))


@jax.jit
def change(sums: Sums, ridge: Any) -> jax.Array:
    """Return the ridge regression solution (G + ridge diag G)^-1 C, float32[in, embed]; G, C: `gram` and `cross`.

    On a mesh, every device solves all of it: its time is that of the factorisation, which they cannot share.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _solved(sums.gram, sums.cross, ridge)
    whole = PartitionSpec()
    solve = jax.shard_map(_solved, in_specs=(whole, whole, whole), out_specs=whole, check_vma=False)
    return solve(sums.gram, sums.cross, jnp.float32(ridge))


def _solved(gram: jax.Array, cross: jax.Array, ridge: Any) -> jax.Array:
    diagonal = jnp.diagonal(gram)
    diagonal = jnp.maximum(diagonal, _FLOOR * jnp.mean(diagonal))
    matrix = gram + jnp.diag(ridge * diagonal)

    def by_lapack(matrix: jax.Array, right: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), right)

    return jax.lax.platform_dependent(matrix, cross, cpu=by_lapack, default=in_blocks)


@jax.jit
def held_out_errors(fit: Sums, held: Sums, ridges: jax.Array) -> jax.Array:
    """Return the change of the held-out error for each ridge penalty, float32[ridges]; NaN if the solve fails.

    The penalties are split over the devices of a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def errors(ridges: jax.Array, fit: Sums, held: Sums) -> jax.Array:
        def error(ridge: jax.Array) -> jax.Array:
            changed = _solved(fit.gram, fit.cross, ridge)
            bent = jnp.einsum("ij,je->ie", held.gram, changed, **_PRODUCT)
            return jnp.sum(changed * (bent - 2 * held.cross))

        return jax.lax.map(error, ridges)

    if mesh.empty:
        return errors(ridges, fit, held)
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    shared = jax.shard_map(errors, in_specs=(every, whole, whole), out_specs=every, check_vma=False)
    padded = jnp.resize(ridges, -(-len(ridges) // mesh.size) * mesh.size)
    return constrain(shared(padded, fit, held)[: len(ridges)], (None,))


def in_blocks(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Solve A x = b for positive definite float32[n, n], by blocked Cholesky factorisation.

    XLA unrolls its own Cholesky for TPUs: compiling takes minutes for 2,048 rows, and never ends for the 11,008 rows of
    a 7B model. Here, loops run over blocks of one size, and all blocks except diagonal ones are matrix products.
    """
    n, width = len(matrix), right.shape[1]
    rest = -n % _BLOCK
    matrix = jnp.pad(matrix, ((0, rest), (0, rest))) + jnp.diag(jnp.arange(n + rest) >= n).astype(matrix.dtype)
    right = jnp.pad(right, ((0, rest), (0, 0)))
    rows = jnp.arange(n + rest)[:, None]
    steps = (n + rest) // _BLOCK

    lower = jnp.zeros_like(matrix)
    for first, last in itertools.pairwise(steps * part // _PARTS for part in range(_PARTS + 1)):
        # the factor's columns up to `done` are finished, and so are its rows above `top`
        top, done = first * _BLOCK, last * _BLOCK

        def factor(step: Any, lower: jax.Array, top: int = top, done: int = done) -> jax.Array:
            start = step * _BLOCK
            above = jax.lax.dynamic_slice(lower, (start, 0), (_BLOCK, done))
            column = jax.lax.dynamic_slice(matrix, (top, start), (n + rest - top, _BLOCK))
            column -= jnp.einsum("ik,jk->ij", lower[top:, :done], above, **_PRODUCT)
            corner = jnp.linalg.cholesky(jax.lax.dynamic_slice(column, (start - top, 0), (_BLOCK, _BLOCK)))
            column = jax.scipy.linalg.solve_triangular(corner, column.T, lower=True).T
            return jax.lax.dynamic_update_slice(lower, jnp.where(rows[top:] >= start, column, 0.0), (top, start))

        lower = jax.lax.fori_loop(first, last, factor, lower)

    def substitute(step: Any, solution: jax.Array, transposed: bool) -> jax.Array:
        start = step * _BLOCK
        axis = (0, start) if transposed else (start, 0)
        shape = (n + rest, _BLOCK) if transposed else (_BLOCK, n + rest)
        strip = jax.lax.dynamic_slice(lower, axis, shape)
        strip = strip.T if transposed else strip
        corner = jax.lax.dynamic_slice(strip, (0, start), (_BLOCK, _BLOCK))
        wanted = jax.lax.dynamic_slice(solution, (start, 0), (_BLOCK, width))
        # the block's own rows of `solution` still hold the right-hand side
        others = jax.lax.dynamic_update_slice(strip, jnp.zeros_like(corner), (0, start))
        wanted -= jnp.einsum("ik,ke->ie", others, solution, **_PRODUCT)
        solved = jax.scipy.linalg.solve_triangular(corner, wanted, lower=not transposed)
        return jax.lax.dynamic_update_slice(solution, solved, (start, 0))

    down = jax.lax.fori_loop(0, steps, lambda step, x: substitute(step, x, False), right)
    up = jax.lax.fori_loop(0, steps, lambda step, x: substitute(steps - 1 - step, x, True), down)
    return up[:n]


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
    return token_sums(scale, rows.weight > 0, values[reader], missing)


def repair_readers(
    layer: Layer, stream: LayerStream, targets: Targets, *, module: str, lost: bool, refit: bool
) -> tuple[Layer, Solution]:
    """Map the input of the branch that ends in `module`; return the layer, unchanged unless the held-out error falls.

    The errors with and without the map are compared after least squares for the writer. Without the map, the writer is
    repaired only if it `lost` heads or neurons. `refit`: see `repair_writer`.
    """
    reader, unpruned = READER_OF[module], targets.before if module == "o_proj" else targets.middle
    compute = functools.partial(_reader_sums, layer, module=module)
    fit, held = both_sums(stream, compute, unpruned, title=reader)
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
    sums = token_sums(scale, used, read, missing)
    return Sums(constrain(sums.gram, ("mlp", None)), constrain(sums.cross, ("mlp", None)), constrain(energy, ()))


def repair_writer(
    layer: Layer, stream: LayerStream, targets: Targets, *, module: str, refit: bool = True
) -> tuple[Layer, Solution]:
    """Correct an output projection by ridge regression; return the layer, unchanged unless the held-out error falls.

    `refit`: solve again on all rows after choosing the penalty.
    """
    target = targets.middle if module == "o_proj" else targets.after
    statistics = [arrays.get(module) for arrays in targets.statistics]
    compute, title = functools.partial(writer_sums, module=module), f"outputs of {module} in layer {layer.number}"
    fit, held = both_sums(stream, functools.partial(compute, layer), target, statistics, title=title)
    weight = layer.cfg.hidden_size * float(sum(batch.weight.sum() for batch in stream.batches if batch.held_out))
    best, before = best_ridge(fit, held), float(held.energy) / weight
    solution = Solution(before, before, None, count_tokens(stream), len(fit.gram))
    if best is None:
        return layer, solution
    ridge, difference = best
    after = before + difference / weight
    if layer.block.norm_after(module) is not None:  # the norm's statistics change with the weight: measure
        trial = functools.partial(compute, layer.changed(solved(fit, held, ridge, refit=False), module))
        after = float(total_sums(stream, True, trial, target, statistics, title=title).energy) / weight
        if after >= before:
            return layer, solution
    solution.ridge, solution.error_after = ridge, after
    return layer.changed(solved(fit, held, ridge, refit=refit), module), solution
