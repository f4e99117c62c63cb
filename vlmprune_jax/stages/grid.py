"""All variants of an experiment in one workdir, and the table, result.json and report they end in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmprune_jax.distributed.mesh import is_main_process
from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluate.scorers import retained
from vlmprune_jax.hf.target import LAYOUTS, UNEVEN
from vlmprune_jax.prune import CRITERIA, METHODS
from vlmprune_jax.prune.options import one_of
from vlmprune_jax.report.build import build_report, read_result, table_of
from vlmprune_jax.stages import inputs, planning, single
from vlmprune_jax.stages.console import Reporter
from vlmprune_jax.stages.context import Context, teacher_folder
from vlmprune_jax.stages.ledger import Json, write_json
from vlmprune_jax.stages.settings import recover_config
from vlmprune_jax.stages.spec import Experiment, override

NO_RECOVERY = "none"


@dataclass(frozen=True)
class PruneRun:
    """One way to prune: its name, its experiment and its folder (scores.npz, plan.json, pruned/)."""

    name: str
    experiment: Experiment
    folder: Path


@dataclass(frozen=True)
class RecoverRun:
    """One way to recover a pruned model: its folder holds training/ and recovered/."""

    name: str
    experiment: Experiment
    folder: Path
    pruned: PruneRun


def prune_runs(experiment: Experiment, workdir: Path) -> list[PruneRun]:
    """The prune variants, each in its own folder; without variants one, in the workdir itself."""
    if not experiment.prune_variants:
        return [PruneRun(experiment.prune.method, experiment, workdir)]
    return [
        PruneRun(_checked(name), override(experiment, values, f"prune_variants.{name}"), workdir / name)
        for name, values in experiment.prune_variants.items()
    ]


def recover_runs(pruned: PruneRun) -> list[RecoverRun]:
    """The recoveries of one pruned model."""
    experiment = pruned.experiment
    if not experiment.recover_variants:
        return [RecoverRun(f"{pruned.name}-{experiment.recover.name}", experiment, pruned.folder, pruned)]
    runs = []
    for name, values in experiment.recover_variants.items():
        changed = override(experiment, values, f"recover_variants.{name}")
        changed = override(changed, {"recover": {"name": name}})
        runs.append(RecoverRun(f"{pruned.name}-{_checked(name)}", changed, pruned.folder / name, pruned))
    return runs


def _checked(name: str) -> str:
    """A variant's name, which becomes a folder's."""
    if name in ("", ".", "..", NO_RECOVERY, "adapter", "eval", "export", "pruned", "recovered", "training") or set(
        name
    ) & set("/\\\0"):
        raise UserError(f"variant name {name!r} cannot be a folder of the workdir: use another")
    return name


def check_settings(experiment: Experiment, workdir: Path) -> None:
    """Refuse at the start what a stage of any variant would refuse hours later.

    Raises:
      UserError: a setting that does not exist, has no such value, or goes with another one.
    """
    for pruned in prune_runs(experiment, workdir):
        spec = pruned.experiment
        one_of("prune.method", spec.prune.method, METHODS)
        one_of("score.depth", spec.score.depth, tuple(CRITERIA))
        one_of("score.width", spec.score.width, tuple(CRITERIA))
        for run in recover_runs(pruned):
            recover_config(run.experiment.recover)
    one_of("export.layout", experiment.export.layout, LAYOUTS)
    one_of("export.uneven", experiment.export.uneven, UNEVEN)


def score_all(experiment: Experiment, context: Context) -> None:
    """Score every prune variant."""
    for run in prune_runs(experiment, context.workdir):
        single.score_stage(run.experiment, run.folder, context)


def prune_all(experiment: Experiment, context: Context) -> None:
    """Prune every variant from its scores."""
    for run in prune_runs(experiment, context.workdir):
        single.prune_stage(run.experiment, run.folder, context)


def recover_all(experiment: Experiment, context: Context) -> None:
    """Recover every pruned variant in every way."""
    for pruned in prune_runs(experiment, context.workdir):
        for run in recover_runs(pruned):
            single.recover_stage(run.experiment, pruned.folder, run.folder, context)


def plan_all(
    experiment: Experiment, workdir: Path | None, reporter: Reporter, topology: str, n_records: int | None, search: bool
) -> Json:
    """What every recovery needs on a TPU slice, by its name (see `planning.facts`); `search`: and what else would fit.

    Raises:
      UserError: an unknown slice, or a step that does not fit it, with what to change.
    """
    result: Json = {}
    for pruned in prune_runs(experiment, workdir or Path()):
        for run in recover_runs(pruned):
            case = planning.make_case(run.experiment, None if workdir is None else pruned.folder, topology)
            records = inputs.count_records(run.experiment.data) if n_records is None else n_records
            reporter.say(f"{run.name}: compiling for {topology} ...")
            result[run.name] = planning.plan_recovery(case, records, search, reporter.say)
    return result


def evaluate_all(experiment: Experiment, context: Context) -> None:
    """Evaluate the teacher and every model that is there."""
    evaluate_teacher(experiment, context)
    found = 0
    for pruned in prune_runs(experiment, context.workdir):
        if (pruned.folder / "pruned").is_dir() and pruned.experiment.evaluate.unrecovered:
            single.evaluate_stage(pruned.experiment, pruned.folder / "pruned", pruned.folder, "pruned", context)
            found += 1
        for run in recover_runs(pruned):
            if (run.folder / "recovered").is_dir():
                single.evaluate_stage(run.experiment, run.folder / "recovered", run.folder, "recovered", context)
                found += 1
    if not found:
        context.reporter.say("no pruned or recovered model in this workdir yet: only the unpruned one was evaluated")


def evaluate_teacher(experiment: Experiment, context: Context) -> Json:
    """Accuracy of the unpruned model -> `eval/teacher.json`."""
    folder = teacher_folder(experiment)
    return single.evaluate_stage(experiment, folder, context.workdir, "teacher", context)


def run_all(experiment: Experiment, context: Context) -> Json:
    """Every stage of every variant; returns and writes `result.json`, prints its table, builds the report."""
    teacher = evaluate_teacher(experiment, context)
    runs = [
        entry for pruned in prune_runs(experiment, context.workdir) for entry in _run_variant(pruned, teacher, context)
    ]
    chosen = best(runs)
    exported = single.export_stage(experiment, context.workdir / chosen["path"], context)
    result = {
        "teacher": {name: teacher[name] for name in ("accuracy", "questions", "parameters", "by_answer")},
        "runs": runs,
        "best": chosen["name"],
        "export": {"path": "export", **exported},
    }
    write_json(context.workdir / "result.json", result)
    if is_main_process():
        finish(context)
    return result


def best(runs: list[Json]) -> Json:
    """The most accurate run; among equals the smallest.

    Raises:
      UserError: there is none (`evaluate.unrecovered` is off and nothing was recovered).
    """
    if not runs:
        raise UserError("no model was evaluated: set evaluate.unrecovered, or add a recovery")
    return min(runs, key=lambda run: (-run["accuracy"], run["parameters"]))


def _run_variant(pruned: PruneRun, teacher: Json, context: Context) -> Iterator[Json]:
    scored = single.score_stage(pruned.experiment, pruned.folder, context)
    plan = single.prune_stage(pruned.experiment, pruned.folder, context)
    seconds = scored["seconds"] + plan["seconds"]
    common = {
        **{name: plan[name] for name in ("method", "criterion", "ratio_asked", "ratio_reached", "decoder_ratio")},
        "parameters": plan["parameters"],
        "removed_layers": plan["removed_layers"],
        "plan": _relative(pruned.folder / "plan.json", context),
        "scores": [_relative(pruned.folder / name, context) for name in single.criteria_of(pruned.experiment)],
    }
    if pruned.experiment.evaluate.unrecovered:
        folder = pruned.folder / "pruned"
        scores = single.evaluate_stage(pruned.experiment, folder, pruned.folder, "pruned", context)
        unrecovered = {"recovery": NO_RECOVERY, "data_fraction": 0.0, "seconds": round(seconds, 2)}
        yield _entry(pruned.name, folder, scores, teacher, {**common, **unrecovered}, context)
    for run in recover_runs(pruned):
        trained = single.recover_stage(run.experiment, pruned.folder, run.folder, context)
        folder = run.folder / "recovered"
        scores = single.evaluate_stage(run.experiment, folder, run.folder, "recovered", context)
        recovery = {
            "recovery": run.experiment.recover.name,
            "data_fraction": run.experiment.data.fraction,
            "seconds": round(seconds + trained["seconds"], 2),
            "training_records": trained["records"],
            "training_steps": trained["steps"],
            "metrics": _relative(run.folder / "training" / "metrics.jsonl", context),
        }
        yield _entry(run.name, folder, scores, teacher, {**common, **recovery}, context)


def _entry(name: str, folder: Path, scores: Json, teacher: Json, facts: Json, context: Context) -> Json:
    """One element of `result.json`'s runs; paths are relative to the workdir."""
    return {
        "name": name,
        **facts,
        "accuracy": scores["accuracy"],
        # None where the unpruned model answers nothing: JSON has no NaN
        "retained": retained(scores["accuracy"], teacher["accuracy"]) if teacher["accuracy"] else None,
        "questions": scores["questions"],
        "evaluation_seconds": scores["seconds"],
        **({"perplexity": scores["perplexity"]} if "perplexity" in scores else {}),
        "by_answer": scores["by_answer"],
        "path": _relative(folder, context),
    }


