"""The steps of a run (`.stages/steps.json`), and what a workdir without `result.json` has and lacks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.workdir.artefact import Artefact, Part, find_artefact
from vlmprune_jax.workdir.comparison import compare, describe_sets, unpruned_of
from vlmprune_jax.workdir.evaluation import TEACHER, evaluations_of
from vlmprune_jax.workdir.result import Control, Result, Run, RunEvaluation
from vlmprune_jax.workdir.speed import SPEED, MedianSpeed, Speed

STEPS = ".stages/steps.json"
_PATTERN = re.compile(r"(?!.*\*\*)\w[\w./*-]*")
_COMMAND = "vlmprune {} --config=FILE.py --workdir={}"


class StepRecord(Part, frozen=True, kw_only=True):
    """Record of one step of a run: its stage, model and outputs, and if the model is to be evaluated.

    `control`: the model is an unpruned one that is trained for comparison.
    `variant` and `folder` are the folders of the prune variant and of the outputs, relative to the workdir; `outputs`
    are patterns in `folder`, and `model` is the folder of the model there, "" if the stage makes none.
    """

    stage: str
    name: str
    recovery: str
    about: str
    variant: str
    folder: str
    outputs: list[str] = []
    model: str = ""
    evaluated: bool = True
    control: bool = False

    @property
    def path(self) -> Path:
        """Path of the step's model folder, relative to the workdir."""
        return Path(self.folder) / self.model

    def is_done(self, workdir: Path) -> bool:
        """Return True if all outputs of the step exist."""
        patterns = (*self.outputs, *([self.model] if self.model else []))
        return all(any((workdir / self.folder).glob(pattern)) for pattern in patterns)


class Steps(Artefact, frozen=True, kw_only=True, tag=1):
    """File `steps.json`: the list of a run's steps, and the names of its model and evaluation sets."""

    HINT: ClassVar[str] = "run `vlmprune run` again"
    model: str = ""
    sets: str = ""
    steps: list[StepRecord]

    def problems(self, folder: Path) -> str | None:
        """Return the first invalid path in the list of steps; None if all are valid."""
        for step in self.steps:
            for pattern in (*step.outputs, *([step.model] if step.model else [])):  # both are looked for by glob
                if not _PATTERN.fullmatch(pattern):
                    return f"{pattern[:40]!r} cannot be an output"
            for path in (step.variant, step.folder, step.model, *step.outputs):
                if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
                    return f"{path!r} lies outside the workdir"
                try:
                    os.lstat(folder.parent / path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, ValueError) as error:
                    return f"{path[:40]!r} cannot be a path ({reason(error)})"
        return None


@dataclass(frozen=True)
class Variant:
    """One prune variant, with those of its plan and scores files that exist."""

    name: str
    method: str | None
    plan: str | None
    scores: Sequence[str]


@dataclass(frozen=True)
class Unfinished:
    """Finished part of an unfinished run, and the steps that are missing.

    `missing`: (what is missing, the command that makes it).
    """

    result: Result | None
    variants: list[Variant]
    missing: list[tuple[str, str]]

    @property
    def runs(self) -> list[Run]:
        """Entries of the models that have been evaluated so far."""
        return [] if self.result is None else self.result.runs


