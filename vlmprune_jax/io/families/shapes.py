"""Config fields that many families share: widths, windows and types of layers, rotary embedding, special token ids."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Dense, Experts
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention, DeltaNet, RopeConfig, ShortConv

JsonDict = dict[str, Any]

# config.json field with the true widths of each layer, in folders with unequal layers.
PER_LAYER, _PER_LAYER_AXES = "per_layer_shapes", ("q_heads", "kv_heads", "mlp")
# Fields with the widths of layers, in the order of exported files.
_WIDTHS = {
    "linear_num_value_heads": "delta_heads",
    "linear_num_key_heads": "delta_groups",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
}
# Fields that exports state by others: `layer_types`, `num_experts` and heads by type of attention.
_REPLACED = ("full_attention_interval", "full_attn_idxs", "sliding_window_pattern", "num_local_experts",
             "per_layer_config", PER_LAYER)  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"  # in `layer_types`
TYPES = {DeltaNet: "linear_attention", ShortConv: "conv"}  # names of other mixers


def layers_from_hf(
    config: Mapping[str, Any],
    widths: tuple[int, int, int],
    windows: Sequence[int | None],
    attention: Mapping[str, Any],
    local: Mapping[str, Any],
    dense: Mapping[str, Any],
) -> tuple[Layer, ...]:
    """Return the decoder's layers, with widths per layer if config.json lists them, otherwise all with `widths`.

    `attention` and `dense` are fields of the parts; `local` overrides those of layers with a window.

    Raises UserError if the recorded widths and the config have different numbers of layers.
    """
    recorded = config.get(PER_LAYER) or [widths] * len(windows)
    if len(recorded) != len(windows):
        raise UserError(f"num_hidden_layers is {len(windows)} but {PER_LAYER} lists {len(recorded)} layers")
    return tuple(
        Layer(Attention(q, kv, window, **{**attention, **({} if window is None else local)}), Dense(mlp, **dense))
        for (q, kv, mlp), window in zip(recorded, windows, strict=True)
    )


def same_windows(config: Mapping[str, Any]) -> list[int | None]:
    """Return the sliding window size of all layers of a Mistral or Phi-3 config (None = full attention)."""
    window = config.get("sliding_window")
    return [None if window is None else int(window)] * int(config["num_hidden_layers"])


def windows_from_hf(config: Mapping[str, Any]) -> list[int | None]:
    """Return each layer's sliding window size in a Qwen config (None = full attention); check its `layer_types`."""
    n_layers = int(config["num_hidden_layers"])
    window = int(config.get("sliding_window") or 4096) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = int(config.get("max_window_layers", 28))
        return [window if i >= first else None for i in range(n_layers)]
    _check_types(types, n_layers, FULL, SLIDING)
    return [window if kind == SLIDING else None for kind in types]


def _check_types(types: Sequence[str], n_layers: int, *known: str) -> None:
    if len(types) != n_layers:
        raise UserError(f"num_hidden_layers is {n_layers} but layer_types lists {len(types)} layers")
    if unknown := sorted(set(types) - set(known)):
        raise UserError(f"layer_types {unknown} are not supported (supported: {', '.join(known)})")


def layers_to_hf(text: TextConfig, source: Mapping[str, Any]) -> JsonDict:
    """Return a config with its layer counts and widths updated; other fields are kept."""
    config, types = {name: value for name, value in source.items() if name not in _REPLACED}, layer_types(text)
    for name, axis in _WIDTHS.items():
        if widths := [layer.sizes[axis] for layer in text.layers if axis in layer.sizes]:
            config[name] = max(widths)
    config.update(num_hidden_layers=len(text.layers), head_dim=text.local_attention.head_dim)
    if not text.uniform:
        config[PER_LAYER] = [[layer.sizes[axis] for axis in _PER_LAYER_AXES] for layer in text.layers]
    if "max_window_layers" in source:
        config["max_window_layers"] = [*types, SLIDING].index(SLIDING)
    if "layer_types" in source or len(set(types)) > 1:
        config["layer_types"] = types
    part = next((layer.channel for layer in text.layers if isinstance(layer.channel, Experts)), None)
    return config if part is None else {**config, "num_experts": part.experts, "moe_intermediate_size": part.neurons}


def layer_types(text: TextConfig) -> list[str]:
    """Return the config.json field `layer_types`: the type of every layer's mixer."""
    mixers = [layer.mixer for layer in text.layers]
    return [TYPES.get(type(mixer)) or (FULL if mixer.window is None else SLIDING) for mixer in mixers]


def hybrid_layers(text: TextConfig, mixer: Any, config: Mapping[str, Any], full: Container[int]) -> TextConfig:
    """Return the decoder config with attention replaced by `mixer` except in layers of full attention.

    Those are in config.json's `layer_types`, or without it the layer numbers `full`. Raises UserError if `layer_types`
    has a wrong number of layers, unknown types or no full attention.
    """
    types = config.get("layer_types") or [FULL if i in full else TYPES[type(mixer)] for i in range(len(text.layers))]
    _check_types(types, len(text.layers), TYPES[type(mixer)], FULL)
    if FULL not in types:
        raise UserError("layer_types has no full_attention: transformers needs one such layer, so keep one")
    pairs = zip(types, text.layers, strict=True)
    return text.with_layers([x if kind == FULL else Layer(mixer, x.channel) for kind, x in pairs])


def typed_layers_to_hf(text: TextConfig, source: JsonDict) -> JsonDict:
    """Return `layers_to_hf` for a class whose default `layer_types` are not full attention everywhere."""
    return {**layers_to_hf(text, source), "layer_types": layer_types(text)}


