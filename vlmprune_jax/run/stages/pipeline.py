"""Commands on an experiment: checks before, all stages of its variants in one workdir, and then `result.json`."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from msgspec.structs import asdict, replace

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.processes import is_main_process, on_process_zero, process_count
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.mesh.machine import free_memory, processor
from vlmprune_jax.core.mesh.mesh import row_ways, start_devices
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.exports.card import check_upload, license_of, model_name
from vlmprune_jax.io.exports.describe import describe
from vlmprune_jax.io.exports.folder import mtp_tensors
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.gguf_metadata import image_fields
from vlmprune_jax.io.exports.pruning import costs_of
from vlmprune_jax.io.exports.vocabulary import export_files
from vlmprune_jax.io.families import family_of
from vlmprune_jax.run.evaluation.config import EvaluationSetSpec
from vlmprune_jax.run.evaluation.questions import evaluation_records
from vlmprune_jax.run.evaluation.runner import check_answered
from vlmprune_jax.run.experiment.arguments import evaluation_sets, image_tokens, recover_config
from vlmprune_jax.run.stages.evaluate import (
    evaluate_model,
    measure_shapes,
    names_of_sets,
    set_files,
    workload_of,
    write_samples,
)
from vlmprune_jax.run.stages.export import describe_export, export_folder
from vlmprune_jax.run.stages.prune import check_plan, explain_plan, stacks_of
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.stages.work import Work, teacher_folder
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.comparison import best_run
from vlmprune_jax.run.workdir.evaluation import TEACHER
from vlmprune_jax.run.workdir.ledger import StageRecord, differs_only_in, run_task
from vlmprune_jax.run.workdir.result import RESULT, Costs, Evaluations, Export, Result, Run, read_result
from vlmprune_jax.run.workdir.steps import STEPS, Steps, make_result, read_unfinished

FEW_STEPS = 20  # a recovery with fewer steps gets a remark
SAMPLE = 8  # number of recovery records whose images are decoded as a check


def preflight(work: Work, command: str) -> None:
    """Check before a command that its inputs exist and its settings are possible, and print what the command will do.

    Files and pruning targets are checked before the devices start. Raises UserError if a setting, file, record or image
    is missing or malformed, no plan can reach the target, or disk or memory is too small.
    """
    stages, spec, teacher = [*STAGES] if command == "run" else [command], work.experiment, teacher_folder(work.model)
    sets = evaluation_sets(spec.data, spec.evaluate) if "evaluate" in stages else {}
    for name, eval_set in sets.items():
        _check_files("evaluate", set_files(spec.data, name, eval_set))
    work.open_model(teacher)  # refuses truncated weights, and those of another config.json
    steps = [step for step in work.steps if step.stage in stages]
    for step in steps:
        _check_files(step.task.name, step.task.outside)
        for stack in stacks_of(step.sections["prune"]):
            work.config(teacher).stack(stack)  # refuses one that the model does not have
        if step.stage == "prune":
            with error_context(step.task.name):
                check_plan(work, *(step.sections[name] for name in STAGES["prune"].sections))
    start_devices()
    mesh, count, size = work.devices, process_count(), _weights(work)
    axes = "" if mesh is None else ", mesh " + " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = "" if count == 1 else f", {count} processes"
    weights = f"weights of {size / 2**20:,.1f} MiB in {work.model.dtype}"
    lines = [f"{jax.default_backend()}: {processor()}{axes}{processes}, {weights}", *_questions(work, sets)]
    for step in steps:
        lines += _about(step)
    if "export" in stages:
        lines.append(_about_export(work, spec.data, spec.export))
    for line in dict.fromkeys(lines):
        work.say(f"  {line}")
    needed, free = size // (1 if mesh is None else mesh.size), free_memory()
    if needed > free and {*stages} != {"prune"}:
        raise UserError(
            f"model.hf_dir: the weights need {needed / 2**30:,.1f} GiB per device in {work.model.dtype}, but "
            f'{free / 2**30:,.1f} GiB are free: set model.dtype="bfloat16", or use more devices (mesh.fsdp)'
        )
    check_disk(work, steps, exported="export" in stages)


def _weights(work: Work) -> int:
    """Return the size of the unpruned model's weights in bytes."""
    return count_params(work.config(work.teacher)) * DTYPES[work.model.dtype].itemsize


def _check_files(what: str, files: Mapping[str, Path | str]) -> None:
    """Raise UserError if one of these files is missing."""
    for name, path in files.items():
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{what}: {name} is {path}: no such file or folder")


