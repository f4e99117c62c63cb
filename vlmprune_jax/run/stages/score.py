"""Importance scores of the unpruned model -> `scores.npz`, and of its vision tower -> `scores_vision.npz`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count
from vlmprune_jax.base.processes import is_main_process
from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.prune import CRITERIA, fingerprint, score
from vlmprune_jax.core.prune.config import PlanConfig, ScoreConfig
from vlmprune_jax.core.prune.routing import ROUTING, Routing
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.work import Work, journal_path
from vlmprune_jax.run.workdir.content import content_key, made_from
from vlmprune_jax.run.workdir.ledger import Task

_FILES = {"text": "scores", "vision": "scores_vision"}


class ScoreFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Result of the score stage: criterion per scores file, number of records, unreadable record ids."""

    criteria: dict[str, str]
    samples: Count
    skipped: list[str] = []


def stacks_of(prune: PlanConfig) -> tuple[str, ...]:
    """Return the names of the stacks to prune."""
    return STACKS if prune.stack == "both" else (prune.stack,)


def criteria_of(spec: ScoreConfig, prune: PlanConfig, stack: str | None = None) -> dict[str, str]:
    """Return {scores file: criterion} that the pruning method needs; {} if it needs no scores."""
    if not prune.needs_scores:
        return {}
    files = [*zip(("", "_width"), spec.criteria(prune.method), strict=False)]
    stacks = stacks_of(prune) if stack is None else (stack,)
    return {f"{_FILES[name]}{suffix}.npz": criterion for name in stacks for suffix, criterion in files}


def criterion_files(criteria: Iterable[str]) -> dict[str, Path]:
    """Return the source files of users' criteria, on which scores depend."""
    files = {f"criterion {name}": CRITERIA[name].file for name in criteria}
    return {name: path for name, path in files.items() if path is not None}


def _needs_records(criteria: Mapping[str, str]) -> bool:
    return any(CRITERIA[criterion].needs_batches for criterion in criteria.values())


def _parts(output: Path) -> Path:
    """Return the folder in which an interrupted layer-by-layer scoring pass saves its finished layers."""
    return output.with_name(f".{output.name}.parts")


def score_task(task: Task, work: Work, data: DataSpec, spec: ScoreConfig, prune: PlanConfig) -> Task:
    """Add the score stage's files: a scores file per criterion, and the calibration records."""
    criteria = criteria_of(spec, prune)
    records = inputs.record_files(data, "train") if _needs_records(criteria) else {}
    outputs = [work.folder / name for name in criteria]
    return task.add(
        inputs={**records, **criterion_files(criteria.values())},
        outputs=outputs,
        journals=[path for output in outputs for path in (journal_path(output), _parts(output))],
        settings={"criteria": criteria},
        without=("score.depth", "score.width"),  # those that the method needs are its criteria
    )


def score_stage(work: Work, data: DataSpec, spec: ScoreConfig, prune: PlanConfig) -> ScoreFacts:
    """Score the layers, or heads and neurons, of every stack to prune."""
    model, criteria = work.load(work.teacher), criteria_of(spec, prune)
    for stack in stacks_of(prune):
        model.cfg.stack(stack)  # refuses a stack that the model does not have before the first pass
    batches, routes = None, any(CRITERIA[name].needs == "routing" for name in criteria.values())
    key, routing = "", None
    if routes:  # of the same records and model, the routing of tokens is known from an earlier run
        named = affecting("score", {"model": work.model, "data": data})
        named |= {name: getattr(spec, name) for name in ("samples", "longest_text", "seed")}
        key = content_key(made_from(named, {**work.model_files, **inputs.record_files(data, "train")}, 1))
        with contextlib.suppress(UserError):
            stored = Routing.load(work.folder / ROUTING)
            routing = stored if (stored.made_from, stored.fingerprint) == (key, fingerprint(model)) else None
    if _needs_records({name: c for name, c in criteria.items() if CRITERIA[c].needs != "routing" or routing is None}):
        batches = inputs.calibration_batches(work.model, data, spec, model.cfg, seed=spec.seed)
    settings = affecting("score", {"model": work.model, "data": data, "score": spec})
    for stack in stacks_of(prune):
        for name, criterion in criteria_of(spec, prune, stack).items():
            chosen, output = CRITERIA[criterion], work.folder / name
            total = chosen.total(model.cfg, batches or [], stack)
            options: dict[str, Any] = {"stack": stack}
            if chosen.needs == "routing":
                options["routing"] = routing
            if chosen.needs == "labels":
                origin = {"criterion": criterion, "settings": settings, "mesh": vars(work.mesh)}
                options["cache"] = ArrayCache(_parts(output), origin)
            else:
                options["journal"] = work.journal(output, {"batches": total})
            title = criterion if stack == "text" else f"{criterion} of the tower"
            with work.phase(f"score ({title})", total) as progress:
                scores = score(model, batches, spec, criterion=criterion, progress=progress, **options)
            if is_main_process():
                scores.save(output)
                if scores.routing is not None and routing is None:
                    dataclasses.replace(scores.routing, made_from=key).save(work.folder / ROUTING)
    skipped = [name for batch in batches or [] for name, _ in batch.skipped]
    if skipped:
        work.say(f"  {len(skipped)} unreadable records were skipped: {', '.join(skipped[:5])}")
    return ScoreFacts(criteria=criteria, samples=0 if batches is None else spec.samples, skipped=skipped)
