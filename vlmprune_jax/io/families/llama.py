"""Llama decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.io.families.mistral import as_mistral
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict

# Defaults of the config class in transformers.
DEFAULTS: JsonDict = {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return llama_like({**DEFAULTS, **config}, "llama", attention={"bias": bias, "out_bias": bias}, mlp_bias=mlp_bias)


def _to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a Llama config with its layer counts and widths updated; other fields are kept.

    If the number of heads no longer divides `hidden_size`, the model is written as Mistral: transformers 5's config
    class of Llama refuses it, Mistral's accepts an explicit `head_dim`. Computation and weight names are the same.
    """
    config = layers_to_hf(text, source)
    heads = config["num_attention_heads"]
    if text.hidden_size % heads == 0:
        return config
    biases = text.attention.bias or text.channel.bias
    if biases and PER_LAYER in config:
        return config  # no stock class loads unequal widths anyway
    if biases:
        raise UserError(
            f"{heads} attention heads do not divide hidden_size {text.hidden_size}, and Mistral, which allows this, "
            "has "
            "no biases: prune to a number of heads that divides hidden_size"
        )
    return as_mistral(text, config)


LLAMA = decoder_family(
    Decoder(
        "llama",
        "LlamaForCausalLM",
        _from_hf,
        _to_hf,
        llama_like_weights,
        heads_divide=True,
        gguf=(gguf.LLAMA, gguf.DECI),
        tried={"vllm": "", "mlx": "", "openvino": ""},
        vllm_tpu="jax",
    )
)