def read_unfinished(workdir: Path) -> Unfinished:
    """Return the finished results of an unfinished run, and its missing steps.

    Raises UserError if nothing of a run is there, or a file is damaged.
    """
    try:
        workdir.stat()
    except FileNotFoundError:  # any other error is reported as it is, as a link that leads back to itself
        raise UserError(f"{workdir}: no such folder: run `vlmprune run` first") from None
    teacher, listed = evaluations_of(workdir, TEACHER), find_artefact(workdir / STEPS, Steps)
    steps = [] if listed is None else listed.steps
    if not teacher and not any(step.is_done(workdir) for step in steps):
        raise UserError(f"{workdir}: contains no run: run `vlmprune run` first")
    planned = [
        step for step in steps if step.model and (step.control or (workdir / step.variant / "plan.json").is_file())
    ]
    models = [step for step in planned if (workdir / step.path).is_dir()]
    evaluations = {step.path: evaluations_of((workdir / step.path).parent, step.model) for step in models}
    sets = teacher
    for by_set in filter(None, evaluations.values()):  # only sets on which all models were evaluated
        sets = {key: evaluation for key, evaluation in sets.items() if key in by_set}
    result = None
    if sets:
        measured = find_artefact(workdir / SPEED, Speed)
        speeds = {} if measured is None else measured.medians()
        known = [(step, {key: values[key] for key in sets}) for step in models if (values := evaluations[step.path])]
        described = describe_sets(sets, [values for _, values in known])
        compared = [(step, compare(scores, sets, sets=described)) for step, scores in known]
        runs = [_run(step, scores, speeds.get(step.name), workdir) for step, scores in compared if not step.control]
        controls = [Control(**_entry(step, scores, workdir)) for step, scores in compared if step.control]
        unpruned = unpruned_of(sets, speed=speeds.get(""))
        result = Result(sets=described, teacher=unpruned, runs=runs, controls=controls, best="")
    left = [step.name for step in models if step.evaluated and not evaluations[step.path]]
    missing = [(what, _COMMAND.format(name, workdir)) for what, name in _missing(steps, bool(teacher), left, workdir)]
    return Unfinished(result, [_variant(step, workdir) for step in steps if step.stage == "prune"], missing)


def _scores(step: StepRecord, workdir: Path) -> list[str]:
    return [path.relative_to(workdir).as_posix() for path in sorted((workdir / step.variant).glob("scores*.npz"))]


def _variant(step: StepRecord, workdir: Path) -> Variant:
    plan = Path(step.variant) / "plan.json"
    known = PrunePlan.from_json(workdir / plan) if (workdir / plan).is_file() else None
    method, path = (None, None) if known is None else (known.method, plan.as_posix())
    return Variant(name=step.name, method=method, plan=path, scores=_scores(step, workdir))


def _entry(step: StepRecord, evaluation: RunEvaluation, workdir: Path) -> dict[str, Any]:
    """Return the entry fields that controls and pruned models have in common."""
    metrics = Path(step.folder) / "training" / "metrics.jsonl"
    there = step.stage == "recover" and (workdir / metrics).is_file()
    return {
        "name": step.name,
        "recovery": step.recovery,
        "seconds": None,
        "metrics": metrics.as_posix() if there else None,
        "path": step.path.as_posix(),
        "evaluation": evaluation,
    }


def _run(step: StepRecord, evaluation: RunEvaluation, speed: MedianSpeed | None, workdir: Path) -> Run:
    path = Path(step.variant) / "plan.json"
    plan = PrunePlan.from_json(workdir / path)
    return Run(
        **_entry(step, evaluation, workdir),
        method=plan.method,
        criterion=plan.criterion,
        ratio_asked=plan.asked,
        ratio_reached=plan.reached,
        parameters=plan.parameters_after,
        removed_layers=list(plan.removed_layers),
        plan=path.as_posix(),
        scores=_scores(step, workdir),
        speed=speed,
    )


def _missing(
    steps: Sequence[StepRecord], teacher: bool, left: Sequence[str], workdir: Path
) -> Iterator[tuple[str, str]]:
    """Yield (missing item, command that makes it) for the first unfinished step of each variant."""
    if not teacher:
        yield "the scores of the unpruned model", "evaluate"
    blocked: set[str] = set()
    for step in steps:
        if not blocked & {step.variant, step.folder} and not step.is_done(workdir):
            blocked.add(step.folder)
            yield f"{step.name}: {step.about}", step.stage
    if left and teacher:
        yield f"the scores of {', '.join(left)}", "evaluate"
    yield "the best model, exported and compared, and everything else that is left", "run"
