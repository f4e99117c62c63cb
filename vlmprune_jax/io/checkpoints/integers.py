"""Integer storage that fits a model: group sizes, matrices, and rounding in training as in the checkpoint."""

from __future__ import annotations

import functools

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.fake_quant import FAKE_QUANTS
from vlmprune_jax.core.sections import FakeQuant
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import (
    GROUPS,
    SCHEMES,
    CompressedTensors,
    check_scheme,
    is_matrix,
)
from vlmprune_jax.io.checkpoints.layout import Slot, make_slots
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.experts import with_separate_experts
from vlmprune_jax.io.families.table import Family


def make_storage(
    cfg: ModelConfig, family: Family, quantize: str, group_size: int | None, symmetric: bool
) -> CompressedTensors:
    """Return the integer storage format for a checkpoint with layers of these widths.

    Without `group_size`, 8-bit weights have one scale per row, and 4-bit weights have the largest group size that
    divides every row. If no group size does, the smallest is used, and matrices whose rows it does not divide remain
    unquantised.

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


def fake_quant(cfg: ModelConfig, scheme: str) -> FakeQuant:
    """Return the rounding in training for a checkpoint with a scheme's default group size and no zero points."""
    storage = make_storage(cfg, family_of(cfg), scheme, None, True)
    return FakeQuant(storage.bits, storage.group, storage.activations)


FAKE_QUANTS.update({scheme: functools.partial(fake_quant, scheme=scheme) for scheme in SCHEMES})
