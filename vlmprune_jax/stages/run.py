"""The stages of an experiment in order: every variant in one workdir, and the `result.json` that they end in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.spec import Experiment, sections
from vlmprune_jax.experiment.variants import NO_RECOVERY, prune_runs, recover_runs
from vlmprune_jax.stages.evaluate import evaluate_model, parts_of
from vlmprune_jax.stages.job import Sections, make_job, run_stage
from vlmprune_jax.stages.prune import explain_plan
from vlmprune_jax.stages.registry import STAGES
from vlmprune_jax.stages.samples import write_samples
from vlmprune_jax.stages.score import criteria_of
from vlmprune_jax.stages.speed import check_speed, costs_of_folder, workload_of
from vlmprune_jax.stages.work import Context, Work, teacher_folder
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.evaluation import TEACHER, Evaluated
from vlmprune_jax.workdir.ledger import Finished, Job, differs_only_in
from vlmprune_jax.workdir.result import (
    RESULT,
    Export,
    Result,
    Run,
    benchmark_rows,
    best_run,
    compare,
    describe_sets,
    read_result,
    unpruned_of,
)
from vlmprune_jax.workdir.speed import MedianSpeed, Speed
from vlmprune_jax.workdir.unfinished import read_unfinished


@dataclass(frozen=True, eq=False)
class Step:
    """A stage of one variant, in its place.

    `name`, `recovery`: of the model that it makes, in results. `evaluated`: if that model is. `before`: the steps that
    led to it, the first one first.
    """

    stage: str
    name: str
    recovery: str
    evaluated: bool
    sections: Sections
    work: Work
    before: tuple[Step, ...]

    @property
    def makes_model(self) -> bool:
        """True if the stage makes a model."""
        return bool(STAGES[self.stage].model)

    @property
    def path(self) -> str:
        """The model's folder in the workdir."""
        return self.work.out.relative_to(self.work.workdir).as_posix()

    @property
    def job(self) -> Job:
        """The stage with its settings and files."""
        return make_job(self.stage, self.work, self.sections)

    def run(self) -> Finished:
        """Run the stage unless its result is there."""
        return run_stage(self.stage, self.work, self.sections)

    def evaluate(self) -> dict[str, Evaluated]:
        """Evaluate the model that the stage made."""
        return evaluate_model(
            dataclasses.replace(self.work, start=self.work.out, part=self.work.out.name), self.sections
        )


def plan_steps(experiment: Experiment, context: Context) -> Iterator[Step]:
    """Yield the steps of every prune variant, and after them those of each of its recovery variants, in order."""
    for pruned in prune_runs(experiment, context.workdir):
        recoveries = recover_runs(pruned)
        named = (pruned.name, NO_RECOVERY)
        shared = _steps(
            "variant", named, pruned.experiment, context, pruned.folder, pruned.folder, bool(recoveries), ()
        )
        yield from shared
        for run in recoveries:
            named = (run.name, run.experiment.recover.name)
            yield from _steps("recovery", named, run.experiment, context, pruned.folder, run.folder, False, shared)


def _steps(
    scope: str,
    named: tuple[str, str],
    experiment: Experiment,
    context: Context,
    variant: Path,
    folder: Path,
    goes_on: bool,
    before: Sequence[Step],
) -> list[Step]:
    """Return the steps of one variant; its first model has the names given, others add their own.

    `goes_on`: recoveries follow, so its last model is not a result by itself.
    """
    found, settings = list[Step](), sections(experiment)
    stages = {name: stage for name, stage in STAGES.items() if stage.per == scope and stage.is_on(settings)}
    final = [name for name, stage in stages.items() if stage.model and not goes_on][-1:]
    for name, stage in stages.items():
        chain = (*before, *found)
        starts = [step.work.out for step in (before or found) if step.makes_model]
        work = make_work(
            experiment,
            context,
            variant=variant,
            folder=folder,
            start=starts[-1] if starts else Path(experiment.model.hf_dir),
            out=folder / stage.model,
            reconstructed="reconstruct" in (name, *(step.stage for step in chain)),
            recovered=scope == "recovery",
        )
        title, recovery = named
        if any(step.makes_model for step in found):
            title = f"{title}-{stage.model}"
            recovery = stage.model if recovery == NO_RECOVERY else f"{recovery}-{stage.model}"
        evaluated = scope == "recovery" or experiment.evaluate.unrecovered or name in final
        found.append(Step(name, title, recovery, evaluated, settings, work, chain))
    return found


def make_work(experiment: Experiment, context: Context, **place: Any) -> Work:
    """Return the place of a stage, by default in the workdir itself and on the unpruned model."""
    shared = {field.name: getattr(context, field.name) for field in dataclasses.fields(Context)}
    names = ("variant", "folder", "out")
    default: dict[str, Any] = {**dict.fromkeys(names, context.workdir), "start": Path(experiment.model.hf_dir)}
    return Work(**shared, model=experiment.model, mesh=experiment.mesh, **{**default, **place})


