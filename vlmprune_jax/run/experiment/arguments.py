"""Arguments of library functions that take more than one section of an experiment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.terms import check_losses, needs_teacher
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import FORMATS, CardOptions, ExportSpec, quantizations
from vlmprune_jax.io.families.experts import has_experts
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec
from vlmprune_jax.run.evaluation.metrics import metric_named
from vlmprune_jax.run.workdir.artefact import read_artefact
from vlmprune_jax.run.workdir.speed import Bench

QUESTIONS, TEXT = "questions", "text"  # names of the evaluation sets if the config defines none


def plan_config(spec: PlanConfig, model: ModelSpec, data: DataSpec, export: ExportSpec) -> PlanConfig:
    """Return the settings of `make_plan`; data type, format and image tokens of the budget come from the export."""
    budget = spec.budget
    if not budget.limits:
        return spec
    dtype, uneven, curve = export_dtype(model, export), export.uneven, budget.curve
    if budget.bench is not None:
        rates = read_artefact(Path(budget.bench), Bench).decode_rates()
        curve = tuple((size, 1000 / rate) for size, rate in rates.items())
    tokens = image_tokens(data, export) or 0
    budget = dataclasses.replace(budget, dtype=dtype, uneven=uneven, bench=None, curve=curve, image_tokens=tokens)
    return dataclasses.replace(spec, budget=budget)


def image_tokens(data: DataSpec, export: ExportSpec) -> int | None:
    """Return the exported model's maximum number of tokens per image; None to keep the limit in its files."""
    return data.max_image_tokens if export.max_image_tokens is None else export.max_image_tokens


def export_options(spec: ExportSpec) -> dict[str, Any]:
    """Return the keyword arguments of `save` for an export: its settings and `export.options`."""
    others = ("format", "options", "max_image_tokens", *CardOptions.__dataclass_fields__)
    return {name: value for name, value in vars(spec).items() if name not in others} | dict(spec.options)


def with_rounding(spec: ExportSpec, data: DataSpec, recover: RecoverConfig, text: TextConfig) -> ExportSpec:
    """Return the export's settings, for 4-bit weights with the rounding that `rounding=None` stands for.

    GPTQ needs training records, and rounds neither experts nor the zeros of padded layers. A model whose training
    simulated rounding to the nearest (`recover.quantize`) is rounded so.
    """
    if spec.quantize != "w4a16" or spec.rounding is not None:
        return spec
    padded, simulated = spec.uneven == "pad" or spec.head_dim, recover.quantize != "none"
    nearest = data.train is None or padded or simulated or has_experts(text)
    return dataclasses.replace(spec, rounding="nearest" if nearest else "gptq")


def export_in(spec: ExportSpec, name: str, explicit: Collection[str] = ()) -> ExportSpec:
    """Return the settings of an export in the format or quantisation `name`, such as "gguf" or "w4a16".

    Options that this format lacks, and the upload to the hub, are reset to their defaults unless `explicit` names them.
    """
    one_of("--format", name, tuple(dict.fromkeys((*FORMATS, *quantizations()[1:]))))
    home = name if name in FORMATS else next(key for key, other in FORMATS.items() if name in other.quantizations)
    accepted, known = settings_of(FORMATS[home].options), FORMATS[home].quantizations
    quantize = name if name in quantizations() else spec.quantize if spec.quantize in known else "none"
    changes: dict[str, Any] = {key: value for key, value in export_options(ExportSpec()).items() if key not in accepted}
    changes |= {"quantize": quantize, "push_to_hub": None}
    changes = {key: value for key, value in changes.items() if f"export.{key}" not in explicit}
    options = {key: value for key, value in spec.options.items() if key in accepted}
    return dataclasses.replace(spec, **changes, format=home, options=options)


def export_dtype(model: ModelSpec, export: ExportSpec) -> str:
    """Return the data type of the exported weights."""
    return model.dtype if export.dtype == "source" else export.dtype


def recover_config(spec: RecoverConfig) -> RecoverConfig:
    """Return the training loop's settings, including those derived from other sections of the experiment.

    Raises:
      UserError: `save_adapter` without adapters, or losses that do not exist or cannot be computed from a cached
        teacher.
    """
    if spec.save_adapter and spec.adapters is None:
        raise UserError(
            f'recover.save_adapter: recover.trainable={spec.trainable!r} trains no adapter: set it to "lora", or leave '
            "save_adapter out"
        )
    losses = spec.losses
    if spec.teacher_cache is not None and needs_teacher(losses):
        losses = dataclasses.replace(losses, teacher_top_k=spec.teacher_top_k)
    check_losses(losses)
    return dataclasses.replace(spec, losses=losses, merge_lora=spec.merge_lora and not spec.save_adapter)


def evaluation_sets(data: DataSpec, spec: EvaluateSpec) -> dict[str, EvaluationSetSpec]:
    """Return {name: evaluation set}; unset settings are taken from `evaluate` and `data`.

    Raises UserError for a name that no file can have, or a metric that does not exist or is not for this type of set.
    """
    sets = dict(spec.sets)
    if not sets and (data.eval is not None or spec.text is None):
        sets[QUESTIONS] = EvaluationSetSpec()
    if spec.text is not None:
        if TEXT in sets:
            raise UserError(
                f"evaluate.text defines the set {TEXT!r}, which evaluate.sets also defines: remove one of the two"
            )
        sets[TEXT] = EvaluationSetSpec(text=spec.text)
    for name, given in sets.items():
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise UserError(
                f"evaluate.sets: the name {name!r} is used as a file name: use only letters, digits, _ and -"
            )
        defaults: dict[str, Any] = {"metric": "perplexity", "text_window": spec.text_window}
        if given.text is None:
            shared = ("metric", "prompt_suffix", "max_new_tokens", "questions")
            defaults = {"data": data.eval, "images": data.eval_images or data.images}
            defaults |= {field: getattr(spec, field) for field in shared}
        overrides = {field: value for field, value in vars(given).items() if value is not None}
        sets[name] = resolved = EvaluationSetSpec(**defaults | overrides)
        of_text = metric_named(resolved.metric or "", f"evaluate.sets.{name}.metric").score is None
        if of_text != (resolved.text is not None):
            scored, has = ("a text", "questions") if of_text else ("answers to questions", "a text")
            raise UserError(
                f"evaluate.sets.{name}: metric {resolved.metric} scores {scored}, but the set has {has}: choose "
                "another metric"
            )
    return sets
