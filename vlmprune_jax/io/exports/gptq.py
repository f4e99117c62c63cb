"""Integers of an export: the storage that fits a model, GPTQ, importance matrices, and rounding in training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vlmprune_jax.base.cache import ArrayCache, recorded
from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.context import READERS
from vlmprune_jax.core.models.layers import FAKE_QUANTS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.gptq import decoder_stream, finite_sums, input_sums, round_matrices
from vlmprune_jax.core.prune.layers import Layer
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
from vlmprune_jax.core.prune.stream import LayerStream
from vlmprune_jax.core.sections import FakeQuant
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import (
    GROUPS,
    SCHEMES,
    CompressedTensors,
    check_scheme,
    is_matrix,
)
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots
from vlmprune_jax.io.exports.formats import Importance
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.experts import with_separate_experts
from vlmprune_jax.io.families.limits import implementation
from vlmprune_jax.io.families.table import Family


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

    stream = decoder_stream(model, batches, weights)

    def round_layer(layer: Layer) -> Layer | None:
        slots = by_key(_matrices(model.cfg, layer.number)).values()
        held = [matrix for matrix in slots if storage.holds(matrix[0].name, matrix[0].hf_shape)]
        layer_codes, params = _round_layer(layer, held, stream, storage, DTYPES[dtype], cache)
        codes.update(layer_codes)
        return None if layer.number + 1 == stream.n_layers else layer.with_params(params, dtype=np.float32)

    stream.walk(round_layer, progress=progress)
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

    stream = decoder_stream(model, batches, weights)

    def add_squares(layer: Layer) -> Layer | None:
        keys = {f"{layer.number}/{name}": name for name in READERS}

        def compute() -> dict[str, np.ndarray]:
            sums = finite_sums(functools.partial(input_sums, diagonal=True), layer, stream, "imatrix")
            return {key: sums[name] for key, name in keys.items()}

        arrays = recorded(cache, keys, compute)
        for slot in _matrices(model.cfg, layer.number):
            sums[slot.name] = arrays[f"{layer.number}/{layer.block.reader_of(inside(slot))}"]
        return None if layer.number + 1 == stream.n_layers else layer

    stream.walk(add_squares, progress=progress)
    weight = sum(float(batch.weight.sum(dtype=np.float64)) for batch in stream.batches)
    rows = sum(int((batch.weight > 0).any(axis=1).sum()) for batch in stream.batches)
    tokens = sum(int((batch.weight > 0).sum()) for batch in stream.batches)
    return Importance({name: total / weight for name, total in sums.items()}, rows, tokens)


def _matrices(cfg: ModelConfig, number: int) -> list[Slot]:
    """Return the locations (`Slot`) in the checkpoint of the weight matrices in decoder layer `number`."""
    slots = [slot for slot in make_slots(cfg, family_of(cfg)) if slot.path.startswith("text/layers/")]
    return [slot for slot in slots if slot.layer == number and len(slot.hf_shape) == 2]


def _round_layer(
    layer: Layer,
    held: Sequence[Sequence[Slot]],
    stream: LayerStream,
    storage: CompressedTensors,
    dtype: np.dtype,
    cache: ArrayCache | None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Quantise one layer's matrices; return the quantised tensors by path, and the layer's new parameters."""
    matrices_of = dict[str, list[Sequence[Slot]]]()
    for matrix in held:
        if name := layer.block.reader_of(inside(matrix[0])):
            matrices_of.setdefault(name, []).append(matrix)
    keys = {name: [f"{layer.number}/{name}/{part}" for part in ("codes", "scale", "zeros")] for name in matrices_of}

    def compute() -> dict[str, np.ndarray]:
        slots = {name: itertools.chain(*matrices) for name, matrices in matrices_of.items()}
        paths = {name: [(inside(slot), slot.hf_shape[1]) for slot in group] for name, group in slots.items()}
        rounded = round_matrices(layer, paths, stream, storage, dtype)
        return {key: array for name in rounded for key, array in zip(keys[name], rounded[name], strict=True)}

    arrays = recorded(cache, [*itertools.chain(*keys.values())], compute)
    codes, params = dict[str, dict[str, np.ndarray]](), dict[str, np.ndarray]()
    for name, matrices in matrices_of.items():
        integers, scale, zeros = (arrays[key] for key in keys[name])
        size = integers.shape[1] // scale.shape[1]
        values = (integers - np.repeat(zeros, size, axis=1)) * np.repeat(scale, size, axis=1)
        end = 0
        for matrix in matrices:
            start, end = end, end + matrix[0].hf_shape[0]
            codes[matrix[0].name] = storage.parts(integers[start:end], scale[start:end], zeros[start:end])
            for slot in matrix:
                new = values[start + slot.start : start + slot.stop].astype(dtype).astype(np.float32)
                params[inside(slot)] = new.reshape(layer.params[inside(slot)].shape)
    return codes, params


