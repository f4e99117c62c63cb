"""GPTQ (Frantar et al. 2022): quantised codes of a decoder's matrices, chosen to keep outputs on calibration tokens.

With x the input of a matrix, its error |(W - Q) x|^2 depends on the tokens through the sum G = sum_t w_t x x^T alone.
With G = R^T R, R upper triangular, columns are rounded from the last to the first, each compensating the errors of
those rounded before it: column j is rounded at w_j + sum_k>j R_jk (w_k - q_k) / R_jj. (Babai's nearest plane, which
equals GPTQ without an inverse.) Columns with the largest weight come first.

Layer by layer, the stream of the model rounded so far is on the hosts, and one layer and a batch on the devices, as in
`reconstruct`; sums, factor and codes are on the host, float64[in, in]. For matrices that write to the stream, a token's
weight is divided by mean(h^2), as there; matrices that read it read it after a norm.

`imatrix` passes the layers in the same way, for the quantiser of llama.cpp: mean squares of the inputs' channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.settings import override
from vlmprune_jax.core.stack import Stack
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.data.cache import ArrayCache, recorded
from vlmprune_jax.distributed.mesh import gather_to_host, use_mesh
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.export.folder import make_storage
from vlmprune_jax.export.format import Importance
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.disk.compressed_tensors import SCHEMES, CompressedTensors
from vlmprune_jax.hf.layout import Slot, by_key, make_slots
from vlmprune_jax.models.context import READERS, WRITERS
from vlmprune_jax.models.placement import mesh_of
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.batches import CalibrationBatch, names_of_rows, row_batches
from vlmprune_jax.prune.criteria.calibration import calibration_batches, positive
from vlmprune_jax.prune.layers import Given, Layer, Rows, run_block
from vlmprune_jax.prune.reconstruct_config import TokenWeights
from vlmprune_jax.prune.walk import LayerStream, walk

_DAMPING = 0.01  # added to the diagonal of G, as a share of each entry (the paper: of the mean entry)
_FLOOR = 1e-6  # smallest diagonal entry of G, as a share of the mean, for columns that are never active
_BLOCK = 128


@dataclass(frozen=True)
class Rounded(CompressedTensors):
    """Quantised storage format whose integer codes GPTQ computed."""

    codes: Mapping[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rounding: ClassVar[str] = "by GPTQ on calibration records"

    def encode(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the quantised tensors that GPTQ computed for the weight called `name`; `values` are not used.

        Raises UserError if GPTQ's model has no weight of this name.
        """
        tensors = self.codes.get(name, {})
        if {suffix: part.shape for suffix, part in tensors.items()} != {
            suffix: shape for suffix, (_, shape) in self.tensors("F32", values.shape).items()
        }:
            raise UserError(
                f"vp.gptq rounded no weight {name} of shape {list(values.shape)}: save the model that was passed to "
                'vp.gptq, without uneven="pad"'
            )
        return tensors | {"_scale": tensors["_scale"].astype(values.dtype)}


def gptq(
    model: Model,
    batches: Iterable[Any],
    weights: TokenWeights | None = None,
    *,
    quantize: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str = "bfloat16",
    progress: Callable[[int], None] | None = None,
    cache: ArrayCache | None = None,
    **options: Any,
) -> Rounded:
    """Quantise a decoder's matrices by GPTQ; pass the result to `save(..., storage=...)`.

    Args:
      model: the model to be saved, on one device or a mesh.
      batches: calibration batches (see `score`); labels, if present, distinguish answers from prompts.
      quantize, group_size, symmetric, dtype: as in `save`.
      progress: called with the number of finished layers.
      cache: keeps the codes of finished layers, to continue after an interruption.
      weights: weights of the calibration tokens; `options` override single weights.
      options: `prompt_weight`, `image_weight`, `answer_weight`, see `TokenWeights`.

    Raises UserError for a group size that does not divide the rows, unreadable batches, or activations that are not
    finite.
    """
    one_of("quantize", quantize, tuple(SCHEMES))
    dtype = model.params["text"]["embed_tokens"]["weight"].dtype.name if dtype == "source" else dtype
    one_of("dtype", dtype, tuple(DTYPES))
    weights = override(TokenWeights() if weights is None else weights, options, "gptq")
    storage = make_storage(model.cfg, family_of(model.cfg), quantize, group_size, symmetric)
    codes: dict[str, dict[str, np.ndarray]] = {}

    def round_layer(layer: Layer, stream: LayerStream) -> Layer:
        slots = by_key(_matrices(model.cfg, layer.number)).values()
        held = [matrix for matrix in slots if storage.holds(matrix[0].name, matrix[0].hf_shape)]
        layer_codes, params = _round_layer(layer, held, stream, storage, DTYPES[dtype], cache)
        codes.update(layer_codes)
        return dataclasses.replace(layer, params=layer.params | params)

    _walk_rows(model, batches, weights, round_layer, progress)
    return Rounded(**vars(storage), codes=codes)


