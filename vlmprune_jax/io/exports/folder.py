"""A Hugging Face folder: tensors under their keys (plain or integers), config.json and the files that load it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, Entry, file_name
from vlmprune_jax.core.channels import Dense
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.lazy import check_finite
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.prune.surgery import keep_indices
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, Storage, StoredWeight
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, constant, encoded, split_shards, weight, write_weights
from vlmprune_jax.io.checkpoints.layout import (
    Slot,
    block_number,
    block_prefix,
    by_key,
    make_slots,
    stacked,
    template,
    tied_head,
)
from vlmprune_jax.io.checkpoints.read import FileArray, read_config, read_fields, resolve
from vlmprune_jax.io.exports.card import loading_of
from vlmprune_jax.io.exports.formats import Contents, FolderOptions, Origin
from vlmprune_jax.io.exports.gptq import check_on_tpus, make_storage, matrices
from vlmprune_jax.io.exports.target import Target, make_target, write_files
from vlmprune_jax.io.exports.weights import Weights, cast
from vlmprune_jax.io.families import Family, family_of
from vlmprune_jax.io.families.experts import as_stored, with_separate_experts
from vlmprune_jax.io.families.towers import is_left_out, stock_tower_constants, vision_of

MAX_SHARD_BYTES = 5 * 10**9  # the default of the hub and of transformers


def folder_contents(model: Model, origin: Origin, options: FolderOptions) -> Contents:
    """Return the exported folder's content; weights that the integers' storage cannot hold remain unquantised."""
    if options.rounding == "gptq" and options.storage is None:
        raise UserError('rounding="gptq" needs calibration records: pass storage=vp.gptq(model, batches, quantize=...)')
    target, storage, dtype = make_target(model.cfg, origin.folder, options), options.storage, options.dtype
    if storage is None and options.quantize != "none":
        integers = options.quantize, options.group_size, options.symmetric
        storage = make_storage(target.cfg, target.family, *integers)
    if isinstance(storage, CompressedTensors):
        target = dataclasses.replace(target, family=with_separate_experts(target.family))
        if origin.tpu_chips:
            check_on_tpus(target.cfg, storage, origin.tpu_chips)
    weights = origin.weights or origin.folder
    tensors, config = make_tensors(model, target, Checkpoint(weights), dtype, storage), target.config
    module = (
        mtp_tensors(Checkpoint(resolve(options.mtp_dir or weights)), target.cfg, dtype) if options.mtp == "cut" else []
    )
    section, text, field = target.family.text_section, target.family.text_config(config), target.family.mtp[1]
    if section is not None and field in text:
        layers = {tensor.key.partition("layers.")[2].split(".")[0] for tensor in module} - {""}
        config = {**config, section: {**text, field: len(layers)}}
    tensors += module
    if storage is not None:
        config |= {"quantization_config": storage.to_config({tensor.key: tensor.shape for tensor in tensors})}
    target = dataclasses.replace(target, config=config)

    def write(folder: Path) -> None:
        write_weights(tensors, folder, MAX_SHARD_BYTES)
        write_files(target, model.cfg, origin.folder, folder)

    def card(folder: Path) -> str:
        listed = [] if storage is None else matrices(target.cfg, target.family)
        plain = [slot.key for slot in listed if storage and not storage.holds(slot.name, slot.hf_shape)]
        return loading_of(folder, model.cfg, target.cfg, config, storage, dtype, [*dict.fromkeys(plain)])

    return Contents([*itertools.chain(*split_shards(tensors, MAX_SHARD_BYTES))], write, card)


def make_tensors(
    model: Model, target: Target, source: Checkpoint, dtype: str, storage: Storage | None = None
) -> list[Tensor]:
    """Return all tensors of the exported checkpoint, zero-padded where the target's layers are wider.

    In the source's layout, keys keep their spelling, and unused source tensors follow, in the same dtype.

    Raises UserError if the source lacks a tensor of the model.
    """
    family = family_of(model.cfg) if source.storage is None else with_separate_experts(family_of(model.cfg))
    family = as_stored(family, model.cfg, {key: entry.shape for key, entry in source.entries.items()})
    parameters = Weights.of(model, family, target.cfg)
    spelling = {template(family.canonical(key)): (template(key), entry.dtype) for key, entry in source.entries.items()}
    tensors = by_key(make_slots(target.cfg, target.family))
    lacking = set(parameters.slots) - {slot.name for slots in tensors.values() for slot in slots}
    missing = [parameters.slots[name].key for name in parameters.slots if name in lacking]
    head = tied_head(target.cfg, target.family)
    if head in spelling and not target.converts:  # some tied checkpoints hold the embedding twice
        tensors[head] = next(slots for slots in tensors.values() if slots[0].path == "text/embed_tokens/weight")
    weights: list[tuple[str, Tensor]] = []
    for key, slots in tensors.items():
        before = parameters.slots[slots[0].name]
        spelled, stored = spelling.get(template(before.key), (None, file_name(parameters.flat[before.path].dtype.name)))
        if spelled is None and family.separate_vision and before.part == "vision":
            if not target.converts:
                continue  # the tower stays in its own folder
        elif spelled is None:
            missing.append(before.key)
            break
        if target.converts:
            spelled = key
        else:
            spelled, stored = spelling.get(template(key), (template(key), stored))
            spelled = (template(key) if family.respells else spelled).replace("{}", str(slots[0].layer))
            stored = source.entries[spelled].dtype if spelled in source.entries else stored
        stored = stored if dtype == "source" else file_name(dtype)
        weights.append((slots[0].name, parameters.tensor(spelled, slots, stored)))
    if missing:
        raise UserError(f"{source.folder}: has no tensor {missing[0]}: pass the folder that the model was loaded from")
    if target.converts:
        # weights that stock transformers' tower class requires for loading but never uses
        constants, kind = stock_tower_constants(vision_of(target.cfg)), WEIGHT_DTYPES[weights[0][1].dtype]
        unused = [constant(key, np.full(shape, value, kind)) for key, (shape, value) in constants.items()]
    else:
        unused = _passthrough(source, set(tensors), target, family, dtype)
    return [tensor for _, tensor in weights] + unused if storage is None else encoded(weights, storage) + unused


def _passthrough(source: Checkpoint, known: set[str], target: Target, family: Family, dtype: str) -> list[Tensor]:
    """Return source tensors that no forward pass uses; they are copied unchanged, except those of removed layers.

    Weights get the dtype; rotary tables of old checkpoints and integers keep theirs, as raw bytes.
    """
    cfg = target.cfg
    ends = {block_prefix("text", cfg, family): len(cfg.text.layers)}
    ends |= {} if cfg.vision is None else {block_prefix("vision", cfg, family): cfg.vision.n_layers_total}
    tensors = list[Tensor]()
    for key, entry in source.entries.items():
        name = family.canonical(key)
        if name in known or family.is_dropped(name) or not family.is_ignored(name) or is_left_out(name, target.config):
            continue
        if family.mtp[0] and name.startswith(family.mtp[0]):
            continue  # `mtp_tensors` prunes them
        if any((number := block_number(name, prefix)) is not None and number >= end for prefix, end in ends.items()):
            continue
        written = name if family.respells else key
        if isinstance(entry, Entry) and (entry.dtype not in WEIGHT_DTYPES or key.endswith("inv_freq")):
            blocks = lambda entry=entry: iter([entry.raw()])  # noqa: E731
            tensors.append(Tensor(written, entry.dtype, entry.shape, entry.n_bytes, blocks))
        else:
            tensors.append(_copied(entry, written, entry.dtype if dtype == "source" else file_name(dtype)))
    return tensors


def _copied(entry: StoredWeight, key: str, dtype: str, what: str | None = None) -> Tensor:
    return weight(key, dtype, entry.shape, lambda: [cast(entry.array(), dtype)], what)


# Multi-token prediction (MTP) ----------------------------------------------------------------------------------------


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
    with_attention = [[x for x in c.text.layers if isinstance(x.mixer, Attention)] for c in (whole, cfg)]
    if not all(with_attention):
        raise _refusal(source, "the decoder has no layer with full attention, whose widths the module would get")
    wide, own = (layers[-1] for layers in with_attention)
    if not isinstance(wide.channel, Dense):
        raise _refusal(source, "MTP layers with experts cannot be pruned")
    keys = {name: key for key in source.entries if (name := family.canonical(key)).startswith(prefix)}
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
        what = f"{entry.file}: tensor {key}, to be written as {stored},"
        held = layers.get(name)
        tensors.append(_copied(entry, key, stored, what) if held is None else parameters.tensor(key, held, stored))
    return tensors


def _refusal(source: Checkpoint, problem: str) -> UserError:
    return UserError(f'{source.folder}: export.mtp="cut": {problem}: use mtp="drop"')


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
        kept = np.sort(np.argsort(-by_owner.sum(axis=1), kind="stable")[:after])
        inside = np.sort(np.argsort(-by_owner[kept], kind="stable")[:, : own.sizes[axis.name] // after])
        units |= {name: tuple(kept.tolist()) for name in owners}
        units[axis.name] = tuple((kept[:, None] * by_owner.shape[1] + inside).reshape(-1).tolist())
    return KeptLayer(number, units)
