"""A Hugging Face folder: tensors under their keys (plain or integers), config.json and the files that load it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, Entry, file_name
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint, Storage
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, encoded, split_shards, weight, write_weights
from vlmprune_jax.io.checkpoints.layout import (
    block_number,
    block_prefix,
    by_key,
    make_slots,
    template,
    tied_head,
)
from vlmprune_jax.io.checkpoints.read import resolve
from vlmprune_jax.io.exports.card import loading_of
from vlmprune_jax.io.exports.format import Contents, FolderOptions, Origin
from vlmprune_jax.io.exports.gptq import check_on_tpus, make_storage, matrices
from vlmprune_jax.io.exports.mtp import mtp_tensors
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
        unused = _constants(target.cfg, weights[0][1].dtype)
    else:
        unused = _passthrough(source, set(tensors), target, family, dtype)
    return [tensor for _, tensor in weights] + unused if storage is None else encoded(weights, storage) + unused


def _constants(cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Return the weights that stock transformers' tower class requires for loading but never uses."""
    tensors = []
    for key, (shape, value) in stock_tower_constants(vision_of(cfg)).items():
        constant = np.full(shape, value, WEIGHT_DTYPES[dtype])
        tensors.append(weight(key, dtype, shape, functools.partial(iter, [constant])))
    return tensors


def _passthrough(source: Checkpoint, known: set[str], target: Target, family: Family, dtype: str) -> list[Tensor]:
    """Return source tensors that no forward pass uses; they are copied unchanged, except those of removed layers.

    Weights get the dtype; rotary tables of old checkpoints and integers keep theirs, as raw bytes.
    """
    cfg = target.cfg
    ends = {"text": len(cfg.text.layers)} | ({"vision": cfg.vision.n_layers_total} if cfg.vision is not None else {})
    prefixes = {stack: block_prefix(stack, cfg, family) for stack in ends}
    tensors = list[Tensor]()
    for key, entry in source.entries.items():
        name = family.canonical(key)
        if name in known or family.is_dropped(name) or not family.is_ignored(name) or is_left_out(name, target.config):
            continue
        if family.mtp[0] and name.startswith(family.mtp[0]):
            continue  # `mtp_tensors` prunes them
        numbers = {stack: block_number(name, prefix) for stack, prefix in prefixes.items()}
        if any(number is not None and number >= ends[stack] for stack, number in numbers.items()):
            continue
        written = name if family.respells else key
        if isinstance(entry, Entry) and (entry.dtype not in WEIGHT_DTYPES or key.endswith("inv_freq")):
            blocks = lambda entry=entry: iter([entry.raw()])  # noqa: E731
            tensors.append(Tensor(written, entry.dtype, entry.shape, entry.n_bytes, blocks))
        else:
            stored = entry.dtype if dtype == "source" else file_name(dtype)
            pieces = lambda entry=entry, stored=stored: [cast(entry.array(), stored)]  # noqa: E731
            tensors.append(weight(written, stored, entry.shape, pieces))
    return tensors
