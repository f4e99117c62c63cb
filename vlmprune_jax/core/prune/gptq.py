"""GPTQ (Frantar et al. 2022): quantised codes of a decoder's matrices, chosen to keep outputs on calibration tokens.

With x the input of a matrix, its error |(W - Q) x|^2 depends on the tokens through the sum G = sum_t w_t x x^T alone.
With G = R^T R, R upper triangular, columns are rounded from the last to the first, each compensating the errors of
those rounded before it: column j is rounded at w_j + sum_k>j R_jk (w_k - q_k) / R_jj. (Babai's nearest plane, which
equals GPTQ without an inverse.) Columns with the largest weight come first.

Layer by layer, the stream of the model rounded so far is on the hosts, and one layer and a batch on the devices, as in
`reconstruct`; sums, factor and codes are on the host, float64[in, in]. For matrices that write to the stream, a token's
weight is divided by mean(h^2), as there; matrices that read it read it after a norm.

The diagonals of the same sums, without these divisors, are for quantisers that weigh channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import READERS, WRITERS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.batches import row_batches
from vlmprune_jax.core.prune.calibration import calibration_batches, positive
from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.least_squares import check_finite, token_scale, token_sums
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.prune.stream import LayerStream

_DAMPING = 0.01  # added to the diagonal of G, as a share of each entry (the paper: of the mean entry)
_FLOOR = 1e-6  # smallest diagonal entry of G, as a share of the mean, for columns that are never active
_BLOCK = 128


class IntegerGrid(Protocol):
    """Integers that may stand for the weights of a matrix float32[rows, in]: code q stands for scale * (q - zero)."""

    def grid(self, values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return scales in `dtype` and zero points for a matrix, [rows, groups] each."""

    def round(self, values: np.ndarray, scale: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        """Return the nearest integer codes, int8."""


def decoder_stream(model: Model, batches: Iterable[Any], weights: TokenWeights) -> LayerStream:
    """Return the residual stream of all calibration rows at the input of the decoder's first layer."""
    grouped = row_batches(list(calibration_batches(batches, model.cfg, labels=False)), vars(weights))
    positive(len(grouped))
    return LayerStream(model, "text", grouped)


def round_matrices(
    layer: Layer, paths: Mapping[str, Sequence[tuple[str, int]]], stream: LayerStream, grid: IntegerGrid, dtype: Any
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Quantise the matrices of one layer; return {input: (codes, scales, zero points)} of all rows that read the input.

    `paths`: for each input that matrices read, the parameters (path within the layer, values of a row) in order.
    Matrices with one input share its sums: one factor, one pass over the columns.
    """
    sums, rounded = finite_sums(input_sums, layer, stream, "gptq"), {}
    for name, matrices in paths.items():
        parts = [np.asarray(gather_to_host(layer.params[path])).reshape(-1, width) for path, width in matrices]
        values = np.concatenate(parts)
        scale, zeros = grid.grid(values, dtype)
        rounded[name] = compensated(values, sums[name], grid, scale, zeros), scale, zeros
    return rounded


def compensated(
    values: np.ndarray, gram: np.ndarray, grid: IntegerGrid, scale: np.ndarray, zeros: np.ndarray
) -> np.ndarray:
    """Quantise weights float32[rows, in] to int8 codes by GPTQ, given X^T X float64[in, in] and the integer grid."""
    diagonal = np.diagonal(gram)
    diagonal = np.maximum(diagonal, max(_FLOOR * diagonal.mean(), float(np.finfo(np.float32).tiny)))
    order = np.argsort(diagonal, kind="stable")  # rounded from the last on
    damped = (gram + np.diag(diagonal - np.diagonal(gram) + _DAMPING * diagonal))[np.ix_(order, order)]
    upper = scipy.linalg.cholesky(damped, lower=False)
    upper = (upper / np.diagonal(upper)[:, None]).astype(np.float32)
    groups = order // (values.shape[1] // scale.shape[1])
    values, scale, zeros = values[:, order], scale[:, groups], zeros[:, groups]
    codes, error = np.empty(values.shape, np.int8), np.zeros(values.shape, np.float32)
    for end in range(values.shape[1], 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        aims = values[:, start:end] + error[:, end:] @ upper[start:end, end:].T
        for j in range(end - 1, start - 1, -1):
            aim = aims[:, j - start] + error[:, j + 1 : end] @ upper[j, j + 1 : end]
            codes[:, j] = grid.round(aim, scale[:, j], zeros[:, j])
            error[:, j] = values[:, j] - (codes[:, j].astype(np.float32) - zeros[:, j]) * scale[:, j]
    return codes[:, np.argsort(order)]


def finite_sums(
    sums: Callable[[Layer, Rows], dict[str, jax.Array]], layer: Layer, stream: LayerStream, title: str
) -> dict[str, np.ndarray]:
    """Sum a layer's statistics over all calibration rows in float64; errors begin with `title`.

    Raises UserError if the sums of a row are not finite.
    """
    totals: dict[str, np.ndarray] = {}
    for batch, batch_sums in stream.visit(lambda rows: sums(layer, rows)):
        for name, batch_sum in batch_sums.items():
            values = np.asarray(batch_sum, np.float64)
            rows = [] if np.isfinite(values).all() else batch.names
            check_finite(f"{title}: activations in layer {layer.number}", rows)
            totals[name] = totals.get(name, 0.0) + values
    return totals


@functools.partial(jax.jit, static_argnames="diagonal")
def input_sums(layer: Layer, rows: Rows, *, diagonal: bool = False) -> dict[str, jax.Array]:
    """Return the sums of w x x^T, float32[in, in], for each input x of a layer's matrices (`READERS`).

    `diagonal`: return the sums of x^2, float32[in], with each token's weight as it is.
    """
    outs = {} if diagonal else {name: f"{name}_out" for name in WRITERS}
    block, after, values = layer.compute(rows, (*READERS, *outs.values()))
    scales, sums = dict.fromkeys(READERS, rows.weight), dict[str, jax.Array]()
    for name, out in outs.items():
        norm, scales[name] = block.norm_after(name), token_scale(rows.weight, after.x)
        if norm is not None:
            scales[name] *= norm.statistics(values[out])[..., 1] ** 2
    for name in READERS:
        read, used = values[name].reshape(*rows.x.shape[:2], -1), rows.weight > 0
        if diagonal:
            square = jnp.where(used[..., None], read, 0.0) ** 2
            sums[name] = jnp.einsum("bsi,bs->i", square, rows.weight, precision="highest")
        else:
            sums[name] = token_sums(scales[name], used, read).gram
    return jax.tree.map(lambda total: constrain(total, ()), sums)
