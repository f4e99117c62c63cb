"""Options of the built-in export formats: Hugging Face folders, and GGUF files for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.budget import LAYOUTS, UNEVEN
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import export_setting, setting
from vlmprune_jax.base.weight_files import WRITTEN
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors, check_scheme
from vlmprune_jax.io.exports.format import Importance


@dataclass(frozen=True)
class FolderOptions:
    """Options of the export to a Hugging Face folder."""

    layout: str = export_setting(
        "source",
        'Tensor names and config of the export: as in the source ("source"), or in the stock class ("transformers").',
        choices=LAYOUTS,
    )
    uneven: str = export_setting(
        "per_layer",
        'Layers of unequal width: "per_layer" writes true sizes (Hugging Face folders include the PyTorch file that '
        'loads them), "pad" adds zero heads and neurons (same function, no savings), "refuse" stops with an error.',
        choices=UNEVEN,
    )
    head_dim: int = export_setting(
        0,
        "Channels per attention head of the decoder: 4 or 16 times the model's, padded with zeros (0 = the model's).",
        unit="channels",
        least=0,
    )
    dtype: str = export_setting(
        "bfloat16",
        'Data type of the exported weights; "source" keeps the source folder\'s type.',
        choices=WRITTEN,
    )
    mtp: str = export_setting(
        "drop",
        'Module that predicts several tokens at once (Qwen3.5\'s MTP): "drop" leaves it out, "cut" prunes it to the '
        "decoder's numbers of heads and neurons (those with the largest weights).",
        choices=("drop", "cut"),
    )
    quantize: str = export_setting(
        "none",
        "Bits of weights and activations of the decoder's matrices (w4a16: 4-bit weights, 16-bit activations).",
        choices=("none", *SCHEMES),
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
        choices=("nearest", "gptq"),
    )
    storage: Any = setting(
        None, "Weights that are already quantised, such as the result of `vp.gptq` (None = none).", offered=False
    )

    def __post_init__(self) -> None:
        if self.quantize != "none":
            check_scheme(self.quantize, self.group_size, self.symmetric)
        elif self.storage is None and (self.group_size, self.symmetric, self.rounding) != (None, True, None):
            raise UserError(
                f"group_size, symmetric and rounding are for integers: set quantize to {', '.join(SCHEMES)}"
            )
        if self.mtp != "drop" and (self.quantize != "none" or isinstance(self.storage, CompressedTensors)):
            raise UserError(f'mtp={self.mtp!r} is for exports without integers: use mtp="drop"')
        if self.rounding == "gptq" and (self.uneven == "pad" or self.head_dim):
            raise UserError(
                'rounding="gptq" cannot round the zeros that uneven="pad" or head_dim adds: use uneven="per_layer" (no '
                'difference if all layers are equal) and head_dim=0, or rounding="nearest"'
            )


@dataclass(frozen=True)
class GgufOptions:
    """Options of the export to GGUF files."""

    uneven: str = export_setting(
        "per_layer",
        'Layers of unequal width: "per_layer" writes their true sizes, if llama.cpp\'s architecture allows it.',
        choices=UNEVEN,
    )
    dtype: str = export_setting(
        "bfloat16",
        'Data type of the exported weights; "source" uses that of the source\'s embedding.',
        choices=WRITTEN,
    )
    quantize: str = export_setting(
        "none",
        "Quantisation type of the decoder's matrices, in blocks of 32 values along a row.",
        choices=("none", "q8_0", "q5_1", "q4_0"),
    )
    rolled_positions: bool = export_setting(
        False,
        "Write the tower's position table for llama.cpp builds that put the class token last (GGUF; "
        "ggml-org/llama.cpp#25814); wrong for all other builds.",
    )
    imatrix: bool | Importance = export_setting(
        False,
        "Also write a file for `llama-quantize --imatrix` (GGUF without quantisation), with mean squared inputs of "
        "each matrix on the calibration records of `reconstruct`. In Python, this is the result of `vp.imatrix`.",
    )

    def __post_init__(self) -> None:
        if self.imatrix and self.quantize != "none":
            raise UserError(
                'imatrix is for llama-quantize, which needs a GGUF file without quantisation: use quantize="none", '
                f"not {self.quantize!r}"
            )
