"""A workdir whose `result.json` is not there yet, as far as its files go, and which command makes what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.report.answers import DEFAULT_SET, TEACHER, evaluation_file, read_evaluated
from vlmprune_jax.report.result import describe_sets, make_run, unpruned_of
from vlmprune_jax.report.speed import read_speed, speeds_of

Json = dict[str, Any]
UNTRAINED = ("none", "reconstructed")  # recoveries that train nothing
_COMMAND = "vlmprune {} --config=FILE.py --workdir={}"


def read_unfinished(workdir: Path) -> Json:
    """What `result.json` would hold, as far as it is known: sets, teacher (or None) and runs, without best and export.

    `variants`: name, method, plan and scores of every way to prune. `missing`: (what, command) of what is not there.

    Raises:
      UserError: nothing of a run is there, or a file is damaged.
    """
    try:
        workdir.stat()
    except FileNotFoundError:  # whatever else hinders it says so itself, as a link that leads back to itself
        raise UserError(f"{workdir}: no such folder: run `vlmprune run` first") from None
    teacher = _found(workdir, TEACHER)
    variants = [_variant(folder, workdir) for folder in _folders(workdir)]
    if not teacher and not variants:
        raise UserError(f"{workdir}: nothing of a run is here: run `vlmprune run` first")
    speeds, runs = speeds_of(read_speed(workdir)), list[Json]()
    models = [(variant, *model) for variant in variants for model in _models(variant)]
    answered = {folder: _found(folder.parent, folder.name) for *_, folder in models}
    for found in filter(None, answered.values()):  # a set that was evaluated of some models only tells nothing yet
        teacher = {key: of for key, of in teacher.items() if key in found}
    for variant, name, recovery, folder in models:
        if teacher and answered[folder]:
            facts = {**_facts(variant, workdir), **_recovery(recovery, folder, workdir)}
            facts |= {"speed": speeds[name]} if name in speeds else {}
            found = {key: answered[folder][key] for key in teacher}
            runs.append(make_run(name, facts, found, teacher, _below(folder, workdir)))
    unpruned = unpruned_of(teacher, {"speed": speeds[""]} if "" in speeds else {}) if teacher else None
    return {
        "sets": describe_sets(teacher),
        "teacher": unpruned,
        "runs": runs,
        "variants": variants,
        "missing": [(what, _COMMAND.format(name, workdir)) for what, name in _missing(teacher, variants, runs)],
    }


def _folders(workdir: Path) -> Iterator[Path]:
    """The workdir, and those in it, where a model was scored or pruned."""
    for folder in (workdir, *sorted({path.parent for path in workdir.glob("*/*.*")})):
        is_model = (folder / "config.json").is_file()  # which has its plan beside its weights
        if not is_model and ((folder / "plan.json").is_file() or any(folder.glob("*scores*.npz"))):
            yield folder


def _variant(folder: Path, workdir: Path) -> Json:
    plan = folder / "plan.json"
    known = PrunePlan.from_json(plan) if plan.is_file() else None
    method = None if known is None else known.method
    return {
        "name": folder.name if folder != workdir else method or "scored",
        "method": method,
        "plan": _below(plan, workdir) if plan.is_file() else None,
        "scores": [_below(path, workdir) for path in sorted(folder.glob("*scores*.npz"))],
        "folder": folder,
    }


def _models(variant: Json) -> Iterator[tuple[str, str, Path]]:
    """(name, recovery, folder) of the models that were made, as a finished run calls them."""
    folder, called = variant["folder"], variant["name"]
    made = [(called, "none", folder / "pruned"), (f"{called}-reconstructed", "reconstructed", folder / "reconstructed")]
    trained = [folder / "recovered", *sorted(folder.glob("*/recovered"))]
    for path in trained:
        own = path.parent == folder or not (path.parent / "plan.json").is_file()  # else it is another variant's
        name = "recovered" if path.parent == folder else path.parent.name
        made += [(f"{called}-{name}", name, path)] if own else []
    yield from (one for one in made if variant["plan"] is not None and one[2].is_dir())


def _facts(variant: Json, workdir: Path) -> Json:
    plan = PrunePlan.from_json(workdir / variant["plan"])
    return {
        "method": plan.method,
        "criterion": plan.criterion,
        "ratio_asked": plan.asked,
        "ratio_reached": plan.reached,
        "parameters": plan.parameters_after,
        "removed_layers": list(plan.removed_layers),
        "plan": variant["plan"],
        "scores": variant["scores"],
    }


def _recovery(recovery: str, folder: Path, workdir: Path) -> Json:
    metrics = folder.parent / "training" / "metrics.jsonl"
    trained = recovery not in UNTRAINED
    found = {"metrics": _below(metrics, workdir)} if trained and metrics.is_file() else {}
    return {"recovery": recovery, "data_fraction": 0.0, "seconds": None, **found}


def _found(folder: Path, name: str) -> dict[str, Json]:
    """Set -> its evaluation, of the model that is called so."""
    found = {}
    for path in sorted((folder / "eval").glob(f"{name}*.json")):
        key = DEFAULT_SET if path.stem == name else path.stem.removeprefix(f"{name}.")
        if path == evaluation_file(folder, name, key):
            found[key] = read_evaluated(path)
    return found


def _missing(teacher: Json, variants: list[Json], runs: list[Json]) -> Iterator[tuple[str, str]]:
    if not teacher:
        yield "what the unpruned model is worth", "evaluate"
    if not variants:
        yield "importances of layers, heads and neurons", "score"
    for variant in variants:
        models = list(_models(variant))
        if variant["plan"] is None or not models:
            yield f"{variant['name']}: the plan and the pruned model", "prune"
            continue
        if not any(recovery not in UNTRAINED for _, recovery, _ in models):
            yield f"{variant['name']}: recovery training", "recover"
        known = {run["name"] for run in runs}
        left = [name for name, _, _ in models if name not in known]
        if left and teacher:
            yield f"what {', '.join(left)} is worth", "evaluate"
    yield "the best model, exported and compared, and everything else that is left", "run"


def _below(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).as_posix()