def imatrix(
    model: Model,
    batches: Iterable[Any],
    weights: TokenWeights | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    cache: ArrayCache | None = None,
    **options: Any,
) -> Importance:
    """Return the importance matrix (mean squared inputs) of a decoder for `save(..., format="gguf", imatrix=...)`.

    See `gptq` for arguments and errors.
    """
    weights = override(TokenWeights() if weights is None else weights, options, "imatrix")
    sums: dict[str, np.ndarray] = {}

    def add_squares(layer: Layer, stream: LayerStream) -> Layer:
        keys = {f"{layer.number}/{name}": name for name in READERS}

        def compute() -> dict[str, np.ndarray]:
            sums = finite_sums(_squares, layer, stream, "imatrix")
            return {key: sums[name] for key, name in keys.items()}

        arrays = recorded(cache, keys, compute)
        for slot in _matrices(model.cfg, layer.number):
            sums[slot.name] = arrays[f"{layer.number}/{layer.block.reader_of(inside(slot))}"]
        return layer

    calibration = _walk_rows(model, batches, weights, add_squares, progress)
    weight = sum(float(batch.weight.sum(dtype=np.float64)) for batch in calibration)
    rows = sum(int((batch.weight > 0).any(axis=1).sum()) for batch in calibration)
    tokens = sum(int((batch.weight > 0).sum()) for batch in calibration)
    return Importance({name: total / weight for name, total in sums.items()}, rows, tokens)


def _walk_rows(
    model: Model,
    batches: Iterable[Any],
    weights: TokenWeights,
    visit: Callable[[Layer, LayerStream], Layer],
    progress: Callable[[int], None] | None,
) -> list[CalibrationBatch]:
    """Call `visit` for every decoder layer with all calibration rows at its input (see `walk`); return the batches."""
    with use_mesh(mesh_of(model.params)):
        stream = decoder_stream(model, batches, weights)
        walk(stream, visit, progress)
    return list(stream.batches)


def decoder_stream(model: Model, batches: Iterable[Any], weights: TokenWeights) -> LayerStream:
    """Return the residual stream of all calibration rows at the input of the decoder's first layer."""
    batches = list(batches)
    checked = list(calibration_batches(batches, model.cfg, labels=False))
    grouped = row_batches(checked, weights.by_name, names_of_rows(batches, checked))
    positive(len(grouped))
    return LayerStream(model, "text", grouped)


def _matrices(cfg: ModelConfig, number: int) -> list[Slot]:
    """Return the checkpoint slots (see `Slot`) of the weight matrices in decoder layer `number`."""
    slots = [slot for slot in make_slots(cfg, family_of(cfg)) if slot.path.startswith("text/layers/")]
    return [slot for slot in slots if slot.layer == number and len(slot.hf_shape) == 2]


def _round_layer(
    layer: Layer,
    held: Sequence[Sequence[Slot]],
    stream: LayerStream,
    storage: CompressedTensors,
    dtype: np.dtype,
    cache: ArrayCache | None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, jax.Array]]:
    """Quantise one layer's matrices; return the quantised tensors by path, and the layer's new parameters."""
    by_input = {
        hook: [matrix for matrix in held if layer.block.reader_of(inside(matrix[0])) == hook] for hook in READERS
    }
    # matrices with one input share its sums: one factor, one pass over the columns
    slots_of = {
        hook: [slot for matrix in matrices for slot in matrix] for hook, matrices in by_input.items() if matrices
    }

    def compute() -> dict[str, np.ndarray]:
        sums, arrays = finite_sums(_sums, layer, stream, "gptq"), dict[str, np.ndarray]()
        for hook, slots in slots_of.items():
            values = np.concatenate(
                [np.asarray(gather_to_host(layer.params[inside(s)])).reshape(-1, s.hf_shape[1]) for s in slots]
            )
            scale, zeros = storage.grid(values, dtype)
            quantised = compensated(values, sums[hook], storage, scale, zeros), scale, zeros
            arrays |= dict(zip(_keys(layer, hook), quantised, strict=True))
        return arrays

    keys = [key for hook in slots_of for key in _keys(layer, hook)]
    arrays = recorded(cache, keys, compute)
    codes, params = dict[str, dict[str, np.ndarray]](), dict[str, jax.Array]()
    for hook in slots_of:
        matrices, (integers, scale, zeros) = by_input[hook], (arrays[key] for key in _keys(layer, hook))
        size = integers.shape[1] // scale.shape[1]
        values = (integers - np.repeat(zeros, size, axis=1)) * np.repeat(scale, size, axis=1)
        end = 0
        for matrix in matrices:
            start, end = end, end + matrix[0].hf_shape[0]
            codes[matrix[0].name] = storage.parts(integers[start:end], scale[start:end], zeros[start:end])
            for slot in matrix:
                old = layer.params[inside(slot)]
                new = values[start + slot.start : start + slot.stop].astype(dtype).astype(np.float32)
                params[inside(slot)] = jax.device_put(new.reshape(old.shape), old.sharding)
    return codes, params


