"""Qwen3: Llama's blocks with a norm of every query and key head and a sliding window per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.io.families.qwen2 import DEFAULTS
from vlmprune_jax.io.families.shapes import layers_to_hf, windows_from_hf
from vlmprune_jax.io.families.table import Decoder


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**DEFAULTS, "head_dim": 128, **config}
    windows, bias = windows_from_hf(config, int(config["num_hidden_layers"])), bool(config.get("attention_bias", False))
    return llama_like(config, "qwen3", windows=windows, attention={"bias": bias, "out_bias": bias, "qk_norm": True})


QWEN3 = decoder_family(
    Decoder("qwen3", "Qwen3ForCausalLM", _from_hf, layers_to_hf, llama_like_weights, gguf=(gguf.QWEN3,), vllm_tpu="jax")
)
