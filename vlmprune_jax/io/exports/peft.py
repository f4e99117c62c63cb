"""Export of trained adapters as a folder that `peft` loads onto the pruned model's Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.base.atomic import atomic_folder
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.links import real_path
from vlmprune_jax.base.processes import is_main_process
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.lazy import to_host
from vlmprune_jax.core.models.params import flatten, layer_axes
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.recovery.trainable import LORA_SUFFIXES, projection_names
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, constant, write_shard
from vlmprune_jax.io.checkpoints.layout import Slot, by_key, make_slots
from vlmprune_jax.io.checkpoints.read import read_fields
from vlmprune_jax.io.exports.card import model_name, render
from vlmprune_jax.io.exports.vocabulary import read_tokenizer, vocabulary_digest
from vlmprune_jax.io.exports.weights import Weights
from vlmprune_jax.io.families import Family, family_of

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
_ROOT = "base_model.model."  # prefix of the wrapped model in peft


class _Adapter(NamedTuple):
    """LoRA adapter of one Hugging Face module, which may fuse several of vlmprune's projections (`members`)."""

    a: np.ndarray  # float32[members * rank, in]
    b: np.ndarray  # float32[out, members * rank]
    members: int


def write_adapter(model: Model, out_dir: Path, *, base_dir: Path, trained: Collection[str]) -> None:
    """Write trained LoRA adapters in peft's format, with a model card on how to load them.

    The config has the base model's path relative to `out_dir`, so that a folder with both can be moved. In a
    multi-process run, every process must call this function; process 0 writes.

    Args:
      model: the model with its adapters, not merged.
      out_dir: the new folder.
      base_dir: folder of the model that was trained.
      trained: flat paths of all trained parameters; other trained modules (the projector) are written in full.

    Raises UserError if the model has no adapters, the vision tower was trained, or `base_dir` has no config.
    """
    lora = model.cfg.lora
    if lora is None:
        raise UserError(f"{out_dir}: the model has no LoRA adapters to write: train with merge_lora=False")
    plain = ModelConfig(**{**vars(model.cfg), "lora": None})
    check_adapters(plain, lora.targets)
    family, flat = family_of(plain), flatten(model.params)
    slots, tensors = make_slots(plain, family), list[Tensor]()
    matrices = by_key(slot for slot in slots if slot.path.endswith("/weight"))
    fused = {_module(key, family): _fuse(members, flat) for key, members in matrices.items()}
    adapters = {module: adapter for module, adapter in fused.items() if adapter is not None}
    for module, adapter in adapters.items():
        for name, array in (("lora_A", adapter.a), ("lora_B", adapter.b)):
            tensors.append(constant(f"{_ROOT}{module}.{name}.weight", array))
    whole, parameters = _whole_modules(slots, trained, family), Weights(plain, plain, flat, {x.name: x for x in slots})
    for module, members in whole.items():
        for key, pieces in by_key(members).items():
            tensors.append(parameters.tensor(f"{_ROOT}{module}.{key.rpartition('.')[2]}", pieces, "F32"))
    tensors.sort(key=lambda tensor: tensor.key)
    if not is_main_process():
        for tensor in tensors:
            tensor.fetch()  # gathering split arrays takes all processes, in the same order
    else:
        base, stock = os.path.relpath(real_path(base_dir), real_path(out_dir)), read_fields(base_dir / "config.json")
        classes = [name for name in stock.get("auto_map") or {} if name.startswith("AutoModel")]
        classes += stock.get("architectures") or [] if plain.layout == "transformers" else []
        loader = "AutoModelForCausalLM" if plain.vision is None else next(iter(classes), None)
        config = _config(adapters, list(whole), lora, base, loader)  # no loader: the model needs remote code
        content = read_tokenizer(base_dir)  # an adapter fits only bases with the same vocabulary
        metadata = {} if content is None else {"vocabulary": vocabulary_digest(content)}
        with atomic_folder(Path(out_dir)) as folder:
            write_shard(tensors, folder / WEIGHTS_FILE, **metadata)
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            card = render("adapter", config=config, name=model_name(base_dir), remote="auto_map" in stock)
            (folder / CARD_FILE).write_text(f"{card}\n", encoding="utf-8", errors="backslashreplace")


