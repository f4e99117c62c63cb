"""Advice of the guide for a model folder and a target: a recommendation, predicted plans, and a config file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import yaml

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.settings import override
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.io.checkpoints.read import read_config, resolve
from vlmprune_jax.io.data.inputs import count_records
from vlmprune_jax.io.families import family_of
from vlmprune_jax.run.experiment.recipes import recipes
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import without
from vlmprune_jax.run.planning.case import predict_plan
from vlmprune_jax.run.planning.guide import METHODS, Guide, Recommendation, Target, merge, recommend
from vlmprune_jax.run.stages.unused import unused_settings

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6}
_LARGE = 10**9  # parameters; larger models are loaded in bfloat16
DTYPE = "bfloat16"  # of the export, in which all sizes are counted
_FOLDERS_OWN = ("template", "system", "aspect_ratio")  # `data` settings that the model folder determines
PLACEHOLDERS = {"train": "TRAIN.json", "images": "IMAGES", "eval": "QUESTIONS.json"}  # for files not given


@dataclasses.dataclass(frozen=True)
class Advice:
    """Recommendation for a model folder, with a config file."""

    cfg: ModelConfig
    recommendation: Recommendation
    plans: dict[str, PrunePlan]  # predicted, by pruning method
    config: str  # as YAML
    steps: str | None  # number of optimizer steps and records of the training, or why none is recommended
    own_data: bool  # True if the config names the user's files
    missing: tuple[str, ...]  # settings of `data` that the user still has to set


def advise(
    hf_dir: str,
    *,
    vision_dir: str | None = None,
    ratio: float | None = None,
    most_bytes: float | None = None,
    data_fraction: float | None = None,
    compute: str = "full",
    speed: bool = False,
    guide: Guide,
    files: Mapping[str, str] | None = None,
) -> Advice:
    """Return the recommendation for a model folder or hub id, of which only JSON files are read.

    Args:
      hf_dir, vision_dir: see `load`.
      ratio: share of all parameters to remove.
      most_bytes: maximum size of the bfloat16 weights; set either `ratio` or `most_bytes`.
      data_fraction: share of the training data that is available; None: all records of `files["train"]`, else 5 %.
      compute, guide: see `Target` and `recommend`.
      speed: True to choose only pruning that speeds up decoding.
      files: values of `data.train`, `data.images` and `data.eval` for the config, instead of the evidence's data.

    Raises:
      UserError: the model is missing, none or both targets are set, no plan reaches the target (the message has the
        nearest), or `recommend` fails.
    """
    files = dict(files or {})
    _, cfg = read_config(resolve(hf_dir), None if vision_dir is None else resolve(vision_dir))
    if compute == "projector" and cfg.projector is None:
        raise UserError("compute='projector': this model has no projector, use none or full")
    ratio = _ratio(cfg, ratio, most_bytes)
    bound = {"ratio": ratio} if most_bytes is None else {"budget": {"disk_bytes": most_bytes}}
    goal: dict[str, Any] = {"export": {"dtype": DTYPE}, "prune": bound}

    def predict(*settings: Mapping[str, Any]) -> PrunePlan:
        with error_context("--ratio" if most_bytes is None else "--bytes"):
            return predict_plan(override(Experiment(), merge(*settings, goal)), cfg)

    of_decoder, removed = count_params(cfg, "text") / count_params(cfg), dict[str, float]()
    for method in METHODS:
        with contextlib.suppress(UserError):
            removed[method] = predict(guide.settings[method]).actual_ratio / of_decoder
    data = data_fraction
    if data is None:
        data = 1.0 if "train" in files else guide.data.least
    shares, methods = (ratio, ratio / of_decoder, removed), ("depth",) if speed else METHODS
    target = Target(count_params(cfg), cfg.vision is not None, *shares, data, compute, methods)
    own: dict[str, Any] = {"data": files} if files else {}
    recommendation, steps = _with_enough_steps(target, guide, cfg, count_records(override(Experiment(), own).data))
    variants = recommendation.variants.items()
    plans = {method: predict(recommendation.recipe, settings) for method, settings in variants}
    model = {"hf_dir": hf_dir, **({} if vision_dir is None else {"vision_dir": vision_dir})}
    task = own or recommendation.task
    known = {*PLACEHOLDERS} if "source" in task.get("data", {}) else {*files}
    known |= {"images"} if files or cfg.vision is None else set()
    missing = tuple(name for name in PLACEHOLDERS if name not in known)
    config = _config_file(recommendation, cfg, merge({"model": model}, task, goal))
    return Advice(cfg, recommendation, plans, config, steps, bool(files), missing)


def _ratio(cfg: ModelConfig, ratio: float | None, most_bytes: float | None) -> float:
    """Return the share of all parameters to remove; raise UserError unless exactly one target is set, and prunes."""
    if (ratio is None) == (most_bytes is None):
        raise UserError("give either --ratio=0.3 (share of all parameters to remove) or --bytes=2GB (maximum size)")
    if ratio is not None:
        return ratio
    whole, most_bytes = exported_bytes(count_params(cfg)), most_bytes or 0.0
    if most_bytes >= whole:
        raise UserError(
            f"--bytes={most_bytes:,.0f}: the unpruned weights have only {whole:,} bytes in {DTYPE}, so no pruning is "
            "needed"
        )
    return 1 - most_bytes / whole


def _with_enough_steps(
    target: Target, guide: Guide, cfg: ModelConfig, records: int | None
) -> tuple[Recommendation, str | None]:
    """Return the recommendation, without training if the records are too few, and `Advice.steps`.

    The share of the data is raised, if more is available, until training has as many steps as the shortest measured
    one.
    """
    recommendation, least_steps = recommend(target, guide), guide.data.steps
    if not recommendation.data_fraction:
        return recommendation, None
    recover = _experiment(recommendation, cfg, *recommendation.variants.values())[2].recover
    batch, passes = recover.batch_size, f"{recover.epochs:g} pass{'es' * (recover.epochs != 1)}"
    least = math.ceil(least_steps * batch / recover.epochs)
    if records is None:
        return recommendation, (
            f"at least {least_steps}, as in the shortest measured training: {least:,} records in batches of "
            f"{batch} and {passes} (--train=FILE counts yours)"
        )
    share = min(max(recommendation.data_fraction, math.ceil(1e4 * least / records) / 1e4), target.data)
    used = max(1, int(records * share))
    steps = recover.num_steps(used)
    counted = f"{steps:,} of {batch} records ({used:,} of {records:,} records in {passes})"
    if steps >= least_steps:
        return dataclasses.replace(recommendation, data_fraction=share), counted
    too_few = f"too few: {counted}; the shortest measured training has {least_steps} steps"
    with error_context(f"training steps: {too_few}"):
        return recommend(dataclasses.replace(target, compute="none"), guide), f"do not train: {too_few}"


def exported_bytes(parameters: int) -> int:
    """Return the bytes of this many parameters in the export's dtype."""
    return parameters * DTYPES[DTYPE].itemsize


