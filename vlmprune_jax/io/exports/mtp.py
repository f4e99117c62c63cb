"""Multi-token prediction (MTP) module of a source folder, pruned to the widths of the pruned decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, file_name
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.lazy import check_finite
from vlmprune_jax.core.part import AXES, Part
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, weight
from vlmprune_jax.io.checkpoints.layout import dimensions, weight_table
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.families import Family

_LAYER = "layers."
_NUMBERED = f"{_LAYER}{{i}}."


class MtpCut:
    """Pruning of the module for multi-token prediction (MTP) to the decoder's widths; its layers have full attention.

    Calibration data do not reach this module. Its layers keep the groups of attention heads and the neurons with the
    largest columns in the projections that write to the residual stream.

    Raises UserError if the folder has no such module, or the module has experts, other layers than config.json says,
    or missing tensors, tensors of other shapes, or tensors that are not finite.
    """

    def __init__(self, source: Checkpoint, family: Family, cfg: ModelConfig):
        self._source, (prefix, field, outside) = source, family.mtp
        self._layer = [layer for layer in cfg.text.layers if isinstance(layer.mixer, Attention)][-1]
        if not isinstance(self._layer.channel, Dense):
            raise self._error("MTP layers with experts cannot be pruned")
        names = {family.canonical(key): key for key in source.entries}
        self.keys = {
            name.removeprefix(prefix): key for name, key in names.items() if prefix and name.startswith(prefix)
        }
        if not self.keys:
            raise self._error(f"has no module for multi-token prediction ({prefix or f'family {family.name}'})")
        lines = [
            line for line in weight_table(cfg, family) if _NUMBERED in line.key and line.path.startswith("text/layers/")
        ]
        others = {layer.mixer.module for layer in cfg.text.layers} - {Attention.module}
        own = [line for line in lines if line.path.partition("{i}/")[2].split("/")[0] not in others]
        self._names = {line.path.partition("{i}/")[2]: line.key.partition(_NUMBERED)[2] for line in own}
        self._layouts = {line.key.partition(_NUMBERED)[2]: dimensions(line.layout or "") for line in own}
        self._fixed = {**self._layer.fixed_sizes, "embed": cfg.text.hidden_size}
        layers = {name.split(".")[1] for name in self.keys if name.startswith(_LAYER)}
        self.count, stated = len(layers), family.text_config(read_fields(source.folder / "config.json")).get(field)
        if layers != {*map(str, range(self.count))} or self.count != stated:
            listed = ", ".join(sorted(layers)[:8]) or "none"
            raise self._error(
                f"the module has layers {listed} ({self.count} in all), config.json says {field} {stated}"
            )
        expected = {*outside, *(f"{_LAYER}{i}.{name}" for i in range(self.count) for name in self._layouts)}
        if wrong := sorted(expected ^ self.keys.keys()):
            kind = "missing" if wrong[0] in expected else "unknown"
            raise self._error(f"the tensor {prefix}{wrong[0]} is {kind} ({len(wrong)} in all)")
        for name, multiples in outside.items():
            self._check_shape(name, tuple(cfg.text.hidden_size * multiple for multiple in multiples))
        self._sizes = {f"{_LAYER}{i}": self._sizes_of(f"{_LAYER}{i}") for i in range(self.count)}
        self._kept: dict[str, dict[str, np.ndarray]] = {}
        for layer in self._sizes:
            self._kept[layer] = {}
            for part in self._layer.parts:
                self._kept[layer] |= self._units(part, layer)

    def cut(self, name: str) -> np.ndarray:
        """Return a tensor of the MTP module (by its name in `keys`), pruned to the decoder's widths."""
        array = self._read(name)
        layer = ".".join(name.split(".")[:2])
        for at, axes in enumerate(self._layouts[name.removeprefix(f"{layer}.")] if layer in self._kept else ()):
            for axis in set(axes) & set(self._kept[layer]):
                before, after = array.shape[:at], array.shape[at + 1 :]
                channels = math.prod(self._fixed[other] for other in axes if other != axis)
                units = array.reshape(*before, -1, channels, *after)
                array = np.take(units, self._kept[layer][axis], axis=at).reshape(*before, -1, *after)
        return array

    def _read(self, name: str) -> np.ndarray:
        key = self.keys[name]
        array = self._source[key]
        check_finite(array, f"{self._source.folder}: tensor {key}")
        return array

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self._source.entries[self.keys[name]]
        if entry.shape != shape:
            raise self._error(f"{self.keys[name]} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in WEIGHT_DTYPES:
            raise self._error(f"{self.keys[name]} has dtype {entry.dtype}, supported are {', '.join(WEIGHT_DTYPES)}")

    def _sizes_of(self, layer: str) -> dict[str, int]:
        """Return the sizes of a layer's axes, from the first tensor with each axis; all tensors are compared with them.

        A dimension of a tensor has at most one axis that can be pruned.
        """
        sizes = dict(self._fixed)
        for name, layout in self._layouts.items():
            shape = self._source.entries[self.keys[f"{layer}.{name}"]].shape
            for length, axes in zip(shape, layout, strict=False):
                for axis in axes:
                    if axis not in sizes:
                        sizes[axis] = length // math.prod(sizes.get(other, 1) for other in axes)
            self._check_shape(f"{layer}.{name}", tuple(math.prod(sizes[axis] for axis in axes) for axes in layout))
        for child in self._layer.axes:
            if child.parent and (not sizes[child.parent] or sizes[child.name] % sizes[child.parent]):
                owners = f"{sizes[child.parent]} {AXES[child.parent].title}"
                raise self._error(f"{layer} of the module has {sizes[child.name]} {child.title} but {owners}")
        return sizes

    def _units(self, part: Part, layer: str) -> dict[str, np.ndarray]:
        """Return {axis: ascending indices of the units to keep} for one part of the MTP module."""
        name = f"{layer}.{self._names[f'{part.module}/{part.writer}/weight']}"
        *parents, axis = part.axes
        writer = self._read(name).astype(np.float64)
        strength = np.square(writer).sum(axis=0).reshape(-1, part.fixed_sizes.get(axis.channels, 1)).sum(axis=1)
        if not parents:
            return {axis.name: self._largest(strength, part.sizes[axis.name], name)}
        (parent,) = parents
        by_owner = strength.reshape(self._sizes[layer][parent.name], -1)
        kept = self._largest(by_owner.sum(axis=1), part.sizes[parent.name], name)
        each = part.sizes[axis.name] // part.sizes[parent.name]
        units = [owner * by_owner.shape[1] + self._largest(by_owner[owner], each, name) for owner in kept]
        return {parent.name: kept, axis.name: np.concatenate(units)}

    def _largest(self, strength: np.ndarray, count: int, name: str) -> np.ndarray:
        if count > len(strength):
            raise self._error(f"{name} has {len(strength)} units, fewer than the {count} of the decoder's layers")
        return np.sort(np.argsort(-strength, kind="stable")[:count])

    def _error(self, problem: str) -> UserError:
        return UserError(f'{self._source.folder}: export.mtp="cut": {problem}: use mtp="drop"')


def mtp_tensors(source: Checkpoint, family: Family, cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Return the tensors of a folder's MTP module, pruned to the decoder's widths, in `dtype` ("source": as stored)."""
    head, tensors = MtpCut(source, family, cfg), []
    for name, key in head.keys.items():
        stored = source.entries[key].dtype if dtype == "source" else file_name(dtype)
        with np.errstate(over="ignore"):  # reported with the tensor's name instead
            array = head.cut(name).astype(WEIGHT_DTYPES[stored], copy=False)
        check_finite(array, f"{source.folder}: tensor {key} as {stored}")
        tensors.append(weight(key, stored, array.shape, functools.partial(iter, [array])))
    return tensors


def with_mtp(config: dict[str, Any], family: Family, keys: Sequence[str]) -> dict[str, Any]:
    """Return config.json with the number of MTP layers whose tensors are among `keys`."""
    prefix, field, _ = family.mtp
    section = dict(config.get(family.text_section or "") or {})
    if field not in section:
        return config
    start = f"{prefix}{_LAYER}"
    layers = {key.removeprefix(start).split(".")[0] for key in keys if key.startswith(start)}
    return {**config, str(family.text_section): {**section, field: len(layers)}}
