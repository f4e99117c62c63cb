"""The decoders of all families by `model_type`: alone, and inside vision-language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families.rope import for_both_versions
from vlmprune_jax.families.shapes import token_ids
from vlmprune_jax.families.table import FAMILIES, Decoder, Family, JsonDict, Stock, Weight


def decoder_of(model_type: str) -> Decoder:
    """The decoder of this `model_type`.

    Raises:
      UserError: no such decoder; the message lists what is known.
    """
    decoders = {f.decoder.model_type: f.decoder for f in FAMILIES.values() if f.decoder is not None}
    if model_type not in decoders:
        raise UserError(f"a {model_type!r} decoder is not supported (supported: {', '.join(decoders)})")
    return decoders[model_type]


def text_from_hf(config: Mapping[str, Any]) -> TextConfig:
    """TextConfig of a text config dictionary; absent fields take the defaults of its class in transformers."""
    return decoder_of(config.get("model_type", "llama")).from_hf(config)


def text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """`source` with every field that depends on the layers rewritten; the model type may change (see each decoder)."""
    return for_both_versions(decoder_of(text.decoder).to_hf(text, source))


def vlm_text_to_hf(text: TextConfig, config: JsonDict, source: JsonDict) -> JsonDict:
    """`config` of a vision-language model with its decoder's section, which was `source`.

    Whether embeddings are tied stands in both, since versions 4 and 5 of transformers look in one place each.
    """
    tied = {"tie_word_embeddings": text.tie_embeddings}
    return {**config, **tied, "text_config": {**text_to_hf(text, source), **tied}}


def text_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Weight lines of the decoder; `prefix` precedes `embed_tokens` and `layers`, and `head` is lm_head's key."""
    return decoder_of(text.decoder).weights(text, prefix, head)


def decoder_family(decoder: Decoder) -> Family:
    """The family of a decoder without a vision tower, in the layout of transformers."""

    def from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
        del vision
        text = dataclasses.replace(decoder.from_hf(config), head_bias=decoder.head_bias)
        return ModelConfig(family=decoder.model_type, layout="transformers", text=text, **token_ids(config))

    return Family(
        name=decoder.model_type,
        layout="transformers",
        model_types=(decoder.model_type,),
        from_hf=from_hf,
        to_hf=lambda cfg, source: for_both_versions(decoder.to_hf(cfg.text, source)),
        weights=lambda cfg: decoder.weights(cfg.text, "model.", "lm_head.weight"),
        # a tied head that was written out all the same is not read
        ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
        decoder=decoder,
        stock=Stock(decoder.stock_class, "AutoModelForCausalLM"),
    )
