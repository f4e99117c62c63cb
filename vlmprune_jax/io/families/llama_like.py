"""Config fields and weight names shared by Llama, Mistral, Qwen2, Qwen3 and similar decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.stack import BlockConfig
from vlmprune_jax.io.families.rope import rope_from_hf
from vlmprune_jax.io.families.shapes import layers_from_hf
from vlmprune_jax.io.families.table import Weight


def llama_like(
    config: Mapping[str, Any],
    decoder: str,
    *,
    windows: Sequence[int | None] = (),
    attention: Mapping[str, Any] | None = None,
    local: Mapping[str, Any] | None = None,
    mlp_bias: bool = False,
    block: Mapping[str, Any] | None = None,
    **traits: Any,
) -> TextConfig:
    """Return the TextConfig of a decoder whose config dictionary has Llama's fields.

    `vocab_size`, `intermediate_size` and `max_position_embeddings` are required; other absent fields take LlamaConfig's
    defaults. `windows` has the sliding window of each layer (empty: full attention). `attention`, `block` and `traits`
    are fields of Attention, BlockConfig and TextConfig; `local` overrides those of attention with a window. By default
    the decoder has no biases and no norm of queries and keys.
    """
    hidden = int(config.get("hidden_size", 4096))
    heads = int(config.get("num_attention_heads", 32))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    widths = (heads, kv_heads, int(config["intermediate_size"]))
    dense = {"activation": config.get("hidden_act", "silu"), "bias": mlp_bias}
    windows = windows or [None] * int(config.get("num_hidden_layers", 32))
    attention = {"head_dim": head_dim, "rope": rope_from_hf(config), **(attention or {})}
    return TextConfig(
        hidden_size=hidden,
        layers=layers_from_hf(config, widths, windows, attention, local or {}, dense),
        block=BlockConfig(norm_eps=float(config.get("rms_norm_eps", 1e-6)), **(block or {})),
        vocab_size=int(config["vocab_size"]),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config["max_position_embeddings"]),
        decoder=decoder,
        **traits,
    )


def llama_like_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Return the weight table of a Llama-like decoder; keys begin with `prefix`, and `head` is the key of lm_head."""
    layer, key = "text/layers/{i}", prefix + "layers.{i}"
    mlp_bias = isinstance(text.channel, Dense) and text.channel.bias
    table = [Weight("text/embed_tokens/weight", prefix + "embed_tokens.weight", "vocab embed")]
    for name in ("input_layernorm", "post_attention_layernorm"):
        table.append(Weight(f"{layer}/{name}/weight", f"{key}.{name}.weight", "embed"))
    for name in ("q_norm", "k_norm") if text.attention.qk_norm else ():
        table.append(Weight(f"{layer}/self_attn/{name}/weight", f"{key}.self_attn.{name}.weight", "head"))
    projections = {
        "self_attn.q_proj": ("(q_heads head) embed", "(q_heads head)", text.attention.bias),
        "self_attn.k_proj": ("(kv_heads head) embed", "(kv_heads head)", text.attention.bias),
        "self_attn.v_proj": ("(kv_heads head) embed", "(kv_heads head)", text.attention.bias),
        "self_attn.o_proj": ("embed (q_heads head)", "embed", text.attention.out_bias),
        "mlp.gate_proj": ("mlp embed", "mlp", mlp_bias),
        "mlp.up_proj": ("mlp embed", "mlp", mlp_bias),
        "mlp.down_proj": ("embed mlp", "embed", mlp_bias),
    }
    for name, (weight, bias, has_bias) in projections.items():
        path = f"{layer}/{name.replace('.', '/')}"
        table.append(Weight(f"{path}/weight", f"{key}.{name}.weight", weight))
        if has_bias:
            table.append(Weight(f"{path}/bias", f"{key}.{name}.bias", bias))
    table.append(Weight("text/norm/weight", prefix + "norm.weight", "embed"))
    if not text.tie_embeddings:
        table.append(Weight("text/lm_head/weight", head, "vocab embed"))
    return table
