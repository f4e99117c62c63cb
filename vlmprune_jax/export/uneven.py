"""Padding of layers of unequal width: zero heads and neurons change the size and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlmprune_jax.core.config import LayerShape, ModelConfig

UNEVEN = ("per_layer", "pad", "refuse")  # what to do with unequal layers: true widths, zeros, or an error


def widest(layers: Sequence[LayerShape], heads: int | None = None) -> LayerShape:
    """Return the smallest shape that holds every layer, with query heads in their groups.

    With `heads`, it has that many query heads if some group size of at least the largest allows it.
    """
    kv_heads = max(shape.kv_heads for shape in layers)
    per_group = max(shape.q_heads // shape.kv_heads for shape in layers)
    if heads is not None:
        fits = [n for n in range(kv_heads, heads // per_group + 1) if heads % n == 0]
        kv_heads, per_group = (fits[0], heads // fits[0]) if fits else (kv_heads, per_group)
    return LayerShape(kv_heads * per_group, kv_heads, max(shape.mlp for shape in layers))


def padded(layers: Sequence[LayerShape], heads: int | None = None) -> tuple[LayerShape, ...]:
    """Return all layers at the widths of `widest`, each with its own sliding window."""
    widths = widest(layers, heads).widths
    return tuple(LayerShape(*widths, shape.window) for shape in layers)


def padded_stacks(cfg: ModelConfig) -> ModelConfig:
    """Return the model with all stacks padded; a tower is padded to the full number of heads."""
    for name, stack in cfg.stacks.items():
        heads = stack.hidden_size // stack.head_dim
        layers = padded(stack.layers, heads if name == "text" and cfg.text.whole_heads else None)
        if name == "vision":  # PyTorch classes compute its head size as hidden_size / heads
            layers = tuple(dataclasses.replace(shape, q_heads=heads, kv_heads=heads) for shape in layers)
        cfg = cfg.with_layers(layers, name)
    return cfg


def pad_tensor(array: np.ndarray, axes: tuple[str, ...], shape: LayerShape, target: LayerShape) -> np.ndarray:
    """Widen a tensor with named `axes` from a layer of `shape` to `target`, with zeros.

    A zero value head or neuron adds nothing to the residual stream, and a query head with zero output weights may
    attend anywhere. Query head g * per_group + r belongs to key/value head g, so both counts are padded separately.
    """
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
