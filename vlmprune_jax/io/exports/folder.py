"""A Hugging Face folder: tensors under their keys (plain or integers), config.json and the files that load it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, Extent, file_name
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.core.models.lazy import check_finite, location_of, to_host
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.io.checkpoints.disk.storage import Storage
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, encoded, split_shards, weight, write_weights
from vlmprune_jax.io.checkpoints.integers import matrices
from vlmprune_jax.io.checkpoints.layout import (
    Slot,
    block_number,
    block_prefix,
    by_key,
    join_tensor,
    make_slots,
    row_groups,
    template,
    tied_head,
)
from vlmprune_jax.io.checkpoints.lazy import blocks_of, extent_of
from vlmprune_jax.io.exports.card import loading_of
from vlmprune_jax.io.exports.convert import more_words
from vlmprune_jax.io.exports.format import Contents, Origin
from vlmprune_jax.io.exports.mtp import mtp_tensors, with_mtp
from vlmprune_jax.io.exports.target import Target, write_files
from vlmprune_jax.io.exports.uneven import pad_tensor
from vlmprune_jax.io.exports.vllm_tpu import check_storage, facts
from vlmprune_jax.io.families import Family, family_of
from vlmprune_jax.io.families.decoders import decoder_of
from vlmprune_jax.io.families.experts import has_experts, with_separate_experts
from vlmprune_jax.io.families.limits import how_known, why_not_in_transformers
from vlmprune_jax.io.families.towers import is_left_out, stock_tower_constants, vision_of

MAX_SHARD_BYTES = 5 * 10**9  # the default of the hub and of transformers


def folder_contents(model: Model, origin: Origin, target: Target, dtype: str, storage: Storage | None) -> Contents:
    """Return the exported folder's content; weights that `storage` cannot quantise remain unquantised."""
    tensors = make_tensors(model, target, Checkpoint(origin.weights or origin.folder), dtype, storage)
    if origin.tpu_chips and isinstance(storage, CompressedTensors):
        check_storage(target.cfg, storage, origin.tpu_chips)
    if target.mtp == "cut":
        tensors += mtp_tensors(
            Checkpoint(origin.mtp or origin.weights or origin.folder), target.family, target.cfg, dtype
        )
    config = with_mtp(target.config, target.family, [tensor.key for tensor in tensors])
    target = dataclasses.replace(target, config=config)
    if storage is not None:
        settings = storage.to_config({tensor.key: tensor.shape for tensor in tensors})
        target = dataclasses.replace(target, config=target.config | {"quantization_config": settings})

    def write(folder: Path) -> None:
        write_weights(tensors, folder, MAX_SHARD_BYTES)
        write_files(target, model.cfg, origin.folder, folder)

    return Contents(
        [*itertools.chain(*split_shards(tensors, MAX_SHARD_BYTES))],
        write,
        lambda folder: (
            loading_of(folder, model.cfg, target.cfg, target.config, _unreadable(target.cfg, storage))
            + _engines(target.cfg, storage)
        ),
    )


def _unreadable(cfg: ModelConfig, storage: Storage | None) -> str | None:
    """Return why transformers cannot read a quantised checkpoint; None if it can."""
    if not (isinstance(storage, CompressedTensors) and has_experts(cfg.text)):
        return None
    if decoder_of(cfg.text.decoder).reads_quantised_experts and not storage.activations:
        return None
    return "transformers 5.24 does not read quantised experts, and leaves them random without an error"


def _engines(cfg: ModelConfig, storage: Storage | None) -> str:
    """Return the model card's paragraphs on serving engines."""
    names = ("vllm", "mlx", "openvino") if storage is None and cfg.layout == "transformers" else ()
    lines = [f"- {name}: {why_not(cfg, name) or f'loads it ({how_known(cfg, name)})'}" for name in names]
    return "\n\n" * bool(lines) + "\n".join(lines) + _on_tpus(cfg, storage)


