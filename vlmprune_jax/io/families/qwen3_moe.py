"""Qwen3 with experts (30B-A3B, 235B-A22B), alone, as InternVL3.5's decoder, and with Qwen3-VL's tower."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.experts import (
    expert_layouts,
    expert_names,
    experts_problem,
    experts_to_hf,
    with_expert_count,
    with_experts,
)
from vlmprune_jax.io.families.llama_like import LLAMA_NAMES, llama_like, llama_like_weights
from vlmprune_jax.io.families.qwen3_vl import qwen3_vl_family, text_of
from vlmprune_jax.io.families.shapes import windows_from_hf
from vlmprune_jax.io.families.table import Decoder, JsonDict, in_layers

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
_NAMES = LLAMA_NAMES | in_layers({"mlp/router": "mlp.gate"})


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = with_expert_count({**_DEFAULTS, **config}, 128)
    text = llama_like(config, "qwen3_moe", windows=windows_from_hf, biased=True, attention={"qk_norm": True})
    return with_experts(text, config, renormalise=bool(config.get("norm_topk_prob", False)))


QWEN3_MOE = decoder_family(
    Decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _from_hf,
        experts_to_hf,
        functools.partial(
            llama_like_weights,
            names=_NAMES | expert_names(separate=True),
            layouts=expert_layouts(separate=True),
        ),
        gguf=(gguf.QWEN3MOE,),
        runs_in=("vllm", "mlx"),
        vllm_tpu="jax",
        problem=experts_problem,
        reads_quantised_experts=True,
    )
)

# Qwen3-VL with experts ------------------------------------------------------------------------------------------------

_VL_DECODER = "qwen3_vl_moe_text"
# Defaults of the config class in transformers.
_VL_TEXT: JsonDict = {
    "model_type": _VL_DECODER,
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


def _vl_from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = with_expert_count({**_VL_TEXT, **config}, 60)
    # the class divides by the sum regardless of norm_topk_prob
    return with_experts(text_of(config, _VL_DECODER, {}), config, renormalise=True)


def _vl_problem(text: TextConfig) -> str | None:
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
        _VL_DECODER,
        "Qwen3VLMoeForConditionalGeneration",
        _vl_from_hf,
        experts_to_hf,
        functools.partial(llama_like_weights, names=_NAMES | expert_names(), layouts=expert_layouts()),
        gguf=(gguf.QWEN3VLMOE,),
        problem=_vl_problem,
    ),
    _VL_TEXT,
)
