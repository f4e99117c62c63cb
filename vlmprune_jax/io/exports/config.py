"""The section `export`: the format of the exported model, and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.settings import check_settings, export_setting
from vlmprune_jax.io.exports.formats import FORMATS, quantizations
from vlmprune_jax.io.exports.gguf import GgufOptions
from vlmprune_jax.io.exports.huggingface import FolderOptions


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
