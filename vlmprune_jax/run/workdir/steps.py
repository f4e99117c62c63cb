"""The steps of a run (`.stages/steps.json`), the results of its finished steps, and the missing results."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.base.links import is_inside
from vlmprune_jax.core.prune import PrunePlan
from vlmprune_jax.run.workdir.artefact import Artefact, Part, find_artefact
from vlmprune_jax.run.workdir.comparison import compare, describe_sets, unpruned_of
from vlmprune_jax.run.workdir.evaluation import TEACHER, evaluations_of
from vlmprune_jax.run.workdir.ledger import StageRecord, finished_stages
from vlmprune_jax.run.workdir.result import Evaluations, Result, Run
from vlmprune_jax.run.workdir.speed import SPEED, Speed

STEPS = ".stages/steps.json"
_PATTERN = re.compile(r"(?!.*\*\*)\w[\w./*-]*")
_COMMAND = "vlmprune {} --config=FILE.py --workdir={}"


class PruneFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Removed shares of the decoder's and tower's parameters, which a plan does not tell without the model's config."""

    decoder_ratio: Finite
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
    name: str = ""  # name of the model, in result files
    recovery: str = ""
    about: str = ""  # one-line help of the stage
    variant: str  # folder of the prune variant, with scores, plan.json and the models made before recovery
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

    @property
    def plan(self) -> str:
        """Path of the variant's plan, relative to the workdir."""
        return (Path(self.variant) / "plan.json").as_posix()

    def scores(self, workdir: Path) -> list[str]:
        """Return the paths of the variant's scores files, relative to the workdir."""
        return [path.relative_to(workdir).as_posix() for path in sorted((workdir / self.variant).glob("scores*.npz"))]

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
            for pattern in (*step.outputs, *filter(None, [step.model])):  # both are looked for by glob
                if not _PATTERN.fullmatch(pattern):
                    return f"{pattern[:40]!r} cannot be an output"
            for path in (step.variant, step.folder, step.model, step.compared_with, *step.outputs):
                if not is_inside(folder.parent / path, folder.parent):
                    return f"{path!r} lies outside the workdir"
                try:
                    (folder.parent / path).exists()
                except OSError as error:
                    return f"{path[:40]!r} cannot be a path ({reason(error)})"
        return None


@dataclass(frozen=True)
class Unfinished:
    """Finished results of an unfinished run, and its missing steps.

    `plans`: {plan ("" if there is none yet): scores files}. `missing`: pairs (what is missing, command that makes it).
    """

    result: Result | None
    plans: dict[str, list[str]]
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
        step for step in steps if step.model and (step.control or not step.pruned or (workdir / step.plan).is_file())
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
    missing = [] if teacher else [("the scores of the unpruned model", "evaluate")]
    plans, blocked = dict[str, list[str]](), set[str]()
    for step in steps:
        if not blocked & {step.variant, step.folder} and not step.is_done(workdir):  # the first one of each variant
            blocked.add(step.folder)
            missing.append((f"{step.name}: {step.about}", step.stage))
        if step.stage == "prune":
            plan = step.plan if (workdir / step.plan).is_file() else ""
            plans.setdefault(plan, []).extend(step.scores(workdir))
    left = [step.name for step in models if step.evaluated and not evaluations[step.path]]
    if left and teacher:
        missing.append((f"the scores of {', '.join(left)}", "evaluate"))
    if steps or not teacher:
        missing.append(("the export of the best model, its comparison, and all other unfinished stages", "run"))
    return Unfinished(result, plans, [(what, _COMMAND.format(name, workdir)) for what, name in missing])


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
        done = {member.stage: records[member.record] for member in chain if member.record in records}
        made: dict[str, Any] = {"parameters": unpruned.parameters, "decoder_ratio": 0.0}
        if step.pruned:
            plan, pruned = PrunePlan.from_json(workdir / step.plan), _facts(done.get("prune"), PruneFacts)
            repaired = _facts(done.get("reconstruct"), dict[str, Any])
            made = {name: getattr(plan, name) for name in ("method", "criterion", "target_ratio", "actual_ratio")}
            made |= {
                "decoder_ratio": None if pruned is None else pruned[0].decoder_ratio,
                "parameters": plan.parameters_after,
                "removed_layers": list(plan.removed_layers),
                "reconstruct": "none" if repaired is None else repaired[1].method,
                "plan": step.plan,
                "scores": step.scores(workdir),
            }
        if (trained := _facts(done.get("recover"), RecoverFacts)) is not None:
            facts, settings = trained
            made |= {"data_fraction": settings.fraction, "training_records": facts.records}
            made |= {"training_steps": facts.steps, "loss_terms": facts.terms}
        metrics = Path(step.folder) / "training/metrics.jsonl"
        run = Run(
            name=step.name,
            recovery=step.recovery,
            seconds=round(sum(record.seconds for record in done.values()), 2) if len(done) == len(chain) else None,
            metrics=metrics.as_posix() if step.stage == "recover" and (workdir / metrics).is_file() else None,
            path=step.path,
            evaluation=compared,
            **made,
        )
        (controls if step.control else runs).append(run)
    return Result(sets=sets, teacher=unpruned, runs=runs, controls=controls, best="")


def _facts(record: StageRecord | None, kind: Any) -> Any:
    """Return (facts of type `kind`, settings) of a ledger entry; None if there is none, or it is of another type."""
    if record is not None:
        with contextlib.suppress(msgspec.ValidationError, RecursionError):
            return msgspec.convert((record.facts, record.made_from.settings), tuple[kind, _Settings])
    return None
