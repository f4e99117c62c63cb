"""Plans and pruning in which files take part: tokenizers to trim, exports to count, checkpoints to load or cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from jax.sharding import Mesh

from vlmprune_jax.base.budget import UNEVEN, Budget
from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import STACKS, ModelConfig
from vlmprune_jax.core.models.flops import active_params, forward_flops
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model, config_of
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.cost import cache_size
from vlmprune_jax.core.prune.fingerprints import fingerprint
from vlmprune_jax.core.prune.reconstruction import reconstruct as repair
from vlmprune_jax.core.prune.scores import Scores, score
from vlmprune_jax.core.prune.select import plan_pruning, prune_in_steps, unscored
from vlmprune_jax.core.prune.surgery import apply_plan
from vlmprune_jax.io.checkpoints.batches import Records, batches
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.disk.tensors import bytes_on_disk
from vlmprune_jax.io.checkpoints.read import load, open_model, resolve
from vlmprune_jax.io.exports.folder import MAX_SHARD_BYTES, make_tensors
from vlmprune_jax.io.exports.formats import FolderOptions
from vlmprune_jax.io.exports.target import make_target
from vlmprune_jax.io.exports.token_sources import Source, choose_vocabulary
from vlmprune_jax.io.exports.weights import padded_stacks
from vlmprune_jax.io.exports.write import save


def make_plan(
    scores: Scores | Sequence[Scores] | None,
    cfg: ModelConfig | Model,
    config: PlanConfig | None = None,
    **options: Annotated[Any, PlanConfig],
) -> PrunePlan:
    """Plan which layers, heads and neurons to remove for a target or budget; needs no forward pass.

    `make_plan(scores, model, method="depth", ratio=0.3, protect=(0, 1))`, or `make_plan(None, model, layers=(3, 4))`

    Args:
      scores: scores of this model's stack to prune; for "hybrid", the pair (depth scores, width scores). Scores of
        several stacks (one after the other) make a plan that removes the same share of layer parameters from each.
        None if `layers` lists the layers to remove, or only a vocabulary is trimmed.
      cfg: the model or its config; without scores, the model.
      config: settings; `options` override single settings.
      options: settings by name, see `PlanConfig`. The target is one of `ratio`, `layers_removed` and `layers` (depth),
        `sparsity` (width) and `budget` ({"parameters": 1e8}, see `Budget`). For a budget, the plan removes as little as
        satisfies it, and records the cost in its options as `budget_reached`.

    Raises UserError for scores of another model or of the wrong type, a setting that does not exist or that the method
    does not use, or a ratio that the method cannot reach.
    """
    model, cfg = cfg, config_of(cfg)
    for part in (part for layer in cfg.text.layers for part in layer.parts if part.why_fixed):
        for axis in options.keys() & part.fixed_sizes.keys():
            advice = "remove layers, heads or neurons"
            raise UserError(f"make_plan: {axis} of {part.module} cannot be pruned ({part.why_fixed}): {advice}")
    whole = {name: () for name in ("attn_layers", "mlp_layers") if options.get(name) == "all"}
    config = _configured(config, {**options, **whole}, "make_plan")
    config.check([name for name, value in options.items() if value is not None])
    if scores is None or config.layers:
        if config.needs_scores or not isinstance(model, Model):
            raise UserError(
                "make_plan: scores=None needs the model, and is allowed only if `layers` lists the layers to remove, "
                "or nothing but the vocabulary is trimmed: pass scores"
            )
        return plan_pruning(unscored(fingerprint(model)), cfg, config, choose_vocabulary(cfg, config.vocabulary))
    if config.steps > 1:
        raise UserError(f"make_plan: steps={config.steps} need new scores before each: use prune_iteratively")
    return plan_pruning(scores, cfg, config, choose_vocabulary(cfg, config.vocabulary))


def prune_iteratively(
    model: Model,
    batches: Callable[[int], Iterable[Any]],
    config: PlanConfig | None = None,
    *,
    criterion: str,
    scores: Scores | None = None,
    score_config: ScoreConfig | None = None,
    score_options: Mapping[str, Any] | None = None,
    **options: Annotated[Any, PlanConfig],
) -> tuple[Model, PrunePlan, tuple[Scores, ...]]:
    """Prune heads and neurons to a target in equal steps, with new scores before every step.

    Step k of K aims at k/K of the target, always relative to the original model. Under a budget, it aims at k/K of the
    ratio that satisfies the budget with the first scores, and the last step aims at the budget itself.

    Args:
      batches: function that returns the calibration batches of step k = 0, 1, ...
      config, options: settings of `make_plan`, with the method "width"; `steps` is their number, `stack` the stack.
      scores: scores of `model` for the first step (None = compute them).
      score_config, score_options: settings of `score`: its arguments `config` and `options`.

    Returns:
      The pruned model, one plan that leads from `model` to it, and the scores of every step.

    Raises UserError under the conditions of `score` and `make_plan`.
    """
    config = dataclasses.replace(_configured(config, options, "prune_iteratively"), method="width")
    config.check()
    settings = {"criterion": criterion, "stack": config.stack, **(score_options or {})}
    score_again = functools.partial(score, config=score_config, **settings)
    vocabulary = choose_vocabulary(model.cfg, config.vocabulary)
    return prune_in_steps(model, batches, config, vocabulary, score_again, scores)


def _configured(config: PlanConfig | None, options: Mapping[str, Any], function: str) -> PlanConfig:
    config = override(PlanConfig() if config is None else config, options, function, offered=False)
    return dataclasses.replace(config, budget=with_export(config.budget))


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
    other tensors are read, indexed and written one at a time. No array is put on a device, and no accelerator is
    started.

    In a multi-process run, every process must call this function; the first process writes.

    Args:
      source_dir: the folder (or hub id) of the model that the plan is for.
      plan: the prune plan; its fingerprint is compared with weights sampled from the files.
      out_dir: the new folder, which appears only once it is complete.
      vision_dir: folder of a separate vision tower, as in `load`.
      dtype: data type of the weights; "source" keeps the data type of every tensor.
      overwrite, **options: as in `save`, for example format, layout, uneven and quantize.

    Raises UserError under the conditions of `load`, `apply_plan` and `save`.
    """
    source = resolve(source_dir)
    model = open_model(source, None if vision_dir is None else resolve(vision_dir))
    pruned = apply_plan(model, plan)
    if plan.vocabulary is not None:
        Source.of(source, model.cfg).check(plan.vocabulary)
    save(pruned, out_dir, dtype=dtype, overwrite=overwrite, **options)


