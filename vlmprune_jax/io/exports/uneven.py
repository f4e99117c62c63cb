"""Widths of exported layers: zero-padding, the PyTorch loader file of unequal layers, and the fit to llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.limits import first_unmet
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.io.families import Family
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.gguf import Architecture
from vlmprune_jax.io.families.limits import architectures_of, tower_limit, width_limits
from vlmprune_jax.io.families.table import JsonDict

LOADER_FILE = "modeling_per_layer.py"
LOADER = Path(__file__).parent / "remote" / LOADER_FILE
_MODULE, _PREFIX = "modeling_per_layer.", "PerLayer"  # of names of classes in the loader file
_PADDED_ROPES = ("default", "linear", "llama3")  # rotary types whose frequencies depend only on channel / head_dim


def padded(layers: Sequence[Layer], heads: int | None = None) -> tuple[Layer, ...]:
    """Return all layers after zero-padding to equal sizes: the smallest sizes that hold every layer.

    With `heads`, layers have that many query heads if a group size of at least the largest one divides this number.
    """
    axes = {axis.name: axis for layer in layers for axis in layer.axes}
    sizes = {name: max(layer.sizes[name] for layer in layers if name in layer.sizes) for name in axes}
    for name, axis in axes.items():
        if axis.parent:  # counts of parents and of children per parent are padded separately
            per_parent = max(x.sizes[name] // x.sizes[axis.parent] for x in layers if name in x.sizes)
            if heads is not None and name == "q_heads":
                fits = [n for n in range(sizes[axis.parent], heads // per_parent + 1) if heads % n == 0]
                if fits:
                    sizes[axis.parent], per_parent = fits[0], heads // fits[0]
            sizes[name] = sizes[axis.parent] * per_parent
    return tuple(layer.resized(sizes) for layer in layers)


def padded_stacks(cfg: ModelConfig) -> ModelConfig:
    """Return the config with every stack zero-padded to equal widths; a vision tower regains all its heads."""
    for name, stack in cfg.stacks.items():
        widths = {tuple(layer.sizes.items()) for layer in stack.layers}
        if not stack.uniform or len(widths) == 1:  # Gemma 4's class knows two widths
            heads = stack.hidden_size // stack.attention.head_dim if name == "text" and cfg.text.whole_heads else None
            cfg = cfg.with_layers(padded(stack.layers, heads), name)
    return _with_whole_tower(cfg)


def _with_whole_tower(cfg: ModelConfig) -> ModelConfig:
    """Return the config with all heads of the tower, whose classes compute the head size as hidden_size / heads."""
    if cfg.vision is None:
        return cfg
    heads = cfg.vision.hidden_size // cfg.vision.attention.head_dim
    sizes = {"q_heads": heads, "kv_heads": heads}
    return cfg.with_layers([layer.resized(sizes) for layer in cfg.vision.layers], "vision")


def with_head_dim(cfg: ModelConfig, head_dim: int) -> ModelConfig:
    """Return the config with decoder heads zero-padded to `head_dim` channels (0 = unchanged).

    Raises UserError if the padded heads would compute a different function.
    """
    layers = []
    for layer in cfg.text.layers:
        heads = layer.mixer
        if head_dim and (not isinstance(heads, Attention) or heads.head_dim != head_dim):
            rope = getattr(heads, "rope", None)
            plain = rope is not None and rope.kind in _PADDED_ROPES and not rope.sections and not heads.rotary_dim
            if not plain or heads.qk_norm or heads.v_norm or heads.scale or cfg.text.whole_heads:
                raise UserError(
                    f"head_dim={head_dim}: heads of {cfg.text.decoder} with this rotary embedding, norm or scale "
                    "cannot be padded with zeros: leave head_dim out"
                )
            if head_dim not in (4 * heads.head_dim, 16 * heads.head_dim):  # doubled or quadrupled queries round nothing
                raise UserError(
                    f"head_dim={head_dim}: expected 4 or 16 times the model's {heads.head_dim} channels: set head_dim "
                    f"to {4 * heads.head_dim} or {16 * heads.head_dim}"
                )
            layer = dataclasses.replace(layer, mixer=dataclasses.replace(heads, head_dim=head_dim))
        layers.append(layer)
    return cfg.with_layers(layers)


def with_loader(config: JsonDict, text: TextConfig, family: Family) -> JsonDict:
    """Return config.json for a model with unequal layers: per-layer widths, and the model's class in the loader file.

    Config classes validate nominal head counts: Llama's must divide `hidden_size`, and Phi-3's LongRoPE needs one
    factor per frequency of hidden_size / heads. The nominal counts, to which no layer is wider, are therefore the next
    valid numbers.
    """
    assert family.stock is not None
    inner = family.text_config(config)
    if decoder_of(inner["model_type"]).heads_divide:
        fits = [n for n in range(inner["num_attention_heads"], text.hidden_size + 1) if text.hidden_size % n == 0]
        whole = text.hidden_size // text.attention.head_dim
        inner["num_attention_heads"] = heads = whole if whole in fits else fits[0]
        if heads % inner["num_key_value_heads"]:
            inner["num_key_value_heads"] = heads
    config = dict(inner) if family.text_section is None else {**config, family.text_section: inner}
    auto, stock = family.stock.auto, _PREFIX + family.stock.name
    others = {name: value for name, value in (config.get("auto_map") or {}).items() if name != auto}
    auto_map = others | {auto: f"{_MODULE}{stock}"}
    return {**config, "architectures": [stock], "auto_map": auto_map}


def without_loader(config: JsonDict) -> JsonDict:
    """Return config.json for the stock class (undoes `with_loader`)."""
    result, auto_map = dict(config), config.get("auto_map") or {}
    remaining = {name: value for name, value in auto_map.items() if not str(value).startswith(_MODULE)}
    if remaining:
        result["auto_map"] = remaining
    elif auto_map:
        del result["auto_map"]
    if config.get("architectures"):
        result["architectures"] = [name.removeprefix(_PREFIX) for name in config["architectures"]]
    return result


def loader_class(config: JsonDict) -> str | None:
    """Return the loader file's class name for a folder with this config.json; None if a stock class loads it."""
    classes = [str(value) for value in (config.get("auto_map") or {}).values() if str(value).startswith(_MODULE)]
    return classes[0].removeprefix(_MODULE) if classes else None


def fit(cfg: ModelConfig, uneven: str) -> tuple[Architecture, ModelConfig]:
    """Return llama.cpp's architecture for a model, and the model config after zero-padding if `uneven` is "pad"."""
    able, text = architectures_of(cfg), cfg.text
    first = able[0]
    if uneven == "pad":
        if first_unmet(width_limits(first, cfg), cfg) is not None:
            whole = None if first.free_heads else text.hidden_size // text.attention.head_dim
            cfg = cfg.with_layers(padded(text.layers, whole))
            if first_unmet(width_limits(first, cfg), cfg) is not None:
                raise UserError(
                    f"llama.cpp's {first.name} needs {whole} heads in equal groups in every layer, which zero "
                    "heads cannot make of these: prune without removing heads"
                )
        cfg = _with_whole_tower(cfg)
    candidates = able[:1] if uneven == "refuse" and not cfg.text.uniform else able
    fits = [architecture for architecture in candidates if first_unmet(width_limits(architecture, cfg), cfg) is None]
    problem = first_unmet([tower_limit(first, cfg)] if fits else width_limits(first, cfg), cfg)
    if problem is not None:
        raise UserError(problem)
    return fits[0], cfg
