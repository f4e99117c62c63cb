"""Qwen2 and Qwen2.5: Llama's blocks with query, key and value biases and a sliding window per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.io.families.shapes import layers_to_hf, windows_from_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict

# Defaults of the config class in transformers, here and for Qwen3.
DEFAULTS: JsonDict = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**DEFAULTS, **config}
    windows = windows_from_hf(config, int(config["num_hidden_layers"]))
    return llama_like(config, "qwen2", windows=windows, attention={"bias": True})


QWEN2 = decoder_family(
    Decoder(
        "qwen2",
        "Qwen2ForCausalLM",
        _from_hf,
        layers_to_hf,
        llama_like_weights,
        gguf=(gguf.QWEN2, gguf.LLAMA, gguf.DECI),
        derives_head_dim=("vllm", "mlx"),
        vllm_tpu="jax",
    )
)
