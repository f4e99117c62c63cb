"""GGUF files on the disk: writing, the importance file for llama.cpp's quantiser, and "Loading" of the card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, write_tensor
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots
from vlmprune_jax.io.exports.card import render
from vlmprune_jax.io.exports.format import Importance
from vlmprune_jax.io.exports.gguf_model import GgufFile, tiled, under_names
from vlmprune_jax.io.exports.uneven import fit
from vlmprune_jax.io.exports.weights import pad_tensor
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.gguf import UNQUANTISED

_ALIGNMENT = 32
# Importance file, as in llama.cpp of October 2026, common/imatrix-loader.cpp: `NAME.in_sum2` float32[1, in], the sum of
# squares over all tokens, and `NAME.counts` float32[1, 1], whole numbers, by which it divides.
PREFIX, SUFFIX = "imatrix-", ".gguf_file"  # not .gguf, the suffix of models


def write_gguf(content: GgufFile, folder: Path) -> None:
    """Write a GGUF file one tensor at a time."""
    with (folder / content.name).open("wb") as file:
        header = _header(content, folder)
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for tensor in content.tensors:
            write_tensor(tensor, file)
            file.write(bytes(-tensor.n_bytes % _ALIGNMENT))


def _header(content: GgufFile, folder: Path) -> bytes:
    """Return the bytes of a GGUF file before its tensor data, as the gguf library writes them."""
    from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType

    writer = GGUFWriter(None, content.architecture)
    for name, value in content.fields.items():
        if "." in name:
            (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
        else:
            getattr(writer, f"add_{name}")(RopeScalingType(value) if name == "rope_scaling_type" else value)
    for tensor in content.tensors:
        kind = GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(tensor.key, tensor.shape, np.dtype(np.float32), tensor.n_bytes, kind)
    path = folder / f"{content.name}.header"
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return read_bytes(path)
    finally:
        path.unlink(missing_ok=True)


def gguf_loading(files: Sequence[GgufFile], cfg: ModelConfig, imatrix: GgufFile | None = None) -> str:
    """Return the model card's section "Loading" for GGUF files."""
    stem, _, label = files[0].name.removesuffix(".gguf").rpartition("-")
    padded = cfg.with_layers(files[0].layers)
    if len(files) > 1:
        padded = padded.with_layers(files[1].layers, "vision")
    return render(
        "gguf",
        files=files,
        unquantised=[key for file in files for key in file.unquantised],
        before=count_params(cfg),
        after=count_params(padded),
        imatrix=imatrix,
        stem=stem,
        label=label,
        remarks=[remark for file in files for remark in file.remarks],
    )


def imatrix_file(importance: Importance, model: GgufFile, cfg: ModelConfig, uneven: str) -> GgufFile:
    """Return the importance matrix file that belongs to a GGUF file (zero-padded layers if `uneven` is "pad")."""
    architecture, wide = fit(cfg, uneven)
    family = family_of(cfg)
    here = under_names(family, "text", architecture.tensors)
    before = {slot.name: slot for slot in make_slots(cfg, here)}
    slots = [
        slot
        for slot in make_slots(wide, here)
        if slot.path.startswith("text/layers/") and len(slot.hf_shape) == 2 and not slot.key.endswith(UNQUANTISED)
    ]
    tensors = list[Tensor]()
    for key, tensor_slots in by_key(slots).items():
        after = tensor_slots[0]  # parts of a tensor have the same inputs
        mean = importance.means.get(after.name)
        if mean is None or mean.shape != (before[after.name].hf_shape[1],):
            raise UserError(
                f"{after.name}: the importance matrix belongs to another model: compute it for the model that you "
                "save (vp.imatrix)"
            )
        sums = _widened(mean, before[after.name], after, cfg, wide) * importance.tokens
        tensors.append(_tensor(f"{key}.in_sum2", sums[None]))
        tensors.append(_tensor(f"{key}.counts", np.full((1, 1), importance.tokens)))
    fields = {
        "type": "imatrix",
        "imatrix.datasets": ["calibration records"],
        "imatrix.chunk_count": importance.rows,
        "imatrix.chunk_size": -(-importance.tokens // importance.rows),
    }
    stem = model.name.removesuffix(".gguf").rpartition("-")[0]
    return GgufFile(f"{PREFIX}{stem}{SUFFIX}", "imatrix", fields, tensors, model.layers)


def _widened(mean: np.ndarray, before: Slot, after: Slot, cfg: ModelConfig, wide: ModelConfig) -> np.ndarray:
    """Return the mean squared inputs of a matrix as llama.cpp orders them, with zeros for padded channels."""
    assert before.layer is not None
    inside = len(before.shape) - 1
    while np.prod(before.shape[inside:]) < mean.size:
        inside -= 1
    axes, mean = before.axes[inside:], mean.reshape(before.shape[inside:])
    if before.shape != after.shape:
        mean = pad_tensor(mean, axes, "text", before.layer, cfg, wide)
    return (tiled(mean, axes, wide.text.layers[before.layer]) if "delta_heads" in axes else mean).reshape(-1)


def _tensor(key: str, values: np.ndarray) -> Tensor:
    data = np.ascontiguousarray(values, np.float32)
    return Tensor(key, "F32", data.shape, data.nbytes, lambda: iter([data.reshape(-1).view(np.uint8)]))
