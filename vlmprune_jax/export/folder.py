"""Content of a Hugging Face folder: tensors under their keys, config.json, tokenizer and the files that load it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.weight_files import WEIGHT_DTYPES, file_name
from vlmprune_jax.export.card import loading_of
from vlmprune_jax.export.convert import more_words
from vlmprune_jax.export.format import Contents, Origin
from vlmprune_jax.export.target import Target, write_files
from vlmprune_jax.export.uneven import pad_tensor
from vlmprune_jax.families import Family, family_of
from vlmprune_jax.families.towers import is_left_out, stock_tower_constants, stock_tower_key, vision_of
from vlmprune_jax.hf.disk.checkpoint import Checkpoint
from vlmprune_jax.hf.disk.storage import Storage, StoredWeight
from vlmprune_jax.hf.disk.tensors import Tensor, encoded, split_shards, weight, write_weights
from vlmprune_jax.hf.fetch import extent_of, origin, to_host
from vlmprune_jax.hf.layout import (
    Slot,
    block_number,
    block_prefix,
    by_key,
    join_tensor,
    make_slots,
    template,
    tied_head,
)
from vlmprune_jax.hf.read import check_finite
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model

MAX_SHARD_BYTES = 5 * 10**9  # the default of the hub and of transformers


def folder_contents(model: Model, origin: Origin, target: Target, dtype: str, storage: Storage | None) -> Contents:
    """Return the content of a folder for `target`, with weights in `storage` if it holds them, else plain."""
    tensors = make_tensors(model, target, Checkpoint(origin.weights or origin.folder), dtype, storage)
    if storage is not None:
        settings = storage.to_config({tensor.key: tensor.shape for tensor in tensors})
        target = dataclasses.replace(target, config=target.config | {"quantization_config": settings})

    def write(folder: Path) -> None:
        write_weights(tensors, folder, MAX_SHARD_BYTES)
        write_files(target, model.cfg, origin.folder, folder)

    return Contents(
        [*itertools.chain(*split_shards(tensors, MAX_SHARD_BYTES))],
        write,
        lambda folder: loading_of(folder, model.cfg, target.cfg, target.config),
    )


def make_tensors(
    model: Model, target: Target, source: Checkpoint, dtype: str, storage: Storage | None = None
) -> list[Tensor]:
    """Return every tensor of the new folder, with blocks padded to those of the target.

    In the source's layout, keys keep their spelling, and the source's tensors that are not computed with follow, in
    the same dtype.

    Raises:
      UserError: the source lacks a tensor of the model.
    """
    flat, family = flatten(model.params), family_of(model.cfg)
    spelling = {template(family.canonical(key)): (template(key), entry.dtype) for key, entry in source.entries.items()}
    before = {slot.name: slot for slot in make_slots(model.cfg, family)}
    after = by_key(make_slots(target.cfg, target.family))
    placed = {part.name for parts in after.values() for part in parts}
    missing = [slot for name, slot in before.items() if name not in placed]
    if missing:
        key = missing[0].key
        raise UserError(f"{source.folder}: has no tensor {key}: pass the folder that the model came from")
    head = tied_head(target.cfg, target.family)
    if head in spelling and not target.converts:  # some tied checkpoints hold the embedding twice
        after[head] = next(parts for parts in after.values() if parts[0].path == "text/embed_tokens/weight")
    weights: list[tuple[str, Tensor]] = []
    for key, parts in after.items():
        first = before[parts[0].name]
        source_tensor = spelling.get(template(first.key))
        if source_tensor is None and family.separate_vision and first.path.startswith("vision/"):
            if not target.converts:
                continue  # the tower stays in its own folder
            source_tensor = (key, file_name(flat[first.path].dtype.name))
        if source_tensor is None:
            raise UserError(f"{source.folder}: has no tensor {first.key}: pass the folder that the model came from")
        if target.converts:
            spelled, stored = stock_tower_key(key, vision_of(target.cfg)), source_tensor[1]
        else:
            spelled, stored = spelling.get(template(key), (template(key), source_tensor[1]))
            spelled = template(key) if family.respells else spelled
            spelled = spelled.replace("{}", str(parts[0].layer))
            stored = source.entries[spelled].dtype if spelled in source.entries else stored
        stored = stored if dtype == "source" else file_name(dtype)
        pairs = [(before[part.name], part) for part in parts]
        weights.append((parts[0].name, _weight(spelled, stored, pairs, model.cfg, target.cfg, flat)))
    if target.converts:
        unused = _constants(target.cfg, weights[0][1].dtype)
    else:
        unused = _carried(source, set(after), target, family, dtype)
    tensors = [tensor for _, tensor in weights] if storage is None else encoded(weights, storage)
    return tensors + unused


def _weight(
    key: str,
    dtype: str,
    pairs: list[tuple[Slot, Slot]],
    old: ModelConfig,
    new: ModelConfig,
    flat: Mapping[str, Any],
) -> Tensor:
    """Return one tensor of the new folder from its parameters, as pairs (slot in the model, slot in the folder)."""

    def fetch_part(before: Slot, after: Slot) -> np.ndarray:
        array = to_host(flat[before.path], before.index)
        if before.shape != after.shape:
            if before.layer is not None:
                shapes = [cfg.stack(before.part).layers[before.layer] for cfg in (old, new)]
                array = pad_tensor(array, before.axes, *shapes)
            else:
                array = more_words(array, before.axes, new.text.vocab_size)
        return _as_dtype(array, dtype)

    parts = [(flat[before.path], before.index) for before, _ in pairs]
    extent = extent_of(parts, dtype) if all(before.shape == after.shape for before, after in pairs) else None
    check = functools.partial(check_finite, what=f"{origin(*parts[0]) or key}, to be written as {dtype},")
    fetch = lambda: join_tensor([fetch_part(*pair) for pair in pairs])  # noqa: E731
    return weight(key, dtype, pairs[0][1].hf_shape, fetch, extent, check)


def _as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported with the tensor's name instead
        return array.astype(WEIGHT_DTYPES[dtype], copy=False)


def _converted(key: str, entry: StoredWeight, dtype: str) -> Tensor:
    return weight(key, dtype, entry.shape, lambda: _as_dtype(entry.array(), dtype))


def _constants(cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Return the weights that the stock tower class declares but never uses."""
    tensors = []
    for key, (shape, value) in stock_tower_constants(vision_of(cfg)).items():
        fetch = functools.partial(np.full, shape, value, WEIGHT_DTYPES[dtype])
        tensors.append(weight(key, dtype, shape, fetch, None, lambda array: None))
    return tensors


