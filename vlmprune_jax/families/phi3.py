"""Phi-3 and Phi-4-mini: Llama's blocks with fused weights in files, LongRoPE and a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families import gguf
from vlmprune_jax.families.decoders import decoder_family
from vlmprune_jax.families.llama_like import llama_like, llama_like_weights
from vlmprune_jax.families.mistral import as_mistral
from vlmprune_jax.families.rope import longrope_to_hf, rotary_dim
from vlmprune_jax.families.shapes import PER_LAYER, layers_to_hf
from vlmprune_jax.families.table import Decoder, JsonDict, Weight

# What transformers' config class fills in where a config.json is silent.
_DEFAULTS: JsonDict = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
# Rows of a fused tensor, in order.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    config = {**_DEFAULTS, **config, "model_type": "phi3"}
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    window = config.get("sliding_window")
    windows = [None if window is None else int(window)] * int(config["num_hidden_layers"])
    return llama_like(config, "phi3", windows=windows, rotary_dim=rotary_dim(config, head_dim, default=1.0))


def _to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """`source` with every field that depends on the layers rewritten; unknown fields survive.

    LongRoPE under its first name "su" gets its later one, which transformers 5 wants and transformers 4 knows.
    Phi3Config wants as many LongRoPE factors as hidden_size // heads / 2, whatever `head_dim` says, so a model that
    lost heads does not load as Phi-3. It is written as Mistral: the same computation, with the fused weights split.

    Raises:
      UserError: it lost heads and rotates a part of each only (Phi-4-mini), which no class of transformers computes.
    """
    config = layers_to_hf(text, source)
    scaling = config.get("rope_scaling") or {}
    if text.rope.kind == "longrope" and "type" in scaling:
        config["rope_scaling"] = {**scaling, "type": "longrope"}
    heads = config["num_attention_heads"]
    if text.rope.kind != "longrope" or text.hidden_size // heads == text.head_dim or PER_LAYER in config:
        return config
    if text.rotary_dim != text.head_dim:
        raise UserError(
            f"no class of transformers holds {heads} heads of {text.head_dim} in hidden size {text.hidden_size} with "
            "LongRoPE and partial rotary embedding: prune layers and neurons, and keep all heads"
        )
    config = {name: value for name, value in config.items() if name not in ("auto_map", "partial_rotary_factor")}
    return as_mistral(text, {**config, **longrope_to_hf(text.rope, source)})


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Weight lines of the decoder: Llama's, several of which lie in one tensor of the files."""
    fused = {part: whole for whole, parts in _FUSED.items() for part in parts}
    table = []
    for line in llama_like_weights(text, prefix, head):
        owner = next((part for part in fused if f".{part}." in line.key), None)
        table.append(line if owner is None else dataclasses.replace(line, key=line.key.replace(owner, fused[owner])))
    return table


PHI3 = decoder_family(
    Decoder(
        "phi3",
        "Phi3ForCausalLM",
        _from_hf,
        _to_hf,
        _weights,
        heads_divide=True,
        gguf=(gguf.PHI3, gguf.LLAMA, gguf.DECI),
    )
)
