"""Checks of inputs and settings before a run, and the lines that announce its steps in order."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.processes import on_process_zero, process_count
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.mesh.machine import free_memory, processor
from vlmprune_jax.core.mesh.mesh import row_ways, start_devices
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.records import remarks
from vlmprune_jax.io.exports.card import check_upload, license_of, model_name
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.gguf_metadata import image_fields
from vlmprune_jax.io.exports.mtp import mtp_tensors
from vlmprune_jax.io.exports.vocabulary import export_files
from vlmprune_jax.io.families import family_of
from vlmprune_jax.run.evaluation.config import EvaluationSetSpec
from vlmprune_jax.run.evaluation.questions import evaluation_records
from vlmprune_jax.run.evaluation.runner import check_answered
from vlmprune_jax.run.experiment.arguments import evaluation_sets, image_tokens, recover_config
from vlmprune_jax.run.stages.evaluate import set_files
from vlmprune_jax.run.stages.prune import check_plan, stacks_of
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.stages.work import Work, teacher_folder
from vlmprune_jax.run.workdir.evaluation import TEACHER

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
        lines.append(_export(work, spec.data, spec.export))
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
            yield from remarks(records, eval_set.data or name)
            sizes.append(f"{name} ({len(records):,} questions)")
        else:
            sizes.append(f"{name} (text)")
    if sizes:
        yield f"evaluate {TEACHER} and every model: {', '.join(sizes)}"


def _about(step: Work) -> Iterator[str]:
    """Yield lines that describe a step, with its numbers of records and optimizer steps."""
    data, counted = step.experiment.data, ""
    if any(name.startswith("data.train") for name in step.task.inputs):
        shared, spec = inputs.load_inputs(step.model, data, step.config(step.teacher)), step.sections[step.stage]
        yield from shared.notes
        available = inputs.training_records(data, shared.template)
        total = len(available)
        yield from remarks(available, "data.train")
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


def _export(work: Work, data: DataSpec, spec: ExportSpec) -> str:
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
