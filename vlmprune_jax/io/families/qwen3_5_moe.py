"""Qwen3.5 and 3.6 with experts (35B-A3B): a hybrid decoder whose layers have experts and a gated shared expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.channels import ExpertsAndShared
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.experts import expert_count, expert_sizes, expert_weights, with_channels
from vlmprune_jax.io.families.qwen3_5 import IDS, MTP, hybrid_from_hf, hybrid_to_hf, hybrid_weights
from vlmprune_jax.io.families.qwen3_vl import qwen3_vl_family
from vlmprune_jax.io.families.shapes import hybrid_problem
from vlmprune_jax.io.families.table import Decoder, JsonDict, Weight

_DECODER = "qwen3_5_moe_text"
# Defaults of the config class in transformers that differ from those of the dense models.
_TEXT: JsonDict = {
    "model_type": _DECODER,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**_TEXT, **config}
    if config.get("num_experts") is None and config.get("num_local_experts") is None:
        config["num_experts"] = 256
    text, experts = hybrid_from_hf(config, _DECODER), expert_count(config)
    part = ExpertsAndShared(
        experts,
        experts * int(config["moe_intermediate_size"]),
        int(config["num_experts_per_tok"]),
        mlp=int(config["shared_expert_intermediate_size"]),
        activation=text.channel.activation,
    )
    return with_channels(text, [part] * len(text.layers))


def _to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    config = hybrid_to_hf(text, source)
    shared = config.pop("intermediate_size")  # of a dense MLP, which no layer has
    return {**config, **expert_sizes(text), "shared_expert_intermediate_size": shared}


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    layer, key = "text/layers/{i}/mlp", prefix + "layers.{i}.mlp"
    table = [
        dataclasses.replace(
            line, path=line.path.replace("/mlp/", "/mlp/dense/"), key=line.key.replace(".mlp.", ".mlp.shared_expert.")
        )
        for line in hybrid_weights(text, prefix, head)
    ]
    layouts = ("experts expert_mlp embed", "experts embed expert_mlp")
    return [
        *table,
        Weight(f"{layer}/router/weight", f"{key}.gate.weight", "experts embed"),
        Weight(f"{layer}/dense_gate/weight", f"{key}.shared_expert_gate.weight", "unit embed"),
        *expert_weights("text/layers/{i}", f"{key}.experts.", layouts, ("gate_up_proj", "gate_up_proj", "down_proj")),
    ]


QWEN3_5_MOE = qwen3_vl_family(
    "qwen3_5_moe",
    Decoder(
        _DECODER,
        "Qwen3_5MoeForConditionalGeneration",
        _from_hf,
        _to_hf,
        _weights,
        gguf=(gguf.QWEN35MOE,),
        problem=hybrid_problem,
        reads_quantised_experts=True,
    ),
    _TEXT,
    deepstack=False,
    mtp=MTP,
    ids=IDS,
    vllm_tpu="",
    runs_in=("vllm",),
)
