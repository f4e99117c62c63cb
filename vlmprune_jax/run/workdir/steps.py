"""The steps of a run (`.stages/steps.json`), the results of its finished steps, and the missing results."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.run.workdir.artefact import Artefact, Part, find_artefact
from vlmprune_jax.run.workdir.comparison import compare, describe_sets, unpruned_of
from vlmprune_jax.run.workdir.evaluation import TEACHER, evaluations_of
from vlmprune_jax.run.workdir.ledger import StageRecord, finished_stages
from vlmprune_jax.run.workdir.result import Evaluations, ModelEvaluation, Result, Run
from vlmprune_jax.run.workdir.speed import SPEED, Speed

STEPS = ".stages/steps.json"
_PATTERN = re.compile(r"(?!.*\*\*)\w[\w./*-]*")
_COMMAND = "vlmprune {} --config=FILE.py --workdir={}"


class PruneFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Facts about a plan: requested and reached ratios, and parameter counts by part of the model."""

    method: str
    criterion: str
    target_ratio: Finite | None = msgspec.field(name="ratio_asked")  # field name in files of version 0.1.0
    actual_ratio: Finite = msgspec.field(name="ratio_reached")
    decoder_ratio: Finite
    parameters: Count
    parameters_before: Count
    removed_layers: list[Count]
    tower_ratio: Finite | None = None


class RecoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a training run: labels of its loss terms, and the metrics of its last step."""

    steps: Count
    resumed_from: Count
    records: Count
    recovery: str
    terms: dict[str, str]
    trained_parameters: Count
    frozen_parameters: Count
    skipped_rows: Count
    tokens: Finite
    compile_seconds: Finite
    last: dict[str, float | None]


class _Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a stage, from its ledger entry, that `result.json` and reports show."""

    fraction: Finite = msgspec.field(name="data.fraction", default=0.0)
    method: str = msgspec.field(name="reconstruct.method", default="none")


class StepRecord(Part, frozen=True, kw_only=True):
    """One step of a run; folders are relative to the workdir."""

    stage: str
    name: str  # name of the model, in result files
    recovery: str
    about: str  # one-line help of the stage
    variant: str  # folder of the prune variant
    folder: str  # folder of the outputs
    outputs: list[str] = []  # patterns of file names in `folder`
    model: str = ""  # folder of the model in `folder`; "" if the stage makes none
    evaluated: bool = True  # True if the model is evaluated
    pruned: bool = True  # False for an unpruned model that is trained
    control: bool = False  # True for a control: an unpruned model, trained for comparison
    compared_with: str = ""  # folder of the control of a recovered model; "" if there is none

    @property
    def path(self) -> str:
        """Path of the step's model folder, relative to the workdir."""
        return (Path(self.folder) / self.model).as_posix()

    @property
    def record(self) -> str:
        """Name of the step's ledger entry."""
        return self.stage if self.folder == "." else f"{self.folder}/{self.stage}".replace("/", ".")

    def is_done(self, workdir: Path) -> bool:
        """Return True if all outputs of the step exist."""
        patterns = (*self.outputs, *([self.model] if self.model else []))
        return all(any((workdir / self.folder).glob(pattern)) for pattern in patterns)


class Steps(Artefact, frozen=True, kw_only=True, tag=1):
    """File `steps.json`: a run's steps, and the names of its model and sets."""

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
            for path in (step.variant, step.folder, step.model, step.compared_with, *step.outputs):
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
    """One prune variant, with its plan and scores files that exist."""

    name: str
    method: str | None
    plan: str | None
    scores: Sequence[str]