def _keys(layer: Layer, hook: str) -> tuple[str, str, str]:
    return f"{layer.number}/{hook}/codes", f"{layer.number}/{hook}/scale", f"{layer.number}/{hook}/zeros"


def compensated(
    values: np.ndarray, gram: np.ndarray, storage: CompressedTensors, scale: np.ndarray, zeros: np.ndarray
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
            codes[:, j] = storage.round(aim, scale[:, j], zeros[:, j])
            error[:, j] = values[:, j] - (codes[:, j].astype(np.float32) - zeros[:, j]) * scale[:, j]
    return codes[:, np.argsort(order)]


def inside(slot: Slot) -> str:
    """Return a parameter's path within its layer."""
    return slot.name.split("/", 3)[3]


@functools.partial(jax.jit, static_argnames=("stack", "cfg"))
def _sums(
    params: Mapping[str, jax.Array], x: jax.Array, weight: jax.Array, given: Given, *, stack: str, cfg: Stack
) -> dict[str, jax.Array]:
    outs = {name: f"{name}_out" for name in WRITERS}
    block, after, values = run_block(stack, cfg, params, x, given, (*READERS, *outs.values()))
    counts = weight[..., None] > 0

    def scale(name: str) -> jax.Array:
        if name not in WRITERS:
            return weight
        norm, of_stream = block.norm_after(name), weight / jnp.mean(after * after, axis=-1)
        return of_stream if norm is None else of_stream * norm.statistics(values[outs[name]])[..., 1] ** 2

    def gram(name: str) -> jax.Array:
        read = jnp.where(counts, values[name].reshape(*x.shape[:2], -1), 0.0)  # padding may hold anything
        weighted = read * jnp.where(weight > 0, scale(name), 0.0)[..., None]
        return jnp.einsum("bsi,bsj->ij", weighted, read, precision="highest")

    return {name: constrain(gram(name), ()) for name in READERS}


def finite_sums(
    sums: Callable[..., dict[str, jax.Array]], layer: Layer, stream: LayerStream, what: str
) -> dict[str, np.ndarray]:
    """Sum a layer's statistics over all calibration rows in float64; errors begin with the name `what`.

    Raises UserError if the sums of a row are not finite.
    """
    totals: dict[str, np.ndarray] = {}

    def of_rows(rows: Rows) -> dict[str, jax.Array]:
        return sums(layer.params, *rows, stack=layer.stack, cfg=layer.cfg)

    for batch, batch_sums in stream.visit(of_rows, layer.number):
        for name, batch_sum in batch_sums.items():
            values = np.asarray(batch_sum, np.float64)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{what}: activations in layer {layer.number} are not finite in {', '.join(batch.names[:5])} of "
                    "the calibration batches: check these records and the weights"
                )
            totals[name] = totals.get(name, 0.0) + values
    return totals


@functools.partial(jax.jit, static_argnames=("stack", "cfg"))
def _squares(
    params: Mapping[str, jax.Array], x: jax.Array, weight: jax.Array, given: Given, *, stack: str, cfg: Stack
) -> dict[str, jax.Array]:
    _, _, values = run_block(stack, cfg, params, x, given, READERS)

    def mean_squares(name: str) -> jax.Array:
        read = values[name].reshape(*x.shape[:2], -1)
        return jnp.einsum("bsi,bs->i", jnp.where(weight[..., None] > 0, read, 0.0) ** 2, weight, precision="highest")

    return {name: constrain(mean_squares(name), ()) for name in READERS}
