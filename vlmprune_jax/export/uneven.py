"""Layers of unequal width: padding with zeros, or a config and loader file for PyTorch that have their true sizes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.stack import LayerShape
from vlmprune_jax.families import Family
from vlmprune_jax.families.decoders import decoder_of
from vlmprune_jax.families.table import JsonDict

UNEVEN = ("per_layer", "pad", "refuse")  # what to do with unequal layers: true widths, zeros, or an error
LOADER_FILE = "modeling_per_layer.py"
_LOADER = Path(__file__).parent / "remote" / LOADER_FILE
_PREFIX = "PerLayer"


def widest(layers: Sequence[LayerShape], heads: int | None = None) -> LayerShape:
    """Return the smallest layer shape to which every layer can be zero-padded.

    With `heads`, it has that many query heads if some group size of at least the largest allows it.
    """
    kv_heads = max(shape.kv_heads for shape in layers)
    per_group = max(shape.q_heads // shape.kv_heads for shape in layers)
    if heads is not None:
        fits = [n for n in range(kv_heads, heads // per_group + 1) if heads % n == 0]
        kv_heads, per_group = (fits[0], heads // fits[0]) if fits else (kv_heads, per_group)
    return LayerShape(kv_heads * per_group, kv_heads, max(shape.mlp for shape in layers))


def padded(layers: Sequence[LayerShape], heads: int | None = None) -> tuple[LayerShape, ...]:
    """Return the shapes of all layers after zero-padding to equal widths; sliding windows are unchanged."""
    widths = widest(layers, heads).widths
    return tuple(shape.with_widths(*widths) for shape in layers)


def padded_stacks(cfg: ModelConfig) -> ModelConfig:
    """Return the config with every stack zero-padded to equal widths; a vision tower gets all its heads back."""
    for name, stack in cfg.stacks.items():
        heads = stack.hidden_size // stack.head_dim
        layers = stack.layers
        if not stack.even or len({shape.widths for shape in layers}) == 1:  # Gemma 4's class knows two widths
            layers = padded(layers, heads if name == "text" and cfg.text.whole_heads else None)
        if name == "vision":  # PyTorch classes compute its head size as hidden_size / heads
            layers = tuple(dataclasses.replace(shape, q_heads=heads, kv_heads=heads) for shape in layers)
        cfg = cfg.with_layers(layers, name)
    return cfg


def pad_tensor(array: np.ndarray, axes: tuple[str, ...], stack: str, layer: int, *cfgs: ModelConfig) -> np.ndarray:
    """Zero-pad a tensor along its named `axes`, from the first config's widths to the second's.

    A zero value head or neuron adds nothing to the residual stream, and a query head with zero output weights may
    attend anywhere. Query head g * per_group + r belongs to key/value head g, so both counts are padded separately.
    """
    shape, target = (cfg.stack(stack).layers[layer] for cfg in cfgs)
    if "q_heads" in axes:
        at = axes.index("q_heads")
        per_group = shape.q_heads // shape.kv_heads
        array = array.reshape(*array.shape[:at], shape.kv_heads, per_group, *array.shape[at + 1 :])
        array = _extend(_extend(array, at, target.kv_heads), at + 1, target.q_heads // target.kv_heads)
        return array.reshape(*array.shape[:at], target.q_heads, *array.shape[at + 2 :])
    for axis, size in (("kv_heads", target.kv_heads), ("mlp", target.mlp)):
        if axis in axes:
            array = _extend(array, axes.index(axis), size)
    return array


def _extend(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)


def with_loader(config: JsonDict, text: TextConfig, family: Family) -> JsonDict:
    """Return config.json for a model with unequal layers: per-layer widths, and its class in the loader file.

    Config classes validate nominal head counts: Llama's must divide `hidden_size`, and Phi-3's LongRoPE needs one
    factor per frequency of hidden_size / heads. The nominal counts, from which each layer is cut, are the next valid
    ones.
    """
    assert family.stock is not None
    inner = family.text_config(config)
    if decoder_of(inner["model_type"]).heads_divide:
        fits = [n for n in range(inner["num_attention_heads"], text.hidden_size + 1) if text.hidden_size % n == 0]
        whole = text.hidden_size // text.head_dim
        inner["num_attention_heads"] = heads = whole if whole in fits else fits[0]
        if heads % inner["num_key_value_heads"]:
            inner["num_key_value_heads"] = heads
    config = dict(inner) if family.text_section is None else {**config, family.text_section: inner}
    auto, stock = family.stock.auto, _PREFIX + family.stock.name
    others = {name: value for name, value in (config.get("auto_map") or {}).items() if name != auto}
    auto_map = others | {auto: f"{LOADER_FILE.removesuffix('.py')}.{stock}"}
    return {**config, "architectures": [stock], "auto_map": auto_map}


def without_loader(config: JsonDict) -> JsonDict:
    """Return config.json for the stock class (undoes `with_loader`)."""
    module = LOADER_FILE.removesuffix(".py") + "."
    result = dict(config)
    remaining = {k: v for k, v in (config.get("auto_map") or {}).items() if not str(v).startswith(module)}
    if remaining:
        result["auto_map"] = remaining
    elif len(remaining) != len(config.get("auto_map") or {}):
        del result["auto_map"]
    if config.get("architectures"):
        result["architectures"] = [name.removeprefix(_PREFIX) for name in config["architectures"]]
    return result


def write_loader(folder: Path) -> None:
    """Copy the PyTorch file that loads layers of unequal width into the exported folder."""
    shutil.copyfile(_LOADER, folder / LOADER_FILE)


def loader_class(config: JsonDict) -> str | None:
    """Return the loader file's class name for a folder with this config.json; None if a stock class loads it."""
    module = LOADER_FILE.removesuffix(".py") + "."
    classes = [str(v) for v in (config.get("auto_map") or {}).values() if str(v).startswith(module)]
    return classes[0].removeprefix(module) if classes else None