def check_adapters(cfg: ModelConfig, targets: Collection[str]) -> None:
    """Raise UserError if these projections (() = all) include experts, whose LoRA adapters no engine can load."""
    on_experts = [path for path in layer_axes(cfg) if path.startswith("mlp/experts/")]
    names = {path.split("/")[-2] for path in on_experts} & {*(targets or projection_names(cfg))}
    if names:
        raise UserError(
            f"recover.save_adapter: vLLM drops or refuses adapters on experts ({', '.join(sorted(names))}): export the "
            "merged model, or set recover.lora.targets to projections of the attention"
        )


def _fuse(members: Sequence[Slot], flat: Mapping[str, Any]) -> _Adapter | None:
    """Fuse LoRA adapters of projections that share a tensor: stacked A, block-diagonal B (same function)."""
    pairs: list[tuple[Slot, np.ndarray, np.ndarray]] = []
    for slot in members:
        owner = slot.path.rpartition("/")[0]
        if f"{owner}/lora_a" in flat:
            a, b = (to_host(flat[f"{owner}/{suffix}"], slot.place).astype(np.float32) for suffix in LORA_SUFFIXES)
            pairs.append((slot, a.reshape(len(a), -1), b.reshape(-1, b.shape[-1])))
    if not pairs:
        return None
    stacked = np.concatenate([a for _, a, _ in pairs])
    blocks, column = np.zeros((members[0].hf_shape[0], len(stacked)), np.float32), 0
    for slot, a, b in pairs:
        blocks[slot.start : slot.stop, column : column + len(a)] = b
        column += len(a)
    return _Adapter(stacked, blocks, len(pairs))


def _whole_modules(slots: Sequence[Slot], trained: Collection[str], family: Family) -> dict[str, list[Slot]]:
    """Return {module name: tensors} of all modules with trained parameters other than adapters."""
    plain = {path for path in trained if not path.endswith(LORA_SUFFIXES)}
    vision = sorted(path for path in plain if path.startswith("vision/"))
    if vision:
        raise UserError(
            f"adapter: cannot contain a trained vision tower ({vision[0]}): export the merged model instead"
        )
    modules: dict[str, list[Slot]] = {}
    for slot in slots:
        modules.setdefault(_module(slot.key, family), []).append(slot)
    return {name: members for name, members in modules.items() if any(slot.path in plain for slot in members)}


def _module(key: str, family: Family) -> str:
    """Return the name that stock transformers gives to a tensor's module."""
    name = key.rpartition(".")[0]
    for pattern, replacement in family.modules:
        name = re.sub(pattern, replacement, name)
    return name


def _config(
    adapters: Mapping[str, _Adapter], whole: Sequence[str], lora: LoraConfig, base: str, loader: str | None
) -> dict[str, Any]:
    """Return peft's adapter_config.json; target modules are a regex over full names.

    The Auto classes of peft find the class of a decoder by `task_type`, and that of a vision-language model by
    `auto_mapping`.
    """
    targets = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module)) for module in adapters)
    members = {module.rpartition(".")[2]: adapter.members for module, adapter in adapters.items()}
    fused = {name: count for name, count in members.items() if count > 1}
    causal = loader == "AutoModelForCausalLM"
    mapping = None if causal or loader is None else {"base_model_class": loader, "parent_library": "transformers"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "auto_mapping": mapping,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": "|".join(targets),
        "modules_to_save": list(whole) or None,
        # The scale is alpha / r: both are multiplied by the number of fused projections.
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: count * lora.alpha for name, count in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
