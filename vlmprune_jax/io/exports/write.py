"""Writing of a model in an export format, and comparison of the result with the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from vlmprune_jax.io.checkpoints.disk.storage import Storage
from vlmprune_jax.io.checkpoints.read import resolve
from vlmprune_jax.io.exports.card import model_name, write_card
from vlmprune_jax.io.exports.format import Comparison, Format, Importance, Origin
from vlmprune_jax.io.exports.formats import choose_format
from vlmprune_jax.io.exports.processor import limited_images
from vlmprune_jax.io.exports.target import copy_always
from vlmprune_jax.io.exports.vocabulary import trimmed_files


def save(
    model: Model,
    out_dir: str | Path,
    *,
    source_dir: str | Path | None = None,
    format: str = "huggingface",
    layout: str = "source",
    uneven: str = "per_layer",
    head_dim: int = 0,
    mtp: str = "drop",
    mtp_dir: str | Path | None = None,
    dtype: str = "bfloat16",
    quantize: str = "none",
    group_size: int | None = None,
    symmetric: bool = True,
    storage: Storage | None = None,
    imatrix: bool | Importance = False,
    rolled_positions: bool = False,
    max_image_tokens: int | None = None,
    overwrite: bool = False,
    plan: PrunePlan | None = None,
    name: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    reconstructed: bool = False,
    recovered: bool = False,
    benchmarks: Sequence[Sequence[str]] = (),
    **options: Any,
) -> None:
    """Write a model in an export format; the output folder appears only once it is complete.

    Process 0 writes. If arrays are split over processes, every process must call this function.

    Args:
      model: the model; adapters must be merged (`recovery.trainable.merge_lora`).
      out_dir: the new folder.
      source_dir: folder whose tokenizer, processor and unused tensors are copied (None = where the model was loaded).
      format: name in `vp.formats`: "huggingface", "compressed-tensors" (integers), or "gguf" (for llama.cpp).
      layout: checkpoint keys and config as in the "source" folder, or as in the stock class of "transformers".
      uneven: layers of unequal width keep their sizes ("per_layer"), are padded ("pad") or refused ("refuse").
      head_dim: channels per head, 4 or 16 times the model's, padded with zeros (0 = the model's); for folders.
      mtp: "drop" the module that predicts several tokens (Qwen3.5), or "cut" (prune) it as the decoder; for folders.
      mtp_dir: folder with the unpruned module for mtp="cut" (None = `source_dir`; pruned folders have none).
      dtype: type of the written weights: "bfloat16", "float16", "float32" (all bits that `vp.load` reads), or "source".
      quantize: "w8a16", "w4a16" or "w8a8" for Hugging Face folders; "q8_0", "q5_1" or "q4_0" for GGUF.
      group_size: values of a row that share a scale, with w8a16 and w4a16 (None = see `help export.group_size`).
      symmetric: False adds zero points to w8a16 and w4a16.
      storage: object that stores quantised weights, such as `vp.gptq(...)`; for Hugging Face folders.
      imatrix: `vp.imatrix(...)`, to write the importance file of llama-quantize as well; for GGUF.
      rolled_positions: True for builds of llama.cpp that put the tower's class token last; for GGUF.
      max_image_tokens: maximum tokens per image in the processor files (None = as in `source_dir`).
      overwrite: replace an existing model folder.
      plan: the prune plan, written as plan.json and used to trim the tokenizer (None = as `apply_plan` pruned it).
      name: name of the unpruned model on the model card, if possible a hub id (None = the name of `source_dir`).
      license: license on the model card, as the hub names it (None = the license on `source_dir`'s card).
      datasets: names of the training data on the model card, if possible hub ids.
      reconstructed, recovered: True if the model card names these steps after pruning.
      benchmarks: rows of the card's table: set, scores of unpruned and this model, retained % and its interval.
      **options: options of a user-defined format.

    Raises:
      UserError: out_dir exists, source_dir is unknown or belongs to another model, an option is invalid, the format
        cannot hold a weight, or the disk is full.
    """
    options |= {"layout": layout, "uneven": uneven, "head_dim": head_dim, "dtype": dtype, "quantize": quantize}
    options |= {"group_size": group_size, "symmetric": symmetric, "storage": storage, "imatrix": imatrix}
    options |= {"rolled_positions": rolled_positions, "mtp": mtp}
    card: dict[str, Any] = {"reconstructed": reconstructed, "recovered": recovered}
    card |= {"license": license, "datasets": datasets, "benchmarks": benchmarks}
    source_dir, plan = model.source if source_dir is None else source_dir, model.plan if plan is None else plan
    if source_dir is None:
        raise UserError("vp.save: source_dir is not set, and the model was not loaded from a folder: pass source_dir=")
    source, chosen = resolve(source_dir), choose_format(format, options)
    with _files(source, plan, max_image_tokens, model) as files:
        origin = Origin(
            files, name or model_name(source), weights=source, mtp=None if mtp_dir is None else resolve(mtp_dir)
        )
        _write(model, Path(out_dir), source, origin, *chosen, overwrite, plan, card)


@contextlib.contextmanager
def _files(source: Path, plan: PrunePlan | None, max_image_tokens: int | None, model: Model) -> Iterator[Path]:
    """Context that yields a folder with the tokenizer, processor and configs for the export."""
    with (
        trimmed_files(source, None if plan is None else plan.vocabulary, model.cfg) as trimmed,
        limited_images(trimmed, max_image_tokens, model.cfg) as files,
    ):
        yield files


def _write(
    model: Model,
    out: Path,
    source: Path,
    origin: Origin,
    chosen: Format,
    settings: Any,
    overwrite: bool,
    plan: PrunePlan | None,
    card: Mapping[str, Any],
) -> None:
    """Write a model in the chosen export format; `card` holds the arguments of `write_card`."""
    if model.cfg.lora is not None:
        raise UserError("the model has unmerged LoRA adapters: merge them first (recovery.merge_lora)")
    name, pruned = origin.name, plan is not None or os.path.lexists(source / "plan.json")
    options = {} if plan is None else plan.options.get("second", plan.options)  # of two plans, the newer
    chips = options.get("tensor_parallel", 1) if "vllm_tpu" in options.get("loads_in", ()) else 0
    origin = replace(origin, name=f"{name}-pruned" if pruned else name, pruned=pruned, tpu_chips=chips)
    contents = chosen.prepare(model, origin, settings)
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
            loading, library = contents.card(folder), chosen.library
            write_card(folder, model.cfg, name, source, loading=loading, library=library, **card)
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
    with _files(source, plan, max_image_tokens, model) as files:
        return chosen.check(model, Path(out_dir), Origin(files, model_name(source), tower, source), settings)
