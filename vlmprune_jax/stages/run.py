"""All variants of an experiment in one workdir, and the table, result.json and report they end in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import NO_RECOVERY, PruneRun, prune_runs, recover_runs
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.prune import PrunePlan, Scores
from vlmprune_jax.report.build import build_report, tables_of
from vlmprune_jax.report.provenance import provenance_section
from vlmprune_jax.stages.context import Context, teacher_folder
from vlmprune_jax.stages.evaluate import evaluate_stage
from vlmprune_jax.stages.export import export_stage
from vlmprune_jax.stages.plan_tables import Table, explain
from vlmprune_jax.stages.prune import prune_stage
from vlmprune_jax.stages.reconstruct import RECONSTRUCTED, reconstruct_stage
from vlmprune_jax.stages.recover import recover_stage
from vlmprune_jax.stages.samples import write_samples
from vlmprune_jax.stages.score import criteria_of, score_stage
from vlmprune_jax.stages.speed import check_speed, costs_of_folder, speed_stage, workload_of
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import Evaluated
from vlmprune_jax.workdir.ledger import Json, finished_stages
from vlmprune_jax.workdir.result import (
    RESULT,
    Export,
    Result,
    Run,
    Unpruned,
    benchmark_rows,
    best_run,
    compare,
    describe_sets,
    read_result,
    unpruned_of,
)
from vlmprune_jax.workdir.unfinished import read_unfinished


def score_all(experiment: Experiment, context: Context) -> None:
    """Score every prune variant."""
    for run in prune_runs(experiment, context.workdir):
        score_stage(run.experiment, run.folder, context)


def prune_all(experiment: Experiment, context: Context, *, explained: bool = False) -> None:
    """Prune every variant from its scores; `explained`: and print what each layer lost and why."""
    for run in prune_runs(experiment, context.workdir):
        prune_stage(run.experiment, run.folder, context)
        for table in _explanation(run.experiment, run.folder) if explained else ():
            context.reporter.table(*table)


def _explanation(experiment: Experiment, folder: Path) -> list[Table]:
    tower = experiment.model.vision_dir
    _, cfg = read_config(teacher_folder(experiment.model), None if tower is None else Path(tower))
    scores = [Scores.load(folder / name) for name in criteria_of(experiment)]
    return explain(PrunePlan.from_json(folder / "plan.json"), cfg, experiment.prune, scores)


def reconstruct_all(experiment: Experiment, context: Context) -> None:
    """Reconstruct every pruned variant that is to be.

    Raises:
      UserError: none is.
    """
    wanted = [run for run in prune_runs(experiment, context.workdir) if run.experiment.reconstruct.method != "none"]
    if not wanted:
        raise UserError('reconstruct.method is "none": set it to "least_squares" (--config.reconstruct.method=...)')
    for run in wanted:
        reconstruct_stage(run.experiment, run.folder, context)


def recover_all(experiment: Experiment, context: Context) -> None:
    """Recover every pruned variant in every way.

    Raises:
      UserError: there is none.
    """
    wanted = [run for pruned in prune_runs(experiment, context.workdir) for run in recover_runs(pruned)]
    if not wanted:
        raise UserError('recover.method is "none": set it to "train" (--config.recover.method=train)')
    for run in wanted:
        recover_stage(run.experiment, run.pruned.folder, run.folder, context)


def evaluate_all(experiment: Experiment, context: Context) -> None:
    """Evaluate the teacher and every model that is there, and bring it into `result.json`, if that is there."""
    teacher = evaluate_teacher(experiment, context)
    found: dict[str, dict[str, Evaluated]] = {}  # by the model's path
    for pruned in prune_runs(experiment, context.workdir):
        for name in _untrained(pruned):
            folder = pruned.folder / name
            if _is_evaluated(pruned, name) and folder.is_dir():
                one = evaluate_stage(pruned.experiment, folder, pruned.folder, name, context)
                found[_relative(folder, context)] = one
        for run in recover_runs(pruned):
            folder = run.folder / "recovered"
            if folder.is_dir():
                one = evaluate_stage(run.experiment, folder, run.folder, "recovered", context)
                found[_relative(folder, context)] = one
    on_process_zero(lambda: write_samples(experiment, read_unfinished(context.workdir).runs, context))
    if not found:
        context.reporter.say("no pruned or recovered model in this workdir yet: only the unpruned one was evaluated")
    elif is_main_process() and (context.workdir / RESULT).is_file():
        _renew(teacher, found, context)


def _renew(teacher: dict[str, Evaluated], found: dict[str, dict[str, Evaluated]], context: Context) -> None:
    """Write the new evaluations into `result.json`; the best run and its export stay."""
    result = read_result(context.workdir)
    lacking = [run.path for run in result.runs if run.path not in found]
    if lacking:
        context.reporter.say(f"result.json is left as it is: {lacking[0]} is not among this experiment's models")
        return
    runs = [replace(run, evaluation=compare(found[run.path], teacher)) for run in result.runs]
    unpruned = unpruned_of(teacher, result.teacher.costs, result.teacher.speed)
    renewed = replace(result, sets=describe_sets(teacher), teacher=unpruned, runs=runs)
    if renewed != result:
        write_artefact(context.workdir / RESULT, renewed)
        context.reporter.say("result.json holds what was found; `vlmprune report` makes its page anew")


def evaluate_teacher(experiment: Experiment, context: Context) -> dict[str, Evaluated]:
    """Evaluate the unpruned model on every set -> `eval/teacher.json`."""
    folder = teacher_folder(experiment.model)
    return evaluate_stage(experiment, folder, context.workdir, "teacher", context)


def run_all(experiment: Experiment, context: Context) -> Result:
    """Every stage of every variant; returns and writes `result.json`, prints its table, builds the report."""
    result = make_models(experiment, context)
    exported = _export(experiment, result.best_run, result, context)
    result = replace(result, export=Export(path="export", **exported))
    write_artefact(context.workdir / RESULT, result)
    if is_main_process():
        finish(context)
    return result


def make_models(experiment: Experiment, context: Context) -> Result:
    """Every stage of every variant but export; returns `result.json` without `export`."""
    check_speed(experiment)
    teacher = evaluate_teacher(experiment, context)
    runs = [run for pruned in prune_runs(experiment, context.workdir) for run in _run_variant(pruned, teacher, context)]
    best = best_run(runs, describe_sets(teacher)).name
    on_process_zero(lambda: write_samples(experiment, runs, context))
    unpruned, runs = _with_costs_and_speed(experiment, unpruned_of(teacher), runs, context)
    workload = workload_of(experiment)
    return Result(sets=describe_sets(teacher), teacher=unpruned, runs=runs, best=best, workload=workload)


def _with_costs_and_speed(
    experiment: Experiment, unpruned: Unpruned, runs: Sequence[Run], context: Context
) -> tuple[Unpruned, list[Run]]:
    """Add to all models their costs, and their speed if it is measured."""
    folders = {run.name: context.workdir / run.path for run in runs}
    speeds = speed_stage(experiment, folders, context)
    costs = costs_of_folder(experiment, teacher_folder(experiment.model))
    return replace(unpruned, costs=costs, speed=speeds.get("")), [
        replace(run, costs=costs_of_folder(experiment, folders[run.name]), speed=speeds.get(run.name)) for run in runs
    ]


def _run_variant(pruned: PruneRun, teacher: dict[str, Evaluated], context: Context) -> Iterator[Run]:
    scored = score_stage(pruned.experiment, pruned.folder, context)
    plan = prune_stage(pruned.experiment, pruned.folder, context)
    seconds = scored["seconds"] + plan["seconds"]
    common = {
        **{name: plan[name] for name in ("method", "criterion", "ratio_asked", "ratio_reached", "decoder_ratio")},
        "parameters": plan["parameters"],
        "reconstruct": pruned.experiment.reconstruct.method,
        "removed_layers": plan["removed_layers"],
        "plan": _relative(pruned.folder / "plan.json", context),
        "scores": [_relative(pruned.folder / name, context) for name in criteria_of(pruned.experiment)],
    }
    for name in _untrained(pruned):
        if name == RECONSTRUCTED:
            seconds += reconstruct_stage(pruned.experiment, pruned.folder, context)["seconds"]
        if not _is_evaluated(pruned, name):
            continue
        folder = pruned.folder / name
        found = evaluate_stage(pruned.experiment, folder, pruned.folder, name, context)
        yield Run(
            name=pruned.name if name == "pruned" else f"{pruned.name}-{name}",
            recovery=NO_RECOVERY if name == "pruned" else name,
            seconds=round(seconds, 2),
            path=_relative(folder, context),
            evaluation=compare(found, teacher),
            **common,
        )
    for run in recover_runs(pruned):
        trained = recover_stage(run.experiment, pruned.folder, run.folder, context)
        folder = run.folder / "recovered"
        found = evaluate_stage(run.experiment, folder, run.folder, "recovered", context)
        yield Run(
            name=run.name,
            recovery=run.experiment.recover.name,
            data_fraction=run.experiment.data.fraction,
            training_records=trained["records"],
            training_steps=trained["steps"],
            loss_terms=trained["terms"],
            seconds=round(seconds + trained["seconds"], 2),
            metrics=_relative(run.folder / "training" / "metrics.jsonl", context),
            path=_relative(folder, context),
            evaluation=compare(found, teacher),
            **common,
        )


def _untrained(pruned: PruneRun) -> list[str]:
    """Folders of the models that nothing was trained for, in the order in which they are made."""
    return ["pruned"] if pruned.experiment.reconstruct.method == "none" else ["pruned", RECONSTRUCTED]


def _is_evaluated(pruned: PruneRun, untrained: str) -> bool:
    """Whether such a model is: where nothing is trained, the last one is what this is all for."""
    last = not recover_runs(pruned) and untrained == _untrained(pruned)[-1]
    return pruned.experiment.evaluate.unrecovered or last


def _relative(path: Path, context: Context) -> str:
    return path.relative_to(context.workdir).as_posix()


def export_best(experiment: Experiment, context: Context) -> Json:
    """Export the best model: that of `result.json`, else the recovered or pruned one of a workdir without variants."""
    if (context.workdir / RESULT).is_file():
        result = read_result(context.workdir)
        return _export(experiment, best_run(result.runs, result.sets), result, context)
    for name in ("recovered", RECONSTRUCTED, "pruned"):
        if (context.workdir / name).is_dir():
            solved = name != "pruned" and experiment.reconstruct.method != "none"
            # Without evaluations there may be a model alone.
            known = read_unfinished(context.workdir).result if (context.workdir / "eval").is_dir() else None
            run = next((run for run in known.runs if run.path == name), None) if known is not None else None
            rows = benchmark_rows(run, known.teacher, known.sets) if run is not None and known is not None else ()
            return export_stage(experiment, context.workdir / name, context, reconstructed=solved, benchmarks=rows)
    raise UserError(f"{context.workdir}: nothing to export yet: run `vlmprune run`, or prune and recover, first")


def _export(experiment: Experiment, run: Run, result: Result, context: Context) -> Json:
    """Export the model of a run of `result.json`."""
    solved = run.recovery != NO_RECOVERY and run.reconstruct != "none"
    rows = benchmark_rows(run, result.teacher, result.sets)
    return export_stage(experiment, context.workdir / run.path, context, reconstructed=solved, benchmarks=rows)


def finish(context: Context) -> None:
    """Print the table of `result.json`, and write the report and its plot; of an unfinished run, what there is."""
    if (context.workdir / RESULT).exists():
        result = read_result(context.workdir)
        for table in tables_of(result):
            context.reporter.table(table.title, table.header, table.rows)
        export = result.export
        where = "" if export is None else f", exported to {context.workdir / export.path}"
        context.reporter.say(f"best: {result.best}{where}")
        if export is not None:
            difference = export.max_abs_logit_difference
            context.reporter.say(f"  reloaded and compared: largest difference of any logit {difference:.2g}")
        numbers = f", plot: {context.workdir / 'report.png'}, numbers: {context.workdir / RESULT}"
    else:
        numbers = ", of an unfinished run: it says what is missing"
    page = build_report(context.workdir, more=[provenance_section(finished_stages(context.workdir))])
    context.reporter.say(f"report: {page}{numbers}")
