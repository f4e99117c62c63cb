"""Writing of a model in an export format, and comparison of the result with the model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from vlmprune_jax.base.atomic import atomic_folder, check_space, check_target
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.io.checkpoints.read import resolve
from vlmprune_jax.io.exports.card import CardFacts, model_name, write_card
from vlmprune_jax.io.exports.formats import Comparison, Origin, choose_format
from vlmprune_jax.io.exports.target import copy_always
from vlmprune_jax.io.exports.vocabulary import export_files


def save(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path | None = None,
    format: str = "huggingface",
    overwrite: bool = False,
    plan: PrunePlan | None = None,
    max_image_tokens: int | None = None,
    **options: Any,
) -> None:
    """Write a model in an export format; the output folder appears only once it is complete.

    `save(model, "DIR/out", uneven="pad", dtype="float32")`, or `save(model, "DIR/out", format="gguf", quantize="q8_0")`

    Process 0 writes. If arrays are split over processes, every process must call this function.

    Args:
      model: the model; adapters must be merged (`recovery.trainable.merge_lora`).
      out_dir: the new folder.
      source_dir: folder whose tokenizer, processor and unused tensors are copied (None = where the model was loaded).
      format: name in `vp.formats`: "huggingface" (with `quantize`, its matrices are integers), or "gguf" (llama.cpp).
      overwrite: replace an existing model folder.
      plan: the prune plan, written as plan.json and used to trim the tokenizer (None = as `apply_plan` pruned it).
      max_image_tokens: maximum tokens per image in the processor files (None = as in `source_dir`).
      **options: options of the format, which are the settings `export.NAME` of a config, such as `dtype`, `layout`,
        `uneven` and `quantize`; in Python also `mtp_dir`, `storage` (the result of `vp.gptq`) and `imatrix` (that of
        `vp.imatrix`); and the fields of `CardFacts`, such as `name` and `license`.

    Raises UserError if out_dir exists, source_dir is unknown or belongs to another model, an option is invalid, the
    format cannot hold a weight, or the disk is full.
    """
    source_dir, plan = model.source if source_dir is None else source_dir, model.plan if plan is None else plan
    if source_dir is None:
        raise UserError("vp.save: source_dir is not set, and the model was not loaded from a folder: pass source_dir=")
    if model.cfg.lora is not None:
        raise UserError("the model has unmerged LoRA adapters: merge them first (recovery.merge_lora)")
    facts = CardFacts(**{x.name: options.pop(x.name) for x in dataclasses.fields(CardFacts) if x.name in options})
    source, out, (chosen, settings) = resolve(source_dir), Path(out_dir), choose_format(format, options)
    split = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in flatten(model.params).values())
    with export_files(source, model.cfg, None if plan is None else plan.vocabulary, max_image_tokens) as files:
        contents = chosen.prepare(model, _origin(source, files, facts.name, plan), settings)

        def check() -> None:
            check_target(out, source, overwrite)
            check_space(out, sum(tensor.n_bytes for tensor in contents.tensors))

        if split:
            on_process_zero(check)
        elif is_main_process():
            check()
        if is_main_process():
            with atomic_folder(out) as folder:
                contents.write(folder)
                copy_always(source, folder, plan)
                write_card(folder, model.cfg, facts, source, loading=contents.card(folder), library=chosen.library)
        if split:
            for tensor in () if is_main_process() else contents.tensors:
                tensor.fetch()  # gathering split arrays takes all processes, in the same order
            multihost_utils.sync_global_devices(f"saved {out}")


def _origin(source: Path, files: Path, name: str | None, plan: PrunePlan | None) -> Origin:
    name, pruned = name or model_name(source), plan is not None or os.path.lexists(source / "plan.json")
    planned = {} if plan is None else plan.options.get("second", plan.options)  # of two plans, the newer
    chips = planned.get("tensor_parallel", 1) if "vllm_tpu" in planned.get("loads_in", ()) else 0
    return Origin(files, f"{name}-pruned" if pruned else name, None, source, chips, pruned)


def check_saved(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    vision_dir: str | Path | None = None,
    format: str = "huggingface",
    max_image_tokens: int | None = None,
    plan: PrunePlan | None = None,
    **options: Any,
) -> Comparison:
    """Compare the folder that `save` wrote with the model (collective).

    `vision_dir` is the vision tower's folder, for an original-layout LLaVA whose folder does not include the tower.

    Raises UserError if the folder cannot be loaded, or its outputs differ from the model's.
    """
    source, tower = resolve(source_dir), None if vision_dir is None else resolve(vision_dir)
    chosen, settings = choose_format(format, options)
    vocabulary = None if plan is None else plan.vocabulary
    with export_files(source, model.cfg, vocabulary, max_image_tokens) as files:
        return chosen.check(model, Path(out_dir), Origin(files, model_name(source), tower, source), settings)
