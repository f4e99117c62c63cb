"""Qwen3.5 and 3.6: gated delta nets, gated attention between them, Qwen3-VL's tower without DeepStack, experts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import ExpertsAndShared
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.mixers import DeltaNet
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.experts import (
    expert_count,
    expert_names,
    with_channels,
    with_expert_count,
)
from vlmprune_jax.io.families.llama_like import defaults_of, llama_like
from vlmprune_jax.io.families.qwen3_vl import qwen3_vl_family, sectioned_rope
from vlmprune_jax.io.families.shapes import hybrid_layers, hybrid_problem, typed_layers_to_hf
from vlmprune_jax.io.families.table import LLAMA_NAMES, Decoder, JsonDict, in_layers

_DECODER, _MOE_DECODER = "qwen3_5_text", "qwen3_5_moe_text"
_DELTA = {  # default sizes of delta nets, and the longest context
    "max_position_embeddings": 32768,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_MTP_SHAPES = {
    "fc.weight": (1, 2),
    "norm.weight": (1,),
    "pre_fc_norm_embedding.weight": (1,),
    "pre_fc_norm_hidden.weight": (1,),
}
_FAMILY: JsonDict = {
    "deepstack": False,
    "mtp": ("mtp.", "mtp_num_hidden_layers", _MTP_SHAPES),
    "ids": {"image_token_id": 248056, "video_token_id": 248057},
    "vllm_tpu": "",
    "runs_in": ("vllm",),
}
_SECTIONS = (11, 11, 10)
_NAMES = LLAMA_NAMES | in_layers(
    {
        f"linear_attn/{path}": f"linear_attn.{name}"
        for path, name in {
            **{f"{name}_proj": "in_proj_qkv" for name in "qkv"},  # its rows, in order
            **{f"{name}_proj": f"in_proj_{name}" for name in "zba"},
            **{f"{name}_conv": "conv1d" for name in "qkv"},
            "decay/weight": "A_log",
            "step/weight": "dt_bias",
            "norm": "norm",
            "out_proj": "out_proj",
        }.items()
    }
)
# The MLP is the expert of all tokens.
_MOE_NAMES = {
    **{
        path.replace("/mlp/", "/mlp/dense/"): name.replace(".mlp.", ".mlp.shared_expert.")
        for path, name in _NAMES.items()
    },
    **in_layers({"mlp/router": "mlp.gate", "mlp/dense_gate": "mlp.shared_expert_gate"}),
    **expert_names(),
}


def _hybrid_from_hf(config: Mapping[str, Any], decoder: str) -> TextConfig:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act {activation!r} is not supported (delta nets: silu)")
    interval = int(config.get("full_attention_interval") or 4)
    rope = sectioned_rope(config, _SECTIONS, interleaved=True)
    attention = {"qk_norm": True, "gated": True, "rope": rope}
    text = llama_like(config, decoder, biased=True, rotary=0.25, attention=attention, block={"norm_offset": 1.0})
    delta = DeltaNet(
        int(config["linear_num_value_heads"]),
        int(config["linear_num_key_heads"]),
        key_dim=int(config["linear_key_head_dim"]),
        value_dim=int(config["linear_value_head_dim"]),
        taps=int(config["linear_conv_kernel_dim"]),
    )
    return hybrid_layers(text, delta, config, range(interval - 1, len(text.layers), interval))


QWEN3_5 = qwen3_vl_family(
    "qwen3_5",
    Decoder(
        _DECODER,
        "Qwen3_5ForConditionalGeneration",
        functools.partial(_hybrid_from_hf, decoder=_DECODER),
        typed_layers_to_hf,
        _NAMES,
        defaults=defaults_of(_DECODER, **_DELTA),
        gguf=(gguf.QWEN35,),
        problem=hybrid_problem,
    ),
    **_FAMILY,
)

# Qwen3.5 with experts -----------------------------------------------------------------------------------------------


def _moe_from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = with_expert_count(config, 256)
    text, experts = _hybrid_from_hf(config, _MOE_DECODER), expert_count(config)
    part = ExpertsAndShared(
        experts,
        experts * int(config["moe_intermediate_size"]),
        int(config["num_experts_per_tok"]),
        mlp=int(config["shared_expert_intermediate_size"]),
        activation=text.channel.activation,
    )
    return with_channels(text, [part] * len(text.layers))


def _moe_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    config = typed_layers_to_hf(text, source)
    shared = config.pop("intermediate_size")  # of a dense MLP, which no layer has
    return {**config, "shared_expert_intermediate_size": shared}


QWEN3_5_MOE = qwen3_vl_family(
    "qwen3_5_moe",
    Decoder(
        _MOE_DECODER,
        "Qwen3_5MoeForConditionalGeneration",
        _moe_from_hf,
        _moe_to_hf,
        _MOE_NAMES,
        defaults=defaults_of(
            _MOE_DECODER,
            **_DELTA,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            num_experts_per_tok=8,
        ),
        gguf=(gguf.QWEN35MOE,),
        problem=hybrid_problem,
        reads_quantised_experts=True,
    ),
    **_FAMILY,
)
