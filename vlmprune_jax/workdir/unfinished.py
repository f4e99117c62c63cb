"""A workdir without `result.json`: what its files say so far, and which command makes what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.workdir.evaluation import TEACHER, Evaluated, evaluations_of
from vlmprune_jax.workdir.result import NOT_TRAINED, Result, Run, compare, describe_sets, unpruned_of
from vlmprune_jax.workdir.speed import read_speed

_COMMAND = "vlmprune {} --config=FILE.py --workdir={}"


@dataclass(frozen=True)
class Variant:
    """One way of pruning: its plan and importance files (relative to the workdir), as far as they are there."""

    name: str
    method: str | None
    plan: str | None
    scores: Sequence[str]
    folder: Path = field(default_factory=Path)


@dataclass(frozen=True)
class Unfinished:
    """What is there: `result` with an empty `best`, None before the unpruned model is evaluated.

    `missing`: (what is missing, the command that makes it).
    """

    result: Result | None
    variants: list[Variant]
    missing: list[tuple[str, str]]

    @property
    def runs(self) -> list[Run]:
        """The models that are evaluated."""
        return [] if self.result is None else self.result.runs


def read_unfinished(workdir: Path) -> Unfinished:
    """Read what is there of a run.

    Raises:
      UserError: nothing of a run is there, or a file is damaged.
    """
    try:
        workdir.stat()
    except FileNotFoundError:  # any other error is reported as it is, as a link that leads back to itself
        raise UserError(f"{workdir}: no such folder: run `vlmprune run` first") from None
    teacher = evaluations_of(workdir, TEACHER)
    variants = [_variant(folder, workdir) for folder in _folders(workdir)]
    if not teacher and not variants:
        raise UserError(f"{workdir}: nothing of a run is here: run `vlmprune run` first")
    models = [(variant, *model) for variant in variants for model in _models(variant)]
    evaluations = {folder: evaluations_of(folder.parent, folder.name) for *_, folder in models}
    for found in filter(None, evaluations.values()):  # only sets on which all models were evaluated
        teacher = {key: of for key, of in teacher.items() if key in found}
    result = None
    if teacher:
        measured = read_speed(workdir)
        speeds = {} if measured is None else measured.medians()
        runs = [
            _run(variant, name, recovery, folder, evaluations[folder], teacher, workdir)
            for variant, name, recovery, folder in models
            if evaluations[folder]
        ]
        runs = [msgspec.structs.replace(run, speed=speeds.get(run.name)) for run in runs]
        unpruned = unpruned_of(teacher, speed=speeds.get(""))
        result = Result(sets=describe_sets(teacher), teacher=unpruned, runs=runs, best="")
    missing = _missing(teacher, variants, [] if result is None else result.runs)
    return Unfinished(result, variants, [(what, _COMMAND.format(name, workdir)) for what, name in missing])


def _folders(workdir: Path) -> Iterator[Path]:
    """The workdir, and those in it, where a model was scored or pruned."""
    for folder in (workdir, *sorted({path.parent for path in workdir.glob("*/*.*")})):
        is_model = (folder / "config.json").is_file()  # a model has its plan beside its weights
        if not is_model and ((folder / "plan.json").is_file() or any(folder.glob("*scores*.npz"))):
            yield folder


def _variant(folder: Path, workdir: Path) -> Variant:
    plan = folder / "plan.json"
    method = PrunePlan.from_json(plan).method if plan.is_file() else None
    return Variant(
        name=folder.name if folder != workdir else method or "scored",
        method=method,
        plan=_below(plan, workdir) if plan.is_file() else None,
        scores=[_below(path, workdir) for path in sorted(folder.glob("*scores*.npz"))],
        folder=folder,
    )


def _models(variant: Variant) -> Iterator[tuple[str, str, Path]]:
    """(name, recovery, folder) of the models that were made, named as in a finished run."""
    folder, name = variant.folder, variant.name
    made = [(name, "none", folder / "pruned"), (f"{name}-reconstructed", "reconstructed", folder / "reconstructed")]
    for path in (folder / "recovered", *sorted(folder.glob("*/recovered"))):
        if path.parent == folder:
            made.append((f"{name}-recovered", "recovered", path))
        elif not (path.parent / "plan.json").is_file():  # else it is another variant's
            made.append((f"{name}-{path.parent.name}", path.parent.name, path))
    yield from (model for model in made if variant.plan is not None and model[2].is_dir())


def _run(
    variant: Variant,
    name: str,
    recovery: str,
    folder: Path,
    evaluations: Mapping[str, Evaluated],
    teacher: Mapping[str, Evaluated],
    workdir: Path,
) -> Run:
    assert variant.plan is not None
    plan, metrics = PrunePlan.from_json(workdir / variant.plan), folder.parent / "training" / "metrics.jsonl"
    trained = recovery not in NOT_TRAINED and metrics.is_file()
    return Run(
        name=name,
        method=plan.method,
        criterion=plan.criterion,
        ratio_asked=plan.asked,
        ratio_reached=plan.reached,
        parameters=plan.parameters_after,
        removed_layers=list(plan.removed_layers),
        recovery=recovery,
        seconds=None,
        plan=variant.plan,
        scores=list(variant.scores),
        metrics=_below(metrics, workdir) if trained else None,
        path=_below(folder, workdir),
        evaluation=compare({key: evaluations[key] for key in teacher}, teacher),
    )


def _missing(
    teacher: Mapping[str, Evaluated], variants: Sequence[Variant], runs: Sequence[Run]
) -> Iterator[tuple[str, str]]:
    """(what is missing, name of the command that makes it)."""
    if not teacher:
        yield "the scores of the unpruned model", "evaluate"
    if not variants:
        yield "importances of layers, heads and neurons", "score"
    for variant in variants:
        models = list(_models(variant))
        if variant.plan is None or not models:
            yield f"{variant.name}: the plan and the pruned model", "prune"
            continue
        if not any(recovery not in NOT_TRAINED for _, recovery, _ in models):
            yield f"{variant.name}: recovery training", "recover"
        known = {run.name for run in runs}
        left = [name for name, _, _ in models if name not in known]
        if left and teacher:
            yield f"the scores of {', '.join(left)}", "evaluate"
    yield "the best model, exported and compared, and everything else that is left", "run"


def _below(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).as_posix()
