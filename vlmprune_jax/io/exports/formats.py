"""Export formats by name, the choice of one by its options, and the section `export` of a config."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.checks import Registry, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import check_settings, export_setting, settings_of
from vlmprune_jax.io.exports.format import Calibration, FolderOptions, Format, GgufOptions


def _of(module: str, function: str) -> Callable[..., Any]:
    """Return a function of this package whose module, which imports jax, is first imported when it is called."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"vlmprune_jax.io.exports.{module}"), function)(*args)

    return call


def _gptq(options: FolderOptions) -> Calibration | None:
    names = ("quantize", "group_size", "symmetric", "dtype")
    settings = {name: getattr(options, name) for name in names}
    return Calibration("storage", "gptq", settings) if options.rounding == "gptq" else None


HUGGINGFACE = Format(
    FolderOptions,
    _of("folder", "folder_contents"),
    lambda model, folder, origin, options: _of("reload", "check_export")(model, folder, origin.vision_dir),
    calibration=_gptq,
)
GGUF = Format(
    GgufOptions,
    _of("gguf_file", "gguf_contents"),
    _of("gguf_file", "check_gguf"),
    _of("gguf_file", "read_on_devices"),
    library="gguf",
    calibration=lambda options: Calibration("imatrix", "imatrix", {}) if options.imatrix is True else None,
)
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
    known, homes = settings_of(chosen.options), {other: settings_of(f.options) for other, f in FORMATS.items()}
    for option, value in values.items():
        defaults = {other: settings[option].default for other, settings in homes.items() if option in settings}
        if not defaults:
            raise UserError(f"format {name!r} has no option {option!r}{suggest(option, tuple(known))}")
        if option not in known and value not in defaults.values():
            raise UserError(
                f"{option}={value!r} is an option of format {' or '.join(map(repr, defaults))}, not of {name!r}: leave "
                "it out, or choose another format"
            )
    options = chosen.options(**{option: value for option, value in values.items() if option in known})
    check_settings("export", options, elsewhere=True)
    return chosen, options


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
