"""Phi-3 and Phi-4-mini: Llama's blocks with fused weights in files, LongRoPE and a sliding window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.llama_like import as_mistral, llama_like, llama_like_weights
from vlmprune_jax.io.families.rope import longrope_to_hf, rotary_dim
from vlmprune_jax.io.families.shapes import PER_LAYER, layers_to_hf, same_windows
from vlmprune_jax.io.families.table import Decoder, JsonDict, Weight

# Defaults of the config class in transformers.
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
    rotated = rotary_dim(config, head_dim, default=1.0)
    return llama_like(config, "phi3", windows=same_windows, attention={"rotary_dim": rotated})


def _to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return a Phi-3 config with its layer counts and widths updated; other fields are kept.

    The rope type "su" is renamed to "longrope", which both transformers 4 and 5 read. Phi3Config requires
    hidden_size // heads / 2 LongRoPE factors, whatever `head_dim` is, so a model with pruned heads does not load as
    Phi-3. It is written as Mistral: the same computation, with the fused weights split.

    Raises:
      UserError: heads were pruned and only part of each is rotated (Phi-4-mini), which no transformers class computes.
    """
    config = layers_to_hf(text, source)
    scaling = config.get("rope_scaling") or {}
    if text.rope.kind == "longrope" and "type" in scaling:
        config["rope_scaling"] = {**scaling, "type": "longrope"}
    heads = config["num_attention_heads"]
    if text.rope.kind != "longrope" or text.hidden_size // heads == text.attention.head_dim or PER_LAYER in config:
        return config
    if text.attention.rotated != text.attention.head_dim:
        raise UserError(
            f"no transformers class supports {heads} heads of {text.attention.head_dim} with hidden_size "
            f"{text.hidden_size}, LongRoPE and partial rotary embedding: keep all heads and prune layers or neurons"
        )
    config = {name: value for name, value in config.items() if name not in ("auto_map", "partial_rotary_factor")}
    return as_mistral(text, {**config, **longrope_to_hf(text.rope, source)})


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Return Phi-3's weight table: Llama's, but with fused query-key-value and gate-up tensors."""
    fused = {name: whole for whole, names in _FUSED.items() for name in names}
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
        derives_head_dim=("mlx",),
    )
)
