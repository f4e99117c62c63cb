"""Export formats by name, the choice of one by its options, and the section `export` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune_jax.base.checks import Registry, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import check_settings, export_setting, settings_of
from vlmprune_jax.io.exports.format import (
    Calibration,
    Comparison,
    Contents,
    FolderOptions,
    Format,
    GgufOptions,
    Importance,
    Origin,
)

if TYPE_CHECKING:
    from vlmprune_jax.core.models.vlm import Model


def _prepare_folder(model: Model, origin: Origin, options: FolderOptions) -> Contents:
    from vlmprune_jax.io.exports.folder import folder_contents  # imports jax, like all that reads a model

    if options.rounding == "gptq" and options.storage is None:
        raise UserError('rounding="gptq" needs calibration records: pass storage=vp.gptq(model, batches, quantize=...)')
    return folder_contents(model, origin, options)


def _check_folder(model: Model, folder: Path, origin: Origin, options: FolderOptions) -> Comparison:
    from vlmprune_jax.io.exports.reload import check_export

    return check_export(model, folder, vision_dir=origin.vision_dir)


def _calibration_of_folder(options: FolderOptions) -> Calibration | None:
    names = ("quantize", "group_size", "symmetric", "dtype")
    settings = {name: getattr(options, name) for name in names}
    return Calibration("storage", "gptq", settings) if options.rounding == "gptq" else None


def _prepare_gguf(model: Model, origin: Origin, options: GgufOptions) -> Contents:
    """Return the content of a GGUF export: `NAME-TYPE.gguf`, `mmproj-NAME-f16.gguf`, `imatrix-NAME.gguf_file`."""
    from vlmprune_jax.io.exports.gguf_file import (  # imports jax, like all that reads a model
        gguf_loading,
        imatrix_file,
        write_gguf,
    )
    from vlmprune_jax.io.exports.gguf_model import make_gguf

    models, imatrix = make_gguf(model, origin, options), None
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


def _check_gguf(model: Model, folder: Path, origin: Origin, options: GgufOptions) -> Comparison:
    from vlmprune_jax.io.exports.gguf_file import check_gguf

    return check_gguf(model, folder, origin.folder, options)


def _read_gguf(folder: Path, model: Model, options: GgufOptions) -> Model:
    from vlmprune_jax.io.exports.gguf_file import read_on_devices

    return read_on_devices(folder, model, options)


def _calibration_of_gguf(options: GgufOptions) -> Calibration | None:
    return Calibration("imatrix", "imatrix", {}) if options.imatrix is True else None


HUGGINGFACE = Format(FolderOptions, _prepare_folder, _check_folder, calibration=_calibration_of_folder)
GGUF = Format(GgufOptions, _prepare_gguf, _check_gguf, _read_gguf, library="gguf", calibration=_calibration_of_gguf)
# A user's file adds its own by assignment: FORMATS["mine"] = Format(...).
FORMATS = Registry("formats", Format, {"huggingface": HUGGINGFACE, "gguf": GGUF})


def quantizations() -> tuple[str, ...]:
    """Return the names of the quantisations that all export formats offer."""
    return tuple(dict.fromkeys(name for chosen in FORMATS.values() for name in chosen.quantizations))


def choose_format(name: str, values: Mapping[str, Any]) -> tuple[Format, Any]:
    """Return an export format and its options: values passed by name, otherwise defaults.

    Options of other formats are accepted if they have their default values, because configs contain the options of all
    formats.

    Raises UserError for an unknown format or option, or a value that the format does not support.
    """
    chosen = FORMATS[one_of("format", name, tuple(FORMATS))]
    quantize = one_of("quantize", values.get("quantize", "none"), quantizations())
    if quantize not in ("none", *chosen.quantizations):
        supported = ", ".join(chosen.quantizations)
        raise UserError(f"quantize {quantize!r} is not supported by format {name!r} (supported: {supported})")
    option_settings = settings_of(chosen.options)
    for option, value in values.items():
        if option not in option_settings:
            _check_foreign(option, value, name, tuple(option_settings))
    options = chosen.options(**{option: value for option, value in values.items() if option in option_settings})
    check_settings("export", options, elsewhere=True)
    return chosen, options


def _check_foreign(option: str, value: Any, name: str, option_names: tuple[str, ...]) -> None:
    """Raise UserError if an option that only other export formats have is set."""
    others = {other: settings_of(f.options) for other, f in FORMATS.items()}
    homes = {other: settings[option].default for other, settings in others.items() if option in settings}
    if not homes:
        raise UserError(f"format {name!r} has no option {option!r}{suggest(option, option_names)}")
    if value not in homes.values():
        raise UserError(
            f"{option}={value!r} is an option of format {' or '.join(map(repr, homes))}, not of {name!r}: leave it "
            "out, or choose another format"
        )


@dataclass(frozen=True)
class _FormatName:
    format: str = export_setting(
        "huggingface",
        'Format of the export: a Hugging Face folder ("huggingface"), or files for llama.cpp ("gguf").',
        choices=FORMATS,
    )


@dataclass(frozen=True)
class CardOptions:
    """Settings of the model card and of the upload to the hub, shared by all export formats."""

    evaluate: bool = export_setting(
        True,
        "Evaluate a quantised export on the evaluation sets of the run, for its model card (False: the card gives the "
        "scores before rounding).",
    )
    base_model: str | None = export_setting(
        None, "Hub id of the unpruned model, for the model card (None = `model.hf_dir` if it is a hub id)."
    )
    license: str | None = export_setting(
        None, "License identifier for the model card, as the hub spells it (None = as on the unpruned model's card)."
    )
    push_to_hub: str | None = export_setting(
        None,
        "Hub repository for uploading the checked export, as ORG/NAME; needs `hf auth login` (None = no upload).",
    )


@dataclass(frozen=True)
class ExportSpec(CardOptions, FolderOptions, GgufOptions, _FormatName):
    """Settings of the export, with the options of all built-in formats."""

    quantize: str = export_setting(
        "none",
        "Quantisation of the decoder's weight matrices: w8a16, w4a16 or w8a8 in Hugging Face folders "
        "(compressed-tensors), q8_0, q5_1 or q4_0 in GGUF.",
        choices=quantizations,
    )
    max_image_tokens: int | None = export_setting(
        None,
        "Maximum number of tokens per image, written to the export's processor files (None = `data.max_image_tokens`).",
        unit="tokens",
        least=1,
    )
    options: Mapping[str, Any] = export_setting(
        {}, "Additional options of the format, by name; needed for user-defined formats."
    )

    def __post_init__(self) -> None:
        check_settings("export", self)
