"""Model -> Hugging Face folder, in the layout and with the files of the folder it came from, or in transformers'."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.export.card import loading_of, model_name, write_card
from vlmprune_jax.export.convert import more_words
from vlmprune_jax.export.gguf import make_gguf
from vlmprune_jax.export.gguf_card import gguf_loading
from vlmprune_jax.export.gguf_file import write_gguf
from vlmprune_jax.export.imatrix import Importance, check_imatrix, imatrix_file
from vlmprune_jax.export.quantized import make_storage, quantized_loading
from vlmprune_jax.export.target import Plan, Target, check_options, copy_always, make_target, write_files
from vlmprune_jax.export.uneven import pad_tensor
from vlmprune_jax.families import Family, family_of
from vlmprune_jax.families.towers import is_left_out, stock_tower_constants, stock_tower_key, vision_of
from vlmprune_jax.hf.disk.atomic import atomic_folder, check_space, check_target
from vlmprune_jax.hf.disk.checkpoint import Checkpoint
from vlmprune_jax.hf.disk.compressed_tensors import CompressedTensors
from vlmprune_jax.hf.disk.dtypes import WEIGHT_DTYPES, file_name
from vlmprune_jax.hf.disk.storage import Storage
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
from vlmprune_jax.hf.read import check_finite, resolve
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model

MAX_SHARD_BYTES = 5 * 10**9  # the hub's and transformers' default


def save(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    format: str = "huggingface",
    layout: str = "source",
    uneven: str = "per_layer",
    dtype: str = "bfloat16",
    quantize: str = "none",
    group_size: int | None = None,
    symmetric: bool = True,
    rolled_positions: bool = False,
    imatrix: Importance | None = None,
    storage: Storage | None = None,
    overwrite: bool = False,
    plan: Plan | None = None,
    name: str | None = None,
    reconstructed: bool = False,
    recovered: bool = False,
    benchmarks: Sequence[Sequence[str]] = (),
) -> None:
    """Write a model as a Hugging Face folder, or as GGUF files in one, that appears whole or not at all.

    The first process writes; where arrays are split over processes, every process must call it.

    Args:
      model: the model; adapters must be merged (`recovery.merge_lora`).
      out_dir: the new folder.
      source_dir: the folder that the model came from: spelling of the keys, config fields that we do not know,
        tokenizer, processor, chat template, generation config, and tensors that are not computed with, come from it.
      format: "huggingface", or "gguf": the files that llama.cpp loads, of the decoder with its tokenizer and of tower
        and projector, with a model card.
      layout: "source", or "transformers": original LLaVA, Bunny and InternVL-Chat become stock classes of transformers
        with tower, tokenizer, processor and chat template (the same as "source" for a folder that is in it already).
      uneven: layers of unequal width: "per_layer" writes true sizes and, in a layout of transformers, the file that
        loads them in PyTorch; "pad" adds zero heads and neurons (the same function in stock transformers, no savings);
        "refuse" raises. GGUF: "per_layer" where llama.cpp has an architecture with such widths, else it raises.
      dtype: of the weights: float32, bfloat16, float16, or "source" (each tensor's own; GGUF: the embedding's).
      quantize: how the decoder's matrices are rounded, or "none". GGUF: "q8_0", "q5_1" or "q4_0", in blocks of 32
        values of a row. Folders, in the compressed-tensors format: "w8a16", "w4a16", or "w8a8", whose activations
        engines round as well.
      group_size: folders: how many values of a row share a scale, 128, 64 or 32; None: a row with 8 bits, and with 4
        the largest that divides every row (else 32, and what that does not divide is not rounded, as the card says).
      symmetric: folders: False gives each group a zero point.
      rolled_positions: GGUF: the position table of a tower with a class token as builds of llama.cpp that put it last
        need it (ggml-org/llama.cpp#25814); wrong for all others.
      imatrix: GGUF that is not quantised: what llama.cpp's quantiser is to weigh channels by (`importance`), written
        beside as imatrix-NAME.gguf_file.
      storage: the format that weights are written in, for those that it holds, in place of one by `quantize`; without
        both they are plain tensors, whatever the source's format is.
      overwrite: replace an existing model folder.
      plan: the prune plan, written beside the weights as plan.json.
      name, reconstructed, recovered: for the model card: the unpruned model's name (None: `source_dir`'s), and whether
        weights were solved for (`reconstruct`), and trained, after pruning.
      benchmarks: for the model card: name, unpruned score, this model's, retained in % and its interval, of every
        evaluation set, as text.

    Raises:
      UserError: out_dir exists, source_dir is not this model's, options do not fit, weights are not finite, or the
        disk is full.
    """
    out, source = Path(out_dir), resolve(source_dir)
    spread = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in flatten(model.params).values())
    rounding: dict[str, Any] = {"quantize": quantize, "group_size": group_size, "symmetric": symmetric}
    check_options(model.cfg, format=format, layout=layout, uneven=uneven, dtype=dtype, **rounding)
    check_imatrix(imatrix is not None, format, quantize)
    name = name or model_name(source)
    steps = [step for step, so in (("reconstructed", reconstructed), ("recovered", recovered)) if so]
    card = functools.partial(write_card, cfg=model.cfg, name=name, steps=steps, benchmarks=benchmarks)
    options: dict[str, Any] = {"uneven": uneven, "dtype": dtype}
    if format == "gguf":
        options |= {"quantize": quantize, "rolled_positions": rolled_positions}
        export = _gguf(model, source, plan, name, card, imatrix, options)
    else:
        rounded = storage or (None if quantize == "none" else rounding)
        export = _folder(model, source, plan, card, layout=layout, storage=rounded, **options)

    def check() -> None:
        check_target(out, source, overwrite)
        check_space(out, sum(tensor.n_bytes for tensor in export.tensors))

    if spread:
        on_process_zero(check)
    elif is_main_process():
        check()
    if is_main_process():
        with atomic_folder(out) as folder:
            export.write(folder)
    if spread:
        for tensor in () if is_main_process() else export.tensors:
            tensor.fetch()  # gathering what is split over processes takes all of them, in the same order
        multihost_utils.sync_global_devices(f"saved {out}")


@dataclass(frozen=True)
class _Export:
    """What is to be written: every tensor, in the order in which `write` fetches them."""

    tensors: list[Tensor]
    write: Callable[[Path], None]


def _folder(
    model: Model,
    source: Path,
    plan: Plan | None,
    card: Callable[..., None],
    *,
    layout: str,
    uneven: str,
    dtype: str,
    storage: Storage | Mapping[str, Any] | None,
) -> _Export:
    """A Hugging Face folder; `storage`: or how to make one that suits what is written (`make_storage`)."""
    target = make_target(model.cfg, source, layout, uneven, dtype)
    if isinstance(storage, Mapping):
        storage = make_storage(target.cfg, target.family, **storage)
    tensors = make_tensors(model, target, Checkpoint(source), dtype, storage)
    if storage is not None:
        settings = storage.to_config({tensor.key: tensor.shape for tensor in tensors})
        target = dataclasses.replace(target, config=target.config | {"quantization_config": settings})

    def write(folder: Path) -> None:
        write_weights(tensors, folder, MAX_SHARD_BYTES)
        write_files(target, model.cfg, source, folder, plan)
        loading = loading_of(folder, model.cfg, target.cfg, target.config)
        if isinstance(storage, CompressedTensors):
            loading = f"{loading}\n\n{quantized_loading(storage, target.cfg, target.family, dtype)}"
        card(folder, loading=loading)

    return _Export([*itertools.chain(*split_shards(tensors, MAX_SHARD_BYTES))], write)


def _gguf(
    model: Model,
    source: Path,
    plan: Plan | None,
    name: str,
    card: Callable[..., None],
    imatrix: Importance | None,
    options: dict[str, Any],
) -> _Export:
    """GGUF files with a card."""
    called = f"{name}-pruned" if plan is not None or os.path.lexists(source / "plan.json") else name
    models = make_gguf(model, source, name=called, **options)
    beside = [] if imatrix is None else [imatrix_file(imatrix, models[0], model.cfg, options["uneven"])]
    files = [*models, *beside]

    def write(folder: Path) -> None:
        for one in files:
            write_gguf(one, folder)
        copy_always(source, folder, plan)
        card(folder, loading=gguf_loading(models, model.cfg, *beside), library="gguf")

    return _Export([tensor for one in files for tensor in one.tensors], write)


def make_tensors(
    model: Model, target: Target, source: Checkpoint, dtype: str, storage: Storage | None = None
) -> list[Tensor]:
    """Every tensor of the new folder, its blocks padded to those of the target.

    In the source's layout the model's own come under the source's spelling of their keys, where it has them, then those
    of the source that are not computed with.

    Raises:
      UserError: the source does not hold a tensor of the model.
    """
    flat, family = flatten(model.params), family_of(model.cfg)
    spelling = {template(family.canonical(key)): (template(key), entry.dtype) for key, entry in source.entries.items()}
    before = {slot.name: slot for slot in make_slots(model.cfg, family)}
    after = by_key(make_slots(target.cfg, target.family))
    placed = {part.name for parts in after.values() for part in parts}
    homeless = [slot for name, slot in before.items() if name not in placed]
    if homeless:
        key = homeless[0].key
        raise UserError(f"{source.folder}: has no tensor {key}: is it the folder that this model came from?")
    head = tied_head(target.cfg, target.family)
    if head in spelling and not target.converts:  # some tied checkpoints hold the embedding twice
        after[head] = next(parts for parts in after.values() if parts[0].path == "text/embed_tokens/weight")
    weights: list[tuple[str, Tensor]] = []
    for key, parts in after.items():
        first = before[parts[0].name]
        held = spelling.get(template(first.key))
        if held is None and family.separate_vision and first.path.startswith("vision/"):
            if not target.converts:
                continue  # the tower stays in its own folder
            held = (key, file_name(flat[first.path].dtype.name))
        if held is None:
            raise UserError(f"{source.folder}: has no tensor {first.key}: is it the folder that this model came from?")
        if target.converts:
            spelled, stored = stock_tower_key(key, vision_of(target.cfg)), held[1]
        else:
            spelled, stored = spelling.get(template(key), (template(key), held[1]))
            spelled = spelled.replace("{}", str(parts[0].layer))
            stored = source.entries[spelled].dtype if spelled in source.entries else stored
        stored = stored if dtype == "source" else file_name(dtype)
        pairs = [(before[part.name], part) for part in parts]
        weights.append((parts[0].name, _weight(spelled, stored, pairs, model.cfg, target.cfg, flat)))
    if target.converts:
        others = _constants(target.cfg, weights[0][1].dtype)
    else:
        others = _carried(source, set(after), target, family)
    tensors = [tensor for _, tensor in weights] if storage is None else encoded(weights, storage)
    return tensors + others


def _weight(
    key: str,
    dtype: str,
    pairs: list[tuple[Slot, Slot]],
    old: ModelConfig,
    new: ModelConfig,
    flat: Mapping[str, Any],
) -> Tensor:
    """One tensor of the new folder from its parameters, each as (slot in the model, slot in the folder)."""

    def fetch_part(before: Slot, after: Slot) -> np.ndarray:
        array = to_host(flat[before.path], before.index)
        if before.shape != after.shape:
            if before.layer is not None:
                shapes = [cfg.stack(before.part).layers[before.layer] for cfg in (old, new)]
                array = pad_tensor(array, before.axes, *shapes)
            else:
                array = more_words(array, before.axes, new.text.vocab_size)
        with np.errstate(over="ignore"):  # reported with the tensor's name instead
            return array.astype(WEIGHT_DTYPES[dtype], copy=False)

    parts = [(flat[before.path], before.index) for before, _ in pairs]
    extent = extent_of(parts, dtype) if all(before.shape == after.shape for before, after in pairs) else None
    check = functools.partial(check_finite, what=f"{origin(*parts[0]) or key}, to be written as {dtype},")
    fetch = lambda: join_tensor([fetch_part(*pair) for pair in pairs])  # noqa: E731
    return weight(key, dtype, pairs[0][1].hf_shape, fetch, extent, check)


def _constants(cfg: ModelConfig, dtype: str) -> list[Tensor]:
    """Weights that a class holds and never uses."""
    tensors = []
    for key, (shape, value) in stock_tower_constants(vision_of(cfg)).items():
        fetch = functools.partial(np.full, shape, value, WEIGHT_DTYPES[dtype])
        tensors.append(weight(key, dtype, shape, fetch, None, lambda array: None))
    return tensors


def _carried(source: Checkpoint, known: set[str], target: Target, family: Family) -> list[Tensor]:
    """Tensors of the source that are not computed with, byte for byte; not those of layers that are gone."""
    cfg = target.cfg
    ends = {"text": len(cfg.text.layers)} | ({"vision": cfg.vision.n_layers_total} if cfg.vision is not None else {})
    prefixes = {stack: block_prefix(stack, cfg, family) for stack in ends}
    tensors = []
    for key, entry in source.entries.items():
        name = family.canonical(key)
        if name in known or not family.is_ignored(name) or is_left_out(name, target.config):
            continue
        numbers = {stack: block_number(name, prefix) for stack, prefix in prefixes.items()}
        if all(number is None or number < ends[stack] for stack, number in numbers.items()):
            extent = entry.extent(0, entry.n_bytes)
            tensors.append(Tensor(key, entry.dtype, entry.shape, entry.n_bytes, entry.raw, extent))
    return tensors
