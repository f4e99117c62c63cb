"""The stages of an experiment in order: every variant in one workdir, and the `result.json` that they end in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import asdict, replace

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.experiment.variants import CONTROL, NO_RECOVERY, RecoverRun, prune_runs, recover_runs
from vlmprune_jax.export.card import model_name
from vlmprune_jax.prune.describe import count_carried
from vlmprune_jax.recovery.objective import uses_labels
from vlmprune_jax.stages.answers import evaluate_model, write_samples
from vlmprune_jax.stages.evaluate import names_of_sets, parts_of
from vlmprune_jax.stages.export import describe_export, export_folder
from vlmprune_jax.stages.job import make_job, run_stage
from vlmprune_jax.stages.prune import explain_plan
from vlmprune_jax.stages.registry import STAGES
from vlmprune_jax.stages.speed import costs_of_folder, workload_of
from vlmprune_jax.stages.step import Step, as_control, as_run
from vlmprune_jax.stages.work import Context, Work, teacher_folder
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.comparison import benchmark_rows, best_run, compare, describe_sets, unpruned_of
from vlmprune_jax.workdir.content import content_key
from vlmprune_jax.workdir.evaluation import TEACHER, Evaluated
from vlmprune_jax.workdir.ledger import Finished, Job, differs_only_in
from vlmprune_jax.workdir.result import RESULT, Control, Export, Result, Run, RunEvaluation, read_result
from vlmprune_jax.workdir.speed import MedianSpeed, Speed
from vlmprune_jax.workdir.unfinished import STEPS, Steps, read_unfinished


@dataclass(frozen=True)
class Pipeline:
    """All stages of an experiment, in its workdir."""

    experiment: Experiment
    context: Context

    @property
    def sections(self) -> dict[str, Any]:
        """Settings of the experiment, by config section."""
        return self.experiment.sections

    def work(self, **place: Any) -> Work:
        """Return the `Work` (folders and models) for a stage."""
        shared = {field.name: getattr(self.context, field.name) for field in dataclasses.fields(Context)}
        default: dict[str, Any] = dict.fromkeys(("variant", "folder", "out"), self.context.workdir)
        default["start"] = Path(self.experiment.model.hf_dir)
        return Work(**{**shared, "model": self.experiment.model, "mesh": self.experiment.mesh, **default, **place})

    def steps(self) -> Iterator[Step]:
        """Yield the stages to run for every prune variant and its recovery variants, in order.

        A recovery's control comes after the first model that is recovered in this way.
        """
        controls = dict[str, Step]()
        for pruned in prune_runs(self.experiment, self.context.workdir):
            variant, recoveries = dataclasses.replace(self, experiment=pruned.experiment), recover_runs(pruned)
            shared = variant._chain("variant", (pruned.name, NO_RECOVERY), pruned.folder, pruned.folder, (), recoveries)
            yield from shared
            for run in recoveries:
                recovery = dataclasses.replace(self, experiment=run.experiment)
                named = (run.name, run.experiment.recover.name)
                known, control = len(controls), recovery._control(run, controls)
                yield from recovery._chain("recovery", named, pruned.folder, run.folder, shared, control=control)
                if control is not None and len(controls) > known:
                    yield control

    def _control(self, run: RecoverRun, known: dict[str, Step]) -> Step | None:
        """Return the step that trains the control (an unpruned model) for a recovery; None if not wanted.

        `known`: the steps so far, by everything that they depend on, to which a new one is added.
        """
        spec, workdir = self.experiment, self.context.workdir
        if not (spec.recover.control and uses_labels(spec.recover.losses)):
            return None
        sections, below = self.sections, run.folder.relative_to(run.pruned.folder)
        if spec.prune.stack != "text" or spec.prune.vocabulary.size is not None:  # whose caches are of another model
            for section, cache in (("data", "feature_cache"), ("recover", "teacher_cache")):
                folder = getattr(sections[section], cache)
                if folder is not None:
                    changed = {cache: str(Path(folder) / CONTROL)}
                    sections[section] = dataclasses.replace(sections[section], **changed)

        def step(folder: Path, title: str) -> Step:
            work = self.work(variant=folder, folder=folder, out=folder / "recovered", recovered=True, pruned=False)
            return Step("recover", title, spec.recover.name, True, sections, work, ())

        name = CONTROL if below == Path() else f"{CONTROL}-{spec.recover.name}"
        first, settings = step(workdir / CONTROL / below, name), affecting("recover", sections)
        key = content_key(settings, [sections["data"].train, sections["data"].images, sections["model"].hf_dir])
        taken = any(other.work.folder == first.work.folder for other in known.values())
        control = step(run.pruned.folder / CONTROL / below, f"{run.pruned.name}-{name}") if taken else first
        return known.setdefault(key, control)

    def _chain(
        self,
        scope: str,
        named: tuple[str, str],
        variant: Path,
        folder: Path,
        before: Sequence[Step],
        recoveries: Sequence[object] = (),
        control: Step | None = None,
    ) -> list[Step]:
        """Return the stages of one variant that change the model, in order."""
        steps, settings = list[Step](), self.sections
        stages = {name: stage for name, stage in STAGES.items() if stage.per == scope and stage.is_on(settings)}
        final = [name for name, stage in stages.items() if stage.model and not recoveries][-1:]
        for name, stage in stages.items():
            chain = (*before, *steps)
            starts = [step.work.out for step in (before or steps) if step.makes_model]
            work = self.work(
                variant=variant,
                folder=folder,
                **({"start": starts[-1]} if starts else {}),
                out=folder / stage.model,
                reconstructed="reconstruct" in (name, *(step.stage for step in chain)),
                recovered=scope == "recovery",
                control=None if control is None else control.work.out,
            )
            title, recovery = named
            if any(step.makes_model for step in steps):
                title = f"{title}-{stage.model}"
                recovery = stage.model if recovery == NO_RECOVERY else f"{recovery}-{stage.model}"
            evaluated = scope == "recovery" or self.experiment.evaluate.unrecovered or name in final
            steps.append(Step(name, title, recovery, evaluated, settings, work, chain))
        return steps

    def models(self) -> list[Step]:
        """Return the steps whose models exist in the workdir and are to be evaluated."""
        return [step for step in self.steps() if step.makes_model and step.evaluated and step.work.out.is_dir()]

    def note_steps(self) -> None:
        """Write the list of steps to the workdir, from which reports show missing results, with names for titles."""
        spec, work = self.experiment, self.work()
        steps = Steps(
            model=spec.export.base_model or model_name(work.teacher),
            sets=names_of_sets(spec.data, spec.evaluate),
            steps=[step.planned for step in self.steps()],
        )
        write_artefact(self.context.workdir / STEPS, steps)

    def run_stage(self, name: str, *, explain: bool = False) -> None:
        """Run one stage for every variant; `explain` also prints each layer's pruned widths with reasons.

        Raises UserError if no variant asks for it.
        """
        steps = [step for step in self.steps() if step.stage == name]
        if not steps:
            raise UserError(f"no model needs the stage {name}: {STAGES[name].off(self.sections)}")
        for step in steps:
            step.run()
            self.note_steps()
            if explain:
                for table in explain_plan(step.work, step.sections["score"], step.sections["prune"]):
                    self.context.reporter.table(*table)

    def run(self) -> Result:
        """Run all stages of all variants and write `result.json`."""
        result = self.make_models()
        done = self._export_run(result.best_run, result)
        result = replace(result, export=Export(path="export", seconds=done.seconds, **asdict(done.facts)))
        write_artefact(self.context.workdir / RESULT, result)
        return result

    def make_models(self) -> Result:
        """Run all stages except the export for all variants; return the result."""
        spec, work, finished, runs = self.experiment, self.work(), dict[Step, Finished](), list[Run]()
        controls, by_step, pending = list[Control](), dict[Step, dict[str, Evaluated]](), list[Step]()
        if spec.speed.rounds:  # prompts that do not fit the model would otherwise fail after all other stages
            spec.speed.check(work.config(work.teacher))
        teacher = self.evaluate_teacher()
        self.note_steps()
        for step in self.steps():
            finished[step] = step.run()
            pending += [step] * (step.makes_model and step.evaluated)
            if {model.work.control for model in pending} <= {None, *(done.work.out for done in finished)}:
                by_step |= _evaluate(pending)
                pending.clear()
        by_folder: dict[Path | None, dict[str, Evaluated]] = {step.work.out: scores for step, scores in by_step.items()}
        sets = describe_sets(teacher, by_step.values())
        for step, evaluations in by_step.items():
            evaluation = compare(evaluations, teacher, by_folder.get(step.work.control), sets)
            if step.work.pruned:
                runs.append(as_run(step, [finished[member] for member in (*step.before, step)], evaluation))
            else:
                controls.append(as_control(step, finished[step], evaluation))
        best = best_run(runs, sets).name
        on_process_zero(lambda: write_samples(self.context.workdir, spec.data, spec.evaluate, runs))
        models = {run.name: self.context.workdir / run.path for run in runs}
        speeds = self._speeds(models) if spec.speed.rounds else {}
        workload = workload_of(work, spec.data, spec.speed, spec.export)
        costs = {name: costs_of_folder(work, folder, workload, spec.export) for name, folder in models.items()}
        unpruned = costs_of_folder(work, work.teacher, workload, spec.export)
        return Result(
            sets=sets,
            teacher=unpruned_of(teacher, unpruned, speeds.get(""), count_carried(work.teacher, work.tower)),
            runs=[replace(run, costs=costs[run.name], speed=speeds.get(run.name)) for run in runs],
            controls=controls,
            best=best,
            workload=workload,
        )

    def evaluate(self) -> None:
        """Evaluate the unpruned model and all models in the workdir, and update an existing `result.json`."""
        context, spec = self.context, self.experiment
        teacher = self.evaluate_teacher()
        self.note_steps()
        by_path = {step.path: (step, evaluations) for step, evaluations in _evaluate(self.models()).items()}
        on_process_zero(
            lambda: write_samples(context.workdir, spec.data, spec.evaluate, read_unfinished(context.workdir).runs)
        )
        if not by_path:
            context.say("no pruned or recovered model in this workdir yet: only the unpruned one was evaluated")
        elif is_main_process() and (context.workdir / RESULT).is_file():
            _renew(teacher, by_path, context)

    def evaluate_teacher(self) -> dict[str, Evaluated]:
        """Evaluate the unpruned model on every set -> `eval/teacher.json`."""
        teacher_folder(self.experiment.model)  # refuses a missing one
        return evaluate_model(self.work(part=TEACHER), self.sections)

    def jobs(self) -> list[Job]:
        """Return the jobs of all stages except the export, with every model evaluated on every set."""
        works = parts_of(self.work(part=TEACHER), self.sections).values()
        return [*(make_job("evaluate", part, self.sections) for part in works), *(step.job for step in self.steps())]

    def measure_speed(self) -> None:
        """Measure the speed of every model in the workdir, in turns with the unpruned model.

        Raises UserError if it is turned off, or there is no model.
        """
        if not self.experiment.speed.rounds:
            raise UserError("speed.rounds is 0: set the number of rounds (--config.speed.rounds=5)")
        models = {step.name: step.work.out for step in self.models() if step.work.pruned}
        if not models:
            raise UserError(f"{self.context.workdir}: no pruned or recovered model yet: run `vlmprune prune` first")
        self._speeds(models)

    def _speeds(self, models: Mapping[str, Path]) -> dict[str, MedianSpeed]:
        """Return {model: median speeds}, with "" for the unpruned model."""
        speed: Speed = run_stage("speed", self.work(models=models, overwrite=True), self.sections).facts
        return speed.medians()

    def export(self, part: str = "") -> None:
        """Export the best model of these variants in `result.json`; without that file, the workdir's last model.

        `part`: name of a further export beside the first, which goes to `export-NAME/`.

        Raises UserError if there is no model.
        """
        workdir = self.context.workdir
        if (workdir / RESULT).is_file():
            result, paths = read_result(workdir), {step.path for step in self.steps() if step.makes_model}
            runs = [run for run in result.runs if run.path in paths]
            if not runs:
                raise UserError(
                    f"{workdir / RESULT}: has no model of these variants: run `vlmprune run` for them first"
                )
            best = best_run(runs, result.sets)
            label, done = result.labels[best.name], self._export_run(best, result, part)
        else:
            model_steps = [step for step in self.steps() if step.makes_model and step.work.out.is_dir()]
            model_steps = [step for step in model_steps if step.work.folder == workdir and step.work.pruned]
            if not model_steps:
                raise UserError(
                    f"{workdir}: no model to export yet: run `vlmprune run`, or `vlmprune prune` and `recover`, first"
                )
            # Without evaluations there may be a model alone.
            known = read_unfinished(workdir).result if (workdir / "eval").is_dir() else None
            run = None if known is None else next((run for run in known.runs if run.path == model_steps[-1].path), None)
            rows = () if run is None or known is None else benchmark_rows(run, known.teacher, known.sets)
            work, label = model_steps[-1].work, model_steps[-1].path
            done = self._export(work.out, work.reconstructed, work.recovered, rows, part)
        for line in describe_export(export_folder(workdir, part), label, done.facts):
            self.context.say(line)

    def _export_run(self, run: Run, result: Result, part: str = "") -> Finished:
        """Export the model of one run in `result.json`."""
        reconstructed = run.recovery != NO_RECOVERY and run.reconstruct != "none"
        path, unrecovered = Path(run.path), [stage.model for stage in STAGES.values() if stage.per == "variant"]
        rows = benchmark_rows(run, result.teacher, result.sets)
        return self._export(self.context.workdir / path, reconstructed, path.name not in unrecovered, rows, part)

    def _export(self, model: Path, reconstructed: bool, recovered: bool, rows: Sequence[Any], part: str) -> Finished:
        work = self.work(start=model, reconstructed=reconstructed, recovered=recovered, benchmarks=rows, part=part)
        job = make_job("export", work, self.sections)
        if on_process_zero(lambda: differs_only_in(job, "benchmarks")):  # the same weights: only the card is outdated
            work = dataclasses.replace(work, overwrite=True)
        return run_stage("export", work, self.sections)


def _evaluate(models: Iterable[Step]) -> dict[Step, dict[str, Evaluated]]:
    """Evaluate models, controls first: other models are compared with the answers of their controls."""
    return {step: step.evaluate() for step in sorted(models, key=lambda step: step.work.pruned)}


def _renew(
    teacher: dict[str, Evaluated], by_path: Mapping[str, tuple[Step, dict[str, Evaluated]]], context: Context
) -> None:
    """Write new evaluations to `result.json`, keeping its best run and export."""
    result = read_result(context.workdir)
    lacking = [entry.path for entry in result.entries if entry.path not in by_path]
    if lacking:
        context.say(f"result.json was not updated, because this config does not make its model {lacking[0]}")
        return
    by_folder = {step.work.out: evaluations for step, evaluations in by_path.values()}
    sets = describe_sets(teacher, by_folder.values())

    def renewed_of(path: str) -> RunEvaluation:
        step, evaluations = by_path[path]
        return compare(evaluations, teacher, by_folder.get(step.work.control) if step.work.control else None, sets)

    runs = [replace(run, evaluation=renewed_of(run.path)) for run in result.runs]
    controls = [replace(control, evaluation=renewed_of(control.path)) for control in result.controls]
    unpruned = unpruned_of(teacher, result.teacher.costs, result.teacher.speed, result.teacher.carried)
    renewed = replace(result, sets=sets, teacher=unpruned, runs=runs, controls=controls)
    if renewed != result:
        write_artefact(context.workdir / RESULT, renewed)
        context.say("result.json has the new results: run `vlmprune report` to update the report")