def _carried(source: Checkpoint, known: set[str], target: Target, family: Family, dtype: str) -> list[Tensor]:
    """Return the tensors of the source that are not computed with, except those of removed layers.

    Weights get the dtype; rotary tables of old checkpoints and integers keep theirs, as raw bytes.
    """
    cfg = target.cfg
    ends = {"text": len(cfg.text.layers)} | ({"vision": cfg.vision.n_layers_total} if cfg.vision is not None else {})
    prefixes = {stack: block_prefix(stack, cfg, family) for stack in ends}
    tensors = []
    for key, entry in source.entries.items():
        name = family.canonical(key)
        if name in known or not family.is_ignored(name) or is_left_out(name, target.config):
            continue
        numbers = {stack: block_number(name, prefix) for stack, prefix in prefixes.items()}
        if any(number is not None and number >= ends[stack] for stack, number in numbers.items()):
            continue
        stored = entry.dtype if dtype == "source" else file_name(dtype)
        if stored == entry.dtype or entry.dtype not in WEIGHT_DTYPES or key.endswith("inv_freq"):
            extent = entry.extent(0, entry.n_bytes)
            tensors.append(Tensor(key, entry.dtype, entry.shape, entry.n_bytes, entry.raw, extent))
        else:
            tensors.append(_converted(key, entry, stored))
    return tensors