def inside(slot: Slot) -> str:
    """Return a parameter's path within its layer."""
    return slot.name.split("/", 3)[3]


def make_storage(
    cfg: ModelConfig, family: Family, quantize: str, group_size: int | None, symmetric: bool
) -> CompressedTensors:
    """Return the integer storage format for a checkpoint with layers of these widths.

    Without `group_size`, 8-bit weights have one scale per row, and 4-bit weights have the largest group size that
    divides every row, otherwise the smallest; matrices whose rows it does not divide remain unquantised.

    Raises UserError if `group_size` does not divide every row, or no group size divides any row.
    """
    check_scheme(quantize, group_size, symmetric)
    bits, activations = SCHEMES[quantize]
    widths = {slot.name: slot.hf_shape[1] for slot in matrices(cfg, family)}
    largest = next((size for size in GROUPS if not any(width % size for width in widths.values())), None)
    if group_size is not None:
        instead = f"use {largest}" if largest else "leave it out (rows that do not divide stay plain)"
        wrong = [name for name, width in widths.items() if width % group_size]
        if wrong:
            raise UserError(
                f"group_size={group_size} does not divide the {widths[wrong[0]]} values of a row of {wrong[0]} "
                f"({len(wrong)} matrices in total): {instead}, or prune with "
                'align_to="int4"'
            )
    elif bits == 4:
        group_size = largest or GROUPS[-1]
        if all(width % group_size for width in widths.values()):
            raise UserError(
                f"w4a16: no row length of this model is a multiple of {group_size}: use w8a16, which has one scale "
                "per row"
            )
    return CompressedTensors(bits, group_size or 0, symmetric, activations)


def matrices(cfg: ModelConfig, family: Family) -> list[Slot]:
    """Return the checkpoint locations (`Slot`) of the decoder's matrices that integers may replace."""
    slots = make_slots(cfg, with_separate_experts(family))
    return [slot for slot in slots if is_matrix(slot.name, slot.hf_shape)]


def check_on_tpus(cfg: ModelConfig, storage: CompressedTensors, chips: int) -> None:
    """Raise UserError if vLLM on TPUs (tpu-inference 0.32, not run there) cannot load these integers on many chips."""
    problem = _tpu_problem(cfg, storage)
    if problem is not None:
        schemes = {name: CompressedTensors(bits, activations=rounds) for name, (bits, rounds) in SCHEMES.items()}
        loads = ", ".join(name for name, other in schemes.items() if _tpu_problem(cfg, other) is None)
        problem += f": use symmetric {loads}" if loads else ': use quantize="none"'
    elif storage.bits == 4:
        widths = [cfg.text.hidden_size]
        for layer in cfg.text.layers:
            split = (layer.mixer.q_heads * layer.mixer.head_dim, *layer.channel.neuron_counts)
            widths += [width // chips for width in split]
        whole = not any(mixer.kv_heads % chips for mixer in cfg.text.attentions)
        if not whole or any(width % (storage.group or width) for width in widths):
            problem = f"each of {chips} chips needs whole key/value heads and groups of {storage.group}"
            problem += ": use a smaller group_size or tensor_parallel"
    if problem is not None:
        raise UserError(f"loads_in='vllm_tpu': vLLM on TPUs could not load {storage.name} weights: {problem}")


def _tpu_problem(cfg: ModelConfig, storage: CompressedTensors) -> str | None:
    """Return why vLLM on TPUs loads these integers on no number of chips; None if it does."""
    text, native, packed = cfg.text, implementation(cfg) == "jax", storage.bits == 4
    problems = {
        f"w8a8 does not load in the JAX class of {cfg.family}": storage.activations and native,
        "w8a16 loads in no class": not storage.activations and not packed,
        f"w4a16 does not load in the PyTorch class of {cfg.family}": packed and not native,
        "zero points do not load": packed and not storage.symmetric,
        "w4a16 does not load with biases": packed
        and (text.attention.bias or text.attention.out_bias or text.channel.bias),
        "w4a16 does not load with padded heads": packed
        and any(mixer.head_dim != 64 and mixer.head_dim % 128 for mixer in text.attentions),
    }
    return next((problem for problem, applies in problems.items() if applies), None)


def fake_quant(cfg: ModelConfig, scheme: str) -> FakeQuant:
    """Return the rounding in training for a checkpoint with a scheme's default group size and no zero points."""
    storage = make_storage(cfg, family_of(cfg), scheme, None, True)
    return FakeQuant(storage.bits, storage.group, storage.activations)


FAKE_QUANTS.update({scheme: functools.partial(fake_quant, scheme=scheme) for scheme in SCHEMES})
