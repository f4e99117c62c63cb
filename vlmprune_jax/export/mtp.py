"""Multi-token prediction (MTP) module of a source folder, pruned to the widths of the pruned decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.part import Part
from vlmprune_jax.families import Family

_LAYERS = "layers.{i}."
Layouts = Mapping[str, list[list[str]]]


class MtpCut:
    """Pruning of the module for multi-token prediction (MTP) to the decoder's widths; its layers have full attention.

    Calibration data do not reach this module. Its layers keep the groups of attention heads and the neurons with the
    largest columns in the projections that write to the residual stream. Raises UserError for layers with experts.
    """

    def __init__(self, source: Mapping[str, np.ndarray], family: Family, cfg: ModelConfig):
        self._source, self._prefix = source, family.mtp[0]
        self._layer = [layer for layer in cfg.text.layers if isinstance(layer.mixer, Attention)][-1]
        if not isinstance(self._layer.channel, Dense):
            raise UserError('export.mtp="cut": MTP layers with experts cannot be pruned: use mtp="drop"')
        lines = [line for line in family.weights(cfg) if _LAYERS in line.key and line.path.startswith("text/layers/")]
        self._names = {line.path.partition("{i}/")[2]: line.key.partition(_LAYERS)[2] for line in lines}
        self._layouts = {line.key.partition(_LAYERS)[2]: _axes(line.layout) for line in lines}
        self._kept: dict[str, dict[str, np.ndarray]] = {}

    def cut(self, name: str) -> np.ndarray:
        """Return a tensor of the MTP module, pruned to the decoder's widths."""
        array = self._source[name]
        layer, _, inside = name.removeprefix(f"{self._prefix}layers.").partition(".")
        if not name.startswith(f"{self._prefix}layers.") or inside not in self._layouts:
            return array
        if layer not in self._kept:
            self._kept[layer] = {}
            for part in self._layer.parts:
                self._kept[layer] |= self._units(part, f"{self._prefix}layers.{layer}.")
        for at, axes in enumerate(self._layouts[inside]):
            for axis in set(axes) & set(self._kept[layer]):
                before, after = array.shape[:at], array.shape[at + 1 :]
                channels = math.prod(self._layer.fixed_sizes[other] for other in axes if other != axis)
                units = array.reshape(*before, -1, channels, *after)
                array = np.take(units, self._kept[layer][axis], axis=at).reshape(*before, -1, *after)
        return array

    def _units(self, part: Part, prefix: str) -> dict[str, np.ndarray]:
        """Return {axis: ascending indices of the units to keep} for one part of the MTP module."""
        name = prefix + self._names[f"{part.module}/{part.writer}/weight"]
        *parents, axis = part.axes
        writer = self._source[name].astype(np.float64)
        strength = np.square(writer).sum(axis=0).reshape(-1, part.channels_of(axis)).sum(axis=1)
        if not parents:
            return {axis.name: _largest(strength, part.sizes[axis.name], name)}
        (parent,) = parents
        inputs = self._names[f"{part.module}/k_proj/weight"]
        owners = len(self._source[prefix + inputs]) // part.channels_of(parent)
        by_owner = strength.reshape(owners, -1)
        kept = _largest(by_owner.sum(axis=1), part.sizes[parent.name], name)
        each = part.sizes[axis.name] // part.sizes[parent.name]
        units = [owner * by_owner.shape[1] + _largest(by_owner[owner], each, name) for owner in kept]
        return {parent.name: kept, axis.name: np.concatenate(units)}


def _largest(strength: np.ndarray, count: int, name: str) -> np.ndarray:
    if count > len(strength):
        raise UserError(
            f'{name}: has {len(strength)} units, fewer than the {count} of the decoder\'s layers: use mtp="drop"'
        )
    return np.sort(np.argsort(-strength, kind="stable")[:count])


def _axes(layout: str) -> list[list[str]]:
    """Return the axes of every dimension of a layout, for example [[q_heads, head], [embed]]."""
    dimensions: list[list[str]] = []
    inside = False
    for token in layout.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            dimensions += [[]] if inside else []
        elif inside:
            dimensions[-1].append(token)
        else:
            dimensions.append([token])
    return dimensions


def with_mtp(config: dict[str, Any], family: Family, keys: Sequence[str]) -> dict[str, Any]:
    """Return config.json, with 0 MTP layers if none of the MTP module's tensors is among `keys`."""
    prefix, field = family.mtp
    section = dict(config.get(family.text_section or "") or {})
    if field not in section or any(key.startswith(prefix) for key in keys):
        return config
    return {**config, str(family.text_section): {**section, field: 0}}
