"""Multi-token prediction (MTP) module of a source folder, pruned to the widths of the pruned decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, file_name
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.lazy import check_finite
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.prune.surgery import keep_indices
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, weight
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots, stacked
from vlmprune_jax.io.checkpoints.read import FileArray, read_config, read_fields
from vlmprune_jax.io.exports.weights import Weights, cast
from vlmprune_jax.io.families import Family, family_of


def mtp_tensors(source: Checkpoint, cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Return the tensors of a folder's MTP module, pruned to the decoder's widths, in `dtype` ("source": as stored).

    Its layers are attention layers of the unpruned decoder. Calibration data do not reach them, so that they keep the
    groups of heads and the neurons with the largest columns in the projections that write to the residual stream.

    Args:
      source: folder with the module; its config.json gives the module's widths.
      cfg: config of the pruned decoder.

    Raises UserError if there is no such module, it has experts, it is narrower than the decoder's attention layers or
    the decoder has none, or tensors are missing, unknown, of other shapes or dtypes, or not finite.
    """
    prefix, field, outside = family_of(cfg).mtp
    if not prefix:
        raise _refusal(source, f"has no module for multi-token prediction (family {cfg.family})")
    family, whole = read_config(source.folder)
    wide, own = (_last_attention(source, x) for x in (whole, cfg))
    if not isinstance(wide.channel, Dense):
        raise _refusal(source, "MTP layers with experts cannot be pruned")
    names = {family.canonical(key): key for key in source.entries}
    keys = {name: key for name, key in names.items() if name.startswith(prefix)}
    if not keys:
        raise _refusal(source, f"has no module for multi-token prediction ({prefix})")
    if any(size < own.sizes[axis] for axis, size in wide.sizes.items()):
        raise _refusal(source, f"its layers of {wide.sizes} are narrower than the decoder's, {own.sizes}")
    stated = family.text_config(read_fields(source.folder / "config.json")).get(field) or 0
    count = min(stated, len(keys))  # whatever config.json says, no layer is without tensors
    before, after = (_slots(whole, family, [layer] * count) for layer in (wide, wide.resized(own.sizes)))
    shapes = {f"{prefix}{name}": tuple(whole.text.hidden_size * n for n in sizes) for name, sizes in outside.items()}
    _check(source, keys, shapes | {slot.key: slot.hf_shape for slot in before}, f"{field} {stated}")
    arrays = {slot.name: FileArray(source.entries[keys[slot.key]], slot) for slot in before}
    kept = [_kept_units(number, wide, own, arrays) for number in range(count)]
    pruned = [(slot, keep_indices(arrays[slot.name], slot.axes, kept[slot.layer or 0])) for slot in before]
    parameters = Weights(whole, whole, stacked(pruned, FileArray.stack), {slot.name: slot for slot in after})
    layers, tensors = by_key(after), []
    for name, key in keys.items():
        entry = source.entries[key]
        stored = entry.dtype if dtype == "source" else file_name(dtype)
        if name in layers:
            tensors.append(parameters.tensor(key, layers[name], stored))
        else:
            what = f"{entry.file}: tensor {key}, to be written as {stored},"
            pieces = lambda entry=entry, stored=stored: [cast(entry.array(), stored)]  # noqa: E731
            tensors.append(weight(key, stored, entry.shape, pieces, what))
    return tensors


def _refusal(source: Checkpoint, problem: str) -> UserError:
    return UserError(f'{source.folder}: export.mtp="cut": {problem}: use mtp="drop"')


def _last_attention(source: Checkpoint, cfg: ModelConfig) -> Layer:
    layers = [layer for layer in cfg.text.layers if isinstance(layer.mixer, Attention)]
    if not layers:
        raise _refusal(source, "the decoder has no layer with full attention, whose widths the module would get")
    return layers[-1]


def _slots(cfg: ModelConfig, family: Family, layers: Sequence[Layer]) -> list[Slot]:
    """Return the locations of the module's weights: those of decoder layers, under the module's keys."""
    slots = make_slots(cfg.with_layers(layers), family) if layers else ()
    return [
        dataclasses.replace(slot, key=f"{family.mtp[0]}layers.{slot.key.partition('layers.')[2]}")
        for slot in slots
        if slot.path.startswith("text/layers/")
    ]


def _check(source: Checkpoint, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], stated: str) -> None:
    """Raise UserError if the module's tensors are not those with these `shapes`; `keys`: {canonical key: key}."""
    if wrong := sorted(shapes.keys() ^ keys.keys()):
        kind = "missing" if wrong[0] in shapes else "unknown"
        raise _refusal(source, f"the tensor {wrong[0]} is {kind} ({len(wrong)} in all; config.json says {stated})")
    for name, key in keys.items():
        entry = source.entries[key]
        if entry.shape != shapes[name]:
            raise _refusal(source, f"{key} has shape {list(entry.shape)}, expected {list(shapes[name])}")
        if entry.dtype not in WEIGHT_DTYPES:
            raise _refusal(source, f"{key} has dtype {entry.dtype}, supported are {', '.join(WEIGHT_DTYPES)}")


def _kept_units(number: int, wide: Layer, own: Layer, arrays: Mapping[str, FileArray]) -> KeptLayer:
    """Choose the heads and neurons of one layer of the module, as many as the decoder's layer `own` has."""
    units: dict[str, tuple[int, ...]] = {}
    for part in wide.parts:
        writer = arrays[f"text/layers/{number}/{part.module}/{part.writer}/weight"]
        values = writer.read()
        check_finite(values, writer.location)
        *parents, axis = part.axes
        owners = [parent.name for parent in parents]
        before, after = (math.prod(layer.sizes[name] for name in owners) for layer in (wide, own))
        strength = np.square(values.astype(np.float64)).sum(axis=0).reshape(wide.sizes[axis.name], -1).sum(axis=1)
        by_owner = strength.reshape(before, -1)
        kept = _largest(by_owner.sum(axis=1), after)
        each = own.sizes[axis.name] // after
        inside = [owner * by_owner.shape[1] + _largest(by_owner[owner], each) for owner in kept]
        units |= {name: tuple(kept.tolist()) for name in owners}
        units[axis.name] = tuple(np.concatenate(inside).tolist())
    return KeptLayer(number, units)


def _largest(strength: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-strength, kind="stable")[:count])
