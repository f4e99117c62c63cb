"""Llama, Mistral, Qwen2 and Qwen3 decoders: Hugging Face config and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.config import TextConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.rope import rope_from_hf
from vlmprune_jax.families.shapes import PER_LAYER, layers_from_hf, layers_to_hf, token_ids, windows_from_hf
from vlmprune_jax.families.table import JsonDict, Weight

__all__ = ["MODEL_TYPES", "PER_LAYER", "text_from_hf", "text_to_hf", "text_weights", "token_ids"]

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# What transformers' config classes fill in where a config.json is silent.
_DEFAULTS: dict[str, JsonDict] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "head_dim": 128},
}
_DEFAULTS["qwen2"]["num_key_value_heads"] = _DEFAULTS["qwen3"]["num_key_value_heads"] = 32


def text_from_hf(config: Mapping[str, Any], tie_default: bool = False) -> TextConfig:
    """TextConfig of a config dictionary of one of `MODEL_TYPES`; absent fields take transformers' defaults."""
    model_type = config.get("model_type", "llama")
    config = {**_DEFAULTS[model_type], **config}
    hidden = int(config.get("hidden_size", 4096))
    heads = int(config.get("num_attention_heads", 32))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    n_layers = int(config.get("num_hidden_layers", 32))
    head_dim = int(config.get("head_dim") or hidden // heads)
    windows: list[int | None] = [None] * n_layers
    if model_type == "mistral" and config["sliding_window"] is not None:
        windows = [int(config["sliding_window"])] * n_layers
    elif model_type in ("qwen2", "qwen3"):
        windows = windows_from_hf(config, n_layers)
    # Mistral has no biases whatever its config says, Qwen2 always has three.
    bias = bool(config.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    return TextConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        head_dim=head_dim,
        layers=layers_from_hf(config, (heads, kv_heads, int(config["intermediate_size"])), windows),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=config.get("hidden_act", "silu"),
        rope=rope_from_hf(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", tie_default)),
        max_positions=int(config["max_position_embeddings"]),
        rotary_dim=head_dim,
        qkv_bias=bias or model_type == "qwen2",
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
    )


def text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """`source` with every field that depends on the layers rewritten; unknown fields survive.

    Heads that no longer divide `hidden_size` are written as Mistral, whose config class accepts an explicit
    `head_dim` where Llama's of transformers 5 refuses it; the computation and the weight names are the same.
    """
    config = layers_to_hf(text, source)
    heads = config["num_attention_heads"]
    if config.get("model_type", "llama") != "llama" or text.hidden_size % heads == 0:
        return config
    biases = text.qkv_bias or text.mlp_bias
    if biases and PER_LAYER in config:
        return config  # no stock class loads it in any case
    if biases:
        raise UserError(
            f"{heads} attention heads do not divide hidden_size {text.hidden_size}, and this model has "
            "biases that the Mistral layout cannot hold: plan with a number of heads that divides it"
        )
    return as_mistral(text, config)


def as_mistral(text: TextConfig, config: JsonDict) -> JsonDict:
    """A Llama-like config as Mistral's: what it leaves to its own class's defaults means something else there."""
    defaults = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "hidden_act": text.activation,
        "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions,
    }
    config = {**defaults, **config, "model_type": "mistral", "sliding_window": text.layers[0].window}
    if config.get("architectures") in (["LlamaForCausalLM"], ["Phi3ForCausalLM"]):
        config["architectures"] = ["MistralForCausalLM"]
    return config


def text_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Weight lines of the decoder; `prefix` precedes `embed_tokens`, `layers`, `norm`, and `head` is lm_head's key."""
    layer, key = "text/layers/{i}", prefix + "layers.{i}"
    table = [Weight("text/embed_tokens/weight", prefix + "embed_tokens.weight", "vocab embed")]
    for name in ("input_layernorm", "post_attention_layernorm"):
        table.append(Weight(f"{layer}/{name}/weight", f"{key}.{name}.weight", "embed"))
    for name in ("q_norm", "k_norm") if text.qk_norm else ():
        table.append(Weight(f"{layer}/self_attn/{name}/weight", f"{key}.self_attn.{name}.weight", "head"))
    projections = {
        "self_attn.q_proj": ("(q_heads head) embed", "(q_heads head)", text.qkv_bias),
        "self_attn.k_proj": ("(kv_heads head) embed", "(kv_heads head)", text.qkv_bias),
        "self_attn.v_proj": ("(kv_heads head) embed", "(kv_heads head)", text.qkv_bias),
        "self_attn.o_proj": ("embed (q_heads head)", "embed", text.out_bias),
        "mlp.gate_proj": ("mlp embed", "mlp", text.mlp_bias),
        "mlp.up_proj": ("mlp embed", "mlp", text.mlp_bias),
        "mlp.down_proj": ("embed mlp", "embed", text.mlp_bias),
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
