"""Decoders of all families by `model_type`, used alone and inside vision-language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.checks import check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.io.families.rope import for_both_versions
from vlmprune_jax.io.families.shapes import token_ids
from vlmprune_jax.io.families.table import FAMILIES, Decoder, Family, JsonDict, Stock, Weight, checked_table

# Keys of tensors that no forward pass uses: also a tied output head that is stored in the file anyway.
UNUSED = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")


def decoder_of(model_type: str) -> Decoder:
    """Return the decoder declaration for a config's `model_type`.

    Raises UserError if the decoder is unknown; the message lists the known ones.
    """
    decoders = {f.decoder.model_type: f.decoder for f in FAMILIES.values() if f.decoder is not None}
    if model_type not in decoders:
        raise UserError(f"decoder {model_type!r} is not supported (supported: {', '.join(decoders)})")
    return decoders[model_type]


def text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    """Return the TextConfig of a decoder's config dictionary; absent fields get transformers' defaults."""
    return _read(decoder_of(config.get("model_type", "llama")), config)


def text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a decoder's config dictionary `source` with its layer counts and widths updated from a TextConfig."""
    return for_both_versions(decoder_of(text.decoder).to_hf(text, source))


def text_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Return the decoder's weight table; its keys begin with `prefix`, and `head` is the key of lm_head."""
    decoder = decoder_of(text.decoder)
    return checked_table(decoder.weights, decoder.weights(text, prefix, head))


def _read(decoder: Decoder, config: Mapping[str, Any]) -> TextConfig:
    text = decoder.from_hf(config)
    check_returned(decoder.from_hf, text, isinstance(text, TextConfig), "a core.config.TextConfig")
    return text


def decoder_family(decoder: Decoder) -> Family:
    """Return a family for a decoder without vision tower, in the transformers layout."""

    def from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
        del vision
        text = dataclasses.replace(_read(decoder, config), head_bias=decoder.head_bias)
        return ModelConfig(family=decoder.model_type, layout="transformers", text=text, **token_ids(config))

    return Family(
        name=decoder.model_type,
        layout="transformers",
        model_types=(decoder.model_type,),
        from_hf=from_hf,
        to_hf=lambda cfg, source: for_both_versions(decoder.to_hf(cfg.text, source)),
        weights=lambda cfg: checked_table(decoder.weights, decoder.weights(cfg.text, "model.", "lm_head.weight")),
        ignored=UNUSED,
        decoder=decoder,
        stock=Stock(decoder.stock_class, "AutoModelForCausalLM"),
        vllm_tpu=decoder.vllm_tpu,
        runs_in=decoder.runs_in,
        tried=decoder.tried,
    )