def size_text(n_bytes: float) -> str:
    """Return a size as text, such as "1.5 GB"."""
    unit, scale = next(((unit, scale) for unit, scale in _UNITS.items() if n_bytes >= scale), ("KB", 1e3))
    return f"{n_bytes / scale:.3g} {unit}"


def _config_file(recommendation: Recommendation, cfg: ModelConfig, settings: dict[str, Any]) -> str:
    """Return the recommended config file as YAML: the family's recipe, advised settings, and `settings`.

    Prompts and images are prepared as the model folder says, and settings without effect are left out.
    """
    fraction = {"data": {"fraction": recommendation.data_fraction}} if recommendation.data_fraction else {}
    only = next(iter(recommendation.variants.values())) if len(recommendation.variants) == 1 else {}
    recipe, changes, start = _experiment(recommendation, cfg, settings, fraction, only)
    data, default = start.data, Experiment().data
    folders = {name: getattr(default, name) for name in _FOLDERS_OWN if getattr(data, name) != getattr(default, name)}
    variants = {} if only else {"prune_variants": recommendation.variants}
    changes = merge(changes, {"data": folders}, variants)
    without_effect = {*itertools.chain(*unused_settings([(override(start, changes), cfg)]).values())}
    content = {**({} if recipe is None else {"recipe": recipe}), **without(changes, without_effect)}
    about = f"# Advice of `vlmprune recommend` for {100 * recommendation.target.ratio:.4g} % of all parameters.\n"
    return about + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _experiment(
    recommendation: Recommendation, cfg: ModelConfig, *settings: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any], Experiment]:
    """Return the family's recipe by name if it is the start, all changes to it, and the resulting experiment."""
    named = family_of(cfg).name
    recipe = named if recommendation.of_family and named in recipes() else None
    large = {"model": {"dtype": "bfloat16"}, "mesh": {"fsdp": -1}} if count_params(cfg) >= _LARGE else {}
    changes = merge({"model": {}}, large, recommendation.recipe, *settings)
    start = Experiment() if recipe is None else override(Experiment(), recipes()[recipe])
    return recipe, changes, override(start, changes)
