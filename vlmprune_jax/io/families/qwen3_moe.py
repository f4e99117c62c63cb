"""Qwen3 with experts (30B-A3B, 235B-A22B), alone and as InternVL3.5's decoder; files have a tensor per expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.experts import experts_problem, experts_to_hf, qwen_expert_weights, with_experts
from vlmprune_jax.io.families.llama_like import llama_like
from vlmprune_jax.io.families.shapes import windows_from_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict, Weight

# Defaults of the config class in transformers.
_DEFAULTS: JsonDict = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**_DEFAULTS, **config}
    if config.get("num_experts") is None and config.get("num_local_experts") is None:
        config["num_experts"] = 128
    windows, bias = windows_from_hf(config, int(config["num_hidden_layers"])), bool(config.get("attention_bias", False))
    attention = {"bias": bias, "out_bias": bias, "qk_norm": True}
    text = llama_like(config, "qwen3_moe", windows=windows, attention=attention)
    return with_experts(text, config, renormalise=bool(config.get("norm_topk_prob", False)))


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    keys = ("{experts}.gate_proj.weight", "{experts}.up_proj.weight", "{experts}.down_proj.weight")
    return qwen_expert_weights(text, prefix, head, ("expert_mlp embed", "embed expert_mlp"), keys)


QWEN3_MOE = decoder_family(
    Decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _from_hf,
        experts_to_hf,
        _weights,
        gguf=(gguf.QWEN3MOE,),
        runs_in=("vllm", "mlx"),
        vllm_tpu="jax",
        problem=experts_problem,
        reads_quantised_experts=True,
    )
)