def _questions(work: Work, sets: Mapping[str, EvaluationSetSpec]) -> Iterator[str]:
    """Yield a line with size and settings of each evaluation set, after reading its records."""
    data, sizes = work.experiment.data, list[str]()
    for name, eval_set in sets.items():
        if eval_set.text is None:
            shared = inputs.load_inputs(work.model, data, work.config(work.teacher))
            yield from shared.notes
            records = evaluation_records(eval_set, image_lead=shared.template.image_lead)
            check_answered(records)
            yield from _remarks(records, eval_set.data or name)
            sizes.append(f"{name} ({len(records):,} questions)")
        else:
            sizes.append(f"{name} (text)")
    if sizes:
        yield f"evaluate {TEACHER} and every model: {', '.join(sizes)}"


def _remarks(records: Iterable[Record], what: str) -> Iterator[str]:
    """Yield a line about empty answers, and a line about ids that several records share, in the data set called `what`.

    All of these records are kept. Repeating a data set on purpose (InternVL's repeat_time) does not repeat ids.
    """
    distinct = {id(record): record for record in records}.values()
    empty = [r.id for r in distinct if any(speaker == "gpt" and not text.strip() for speaker, text in r.turns)]
    if empty:
        yield f"{what}: {len(empty):,} of the records have an empty answer (first: {empty[0]}); all are kept"
    repeated = [name for name, count in Counter(record.id for record in distinct).items() if count > 1]
    if repeated:
        yield f"{what}: {len(repeated):,} of the ids belong to several records (first: {repeated[0]}); all are kept"


def _about(step: Work) -> Iterator[str]:
    """Yield lines that describe a step, with its numbers of records and optimizer steps."""
    data, counted = step.experiment.data, ""
    if any(name.startswith("data.train") for name in step.task.inputs):
        shared, spec = inputs.load_inputs(step.model, data, step.config(step.teacher)), step.sections[step.stage]
        yield from shared.notes
        available = inputs.training_records(data, shared.template)
        total = len(available)
        yield from _remarks(available, "data.train")
        if step.stage == "recover":
            records = inputs.recovery_records(data, shared.template)
            if data.on_error == "stop":
                encoder = shared.training_encoder(step.config(step.teacher))
                for problem in map(encoder.problem, records[:: max(1, len(records) // SAMPLE)][:SAMPLE]):
                    if problem is not None:
                        raise UserError(f"data.train: {problem}")
            config = recover_config(spec).fit_records(len(records), row_ways(step.devices))
            steps = config.num_steps(len(records))
            counted = f": {len(records):,} of {total:,} records, {steps:,} steps of {config.batch_size:,} rows"
            if steps < FEW_STEPS and not step.record.control:
                counted += f" (few steps: raise recover.epochs or data.fraction, which is {data.fraction:g})"
        elif hasattr(spec, "samples"):
            counted = f": {min(spec.samples, total):,} of {total:,} records"
            if spec.samples > total:
                counted += f" ({step.stage}.samples={spec.samples:,} is more than there are)"
    if step.record.control:
        counted += " (the unpruned model, for comparison: recover.control=False leaves it out)"
    yield f"{step.task.name}{counted}"


def _about_export(work: Work, data: DataSpec, spec: ExportSpec) -> str:
    """Check the export's settings and upload, and return a line that describes it."""
    cfg = work.config(work.teacher)
    with export_files(work.teacher, cfg, most=image_tokens(data, spec)) as files:
        if spec.format == "gguf" and cfg.vision is not None:
            image_fields(cfg, family_of(cfg), files)
    if spec.mtp == "cut":
        mtp_tensors(Checkpoint(work.teacher), cfg, "source")  # refuses a missing or damaged module
    checked = "in torch" if importlib.util.find_spec("torch") else "in JAX (for PyTorch install torch)"
    about = f"export as {spec.format}, reloaded and compared {checked}"
    if spec.push_to_hub is None:
        return about
    base, license = spec.base_model or model_name(work.teacher), spec.license or license_of(work.teacher).get("license")
    check_upload(spec.push_to_hub, base if "/" in base else None, license)
    return f"{about}, uploaded to {spec.push_to_hub}"


def check_disk(work: Work, steps: Sequence[Work], *, exported: bool) -> None:
    """Raise UserError if the disk cannot hold the models that these steps, and the export, have yet to write."""
    size, needed = _weights(work), [0]
    for step in steps:
        ratio = step.sections["prune"].ratio if step.record.pruned else 0.0
        if step.record.model and not step.out.is_dir() and ratio is not None:
            needed.append(int(size * (1 - ratio)))
    needed_bytes = sum(needed) + (max(needed) if exported else 0)
    on_process_zero(lambda: check_space(work.workdir / "models", needed_bytes))


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

    passthrough = describe(root.teacher, root.tower)["passthrough"]
    return replace(
        result,
        teacher=measured(result.teacher, "", root.teacher, passthrough=passthrough),
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
