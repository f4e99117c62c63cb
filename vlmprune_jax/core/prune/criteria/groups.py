"""Coupled groups: tensors that are pruned together, whose channel scores are reduced to one score per unit.

A head couples its rows of q, k, v and its columns of o; a neuron couples its rows of gate and up and its column of
down, or its row of fc1 and its column of fc2 (LLM-Pruner, arXiv 2305.11627). Biases are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.params import layer_axes
from vlmprune_jax.core.part import WRITERS, Axis, Key
from vlmprune_jax.core.prune.config import GQA, REDUCTIONS
from vlmprune_jax.core.prune.criteria.criterion import Values

# Reference order of the tensors of a group; it matters for the reduction "first" only.
ORDER = (
    "q_proj", "o_proj", "dense", "out_proj", "v_proj", "k_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2",
)  # fmt: skip
Channels = dict[str, np.ndarray]  # of one layer: tensor -> float[heads, head] or float[neurons]


def coupled(cfg: ModelConfig, stack: str = "text") -> dict[str, dict[str, int]]:
    """Return {axis: {path of a weight that is pruned along with the axis' units: the axis over which scores sum}}.

    An axis with child axes includes its children's weights (a key/value head includes its query heads' weights). The
    axis of the sum is the axis of the layer's array that is not pruned.
    """
    groups: dict[str, dict[str, int]] = {}
    axes = {axis.name: axis for layer in cfg.stack(stack).layers for axis in layer.axes}
    for name, names in layer_axes(cfg, stack).items():
        along = [axes[axis] for axis in names if axis in axes]
        if not along or not name.endswith("/weight"):
            continue
        inner = {axis.channels for axis in along}
        summed = [i for i, axis in enumerate(names) if axis not in axes and axis not in inner]
        if summed:  # a number per unit is no weight of its channels
            groups.setdefault(along[0].parent or along[0].name, {})[name] = summed[0]

    def rank(weight: tuple[str, int]) -> int:
        tensor = weight[0].split("/")[-2]
        return ORDER.index(tensor) if tensor in ORDER else len(ORDER)

    return {axis: dict(sorted(group.items(), key=rank)) for axis, group in groups.items()}


def summed_axes(cfg: ModelConfig, stack: str = "text") -> dict[str, int]:
    """Return {path of every weight that is pruned along with an axis: the axis over which scores sum}."""
    return {name: axis for group in coupled(cfg, stack).values() for name, axis in group.items()}


def scored_axes(layer: Layer, gqa: str) -> tuple[Axis, ...]:
    """Return those axes of a layer along which units get scores.

    Of an axis and its child axis, only one is scored: the axis, whose units include their children, or with
    gqa="q_heads" the query heads. Of experts and their neurons, both are scored, and the pruning method chooses.
    """
    one_of("gqa", gqa, GQA)
    children = {axis.parent: axis for axis in layer.axes if axis.parent and axis.channels}
    singly = children if gqa == "q_heads" else {}
    whole = (singly.get(axis.name, axis) for axis in layer.axes if not axis.parent)
    return *whole, *(axis for axis in layer.axes if axis.parent and not axis.channels)


def reduce_groups(
    channels: Sequence[Channels], cfg: ModelConfig, *, reduction: str, gqa: str, stack: str = "text"
) -> Values:
    """Return {Key(stack, layer, axis): scores}, combined over the weights that are pruned together.

    Args:
      channels: for each layer, path of every coupled weight -> float[heads, head] or float[neurons].
      reduction: how the tensors of a group are combined, channel by channel; a head sums its channels.
      gqa: "groups" scores a key/value head with all its query heads (their q and o channels are added up first);
        "q_heads" scores every query head by q_proj and o_proj alone, because k_proj and v_proj are not pruned.
    """
    reduce = REDUCTIONS[one_of("reduction", reduction, tuple(REDUCTIONS))]
    groups, units = coupled(cfg, stack), {}
    for i, (scores, layer) in enumerate(zip(channels, cfg.stack(stack).layers, strict=True)):
        for axis in scored_axes(layer, gqa):
            names = [name for name in groups[axis.parent or axis.name] if name in scores]
            if not names:
                raise UserError(f"this criterion has no scores of {axis.title}: use a criterion that scores them")
            members = [_unit_channels(np.asarray(scores[name], np.float64), layer, axis) for name in names]
            whole = [member for member in members if member is not None]
            if len({member.shape for member in whole}) > 1:  # channels of several axes do not pair up
                whole = [member.reshape(len(member), -1).sum(axis=1) for member in whole]
            values = reduce(np.stack(whole))
            units[Key(stack, i, axis.name)] = values.reshape(len(values), -1).sum(axis=1)
    return units


def reduce_inputs(
    channels: Sequence[Mapping[str, np.ndarray]], cfg: ModelConfig, *, gqa: str, stack: str = "text"
) -> Values:
    """Return {Key(stack, layer, axis): scores}, from scores of the input channels of o_proj and down_proj.

    "o_proj": float[q_heads, head], summed over a unit's channels (`gqa`, see `reduce_groups`); "down_proj":
    float[neurons].
    """
    units = {}
    for i, (scores, layer) in enumerate(zip(channels, cfg.stack(stack).layers, strict=True)):
        for axis in scored_axes(layer, gqa):
            values = np.asarray(scores[WRITERS[axis.name]], np.float64)
            units[Key(stack, i, axis.name)] = values.reshape(layer.sizes[axis.name], -1).sum(axis=-1)
    return units


def _unit_channels(channels: np.ndarray, layer: Layer, axis: Axis) -> np.ndarray | None:
    """Return a tensor's channel scores as float[units, ...]; None if one of its heads belongs to several units."""
    size, n = layer.sizes[axis.name], len(channels)
    if axis.parent and not axis.channels:  # neurons of experts
        return channels.reshape(-1) if channels.size == size else None
    if n == size:
        return channels if axis.channels else channels.reshape(size, -1).sum(axis=1)  # of experts all neurons
    return channels.reshape(size, n // size, *channels.shape[1:]).sum(axis=1) if n > size else None