def run_everywhere(stage: str, experiment: Experiment, context: Context, *, explain: bool = False) -> None:
    """Run one stage for every variant; `explain` also prints what each layer lost and why.

    Raises:
      UserError: no variant asks for it.
    """
    steps = [step for step in plan_steps(experiment, context) if step.stage == stage]
    if not steps:
        raise UserError(STAGES[stage].off(sections(experiment)))
    for step in steps:
        step.run()
        if explain:
            for table in explain_plan(step.work, step.sections["score"], step.sections["prune"]):
                context.reporter.table(*table)


def evaluate_all(experiment: Experiment, context: Context) -> None:
    """Evaluate the unpruned model and every model in the workdir, and bring `result.json` up to date, if it exists."""
    teacher = evaluate_teacher(experiment, context)
    steps = [step for step in plan_steps(experiment, context) if step.makes_model and step.evaluated]
    found = {step.path: step.evaluate() for step in steps if step.work.out.is_dir()}
    data, spec = experiment.data, experiment.evaluate
    on_process_zero(lambda: write_samples(context.workdir, data, spec, read_unfinished(context.workdir).runs))
    if not found:
        context.say("no pruned or recovered model in this workdir yet: only the unpruned one was evaluated")
    elif is_main_process() and (context.workdir / RESULT).is_file():
        _renew(teacher, found, context)


def _renew(teacher: dict[str, Evaluated], found: Mapping[str, dict[str, Evaluated]], context: Context) -> None:
    """Write the new evaluations into `result.json`; the best run and its export stay."""
    result = read_result(context.workdir)
    lacking = [run.path for run in result.runs if run.path not in found]
    if lacking:
        context.say(f"result.json is left as it is: {lacking[0]} is not among this experiment's models")
        return
    runs = [replace(run, evaluation=compare(found[run.path], teacher)) for run in result.runs]
    unpruned = unpruned_of(teacher, result.teacher.costs, result.teacher.speed)
    renewed = replace(result, sets=describe_sets(teacher), teacher=unpruned, runs=runs)
    if renewed != result:
        write_artefact(context.workdir / RESULT, renewed)
        context.say("result.json holds what was found; `vlmprune report` makes its page anew")


def evaluate_teacher(experiment: Experiment, context: Context) -> dict[str, Evaluated]:
    """Evaluate the unpruned model on every set -> `eval/teacher.json`."""
    teacher_folder(experiment.model)  # refuses a missing one
    return evaluate_model(make_work(experiment, context, part=TEACHER), sections(experiment))


def evaluation_jobs(experiment: Experiment, context: Context) -> list[Job]:
    """Return the jobs of `evaluate_teacher`; every other model is evaluated on the same sets."""
    parts = parts_of(make_work(experiment, context, part=TEACHER), sections(experiment))
    return [make_job("evaluate", part, sections(experiment)) for part in parts.values()]


def run_all(experiment: Experiment, context: Context) -> Result:
    """Run every stage of every variant, and write `result.json`."""
    result = make_models(experiment, context)
    done = _export(experiment, result.best_run, result, context)
    result = replace(result, export=Export(path="export", seconds=done.seconds, **asdict(done.facts)))
    write_artefact(context.workdir / RESULT, result)
    return result


def make_models(experiment: Experiment, context: Context) -> Result:
    """Run every stage of every variant but export; the result has no `export`."""
    whole, finished, runs = make_work(experiment, context), dict[Step, Finished](), list[Run]()
    check_speed(whole, experiment.speed)
    teacher = evaluate_teacher(experiment, context)
    for step in plan_steps(experiment, context):
        finished[step] = step.run()
        if step.makes_model and step.evaluated:
            runs.append(_as_run(step, [finished[one] for one in (*step.before, step)], step.evaluate(), teacher))
    best = best_run(runs, describe_sets(teacher)).name
    on_process_zero(lambda: write_samples(context.workdir, experiment.data, experiment.evaluate, runs))
    models = {run.name: context.workdir / run.path for run in runs}
    speeds = _speeds(experiment, context, models) if experiment.speed.rounds else {}
    workload = workload_of(whole, experiment.speed, experiment.export)
    costs = {name: costs_of_folder(whole, folder, workload, experiment.export) for name, folder in models.items()}
    return Result(
        sets=describe_sets(teacher),
        teacher=unpruned_of(
            teacher, costs_of_folder(whole, whole.teacher, workload, experiment.export), speeds.get("")
        ),
        runs=[replace(run, costs=costs[run.name], speed=speeds.get(run.name)) for run in runs],
        best=best,
        workload=workload,
    )