def _relative(path: Path, context: Context) -> str:
    return path.relative_to(context.workdir).as_posix()


def export_best(experiment: Experiment, context: Context) -> Json:
    """Export the best model: that of `result.json`, else the recovered or pruned one of a workdir without variants."""
    if (context.workdir / "result.json").is_file():
        chosen = best(read_result(context.workdir)["runs"])
        return single.export_stage(experiment, context.workdir / chosen["path"], context)
    for name in ("recovered", "pruned"):
        if (context.workdir / name).is_dir():
            return single.export_stage(experiment, context.workdir / name, context)
    raise UserError(f"{context.workdir}: nothing to export yet: run `vlmprune run`, or prune and recover, first")


def finish(context: Context) -> None:
    """Print the table of `result.json`, and write the report and its plot."""
    result = read_result(context.workdir)
    header, rows = table_of(result)
    context.reporter.table("Accuracy and retained accuracy in percent, ratios of all parameters", header, rows)
    export = result["export"]
    difference = export.get("max_abs_logit_difference")
    context.reporter.say(f"best: {result['best']}, exported to {context.workdir / export['path']}")
    context.reporter.say(f"  reloaded and compared: largest difference of any logit {difference:.2g}")
    page = build_report(context.workdir)
    context.reporter.say(
        f"report: {page}, plot: {page.with_suffix('.png')}, numbers: {context.workdir / 'result.json'}"
    )
