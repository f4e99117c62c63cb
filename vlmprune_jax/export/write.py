"""Writing of a model in an export format, and comparison of the result with the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.export.card import license_of, model_name, write_card
from vlmprune_jax.export.format import Comparison, Origin
from vlmprune_jax.export.formats import choose_format
from vlmprune_jax.export.target import Plan, copy_always
from vlmprune_jax.hf.disk.atomic import atomic_folder, check_space, check_target
from vlmprune_jax.hf.read import resolve
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model


def save(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    format: str = "huggingface",
    overwrite: bool = False,
    plan: Plan | None = None,
    name: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    reconstructed: bool = False,
    recovered: bool = False,
    benchmarks: Sequence[Sequence[str]] = (),
    **options: Any,
) -> None:
    """Write a model in an export format, by default as a Hugging Face folder. The output appears whole or not at all.

    Process 0 writes. If arrays are split over processes, every process must call this function.

    Args:
      model: the model; adapters must be merged (`recovery.merge_lora`).
      out_dir: the new folder.
      source_dir: the folder that the model came from. Spelling of the keys, unknown config fields, tokenizer,
        processor, chat template, generation config, and tensors that are not computed with are copied from it.
      format: name in `vp.formats`: "huggingface", "compressed-tensors" (integers), or "gguf" (for llama.cpp).
      overwrite: replace an existing model folder.
      plan: the prune plan, written beside the weights as plan.json.
      name: name of the unpruned model on the model card, a hub id if it has one; None takes that of `source_dir`.
      license: license on the model card, as the hub names it; None takes that of `source_dir`'s card.
      datasets: names of the training data on the model card, hub ids if they have one.
      reconstructed, recovered: steps after pruning that the model card names.
      benchmarks: rows of the model card's table, as text: name, unpruned score, score of this model, retained % and
        its interval, of each evaluation set.
      **options: options of the format, named as the settings `export.NAME`: layout, uneven, dtype, quantize,
        group_size, symmetric and rolled_positions, with the same defaults. Results of calibration are objects here:
        storage=vp.gptq(...) for folders, and imatrix=vp.importance(...) for GGUF. `dtype` is "bfloat16" by default,
        as checkpoints are published, whatever type `vp.load` computes in (by default float32, for scores and
        training): dtype="float32" keeps every bit.

    Raises:
      UserError: out_dir exists, source_dir is not this model's, options do not fit, weights are not finite, or the
        disk is full.
    """
    out, source = Path(out_dir), resolve(source_dir)
    chosen, settings = choose_format(format, options)
    if model.cfg.lora is not None:
        raise UserError("the model has unmerged LoRA adapters: merge them first (recovery.merge_lora)")
    name, pruned = name or model_name(source), plan is not None or os.path.lexists(source / "plan.json")
    contents = chosen.prepare(model, Origin(source, f"{name}-pruned" if pruned else name), settings)
    split = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in flatten(model.params).values())

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
            steps = [step for step, done in (("reconstructed", reconstructed), ("recovered", recovered)) if done]
            loading = contents.card(folder)
            write_card(
                folder,
                model.cfg,
                name,
                steps,
                loading=loading,
                library=chosen.library,
                license=license_of(source) if license is None else {"license": license},
                datasets=datasets,
                benchmarks=benchmarks,
            )
    if split:
        for tensor in () if is_main_process() else contents.tensors:
            tensor.fetch()  # gathering split arrays takes all processes, in the same order
        multihost_utils.sync_global_devices(f"saved {out}")


def check_saved(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path,
    vision_dir: str | Path | None = None,
    format: str = "huggingface",
    **options: Any,
) -> Comparison:
    """Compare a folder that `save` wrote with the model, given the same arguments; every process must call it.

    `vision_dir` is the vision tower's folder, for an original-layout LLaVA without its own.

    Raises:
      UserError: the folder cannot be loaded, or its outputs differ from the model's.
    """
    source, tower = resolve(source_dir), None if vision_dir is None else resolve(vision_dir)
    chosen, settings = choose_format(format, options)
    return chosen.check(model, Path(out_dir), Origin(source, model_name(source), tower), settings)