def costs_of(
    cfg: ModelConfig, *, dtype: str, uneven: str, length: int, images: int, image_tokens: int = 0
) -> dict[str, int]:
    """Return a model's costs (parameters, bytes, FLOPs), computed from its layer shapes.

    `active_parameters`: parameters that one token uses. `forward_flops`: see `models.flops.forward_flops`.
    `kv_bytes_per_token`: bytes of the key/value cache per token of a row (less beyond a layer's window). `file_bytes`:
    bytes of the exported weights.
    """
    itemsize, images = DTYPES[dtype].itemsize, images if cfg.vision is not None else 0
    return {
        "active_parameters": active_params(cfg),
        "forward_flops": forward_flops(cfg, length=length, images=images, image_tokens=image_tokens),
        "kv_bytes_per_token": itemsize * cache_size(cfg.text, 1),
        "file_bytes": itemsize * count_params(padded_stacks(cfg) if uneven == "pad" else cfg),
    }


def with_export(budget: Budget) -> Budget:
    """Return the budget with what `disk_bytes` counts: the exported layers, and weights copied from `source_dir`.

    Raises UserError if the folder cannot be read or exported.
    """
    if one_of("budget uneven", budget.uneven, UNEVEN) == "pad":
        budget = dataclasses.replace(budget, exported=padded_stacks)
    if budget.source_dir is None or budget.disk_bytes is None:
        return dataclasses.replace(budget, source_dir=None, vision_dir=None)
    source = resolve(budget.source_dir)
    model = open_model(source, None if budget.vision_dir is None else resolve(budget.vision_dir))
    options = FolderOptions(layout=budget.layout, uneven=budget.uneven, dtype=budget.dtype)
    target = make_target(model.cfg, source, options)
    tensors = make_tensors(model, target, Checkpoint(source), budget.dtype)
    computed = costs_of(model.cfg, dtype=budget.dtype, uneven=budget.uneven, length=1, images=0)["file_bytes"]
    other = bytes_on_disk(tensors, MAX_SHARD_BYTES) - computed
    return dataclasses.replace(budget, other_bytes=other, layout="source", source_dir=None, vision_dir=None)


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
