"""The format "gguf": the files that llama.cpp loads, one of the decoder and one of tower and projector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmprune_jax.base.budget import UNEVEN
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import export_setting, settings_of
from vlmprune_jax.base.weight_files import WRITTEN
from vlmprune_jax.io.exports.format import Calibration, Comparison, Contents, Format, Importance, Origin

if TYPE_CHECKING:
    from vlmprune_jax.core.models.vlm import Model


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


def prepare(model: Model, origin: Origin, options: GgufOptions) -> Contents:
    """Return the content of a GGUF export: `NAME-TYPE.gguf`, `mmproj-NAME-f16.gguf`, `imatrix-NAME.gguf_file`."""
    from vlmprune_jax.io.exports.gguf_file import (  # imports jax, like all that reads a model
        gguf_loading,
        imatrix_file,
        write_gguf,
    )
    from vlmprune_jax.io.exports.gguf_model import make_gguf

    settings = {name: getattr(options, name) for name in settings_of(options) if name != "imatrix"}
    models = make_gguf(model, origin.folder, name=origin.name, pruned=origin.pruned, **settings)
    imatrix = None
    if isinstance(options.imatrix, Importance):
        imatrix = imatrix_file(options.imatrix, models[0], model.cfg, options.uneven)
    elif options.imatrix:
        raise UserError("imatrix=True needs calibration records: pass imatrix=vp.imatrix(model, batches)")
    files = models if imatrix is None else [*models, imatrix]

    def write(folder: Path) -> None:
        for file in files:
            write_gguf(file, folder)

    tensors = [tensor for file in files for tensor in file.tensors]
    return Contents(tensors, write, lambda folder: gguf_loading(models, model.cfg, imatrix))


def check(model: Model, folder: Path, origin: Origin, options: GgufOptions) -> Comparison:
    """Reload the written GGUF files, also in llama.cpp if installed, and compare logits with the model's."""
    from vlmprune_jax.io.exports.gguf_check import check_gguf

    return check_gguf(
        model, folder, source_dir=origin.folder, uneven=options.uneven, rolled_positions=options.rolled_positions
    )


def read(folder: Path, model: Model, options: GgufOptions) -> Model:
    """Read written GGUF files as a float32 model, on the devices of the exported model."""
    from vlmprune_jax.core.models.placement import mesh_of
    from vlmprune_jax.io.exports.gguf_check import on_devices, read_gguf

    written, _ = read_gguf(folder, model.cfg, options.uneven, options.rolled_positions)
    return on_devices(written, mesh_of(model.params))


def calibration(options: GgufOptions) -> Calibration | None:
    """Return the calibration statistic that `imatrix=True` needs; None without it."""
    return Calibration("imatrix", "imatrix", {}) if options.imatrix is True else None


GGUF = Format(GgufOptions, prepare, check, read, library="gguf", calibration=calibration)
