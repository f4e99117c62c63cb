"""Coupled groups: tensors that are pruned together, whose channel scores are reduced to one score per unit.

A head couples its rows of q, k, v and its columns of o; a neuron couples its rows of gate and up and its column of
down, or its row of fc1 and its column of fc2 (LLM-Pruner, arXiv 2305.11627). Biases are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlmprune_jax.core.checks import one_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.stack import LayerShape
from vlmprune_jax.models.params import layer_axes
from vlmprune_jax.prune.criteria.criterion import Parts

# Reference order of the tensors of a group; it matters for the reduction "first" only.
ORDER = (
    "q_proj", "o_proj", "dense", "out_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
)  # fmt: skip
PRUNED = {"q_heads", "kv_heads", "head", "mlp"}
REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda stack: stack.sum(axis=0),
    "mean": lambda stack: stack.mean(axis=0),
    "max": lambda stack: stack.max(axis=0),
    "prod": lambda stack: stack.prod(axis=0),
    "first": lambda stack: stack[0],
}
GQA = ("groups", "q_heads")
Channels = dict[str, np.ndarray]  # of one layer: tensor -> float[heads, head] or float[neurons]


def coupled(cfg: ModelConfig, stack: str = "text") -> tuple[dict[str, int], dict[str, int]]:
    """Return the weights that are pruned along with heads, and those pruned along with neurons.

    Each with its axis (of the layer's own array) that channel scores sum over: the axis that is not pruned.
    """
    attention: dict[str, int] = {}
    mlp: dict[str, int] = {}
    for name, axes in layer_axes(cfg, stack).items():
        group = attention if {"q_heads", "kv_heads"} & set(axes) else mlp if "mlp" in axes else None
        if group is not None and name.endswith("/weight"):
            (group[name],) = (i for i, axis in enumerate(axes) if axis not in PRUNED)

    def ordered(group: dict[str, int]) -> dict[str, int]:
        return dict(sorted(group.items(), key=lambda item: ORDER.index(item[0].split("/")[-2])))

    return ordered(attention), ordered(mlp)


def reduce_groups(
    channels: Sequence[Channels], cfg: ModelConfig, *, reduction: str, gqa: str, stack: str = "text"
) -> Parts:
    """Return {"heads": ..., "mlp": ...} scores per layer, combined over the weights that are pruned together.

    Args:
      channels: per layer, path of every coupled weight -> float[heads, head] or float[neurons].
      reduction: over the tensors of a group, channel by channel; a head is then the sum over its channels.
      gqa: "groups" scores a key/value head with all its query heads (their q and o channels are added up first);
        "q_heads" scores every query head by its q and o alone, since k and v stay.
    """
    reduce = REDUCTIONS[one_of("reduction", reduction, tuple(REDUCTIONS))]
    one_of("gqa", gqa, GQA)
    attention, mlp = coupled(cfg, stack)
    heads: list[np.ndarray] = []
    neurons: list[np.ndarray] = []
    for layer, shape in zip(channels, cfg.stack(stack).layers, strict=True):
        scores = {name: np.asarray(values, np.float64) for name, values in layer.items()}
        neurons.append(reduce(np.stack([scores[name] for name in mlp])))
        members = [_unit_channels(scores[name], shape, gqa) for name in attention if name in scores]
        heads.append(reduce(np.stack([member for member in members if member is not None])).sum(axis=-1))
    return {"heads": tuple(heads), "mlp": tuple(neurons)}


def reduce_inputs(
    channels: Sequence[Mapping[str, np.ndarray]], cfg: ModelConfig, *, gqa: str, stack: str = "text"
) -> Parts:
    """Return {"heads": ..., "mlp": ...} scores per layer, from scores of the input channels of o_proj and down_proj.

    "o_proj": float[q_heads, head], summed over a unit's channels (`gqa`, see `reduce_groups`); "down_proj":
    float[neurons].
    """
    one_of("gqa", gqa, GQA)
    heads, neurons = [], []
    for layer, shape in zip(channels, cfg.stack(stack).layers, strict=True):
        units = shape.kv_heads if gqa == "groups" else shape.q_heads
        heads.append(np.asarray(layer["o_proj"], np.float64).reshape(units, -1).sum(axis=-1))
        neurons.append(np.asarray(layer["down_proj"], np.float64))
    return {"heads": tuple(heads), "mlp": tuple(neurons)}


def _unit_channels(channels: np.ndarray, shape: LayerShape, gqa: str) -> np.ndarray | None:
    """Return a tensor's channel scores as float[units, head]; None if one head belongs to several units."""
    n, head = channels.shape
    if gqa == "q_heads" and shape.q_heads != shape.kv_heads:
        return channels if n == shape.q_heads else None
    if n == shape.kv_heads:
        return channels
    return channels.reshape(shape.kv_heads, n // shape.kv_heads, head).sum(axis=1)
