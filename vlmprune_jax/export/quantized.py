"""Integer storage (compressed-tensors) for a model: group sizes that fit it, and its text on the model card."""

from __future__ import annotations

from collections.abc import Mapping

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families import Family
from vlmprune_jax.hf.disk.compressed_tensors import GROUPS, SCHEMES, CompressedTensors, check_scheme
from vlmprune_jax.hf.layout import Slot, make_slots


def make_storage(
    cfg: ModelConfig, family: Family, quantize: str, group_size: int | None, symmetric: bool
) -> CompressedTensors:
    """Return the storage format for a folder with the widths of `cfg`.

    Without `group_size`, 8 bits have one scale per row, and 4 bits the largest size that divides every row. If no size
    does, 4 bits use the smallest one, and rows that it does not divide stay plain.

    Raises:
      UserError: `group_size` does not divide every row, or no size divides any row.
    """
    check_scheme(quantize, group_size, symmetric)
    bits, activations = SCHEMES[quantize]
    widths = {slot.name: slot.hf_shape[1] for slot in _matrices(cfg, family)}
    if group_size is not None:
        wrong = [name for name, width in widths.items() if width % group_size]
        if wrong:
            raise UserError(
                f"group_size={group_size} does not divide the {widths[wrong[0]]} values of a row of {wrong[0]} "
                f"({len(wrong)} matrices in total): {_advice(widths)}"
            )
    elif bits == 4:
        group_size = _largest(widths) or GROUPS[-1]
        if all(width % group_size for width in widths.values()):
            raise UserError(
                f"w4a16: no row of this model divides by {group_size}: use w8a16, which has one scale per row"
            )
    return CompressedTensors(bits, group_size or 0, symmetric, activations)


def _largest(widths: Mapping[str, int]) -> int | None:
    return next((size for size in GROUPS if not any(width % size for width in widths.values())), None)


def _advice(widths: Mapping[str, int]) -> str:
    largest = _largest(widths)
    instead = f"use {largest}" if largest else "leave it out (rows that do not divide stay plain)"
    return f'{instead}, or prune with snap_for="int4"'


def quantized_loading(storage: CompressedTensors, cfg: ModelConfig, family: Family, dtype: str) -> str:
    """Return the text on integers for a folder's card; `cfg` and `family` are those of the folder."""
    plain = ["embeddings", "head", "norms", *(["tower and projector"] if cfg.vision is not None else [])]
    parts = [
        f"The matrices of the decoder's layers are {storage.name}; {', '.join(plain)} are {dtype}. Transformers needs "
        "`pip install compressed-tensors`. On a CPU it decodes the weights on loading, so the model is smaller on disk "
        "but not in memory. The keys follow the documentation of vLLM (not tested there)."
    ]
    left = [slot.key for slot in _matrices(cfg, family) if not storage.holds(slot.name, slot.hf_shape)]
    if left:
        names = ", ".join(f"`{key}`" for key in dict.fromkeys(left))
        parts.append(f"Also in {dtype}, because groups of {storage.group} do not divide their rows: {names}.")
    if not storage.symmetric:
        parts.append(
            "In transformers, zero points need `quantization_config=CompressedTensorsConfig(dequantize=True)`: "
            "compressed-tensors 0.20 does not support packed zero points otherwise."
        )
    if storage.activations:
        parts.append("The engine rounds the inputs of these matrices to 8 bits, per token.")
    return " ".join(parts)


def _matrices(cfg: ModelConfig, family: Family) -> list[Slot]:
    """Return the slots of the matrices in the decoder's layers."""
    slots = make_slots(cfg, family)
    return [slot for slot in slots if slot.path.startswith("text/layers/") and len(slot.hf_shape) == 2]
