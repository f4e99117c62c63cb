"""File surgery: apply a plan to a checkpoint, tensor by tensor, without an accelerator or the model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmprune_jax.export.write import save
from vlmprune_jax.hf.lazy import open_model
from vlmprune_jax.hf.read import resolve
from vlmprune_jax.plans.plan import PrunePlan
from vlmprune_jax.prune.surgery import apply_plan
from vlmprune_jax.prune.token_sources import Source


def prune_folder(
    source_dir: str | Path,
    plan: PrunePlan,
    out_dir: str | Path,
    *,
    vision_dir: str | Path | None = None,
    dtype: str = "source",
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Prune a checkpoint file by file without loading it; bytes equal `save(apply_plan(load(...), plan), ...)`.

    The plan is applied to arrays that stay in their files. Tensors that the plan does not change are copied in blocks;
    other tensors are read, indexed and written one at a time. Every block is read back and compared. No array is put on
    a device, and no accelerator is started.

    In a multi-process run, every process must call this function; the first process writes.

    Args:
      source_dir: the folder (or hub id) of the model that the plan is for.
      plan: the prune plan; its fingerprint is compared with weights sampled from the files.
      out_dir: the new folder, which appears only once it is complete.
      vision_dir: folder of a separate vision tower, as in `load`.
      dtype: data type of the weights; "source" keeps the data type of every tensor.
      overwrite, **options: as in `save`, for example format, layout, uneven and quantize.

    Raises UserError under the conditions of `load`, `apply_plan` and `save`, and if a disk returns other bytes than
    were written.
    """
    source = resolve(source_dir)
    model = open_model(source, None if vision_dir is None else resolve(vision_dir))
    pruned = apply_plan(model, plan)
    if plan.vocabulary is not None:
        Source.of(source, model.cfg).check(plan.vocabulary)
    save(pruned, out_dir, dtype=dtype, overwrite=overwrite, **options)