def hybrid_problem(text: TextConfig) -> str | None:
    """Return why transformers' hybrid decoders do not support these layers, with advice; None if they do."""
    if not text.attentions:
        return "transformers needs one layer of full attention: keep one"
    return (
        None if text.uniform else "its class has one width for all layers of a kind: prune them alike (selection local)"
    )


def tied_embeddings(config: Mapping[str, Any], text: Mapping[str, Any], *, default: bool) -> bool:
    """Return True if a vision-language model's output head shares its weights with the embeddings.

    Transformers 4 reads the decoder's flag, transformers 5 the outer one (`default` if absent).
    """
    if str(config.get("transformers_version", "5")).startswith("4."):
        return bool(text.get("tie_word_embeddings", False))
    return bool(config.get("tie_word_embeddings", default))


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bos, eos and pad token ids of a config as keyword arguments of ModelConfig."""
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": eos_ids,
        "pad_token_id": config.get("pad_token_id"),
    }


# Rotary embedding, in the spellings of transformers 4 and 5 ------------------------------------------------------

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


def rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    """Return the RopeConfig of a config dictionary, from `rope_parameters` or `rope_theta` and `rope_scaling`."""
    nested = config.get("rope_parameters") or {}
    scaling = nested or config.get("rope_scaling") or {}
    theta = float(nested.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "su" or (kind == "yarn" and "long_factor" in scaling):
        kind = "longrope"  # older names of LongRoPE, in the first releases of Phi-3
    sections = tuple(map(int, scaling.get("mrope_section") or ()))
    if kind == "mrope":
        kind = "default"  # Qwen2-VL's name of default rope with M-RoPE sections
    if kind not in ROPE_KINDS:
        raise UserError(f"rope type {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})")
    if kind == "default":
        return RopeConfig(theta=theta, kind=kind, sections=sections)
    if sections:
        raise UserError(f"{kind} rope with mrope_section is not supported (supported: default)")
    needed = {"longrope": ("short_factor", "long_factor"), "proportional": ()}.get(kind, ("factor",))
    if missing := [name for name in needed if name not in scaling]:
        raise UserError(f"{kind} rope: {', '.join(missing)} missing: add it to rope_scaling in config.json")
    if kind == "longrope":
        return _longrope(config, scaling, theta)
    if kind == "proportional":
        rotated = float(scaling.get("partial_rotary_factor") or 1.0)
        return RopeConfig(theta=theta, kind=kind, factor=float(scaling.get("factor") or 1.0), rotated=rotated)
    if kind == "yarn":
        unsupported = [name for name in ("mscale", "mscale_all_dim", "truncate") if scaling.get(name)]
        if unsupported:
            raise UserError(f"yarn rope with the fields {', '.join(unsupported)} is not supported")
    original = scaling.get("original_max_position_embeddings") or config.get("max_position_embeddings", 0)
    factor = float(scaling["factor"])
    # YaRN's attention temperature (Peng et al. 2023, eq. 22) is the default if the config lacks it
    temperature = 0.1 * math.log(factor) + 1.0 if kind == "yarn" and factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_max_positions=int(original),
        low_freq_factor=float(scaling.get("low_freq_factor", 0.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 0.0)),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=float(scaling.get("attention_factor") or temperature),
    )


def _longrope(config: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    """Return the RopeConfig of a LongRoPE config (Ding et al. 2024); top-level fields override the rope dictionary."""
    max_positions = int(config.get("max_position_embeddings", 4096))
    inside = scaling.get("original_max_position_embeddings")
    default = 4096 if config.get("model_type") == "phi3" else max_positions
    original = int(config.get("original_max_position_embeddings") or inside or default)
    if original < 2:
        raise UserError(f"longrope: original_max_position_embeddings {original} must be at least 2")
    factor = float(scaling.get("factor") or max_positions / original)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=float(attention),
        short_factors=tuple(map(float, scaling["short_factor"])),
        long_factors=tuple(map(float, scaling["long_factor"])),
    )


def rotary_dim(config: Mapping[str, Any], head_dim: int, default: float) -> int:
    """Return the number of rotated channels per head: head_dim x `partial_rotary_factor`, rounded down."""
    nested = config.get("rope_parameters") or {}
    factor = nested.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(head_dim * float(default if factor is None else factor))


def for_both_versions(config: JsonDict) -> JsonDict:
    """Return a decoder config that repeats `rope_parameters` under transformers 4's field names."""
    nested = config.get("rope_parameters")
    if not nested or "rope_theta" in config or "full_attention" in nested:  # by layer type: version 5 only
        return config
    outside = {name: nested[name] for name in ("rope_theta", "partial_rotary_factor") if name in nested}
    scaling: JsonDict | None = {name: value for name, value in nested.items() if name not in outside}
    if nested.get("rope_type", "default") == "default":
        scaling = scaling if "mrope_section" in nested else None
    elif config.get("model_type") == "phi3":  # its config class accepts only type, short_factor and long_factor
        scaling = {"type": "longrope", **{name: nested[name] for name in ("short_factor", "long_factor")}}
    return {**config, **outside, "rope_scaling": scaling}


def longrope_to_hf(rope: RopeConfig, source: Mapping[str, Any]) -> JsonDict:
    """Return all LongRoPE fields of a config, for a transformers class that has no defaults for them."""
    fields = {
        "rope_type": "longrope",
        "factor": rope.factor,
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
        "attention_factor": rope.attention_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    outside = {"original_max_position_embeddings": rope.original_max_positions, "rope_theta": rope.theta}
    if source.get("rope_parameters"):
        return {**outside, "rope_parameters": {**fields, "rope_theta": rope.theta}}
    return {**outside, "rope_scaling": fields}
