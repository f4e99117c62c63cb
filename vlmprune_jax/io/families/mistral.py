"""Mistral: Llama's blocks with a sliding window and without biases; export layout of some other decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.io.families.shapes import layers_to_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict

# Defaults of the config class in transformers.
_DEFAULTS: JsonDict = {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "sliding_window": 4096,
}
# Classes that may be exported as Mistral.
_OTHERS = (["LlamaForCausalLM"], ["Phi3ForCausalLM"])


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**_DEFAULTS, **config}
    window = config["sliding_window"]
    windows = [None if window is None else int(window)] * int(config["num_hidden_layers"])
    return llama_like(config, "mistral", windows=windows)


def as_mistral(text: TextConfig, config: JsonDict) -> JsonDict:
    """Convert a Llama-like config to a Mistral config; fields whose defaults differ become explicit."""
    defaults = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "hidden_act": text.channel.activation,
        "rms_norm_eps": text.block.norm_eps,
        "max_position_embeddings": text.max_positions,
    }
    config = {**defaults, **config, "model_type": "mistral", "sliding_window": text.layers[0].mixer.window}
    if config.get("architectures") in _OTHERS:
        config["architectures"] = [_DECODER.stock_class]
    return config


_DECODER = Decoder(
    "mistral", "MistralForCausalLM", _from_hf, layers_to_hf, llama_like_weights, gguf=(gguf.LLAMA, gguf.DECI)
)
MISTRAL = decoder_family(_DECODER)