@dataclass(frozen=True)
class Unfinished:
    """Finished results of an unfinished run, and its missing steps.

    `missing`: pairs (what is missing, command that makes it).
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

    Raises UserError if the workdir has no file of a run, or a file is damaged.
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
        step
        for step in steps
        if step.model and (step.control or not step.pruned or (workdir / step.variant / "plan.json").is_file())
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
        known = {path: {key: values[key] for key in sets} for path, values in evaluations.items() if values}
        result = make_result(workdir, steps, sets, known)
        runs = [replace(run, speed=speeds.get(run.name)) for run in result.runs]
        result = replace(result, runs=runs, teacher=replace(result.teacher, speed=speeds.get("")))
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


def make_result(
    workdir: Path, steps: Sequence[StepRecord], teacher: Evaluations, evaluations: Mapping[str, Evaluations]
) -> Result:
    """Compare all evaluated models with the unpruned model; return the content of `result.json` without `best`.

    Args:
      workdir: folder with plans and the ledger.
      steps: the steps of the run.
      teacher: evaluations of the unpruned model.
      evaluations: evaluations of other models, by folder relative to the workdir.
    """
    sets, records = describe_sets(teacher, evaluations.values()), finished_stages(workdir)
    unpruned = unpruned_of(teacher)
    runs, controls = list[Run](), list[Run]()
    for number, step in enumerate(steps):
        if step.path not in evaluations or not step.model:
            continue
        compared = compare(evaluations[step.path], teacher, evaluations.get(step.compared_with), sets)
        same_model = [other for other in steps[:number] if other.folder in (step.variant, step.folder)]
        chain = [step] if step.control else [*(other for other in same_model if not other.control), step]
        pruning: dict[str, Any] = {"parameters": unpruned.parameters, "decoder_ratio": 0.0}
        if step.pruned:
            pruning = _of_plan(step, chain, records, workdir)
        run = Run(**_entry(step, chain, compared, records, workdir), **pruning)
        (controls if step.control else runs).append(run)
    return Result(sets=sets, teacher=unpruned, runs=runs, controls=controls, best="")


def _facts(stage: str, kind: Any, chain: Sequence[StepRecord], records: Mapping[str, StageRecord]) -> Any:
    """Return (facts, settings) in the ledger of a stage among the steps that led to a model; None if there are none.

    `kind`: type of the facts.
    """
    for step in chain:
        if step.stage == stage and step.record in records:
            record = records[step.record]
            with contextlib.suppress(msgspec.ValidationError, RecursionError):
                return msgspec.convert((record.facts, record.made_from.settings), tuple[kind, _Settings])
    return None


def _entry(
    step: StepRecord,
    chain: Sequence[StepRecord],
    evaluation: ModelEvaluation,
    records: Mapping[str, StageRecord],
    workdir: Path,
) -> dict[str, Any]:
    """Return the fields of a model's entry in `result.json` that do not depend on a plan."""
    done = [records[member.record].seconds for member in chain if member.record in records]
    metrics, trained = Path(step.folder) / "training/metrics.jsonl", _facts("recover", RecoverFacts, chain, records)
    entry = {
        "name": step.name,
        "recovery": step.recovery,
        "seconds": round(sum(done), 2) if len(done) == len(chain) else None,
        "metrics": metrics.as_posix() if step.stage == "recover" and (workdir / metrics).is_file() else None,
        "path": step.path,
        "evaluation": evaluation,
    }
    if trained is None:
        return entry
    facts, settings = trained
    return entry | {
        "data_fraction": settings.fraction,
        "training_records": facts.records,
        "training_steps": facts.steps,
        "loss_terms": facts.terms,
    }


def _of_plan(
    step: StepRecord, chain: Sequence[StepRecord], records: Mapping[str, StageRecord], workdir: Path
) -> dict[str, Any]:
    """Return the fields of a pruned model's entry in `result.json` that its plan determines."""
    path, pruned = Path(step.variant) / "plan.json", _facts("prune", PruneFacts, chain, records)
    plan, repaired = PrunePlan.from_json(workdir / path), _facts("reconstruct", dict[str, Any], chain, records)
    return {
        "method": plan.method,
        "criterion": plan.criterion,
        "target_ratio": plan.target_ratio,
        "actual_ratio": plan.actual_ratio,
        "decoder_ratio": None if pruned is None else pruned[0].decoder_ratio,
        "parameters": plan.parameters_after,
        "removed_layers": list(plan.removed_layers),
        "reconstruct": "none" if repaired is None else repaired[1].method,
        "plan": path.as_posix(),
        "scores": _scores(step, workdir),
    }


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
    if steps or not teacher:
        yield "the export of the best model, its comparison, and all other unfinished stages", "run"
