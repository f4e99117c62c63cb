"""Model -> Hugging Face folder, in the layout and with the files of the folder it came from."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.distributed.mesh import is_main_process, process_count
from vlmprune_jax.errors import UserError
from vlmprune_jax.families import Family, detect, family_of
from vlmprune_jax.hf.atomic import atomic_folder, check_space, check_target
from vlmprune_jax.hf.card import model_card
from vlmprune_jax.hf.files import WEIGHT_DTYPES, Checkpoint, read_json
from vlmprune_jax.hf.layout import Slot, block_number, make_slots, template, tied_head
from vlmprune_jax.hf.per_layer import with_loader, without_loader, write_loader
from vlmprune_jax.hf.read import DTYPES, check_finite, resolve
from vlmprune_jax.hf.tensors import Tensor, extent_of, to_host, weight, write_weights
from vlmprune_jax.hf.uneven import pad_tensor, widest
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model

LAYOUTS = ("source", "transformers")
UNEVEN = ("per_layer", "pad", "refuse")
MAX_SHARD_BYTES = 5 * 10**9  # the hub's and transformers' default
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What makes a folder usable beside its weights and config.json.
CARRIED_FILES = (
    "*token*.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
    "generation_config.json", "*processor_config.json", "chat_template*", "*.jinja",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "plan.json",
)  # fmt: skip


def save(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    layout: str = "source",
    uneven: str = "per_layer",
    dtype: str = "bfloat16",
    overwrite: bool = False,
    plan: Any = None,
) -> None:
    """Write a model as a Hugging Face folder that appears whole or not at all.

    In a multi-process run every process must call it; the first one writes.

    Args:
      model: the model; adapters must be merged (`recover.merge_lora`).
      out_dir: the new folder.
      source_dir: the folder that the model came from: spelling of the keys, config fields that we do not know,
        tokenizer, processor, chat template, generation config, and tensors that are not computed with, come from it.
      layout: "source", or "transformers" (the same for a folder that stock transformers loads already).
      uneven: layers of unequal width: "per_layer" writes true sizes (readable by this package), "pad" adds zero heads
        and neurons (the same function in stock transformers, no savings), "refuse" raises.
      dtype: of the weights: float32, bfloat16, float16, or "source" (each tensor's own).
      overwrite: replace an existing model folder.
      plan: the prune plan, written beside the weights as plan.json.

    Raises:
      UserError: out_dir exists, source_dir is not this model's, options do not fit, weights are not finite, or the
        disk is full.
    """
    _check_options(model.cfg, layout, uneven, dtype)
    target, source = Path(out_dir), resolve(source_dir)
    check_target(target, source, overwrite)
    family, config = family_of(model.cfg), read_json(source / "config.json")
    if detect(config, str(source / "config.json")) is not family:
        raise UserError(f"{source}: is not the folder that this {family.name} ({family.layout} layout) model came from")
    layers = model.cfg.text.layers
    cfg = model.cfg.with_layers((widest(layers),) * len(layers)) if uneven == "pad" else model.cfg
    written = _with_dtype(family.to_hf(cfg, without_loader(config)), dtype)
    ships_loader = family.layout == "transformers" and len(set(cfg.text.layers)) > 1
    if ships_loader:
        written = with_loader(written)
    tensors = make_tensors(model, cfg, family, Checkpoint(source), dtype)
    if is_main_process():
        check_space(target, sum(tensor.n_bytes for tensor in tensors))
        with atomic_folder(target) as folder:
            write_weights(tensors, folder, MAX_SHARD_BYTES)
            _write_json(folder / "config.json", written)
            _copy_files(source, folder)
            if ships_loader:
                write_loader(folder)
            if plan is not None:
                plan.to_json(folder / "plan.json")
            card = model_card(model.cfg, cfg, written, source.name, folder / "plan.json")
            (folder / "README.md").write_text(card, encoding="utf-8")
    else:
        for tensor in tensors:  # gathering what is split over processes takes all of them
            tensor.fetch()
    if process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {target}")


def _check_options(cfg: ModelConfig, layout: str, uneven: str, dtype: str) -> None:
    options = (("layout", layout, LAYOUTS), ("uneven", uneven, UNEVEN), ("dtype", dtype, (*DTYPES, "source")))
    for name, value, known in options:
        if value not in known:
            raise UserError(f"{name} {value!r} is not one of {', '.join(known)}")
    if layout == "transformers" and cfg.layout != "transformers":
        raise UserError(f'layout "transformers" is not available for a {cfg.layout}-layout folder: use layout "source"')
    if cfg.lora is not None:
        raise UserError("the model has unmerged LoRA adapters: merge them first (recover.merge_lora)")
    if uneven == "refuse" and len(set(cfg.text.layers)) > 1:
        raise UserError(
            "the layers have unequal widths, which stock transformers cannot load: prune all layers alike "
            '(prune.layers="all"), or export with uneven="pad" (same function, no savings) or "per_layer" (true sizes)'
        )


def make_tensors(model: Model, cfg: ModelConfig, family: Family, source: Checkpoint, dtype: str) -> list[Tensor]:
    """Every tensor of the new folder, its blocks padded to those of `cfg`.

    The model's own come under the source's spelling of their keys, then those of the source that are not computed with.

    Raises:
      UserError: the source does not hold a tensor of the model.
    """
    flat = flatten(model.params)
    spelling = {template(family.canonical(key)): (template(key), entry.dtype) for key, entry in source.entries.items()}
    before = {slot.key: slot for slot in make_slots(model.cfg, family)}
    slots = make_slots(cfg, family)
    head = tied_head(cfg, family)
    if head in spelling:  # some tied checkpoints hold the embedding twice
        embedding = next(slot for slot in slots if slot.path == "text/embed_tokens/weight")
        before[head] = before[embedding.key]
        slots.append(Slot(head, *list(vars(embedding).values())[1:]))
    tensors = []
    for slot in slots:
        if template(slot.key) not in spelling:
            if family.separate_vision and slot.path.startswith("vision/"):
                continue  # the tower stays in its own folder
            raise UserError(f"{source.folder}: has no tensor {slot.key}: is it the folder that this model came from?")
        key, stored = spelling[template(slot.key)]
        key = key.replace("{}", str(slot.layer))
        if dtype == "source":
            stored = source.entries[key].dtype if key in source.entries else stored
        else:
            stored = _NAMES[dtype]
        tensors.append(_weight(key, stored, before[slot.key], slot, model.cfg, cfg, flat))
    known = {slot.key for slot in slots}
    return tensors + _carried(source, known, cfg, family)


def _weight(
    key: str, dtype: str, before: Slot, after: Slot, old: ModelConfig, new: ModelConfig, flat: dict[str, Any]
) -> Tensor:
    def fetch() -> np.ndarray:
        array = to_host(flat[before.path], before.index)
        if padded:
            array = pad_tensor(array, before.axes, old.text.layers[layer], new.text.layers[layer])
        with np.errstate(over="ignore"):  # reported with the tensor's name instead
            return array.astype(WEIGHT_DTYPES[dtype], copy=False)

    layer = before.layer or 0
    padded = before.shape != after.shape and before.layer is not None
    extent = None if padded else extent_of(flat[before.path], before.index, dtype)
    check = functools.partial(check_finite, what=f"{key}, to be written as {dtype},")
    return weight(key, dtype, after.hf_shape, fetch, extent, check)


def _carried(source: Checkpoint, known: set[str], cfg: ModelConfig, family: Family) -> list[Tensor]:
    """Tensors of the source that are not computed with, byte for byte; not those of decoder layers that are gone."""
    tensors = []
    for key, entry in source.entries.items():
        name = family.canonical(key)
        if name in known or not family.is_ignored(name):
            continue
        number = block_number(name, "text", cfg, family)
        if number is None or number < len(cfg.text.layers):
            n_bytes, fetch = entry.end - entry.begin, functools.partial(source.raw, key)
            tensors.append(Tensor(key, entry.dtype, entry.shape, n_bytes, fetch, source.extent(key, 0, n_bytes)))
    return tensors


def _copy_files(source: Path, folder: Path) -> None:
    for pattern in CARRIED_FILES:
        for path in source.glob(pattern):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config naming the weights' dtype under whichever of both names (`torch_dtype`, `dtype`) the source has."""
    if dtype == "source":
        return config
    result = dict(config)
    for name in ("text_config", "vision_config"):
        if isinstance(result.get(name), dict):
            result[name] = {k: dtype if k in ("dtype", "torch_dtype") else v for k, v in result[name].items()}
    names = [name for name in ("dtype", "torch_dtype") if name in result] or ["torch_dtype"]
    return result | dict.fromkeys(names, dtype)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
