"""Commands on an experiment: all stages of its variants in one workdir, and the `result.json` that they end in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.io.exports.card import model_name
from vlmprune_jax.io.exports.describe import count_passthrough
from vlmprune_jax.io.exports.pruning import costs_of
from vlmprune_jax.run.stages.evaluate import (
    evaluate_model,
    measure_shapes,
    names_of_sets,
    workload_of,
    write_samples,
)
from vlmprune_jax.run.stages.export import describe_export, export_folder
from vlmprune_jax.run.stages.preflight import check_disk
from vlmprune_jax.run.stages.prune import explain_plan
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import best_run
from vlmprune_jax.run.workdir.evaluation import TEACHER
from vlmprune_jax.run.workdir.ledger import StageRecord, differs_only_in, run_task
from vlmprune_jax.run.workdir.result import RESULT, Costs, Evaluations, Export, Result, Run, read_result
from vlmprune_jax.run.workdir.steps import STEPS, Steps, make_result, read_unfinished


def run_stage(root: Work, name: str, *, explain: bool = False) -> None:
    """Run one stage for every variant; `explain` also prints each layer's pruned widths with reasons.

    `root`: the `Work` of the command. Raises UserError if the stage is turned off in all variants.
    """
    steps = [step for step in root.steps if step.stage == name]
    if not steps:
        raise UserError(f"no model needs the stage {name}: {STAGES[name].off(root.sections)}")
    for step in _execute(root, steps):
        _note_steps(root)
        if explain:
            for table in explain_plan(step, step.experiment.score, step.experiment.prune):
                root.reporter.table(*table)


def run_all(root: Work) -> Result | None:
    """Run all stages of all variants and write `result.json`; if no stage changes the model, only evaluate it."""
    if not any(step.record.model for step in root.steps):
        evaluate(root)
        return None
    result = make_models(root)
    done = _export(root, root.workdir / result.best_run.path, (result.best_run, result))
    result = replace(result, export=Export(path="export", seconds=done.seconds, **asdict(done.facts)))
    write_artefact(root.workdir / RESULT, result)
    return result


def make_models(root: Work) -> Result:
    """Run all stages except the export for all variants; return the result."""
    spec = root.experiment
    if spec.speed.rounds:  # prompts that do not fit the model would otherwise fail after all other stages
        spec.speed.check(root.config(root.teacher))
    teacher = evaluate_model(root, root.teacher, TEACHER)
    _note_steps(root)
    finished, evaluations, pending = {""}, dict[str, Evaluations](), list[Work]()
    for step in _execute(root, root.steps):
        finished.add(step.record.path)
        pending += [step] if step.record.model and step.record.evaluated else []
        if {model.record.compared_with for model in pending} <= finished:
            evaluations |= _evaluate(pending)
            pending.clear()

    def compared() -> Result:
        result = make_result(root.workdir, [step.record for step in root.steps], teacher, evaluations)
        return replace(result, best=best_run(result.runs, result.sets).name)

    result: Result = on_process_zero(compared, Result)
    on_process_zero(lambda: write_samples(root.workdir, spec.data, spec.evaluate, result.runs))
    models = {run.name: root.workdir / run.path for run in result.runs}
    speeds = measure_shapes(root, models).medians() if spec.speed.rounds else {}
    workload = workload_of(root, spec.data, spec.speed, spec.export)

    def measured(entry: Any, name: str, folder: Path, **fields: Any) -> Any:
        costs = costs_of(root.config(folder), uneven=spec.export.uneven, **asdict(workload))
        return replace(entry, costs=Costs(**costs), speed=speeds.get(name), **fields)

    return replace(
        result,
        teacher=measured(result.teacher, "", root.teacher, passthrough=count_passthrough(root.teacher, root.tower)),
        runs=[measured(run, run.name, models[run.name]) for run in result.runs],
        controls=[measured(control, control.name, root.workdir / control.path) for control in result.controls],
        workload=workload,
    )


def evaluate(root: Work) -> None:
    """Evaluate the unpruned model and all models in the workdir; update the evaluations in `result.json`."""
    spec, teacher = root.experiment, evaluate_model(root, root.teacher, TEACHER)
    _note_steps(root)
    evaluations = _evaluate(
        step for step in root.steps if step.record.model and step.record.evaluated and step.out.is_dir()
    )
    on_process_zero(lambda: write_samples(root.workdir, spec.data, spec.evaluate, read_unfinished(root.workdir).runs))
    if not evaluations:
        why = "no pruned or recovered model in this workdir yet" if root.steps else "nothing is pruned or trained"
        root.say(f"{why}: only the unpruned model was evaluated")
    elif is_main_process() and (root.workdir / RESULT).is_file():
        renewed = make_result(root.workdir, [step.record for step in root.steps], teacher, evaluations)
        old, entries = read_result(root.workdir), {entry.path: entry for entry in renewed.entries}
        lacking = [entry.path for entry in old.entries if entry.path not in entries]
        if lacking:
            root.say(f"result.json was not updated, because this config does not make its model {lacking[0]}")
            return
        runs, controls = (
            [replace(entry, evaluation=entries[entry.path].evaluation) for entry in of]
            for of in (old.runs, old.controls)
        )
        unpruned = replace(old.teacher, evaluation=renewed.teacher.evaluation, parameters=renewed.teacher.parameters)
        result = replace(old, sets=renewed.sets, teacher=unpruned, runs=runs, controls=controls)
        if result != old:
            write_artefact(root.workdir / RESULT, result)
            root.say("result.json has the new results: run `vlmprune report` to update the report")


def measure_speed(root: Work) -> None:
    """Measure the speed of every model in the workdir, in turns with the unpruned model.

    Raises UserError if the measurement is turned off, or there is no model.
    """
    if not root.experiment.speed.rounds:
        raise UserError(
            "speed.rounds is 0, so no speed would be measured: set the number of repeats (--config.speed.rounds=5)"
        )
    models = {step.record.name: step.out for step in _models(root) if step.record.evaluated}
    if not models:
        raise UserError(f"{root.workdir}: no pruned or recovered model yet: run `vlmprune prune` first")
    measure_shapes(root, models)


def export(root: Work, part: str = "") -> None:
    """Export the best model of these variants in `result.json`; without this file, the workdir's last model.

    `part`: name of an additional export, whose folder is `export-NAME/`. Raises UserError if there is no model.
    """
    workdir = root.workdir
    if (workdir / RESULT).is_file():
        result, paths = read_result(workdir), {step.record.path for step in root.steps if step.record.model}
        runs = [run for run in result.runs if run.path in paths]
        if not runs:
            raise UserError(f"{workdir / RESULT}: has no model of these variants: run `vlmprune run` for them first")
        best = best_run(runs, result.sets)
        label, done = result.labels[best.name], _export(root, workdir / best.path, (best, result), part)
    else:
        models = [step for step in _models(root) if step.folder == workdir]
        if not models:
            raise UserError(
                f"{workdir}: no model to export yet: run `vlmprune run`, or `vlmprune prune` and `recover`, first"
            )
        label = models[-1].record.path
        # Without evaluations there may be a model alone.
        known = read_unfinished(workdir).result if (workdir / "eval").is_dir() else None
        evaluation = None if known is None else next(((run, known) for run in known.runs if run.path == label), None)
        done = _export(root, models[-1].out, evaluation, part)
    for line in describe_export(export_folder(workdir, part), label, done.facts):
        root.say(line)


def _models(root: Work) -> Iterator[Work]:
    """Yield the steps whose models exist in the workdir, without controls."""
    return (step for step in root.steps if step.record.model and not step.record.control and step.out.is_dir())


def _execute(root: Work, steps: Sequence[Work]) -> Iterator[Work]:
    """Run the tasks of these steps in order; yield every step that is done."""
    for number, step in enumerate(steps):
        check_disk(root, steps[number:], exported=False)
        run_task(step.task, overwrite=root.overwrite, say=root.say)
        yield step


def _note_steps(root: Work) -> None:
    """Write the list of steps to the workdir, from which reports show missing results, with names for titles."""
    spec = root.experiment
    steps = Steps(
        model=spec.export.base_model or model_name(root.teacher),
        sets=names_of_sets(spec.data, spec.evaluate),
        steps=[step.record for step in root.steps],
    )
    write_artefact(root.workdir / STEPS, steps)


def _evaluate(models: Iterable[Work]) -> dict[str, Evaluations]:
    """Evaluate models, controls first: other models are compared with the answers of their controls."""
    ordered = sorted(models, key=lambda step: not step.record.control)
    return {step.record.path: evaluate_model(step, step.out, step.out.name) for step in ordered}


def _export(root: Work, model: Path, evaluation: tuple[Run, Result] | None, part: str = "") -> StageRecord:
    """Export the model that a step of this experiment made; `evaluation`: its entry in a result, if there is one."""
    maker = next(step for step in root.steps if step.record.model and step.out == model)
    before = (*maker.before, maker)
    task = root.replace(stage="export", start=model, part=part, before=before, evaluation=evaluation).task
    # With the same weights only the card is outdated.
    overwrite = root.overwrite or on_process_zero(lambda: differs_only_in(task, "benchmarks", "export.evaluate"))
    return run_task(task, overwrite=overwrite, say=root.say)