def speed_all(experiment: Experiment, context: Context) -> None:
    """Measure the speed of every model in the workdir.

    Raises:
      UserError: it is turned off, or there is no model.
    """
    if not experiment.speed.rounds:
        raise UserError("speed.rounds is 0: set the number of rounds (--config.speed.rounds=5)")
    steps = [step for step in plan_steps(experiment, context) if step.makes_model and step.evaluated]
    models = {step.name: step.work.out for step in steps if step.work.out.is_dir()}
    if not models:
        raise UserError(f"{context.workdir}: no pruned or recovered model yet: run `vlmprune prune` first")
    _speeds(experiment, context, models)


def _speeds(experiment: Experiment, context: Context, models: Mapping[str, Path]) -> dict[str, MedianSpeed]:
    """Return the median speeds of models by name, that of the unpruned one as ""."""
    work = make_work(experiment, dataclasses.replace(context, overwrite=True), models=models)  # it takes moments
    speed: Speed = run_stage("speed", work, sections(experiment)).facts
    return speed.medians()


def _as_run(
    step: Step, finished: Sequence[Finished], evaluations: dict[str, Evaluated], teacher: dict[str, Evaluated]
) -> Run:
    """Make the entry of a model from the facts of the stages that led to it and its evaluations."""
    facts = {one.stage: done.facts for one, done in zip((*step.before, step), finished, strict=True)}
    plan, trained, settings = facts["prune"], facts.get("recover"), step.sections
    scores = criteria_of(settings["score"], settings["prune"])
    folder, variant = (path.relative_to(step.work.workdir) for path in (step.work.folder, step.work.variant))
    training: dict[str, Any] = {}
    if trained is not None:
        training = {
            "data_fraction": settings["data"].fraction,
            "training_records": trained.records,
            "training_steps": trained.steps,
            "loss_terms": trained.terms,
            "metrics": (folder / "training" / "metrics.jsonl").as_posix() if step.stage == "recover" else None,
        }
    return Run(
        name=step.name,
        method=plan.method,
        criterion=plan.criterion,
        ratio_asked=plan.ratio_asked,
        ratio_reached=plan.ratio_reached,
        decoder_ratio=plan.decoder_ratio,
        parameters=plan.parameters,
        removed_layers=plan.removed_layers,
        reconstruct=settings["reconstruct"].method,
        recovery=step.recovery,
        seconds=round(sum(done.seconds for done in finished), 2),
        plan=(variant / "plan.json").as_posix(),
        scores=[(variant / name).as_posix() for name in scores],
        path=step.path,
        evaluation=compare(evaluations, teacher),
        **training,
    )


def export_best(experiment: Experiment, context: Context) -> None:
    """Export the best model: that of `result.json`, else the last one made in a workdir without variants.

    Raises:
      UserError: there is none.
    """
    if (context.workdir / RESULT).is_file():
        result = read_result(context.workdir)
        _export(experiment, best_run(result.runs, result.sets), result, context)
        return
    made = [step for step in plan_steps(experiment, context) if step.makes_model and step.work.out.is_dir()]
    made = [step for step in made if step.work.folder == context.workdir]
    if not made:
        raise UserError(f"{context.workdir}: nothing to export yet: run `vlmprune run`, or prune and recover, first")
    # Without evaluations there may be a model alone.
    known = read_unfinished(context.workdir).result if (context.workdir / "eval").is_dir() else None
    run = None if known is None else next((run for run in known.runs if run.path == made[-1].path), None)
    rows = () if run is None or known is None else benchmark_rows(run, known.teacher, known.sets)
    work = made[-1].work
    _export_model(experiment, context, work.out, work.reconstructed, work.recovered, rows)


def _export(experiment: Experiment, run: Run, result: Result, context: Context) -> Finished:
    """Export the model of a run of `result.json`."""
    path, rows = Path(run.path), benchmark_rows(run, result.teacher, result.sets)
    reconstructed = run.recovery != NO_RECOVERY and run.reconstruct != "none"
    recovered = path.name not in [stage.model for stage in STAGES.values() if stage.per == "variant"]
    return _export_model(experiment, context, context.workdir / path, reconstructed, recovered, rows)


def _export_model(
    experiment: Experiment, context: Context, model: Path, reconstructed: bool, recovered: bool, rows: Sequence[Any]
) -> Finished:
    card = {"reconstructed": reconstructed, "recovered": recovered, "benchmarks": rows}
    work = make_work(experiment, context, start=model, out=context.workdir / "export", **card)
    job = make_job("export", work, sections(experiment))
    if on_process_zero(lambda: differs_only_in(job, "benchmarks")):  # the same weights: only the card is out of date
        work = dataclasses.replace(work, overwrite=True)
    return run_stage("export", work, sections(experiment))
