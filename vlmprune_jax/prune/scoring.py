"""`score`: one entry point for all criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlmprune_jax.checks import one_of, with_defaults
from vlmprune_jax.distributed.journal import Journal
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.criteria.block_influence import angular_distance, block_influence
from vlmprune_jax.prune.criteria.magnitude import magnitude
from vlmprune_jax.prune.criteria.random import random_scores
from vlmprune_jax.prune.criteria.taylor import taylor
from vlmprune_jax.prune.fingerprint import fingerprint
from vlmprune_jax.prune.scores import Scores

# Options of every criterion with their defaults; reductions are the reference scripts' own.
CRITERIA: Mapping[str, Mapping[str, Any]] = {
    "block_influence": {"reference_compat": False},
    "angular": {"layers_removed": None, "reference_compat": False},
    "taylor": {"variant": "param_first", "reduction": "sum", "gqa": "groups", "rows_per_step": None},
    "l1": {"reduction": "mean", "gqa": "groups"},
    "l2": {"reduction": "mean", "gqa": "groups"},
    "random": {"seed": 0, "gqa": "groups"},
}


def score(
    model: Model,
    batches: Iterable[Any] | None = None,
    *,
    criterion: str,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
    **options: Any,
) -> Scores:
    """Importances of layers ("block_influence", "angular"), of heads and neurons ("taylor", "l1", "l2"), or "random".

    Args:
      model: on one device or on a mesh; the numbers are the same.
      batches: calibration batches, mappings of arrays or objects with `.arrays`: input_ids and attention_mask
        int[batch, seq], with a tower pixel_values float[batch, images, 3, height, width], for taylor labels
        int[batch, seq] (not shifted, -100 where nothing is to be learnt); l1, l2 and random look at none.
      progress: called with the number of finished batches (block_influence, angular) or layers (taylor).
      journal: where block_influence and angular keep what each batch gave, to continue after an interruption.
      options: see `CRITERIA` and the functions of `vlmprune_jax.prune.scores`.

    Raises:
      UserError: an unknown criterion or option (with a suggestion), or batches that do not fit the model.
    """
    one_of("criterion", criterion, tuple(CRITERIA))
    settings = with_defaults(f"criterion {criterion!r}", options, CRITERIA[criterion])
    widths_only = criterion in ("taylor", "l1", "l2")
    if widths_only and model.cfg.lora is not None:
        raise UserError(f"criterion {criterion!r} scores plain weights: merge the LoRA adapters first")
    if criterion in ("block_influence", "angular", "taylor") and batches is None:
        raise UserError(f"criterion {criterion!r} needs calibration batches")
    importance = heads = mlp = None
    if criterion == "block_influence":
        importance = block_influence(model, batches or (), progress=progress, journal=journal, **settings)
    elif criterion == "angular":
        if settings["layers_removed"] is None:
            raise UserError("criterion 'angular' needs layers_removed= (the number of consecutive layers to remove)")
        importance = angular_distance(model, batches or (), progress=progress, journal=journal, **settings)
    elif criterion == "taylor":
        heads, mlp = taylor(model, batches or (), progress=progress, **settings)
    elif criterion == "random":
        importance, (heads, mlp) = random_scores(model.cfg, **settings)
    else:
        heads, mlp = magnitude(model, power=1 if criterion == "l1" else 2, **settings)
    return Scores(criterion, fingerprint(model), settings, importance, heads, mlp)