def _on_tpus(cfg: ModelConfig, storage: Storage | None) -> str:
    """Return the model card's paragraph on vLLM on TPUs."""
    if reason := why_not(cfg, "vllm_tpu"):
        return f"\n\nvLLM on TPUs does not load it: {reason}."
    properties = facts(cfg, storage if isinstance(storage, CompressedTensors) else None)
    return f"\n\nvLLM on TPUs (tpu-inference 0.32, not tested there): {properties}."


def make_tensors(
    model: Model, target: Target, source: Checkpoint, dtype: str, storage: Storage | None = None
) -> list[Tensor]:
    """Return all tensors of the exported checkpoint, zero-padded where the target's layers are wider.

    In the source's layout, keys keep their spelling, and unused source tensors follow, in the same dtype.

    Raises UserError if the source lacks a tensor of the model.
    """
    flat, family = flatten(model.params), family_of(model.cfg)
    family = family if source.storage is None else with_separate_experts(family)
    spelling = {template(family.canonical(key)): (template(key), entry.dtype) for key, entry in source.entries.items()}
    before = {slot.name: slot for slot in make_slots(model.cfg, family)}
    after = by_key(make_slots(target.cfg, target.family))
    placed = {slot.name for slots in after.values() for slot in slots}
    missing = [slot for name, slot in before.items() if name not in placed]
    if missing:
        key = missing[0].key
        raise UserError(f"{source.folder}: has no tensor {key}: pass the folder that the model was loaded from")
    head = tied_head(target.cfg, target.family)
    if head in spelling and not target.converts:  # some tied checkpoints hold the embedding twice
        after[head] = next(slots for slots in after.values() if slots[0].path == "text/embed_tokens/weight")
    weights: list[tuple[str, Tensor]] = []
    for key, slots in after.items():
        first = before[slots[0].name]
        source_tensor = spelling.get(template(first.key))
        if source_tensor is None and family.separate_vision and first.path.startswith("vision/"):
            if not target.converts:
                continue  # the tower stays in its own folder
            source_tensor = (key, file_name(flat[first.path].dtype.name))
        if source_tensor is None:
            raise UserError(
                f"{source.folder}: has no tensor {first.key}: pass the folder that the model was loaded from"
            )
        if target.converts:
            spelled, stored = key, source_tensor[1]
        else:
            spelled, stored = spelling.get(template(key), (template(key), source_tensor[1]))
            spelled = template(key) if family.respells else spelled
            spelled = spelled.replace("{}", str(slots[0].layer))
            stored = source.entries[spelled].dtype if spelled in source.entries else stored
        stored = stored if dtype == "source" else file_name(dtype)
        pairs = [(before[slot.name], slot) for slot in slots]
        weights.append((slots[0].name, _weight(spelled, stored, pairs, model.cfg, target.cfg, flat)))
    if target.converts:
        unused = _constants(target.cfg, weights[0][1].dtype)
    else:
        unused = _passthrough(source, set(after), target, family, dtype)
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
    """Return one tensor of the exported checkpoint, joined from the model parameters that it contains."""

    def fetch_part(before: Slot, after: Slot) -> np.ndarray:
        array = to_host(flat[before.path], before.place)
        if before.axes_in_params != after.axes_in_params:
            if before.layer is not None:
                axes = tuple(name for name, _ in before.axes_in_params)
                array = pad_tensor(array, axes, before.part, before.layer, old, new)
            else:
                array = more_words(array, before.axes, new.text.vocab_size)
        return _as_dtype(array, dtype)

    def joined(pairs: Sequence[tuple[Slot, Slot]]) -> np.ndarray:
        return join_tensor([fetch_part(*pair) for pair in pairs], [after for _, after in pairs])

    def copied(pairs: Sequence[tuple[Slot, Slot]]) -> Extent | None:
        if any((x.shape, x.columns, x.turned) != (y.shape, y.columns, y.turned) for x, y in pairs):
            return None
        return extent_of([(flat[before.path], before.place) for before, _ in pairs], dtype)

    def pieces() -> Iterator[np.ndarray | Extent]:
        if blocks is not None:
            yield from (_as_dtype(block, dtype) for block in blocks())
        else:
            yield from (copied(group) or joined(group) for group in groups)

    arrays, extent = [(flat[before.path], before.place) for before, _ in pairs], copied(pairs)
    check = functools.partial(check_finite, what=f"{location_of(*arrays[0]) or key}, to be written as {dtype},")
    groups = row_groups(pairs, operator.itemgetter(1))
    whole = len(pairs) == 1 and len({(slot.shape, slot.turned) for slot in pairs[0]}) == 1
    blocks = blocks_of(*arrays[0]) if whole else None
    by_piece = pieces if blocks is not None or pairs[0][0].entry is not None else None
    return weight(key, dtype, pairs[0][1].hf_shape, lambda: joined(pairs), extent, check, by_piece)


