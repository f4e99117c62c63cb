"""Llama and Mistral decoders: Hugging Face config and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmprune_jax.config import LayerShape, ModelConfig, RopeConfig, TextConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.table import Family, JsonDict, Weight

TEXT_MODEL_TYPES = ("llama", "mistral")
# The field in which a folder with unequal layers records each layer's true widths.
PER_LAYER = "per_layer_shapes"


def rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    """RoPE of a text config: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4)."""
    nested = config.get("rope_parameters") or {}
    scaling = nested or config.get("rope_scaling") or {}
    theta = float(nested.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UserError(f"config.json: rope type {kind!r} is not supported (supported: default, linear, llama3, yarn)")
    if kind == "default":
        return RopeConfig(theta=theta, kind=kind)
    if kind == "yarn":
        unsupported = [name for name in ("mscale", "mscale_all_dim", "truncate") if scaling.get(name)]
        if unsupported:
            raise UserError(f"config.json: yarn rope with {', '.join(unsupported)} is not supported")
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
    factor = float(scaling["factor"])
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=int(original),
        low_freq_factor=float(scaling.get("low_freq_factor", 0.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 0.0)),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=float(scaling.get("attention_factor") or (_yarn_scale(factor) if kind == "yarn" else 1.0)),
    )


def _yarn_scale(factor: float) -> float:
    """Attention temperature of YaRN (Peng et al. 2023, eq. 22), the default when the config names none."""
    import math

    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def text_from_hf(config: Mapping[str, Any], tie_default: bool = False) -> TextConfig:
    """TextConfig of a Llama or Mistral config dictionary; absent fields take transformers' defaults."""
    model_type = config.get("model_type", "llama")
    hidden = int(config.get("hidden_size", 4096))
    heads = int(config.get("num_attention_heads", 32))
    kv_default = heads if model_type == "llama" else 8
    kv_heads = int(config.get("num_key_value_heads") or kv_default)
    mlp = int(config.get("intermediate_size", 11008 if model_type == "llama" else 14336))
    n_layers = int(config.get("num_hidden_layers", 32))
    window = config.get("sliding_window", 4096) if model_type == "mistral" else None
    if PER_LAYER in config:
        layers = tuple(LayerShape(*widths) for widths in config[PER_LAYER])
    else:
        layers = (LayerShape(heads, kv_heads, mlp),) * n_layers
    if len(layers) != n_layers:
        raise UserError(f"config.json: num_hidden_layers is {n_layers} but {PER_LAYER} lists {len(layers)} layers")
    return TextConfig(
        vocab_size=int(config.get("vocab_size", 32000)),
        hidden_size=hidden,
        head_dim=int(config.get("head_dim") or hidden // heads),
        layers=layers,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=config.get("hidden_act", "silu"),
        rope=rope_from_hf(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", tie_default)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=None if window is None else int(window),
        max_positions=int(config.get("max_position_embeddings", 2048)),
    )


def text_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """`source` with every field that depends on the layers rewritten; unknown fields survive.

    Heads that no longer divide `hidden_size` are written as Mistral, whose config class accepts an explicit
    `head_dim` where Llama's of transformers 5 refuses it; the computation and the weight names are the same.
    """
    config = dict(source)
    widest = LayerShape(
        max(s.q_heads for s in text.layers), max(s.kv_heads for s in text.layers), max(s.mlp for s in text.layers)
    )
    config.update(
        num_hidden_layers=len(text.layers),
        num_attention_heads=widest.q_heads,
        num_key_value_heads=widest.kv_heads,
        intermediate_size=widest.mlp,
        head_dim=text.head_dim,
    )
    config.pop(PER_LAYER, None)
    if len(set(text.layers)) > 1:
        config[PER_LAYER] = [[s.q_heads, s.kv_heads, s.mlp] for s in text.layers]
    if text.hidden_size % widest.q_heads and config.get("model_type", "llama") == "llama":
        biases = text.attention_bias or text.mlp_bias
        if biases and PER_LAYER in config:
            return config  # no stock class loads it in any case
        if biases:
            raise UserError(
                f"{widest.q_heads} attention heads do not divide hidden_size {text.hidden_size}, and this model has "
                "biases that the Mistral layout cannot hold: plan with a number of heads that divides it"
            )
        # What the config leaves to LlamaConfig's defaults means something else to MistralConfig.
        defaults = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "hidden_act": text.activation,
            "rms_norm_eps": text.norm_eps,
            "max_position_embeddings": text.max_positions,
        }
        config = {**defaults, **config, "model_type": "mistral", "sliding_window": None}
        if config.get("architectures") == ["LlamaForCausalLM"]:
            config["architectures"] = ["MistralForCausalLM"]
    return config


def text_weights(text: TextConfig, prefix: str, head: str) -> list[Weight]:
    """Weight lines of the decoder; `prefix` precedes `embed_tokens`, `layers`, `norm`, and `head` is lm_head's key."""
    layer, key = "text/layers/{i}", prefix + "layers.{i}"
    table = [Weight("text/embed_tokens/weight", prefix + "embed_tokens.weight", "vocab embed")]
    for name in ("input_layernorm", "post_attention_layernorm"):
        table.append(Weight(f"{layer}/{name}/weight", f"{key}.{name}.weight", "embed"))
    projections = {
        "self_attn.q_proj": ("(q_heads head) embed", "(q_heads head)", text.attention_bias),
        "self_attn.k_proj": ("(kv_heads head) embed", "(kv_heads head)", text.attention_bias),
        "self_attn.v_proj": ("(kv_heads head) embed", "(kv_heads head)", text.attention_bias),
        "self_attn.o_proj": ("embed (q_heads head)", "embed", text.attention_bias),
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


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos/eos/pad ids as ModelConfig keywords; eos may be one id or a list."""
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": eos_ids,
        "pad_token_id": config.get("pad_token_id"),
    }


def _from_hf(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> ModelConfig:
    del vision
    return ModelConfig(family="llama", layout="transformers", text=text_from_hf(config), **token_ids(config))


LLAMA = Family(
    name="llama",
    layout="transformers",
    matches=lambda config: config.get("model_type") in TEXT_MODEL_TYPES,
    from_hf=_from_hf,
    to_hf=lambda cfg, source: text_to_hf(cfg.text, source),
    weights=lambda cfg: text_weights(cfg.text, "model.", "lm_head.weight"),
    # a tied head that was written out all the same is not read
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
