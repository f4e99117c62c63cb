"""Rotary embedding in Hugging Face configs, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.mixers import RopeConfig
from vlmprune_jax.io.families.table import JsonDict

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


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
    if kind not in KINDS:
        raise UserError(f"rope type {kind!r} is not supported (supported: {', '.join(KINDS)})")
    if kind == "default":
        return RopeConfig(theta=theta, kind=kind, sections=sections)
    if sections:
        raise UserError(f"{kind} rope with mrope_section is not supported (supported: default)")
    if kind == "longrope":
        return _longrope(config, scaling, theta)
    if kind == "proportional":
        rotated = float(scaling.get("partial_rotary_factor") or 1.0)
        return RopeConfig(theta=theta, kind=kind, factor=float(scaling.get("factor") or 1.0), rotated=rotated)
    if kind == "yarn":
        unsupported = [name for name in ("mscale", "mscale_all_dim", "truncate") if scaling.get(name)]
        if unsupported:
            raise UserError(f"yarn rope with the fields {', '.join(unsupported)} is not supported")
    if "factor" not in scaling:
        raise UserError(f'{kind} rope: "factor" is missing: add it to rope_scaling in config.json')
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
    missing = [name for name in ("short_factor", "long_factor") if name not in scaling]
    if missing:
        raise UserError(f"longrope: {', '.join(missing)} missing: add it to rope_scaling in config.json")
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
