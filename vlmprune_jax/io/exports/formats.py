"""Export formats: the options, files, check and model-card section of each; the choice of one; the section `export`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from vlmprune_jax.base.budget import LAYOUTS, UNEVEN
from vlmprune_jax.base.checks import Registry, file_of_users, one_of, suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Finite
from vlmprune_jax.base.settings import check_settings, export_setting, setting, settings_of
from vlmprune_jax.base.weight_files import WRITTEN
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import SCHEMES, CompressedTensors, check_scheme

if TYPE_CHECKING:
    import numpy as np

    from vlmprune_jax.core.models.vlm import Model
    from vlmprune_jax.io.checkpoints.disk.tensors import Tensor


@dataclass(frozen=True)
class Origin:
    """Origin of an exported model: folders of its configs, tokenizer, weights and vision tower, and its name.

    Attributes:
      folder: folder of the model's configs and tokenizer.
      name: the name for the export.
      vision_dir: folder of a separate vision tower.
      weights: folder of the model's tensors, if it differs from `folder` (when the vocabulary is trimmed).
      tpu_chips: tensor-parallel size if the plan was made for vLLM on TPUs (`loads_in`), else 0.
      pruned: True if the model was pruned.
    """

    folder: Path
    name: str
    vision_dir: Path | None = None
    weights: Path | None = None
    tpu_chips: int = 0
    pruned: bool = False


@dataclass(frozen=True)
class Contents:
    """Content of an export that is ready to be written: tensors, write function and model card section.

    Attributes:
      tensors: all tensors, in the order in which `write` fetches them. Their bytes must fit on the disk. Processes that
        share the weights fetch each tensor at the same time as the process that writes.
      write: writes all files of the format into an empty folder.
      card: section "Loading" of the model card, given the folder with all files.
    """

    tensors: Sequence[Tensor]
    write: Callable[[Path], None]
    card: Callable[[Path], str]


class Comparison(TypedDict):
    """Result of comparing the logits of a written model with those of the model in memory.

    `moved_by_rounding`: largest logit difference between the model with rounded weights, with which a quantised export
    is compared, and the model in memory.
    """

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite
    moved_by_rounding: NotRequired[Finite]


@dataclass(frozen=True)
class Importance:
    """Mean squared inputs, float64[in], of every matrix in the decoder's layers, by parameter name.

    `rows` and `tokens` are the numbers of calibration records and tokens.
    """

    means: Mapping[str, np.ndarray]
    rows: int
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Statistic that an export format needs from calibration records, computed before it writes.

    Attributes:
      option: the option that receives the statistic.
      function: name of the function that computes the statistic, such as "gptq".
      settings: arguments of the function, besides the model and the batches.
    """

    option: str
    function: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """Export format; `vp.formats["mine"] = vp.Format(...)` registers a user's format.

    Attributes:
      options: frozen dataclass of `core.settings.setting` fields: keywords of `save`, and settings `export.NAME` of a
        config (in `export.options` if `export` has no such name). The choices of `quantize` are the quantisations.
      prepare: (model, origin, options) -> `Contents`; raises UserError for a model that the format cannot hold.
      check: (model, folder, origin, options) -> `Comparison` of written folder and model; raises UserError if they
      differ.
      read: (folder, exported model, options) -> model with the weights of a quantised export, to evaluate it; None if
        `load` reads the folder.
      library: `library_name` of the model card.
      calibration: options -> the `Calibration` that these options need, or None.
    """

    options: type
    prepare: Callable[[Model, Origin, Any], Contents]
    check: Callable[[Model, Path, Origin, Any], Comparison]
    read: Callable[[Path, Model, Any], Model] | None = None
    library: str = "transformers"
    calibration: Callable[[Any], Calibration | None] = lambda options: None

    @property
    def quantizations(self) -> tuple[str, ...]:
        """Allowed values of the format's option `quantize`."""
        declared = settings_of(self.options).get("quantize")
        return ("none",) if declared is None else declared.names()

    @property
    def file(self) -> Path | None:
        """Source file of a user's export format; None for a built-in format."""
        return file_of_users(self.prepare)


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
    mtp_dir: Any = setting(
        None,
        'Folder with the unpruned module for mtp="cut" (None = `source_dir`; pruned folders have none).',
        offered=False,
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
