"""Qwen3-VL with experts (30B-A3B, 235B-A22B): Qwen3-VL's tower, and files whose experts are transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.experts import experts_problem, experts_to_hf, qwen_expert_weights, with_experts
from vlmprune_jax.io.families.qwen3_vl import qwen3_vl_family, text_of
from vlmprune_jax.io.families.table import Decoder, JsonDict, Weight

_DECODER = "qwen3_vl_moe_text"
# Defaults of the config class in transformers.
_TEXT: JsonDict = {
    "model_type": _DECODER,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**_TEXT, **config}
    if config.get("num_experts") is None and config.get("num_local_experts") is None:
        config["num_experts"] = 60
    # the class divides by the sum regardless of norm_topk_prob
    return with_experts(text_of(config, _DECODER), config, renormalise=True)


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    layouts = ("experts embed expert_mlp", "experts expert_mlp embed")
    return qwen_expert_weights(text, prefix, head, layouts, ("gate_up_proj", "gate_up_proj", "down_proj"))


def _problem(text: TextConfig) -> str | None:
    """Return why transformers' class does not load these layers, with advice; None if it does."""
    neurons = {layer.channel.neurons for layer in text.layers if isinstance(layer.channel, Experts)}
    if neurons & {text.hidden_size, text.hidden_size / 2}:
        return (
            "it tells transposed experts by their shape, and the neurons of an expert are the hidden size "
            f"({text.hidden_size}) or half of it: keep another number of neurons"
        )
    return experts_problem(text)


QWEN3_VL_MOE = qwen3_vl_family(
    "qwen3_vl_moe",
    Decoder(
        _DECODER,
        "Qwen3VLMoeForConditionalGeneration",
        _from_hf,
        experts_to_hf,
        _weights,
        gguf=(gguf.QWEN3VLMOE,),
        problem=_problem,
    ),
    _TEXT,
    tried={"vllm": ""},
)
