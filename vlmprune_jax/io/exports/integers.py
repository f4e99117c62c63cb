"""The format "compressed-tensors": a Hugging Face folder whose decoder matrices are integers of 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import export_setting
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors, check_scheme
from vlmprune_jax.io.exports.format import Calibration, Contents, Format, Origin
from vlmprune_jax.io.exports.huggingface import HUGGINGFACE, FolderOptions

if TYPE_CHECKING:
    from vlmprune_jax.core.models.vlm import Model

ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class IntegerOptions(FolderOptions):
    """Options of the export to a quantised Hugging Face folder."""

    quantize: str = export_setting(
        "none",
        "Bits of weights and activations of the decoder's matrices (w4a16: 4-bit weights, 16-bit activations).",
        choices=tuple(SCHEMES),
    )
    group_size: int | None = export_setting(
        None,
        "Number of values along a row that share a scale, 128, 64 or 32, for w8a16 and w4a16 (None = the whole row "
        "with 8 bits; with 4 bits the largest that divides every row).",
        unit="values",
        least=1,
    )
    symmetric: bool = export_setting(True, "Quantise without zero points (False adds zero points to w8a16 and w4a16).")
    rounding: str | None = export_setting(
        None,
        'Rounding of weights to integers: to the nearest ("nearest"), or by GPTQ, which minimises the error on the '
        'calibration records of `reconstruct` ("gptq"). None = "gptq" for w4a16 if `data.train` is set and GPTQ '
        'supports the model, otherwise "nearest".',
        choices=ROUNDINGS,
    )

    def __post_init__(self) -> None:
        if self.quantize == "none" and self.storage is None:
            raise UserError(f"format 'compressed-tensors' needs quantize: choose {', '.join(SCHEMES)}")
        if self.quantize != "none":
            check_scheme(self.quantize, self.group_size, self.symmetric)
        if self.mtp != "drop":
            raise UserError(f'mtp={self.mtp!r} is for exports without integers: use mtp="drop"')
        if self.rounding == "gptq" and (self.uneven == "pad" or self.head_dim):
            raise UserError(
                'rounding="gptq" cannot round the zeros that uneven="pad" or head_dim adds: use uneven="per_layer" (no '
                'difference if all layers are equal) and head_dim=0, or rounding="nearest"'
            )


def prepare(model: Model, origin: Origin, options: IntegerOptions) -> Contents:
    """Return the content of a quantised export; weights are quantised by GPTQ (`storage`) or by rounding to nearest."""
    from vlmprune_jax.io.checkpoints.integers import make_storage
    from vlmprune_jax.io.exports.folder import folder_contents, quantized_loading
    from vlmprune_jax.io.exports.target import make_target
    from vlmprune_jax.io.families.experts import with_separate_experts

    if options.rounding == "gptq" and options.storage is None:
        raise UserError('rounding="gptq" needs calibration records: pass storage=vp.gptq(model, batches, quantize=...)')
    target = make_target(model.cfg, origin.folder, options.layout, options.uneven, options.dtype, options.head_dim)
    storage = options.storage or make_storage(
        target.cfg, target.family, options.quantize, options.group_size, options.symmetric
    )
    target = replace(target, family=with_separate_experts(target.family))
    contents = folder_contents(model, origin, target, options.dtype, storage)
    integers = quantized_loading(storage, target.cfg, target.family, options.dtype)
    return replace(contents, card=lambda folder: f"{contents.card(folder)}\n\n{integers}")


def calibration(options: IntegerOptions) -> Calibration | None:
    """Return the calibration statistic that `rounding="gptq"` needs; None without it."""
    names = ("quantize", "group_size", "symmetric", "dtype")
    settings = {name: getattr(options, name) for name in names}
    return Calibration("storage", "gptq", settings) if options.rounding == "gptq" else None


COMPRESSED_TENSORS = Format(
    IntegerOptions,
    prepare,
    HUGGINGFACE.check,
    calibration=calibration,
    extends="huggingface",
    storage=CompressedTensors,
)
