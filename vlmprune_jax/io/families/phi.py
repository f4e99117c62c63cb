"""Phi (1, 1.5 and 2): parallel blocks, layer norms, biases and partial rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.stack import BlockConfig
from vlmprune_jax.io.families import gguf
from vlmprune_jax.io.families.decoders import decoder_family
from vlmprune_jax.io.families.rope import rope_from_hf, rotary_dim
from vlmprune_jax.io.families.shapes import layers_from_hf, layers_to_hf
from vlmprune_jax.io.families.table import Decoder, Weight


def _from_hf(config: Mapping[str, Any]) -> TextConfig:
    """Return the TextConfig of a Phi config dictionary; absent fields get transformers' defaults.

    The output head has no bias here; only `PhiForCausalLM` alone has one (`Decoder.head_bias`).
    """
    if config.get("qk_layernorm", False):
        raise UserError("Phi with qk_layernorm=true is not supported (no released Phi uses it)")
    hidden = int(config.get("hidden_size", 2048))
    heads = int(config.get("num_attention_heads", 32))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    widths = (heads, kv_heads, int(config.get("intermediate_size", 8192)))
    windows = [None] * int(config.get("num_hidden_layers", 24))
    rotated = rotary_dim(config, head_dim, default=0.5)
    attention = {"head_dim": head_dim, "rope": rope_from_hf(config), "rotary_dim": rotated}
    dense = {"activation": config.get("hidden_act", "gelu_new"), "gated": False, "bias": True}
    return TextConfig(
        hidden_size=hidden,
        layers=layers_from_hf(config, widths, windows, {**attention, "bias": True, "out_bias": True}, {}, dense),
        block=BlockConfig(norm_eps=float(config.get("layer_norm_eps", 1e-5)), norm="layer", parallel=True),
        vocab_size=int(config.get("vocab_size", 51200)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", 2048)),
        decoder="phi",
    )


def _weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Return Phi's weight table; keys begin with `prefix`, and `head` is the key of lm_head."""
    layer, key = "text/layers/{i}", prefix + "layers.{i}"
    table = [Weight("text/embed_tokens/weight", prefix + "embed_tokens.weight", "vocab embed")]
    lines = {
        "input_layernorm": ("embed", "embed"),
        "self_attn.q_proj": ("(q_heads head) embed", "(q_heads head)"),
        "self_attn.k_proj": ("(kv_heads head) embed", "(kv_heads head)"),
        "self_attn.v_proj": ("(kv_heads head) embed", "(kv_heads head)"),
        "self_attn.dense": ("embed (q_heads head)", "embed"),
        "mlp.fc1": ("mlp embed", "mlp"),
        "mlp.fc2": ("embed mlp", "embed"),
    }
    for name, layouts in lines.items():
        for part, layout in zip(("weight", "bias"), layouts, strict=True):
            table.append(Weight(f"{layer}/{name.replace('.', '/')}/{part}", f"{key}.{name}.{part}", layout))
    for part in ("weight", "bias"):
        table.append(Weight(f"text/final_layernorm/{part}", f"{prefix}final_layernorm.{part}", "embed"))
    if not text.tie_embeddings:
        table.append(Weight("text/lm_head/weight", head, "vocab embed"))
    if text.head_bias:
        table.append(Weight("text/lm_head/bias", head.removesuffix("weight") + "bias", "vocab"))
    return table


PHI = decoder_family(
    Decoder(
        "phi",
        "PhiForCausalLM",
        _from_hf,
        layers_to_hf,
        _weights,
        head_bias=True,
        gguf=(gguf.PHI2,),
        derives_head_dim=("vllm", "vllm_tpu", "mlx"),
    )
)
