"""All variants of an experiment in one workdir, and the table, result.json and report they end in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.experiment.variants import NO_RECOVERY, PruneRun, prune_runs, recover_runs
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.prune import PrunePlan, Scores
from vlmprune_jax.report.build import build_report, tables_of
from vlmprune_jax.report.provenance import provenance_section
from vlmprune_jax.report.result import FOUND, best_run, describe_sets, make_result, make_run, read_result
from vlmprune_jax.report.speed import speeds_of
from vlmprune_jax.report.tables import benchmark_rows
from vlmprune_jax.report.unfinished import read_unfinished
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
from vlmprune_jax.workdir.ledger import Json, finished_stages, write_json


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
    found: dict[str, Json] = {}  # by the model's path
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
    on_process_zero(lambda: write_samples(experiment, read_unfinished(context.workdir)["runs"], context))
    if not found:
        context.reporter.say("no pruned or recovered model in this workdir yet: only the unpruned one was evaluated")
    elif is_main_process() and (context.workdir / "result.json").is_file():
        _renew(teacher, found, context)


def _renew(teacher: Json, found: dict[str, Json], context: Context) -> None:
    """`result.json` with what was found now of its models; which of them is best, and its export, stay."""
    result = read_result(context.workdir)
    lacking = [run["path"] for run in result["runs"] if run["path"] not in found]
    if lacking:
        context.reporter.say(f"result.json is left as it is: {lacking[0]} is not among this experiment's models")
        return
    done = [{name: value for name, value in run.items() if name not in FOUND} for run in result["runs"]]
    runs = [make_run(run["name"], run, found[run["path"]], teacher, run["path"]) for run in done]
    facts = {name: result["teacher"][name] for name in ("costs", "speed") if name in result["teacher"]}
    renewed = make_result(
        teacher, runs, result["best"], result.get("export"), facts=facts, workload=result.get("workload")
    )
    if renewed != result:
        write_json(context.workdir / "result.json", renewed)
        context.reporter.say("result.json holds what was found; `vlmprune report` makes its page anew")


def evaluate_teacher(experiment: Experiment, context: Context) -> Json:
    """What the unpruned model is worth on every set -> `eval/teacher.json`."""
    folder = teacher_folder(experiment.model)
    return evaluate_stage(experiment, folder, context.workdir, "teacher", context)


def run_all(experiment: Experiment, context: Context) -> Json:
    """Every stage of every variant; returns and writes `result.json`, prints its table, builds the report."""
    result = make_models(experiment, context)
    chosen = next(run for run in result["runs"] if run["name"] == result["best"])
    exported = _export(experiment, chosen, result["teacher"], result["sets"], context)
    result["export"] = {"path": "export", **exported}
    write_json(context.workdir / "result.json", result)
    if is_main_process():
        finish(context)
    return result


def make_models(experiment: Experiment, context: Context) -> Json:
    """Every stage of every variant but export; returns `result.json` without `export`."""
    check_speed(experiment)
    teacher = evaluate_teacher(experiment, context)
    runs = [
        entry for pruned in prune_runs(experiment, context.workdir) for entry in _run_variant(pruned, teacher, context)
    ]
    best = best_run(runs, describe_sets(teacher))["name"]
    on_process_zero(lambda: write_samples(experiment, runs, context))
    facts = _costs_and_speed(experiment, runs, context)
    return make_result(teacher, runs, best, None, facts=facts, workload=workload_of(experiment))


def _costs_and_speed(experiment: Experiment, runs: Sequence[Json], context: Context) -> Json:
    """Note costs, and speed where it is measured, in every run; returns those of the unpruned model."""
    folders = {run["name"]: context.workdir / run["path"] for run in runs}
    speeds = speeds_of(speed_stage(experiment, folders, context))
    for run in runs:
        run["costs"] = costs_of_folder(experiment, folders[run["name"]])
        run |= {"speed": speeds[run["name"]]} if run["name"] in speeds else {}
    unpruned = costs_of_folder(experiment, teacher_folder(experiment.model))
    return {"costs": unpruned, **({"speed": speeds[""]} if "" in speeds else {})}


def _run_variant(pruned: PruneRun, teacher: Json, context: Context) -> Iterator[Json]:
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
        how, called = (NO_RECOVERY, pruned.name) if name == "pruned" else (name, f"{pruned.name}-{name}")
        facts = {**common, "recovery": how, "data_fraction": 0.0, "seconds": round(seconds, 2)}
        yield make_run(called, facts, found, teacher, _relative(folder, context))
    for run in recover_runs(pruned):
        trained = recover_stage(run.experiment, pruned.folder, run.folder, context)
        folder = run.folder / "recovered"
        found = evaluate_stage(run.experiment, folder, run.folder, "recovered", context)
        recovery = {
            "recovery": run.experiment.recover.name,
            "data_fraction": run.experiment.data.fraction,
            "seconds": round(seconds + trained["seconds"], 2),
            "training_records": trained["records"],
            "training_steps": trained["steps"],
            "metrics": _relative(run.folder / "training" / "metrics.jsonl", context),
            **({"loss_terms": trained["terms"]} if "terms" in trained else {}),  # recovered by an older version
        }
        yield make_run(run.name, {**common, **recovery}, found, teacher, _relative(folder, context))


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
    if (context.workdir / "result.json").is_file():
        result = read_result(context.workdir)
        chosen = best_run(result["runs"], result["sets"])
        return _export(experiment, chosen, result["teacher"], result["sets"], context)
    for name in ("recovered", RECONSTRUCTED, "pruned"):
        if (context.workdir / name).is_dir():
            solved = name != "pruned" and experiment.reconstruct.method != "none"
            known: Json = {"runs": ()}
            if (context.workdir / "eval").is_dir():  # else nothing was evaluated, and there may be a model alone
                known = read_unfinished(context.workdir)
            rows = [
                benchmark_rows(run, known["teacher"], known["sets"]) for run in known["runs"] if run["path"] == name
            ]
            shown = rows[0] if rows else ()
            return export_stage(experiment, context.workdir / name, context, reconstructed=solved, benchmarks=shown)
    raise UserError(f"{context.workdir}: nothing to export yet: run `vlmprune run`, or prune and recover, first")


def _export(experiment: Experiment, run: Json, teacher: Json, sets: Json, context: Context) -> Json:
    """The model of a run of `result.json`."""
    solved = run["recovery"] != NO_RECOVERY and run.get("reconstruct", "none") != "none"
    rows = benchmark_rows(run, teacher, sets)
    return export_stage(experiment, context.workdir / run["path"], context, reconstructed=solved, benchmarks=rows)


def finish(context: Context) -> None:
    """Print the table of `result.json`, and write the report and its plot; of an unfinished run, what there is."""
    if (context.workdir / "result.json").exists():
        result = read_result(context.workdir)
        for table in tables_of(result):
            context.reporter.table(table.title, table.header, table.rows)
        export = result.get("export")
        where = "" if export is None else f", exported to {context.workdir / export['path']}"
        context.reporter.say(f"best: {result['best']}{where}")
        if export is not None:
            difference = export["max_abs_logit_difference"]
            context.reporter.say(f"  reloaded and compared: largest difference of any logit {difference:.2g}")
        numbers = f", plot: {context.workdir / 'report.png'}, numbers: {context.workdir / 'result.json'}"
    else:
        numbers = ", of an unfinished run: it says what is missing"
    page = build_report(context.workdir, more=[provenance_section(finished_stages(context.workdir))])
    context.reporter.say(f"report: {page}{numbers}")