def _as_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # reported with the tensor's name instead
        return array.astype(WEIGHT_DTYPES[dtype], copy=False)


def _constants(cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Return the weights that stock transformers' tower class requires for loading but never uses."""
    tensors = []
    for key, (shape, value) in stock_tower_constants(vision_of(cfg)).items():
        fetch = functools.partial(np.full, shape, value, WEIGHT_DTYPES[dtype])
        tensors.append(weight(key, dtype, shape, fetch, None, lambda array: None))
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
        stored = entry.dtype if dtype == "source" else file_name(dtype)
        written = name if family.respells else key
        if stored == entry.dtype or entry.dtype not in WEIGHT_DTYPES or key.endswith("inv_freq"):
            extent = entry.extent(0, entry.n_bytes)
            tensors.append(Tensor(written, entry.dtype, entry.shape, entry.n_bytes, entry.raw, extent))
        else:
            fetch = lambda entry=entry, stored=stored: _as_dtype(entry.array(), stored)  # noqa: E731
            tensors.append(weight(written, stored, entry.shape, fetch))
    return tensors


def quantized_loading(storage: CompressedTensors, cfg: ModelConfig, family: Family, dtype: str) -> str:
    """Return the model card's text on how quantised weights are loaded."""
    plain = ["embeddings", "head", "norms", *(["tower and projector"] if cfg.vision is not None else [])]
    sentences = [f"The matrices of the decoder's layers are {storage.name}; {', '.join(plain)} are {dtype}."]
    sentences.append(f"The weights were rounded {storage.rounding}.")
    if storage.bits == 4 and storage.rounding == CompressedTensors.rounding:
        sentences.append("With 4 bits, this usually loses more than GPTQ.")
    tried = storage.symmetric and (storage.bits == 4 or storage.activations)
    loads = why_not_in_transformers(cfg, loader=not cfg.text.uniform) is None
    if loads and not has_experts(cfg.text):
        sentences.append(
            "Transformers needs `pip install compressed-tensors`. On a CPU it decodes the weights on loading, so the "
            "model is smaller on disk but not in memory. vLLM 0.32 loads "
            f"them ({'tried on a CPU, not with `--dtype float32`' if tried else 'on GPUs, by its code'})."
        )
    if has_experts(cfg.text):
        sentences.append("Every expert has matrices of its own, as vLLM reads them (by its code; not tried).")
        if _unreadable(cfg, storage) is None:
            sentences.append(f"Transformers 5.24 computes them in {dtype}.")
    left = [slot.key for slot in matrices(cfg, family) if not storage.holds(slot.name, slot.hf_shape)]
    if left:
        names = ", ".join(f"`{key}`" for key in dict.fromkeys(left))
        sentences.append(f"Also in {dtype}, because groups of {storage.group} do not divide their rows: {names}.")
    if loads and not storage.symmetric:
        sentences.append(
            "In transformers, zero points need `quantization_config=CompressedTensorsConfig(dequantize=True)`: "
            "compressed-tensors 0.20 does not support packed zero points otherwise."
        )
    if storage.activations:
        sentences.append("The engine rounds the inputs of these matrices to 8 bits, per token.")
    return " ".join(sentences)
