"""`prune`: load, score, plan and remove in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.reconstruction import reconstruct as repair
from vlmprune_jax.core.prune.scoring import score
from vlmprune_jax.core.prune.surgery import apply_plan
from vlmprune_jax.io.checkpoints.batches import Records, batches
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan


def prune(
    hf_dir: str | Path,
    data: Records | None = None,
    *,
    ratio: float | None = None,
    method: str = "depth",
    images: str | Path | None = None,
    reconstruct: bool = False,
    scoring: ScoreConfig | Mapping[str, Any] | None = None,
    vision_dir: str | Path | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    **options: Any,
) -> Model:
    """Load a model, score it on calibration records, remove what matters least, and return the pruned model.

    `prune("DIR/llava-1.5-7b-hf", "train.json", ratio=0.3, images="images").save("DIR/pruned")`

    The same as `load`, `batches`, `score`, `make_plan` and `apply_plan` with their defaults.

    Args:
      hf_dir: the model's folder, or hub id.
      data: a data file, or its entries, see `batches`. None if no records are needed: for `layers=(3, 4)`, and for
        criteria that only read weights.
      ratio: share of all parameters to remove; `options` may have another target, such as `layers` or `budget`.
      method: "depth" (layers), "width" (heads and neurons), "hybrid" (both) or "experts".
      images: root folder of the image paths in `data`.
      reconstruct: True to repair the remaining weights by least squares on the same records, see `reconstruct`.
      scoring: criteria, number and seed of calibration records, see `ScoreConfig`.
      vision_dir, dtype, mesh: as in `load`.
      options: settings of pruning by name, see `PlanConfig`.

    Raises UserError under the conditions of the functions above, or if records are needed and `data` is None.
    """
    settings = scoring if isinstance(scoring, ScoreConfig) else override(ScoreConfig(), scoring or {}, "prune(scoring)")
    config = override(PlanConfig(), {"ratio": ratio, "method": method, **options}, "prune", offered=False)
    config.check()
    model, records = load(hf_dir, vision_dir=vision_dir, dtype=dtype, mesh=mesh), []
    if data is not None:
        sampled = {"samples": settings.samples, "seed": settings.seed, "batch_size": settings.batch_size}
        records = batches(hf_dir, data, images=images, vision_dir=vision_dir, **sampled)
    if reconstruct and not records:
        raise UserError("prune: reconstruct=True needs calibration records: pass data")
    scores = [
        score(model, records or None, settings, criterion=criterion, stack=stack)
        for stack in (STACKS if config.stack == "both" else (config.stack,))
        for criterion in settings.criteria(config.method)
        if config.needs_scores
    ]
    plan = make_plan(scores or None, model, config)
    pruned = apply_plan(model, plan)
    return repair(pruned, plan, model, records)[0] if reconstruct else pruned
