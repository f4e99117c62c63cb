"""Speed of the unpruned model and of one pruned model per layer shape, measured in turns -> `speed.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.machine import processor
from vlmprune_jax.core.prune.cost import speed_limits
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.run.evaluation.speed.bench import measure_speed
from vlmprune_jax.run.evaluation.speed.clock import Measurement, SpeedConfig
from vlmprune_jax.run.experiment.arguments import export_dtype, image_tokens
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.ledger import Task, run_task
from vlmprune_jax.run.workdir.result import Workload
from vlmprune_jax.run.workdir.speed import SPEED, Pair, Speed, SpeedWorkload


def workload_of(work: Work, data: DataSpec, spec: SpeedConfig, export: ExportSpec) -> Workload:
    """Return the prompt for which costs are computed, from the settings of `speed` and `export`."""
    images, tokens = int(spec.with_image(work.config(work.teacher))), image_tokens(data, export) or 0
    dtype = export_dtype(work.model, export)
    return Workload(length=spec.prompt_tokens, images=images, dtype=dtype, image_tokens=tokens if images else 0)


class ShapeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured speed of one layer shape, and of the unpruned model in the same repetitions, on which machine."""

    processor: str
    load: float  # load average of the machine before the measurement
    unpruned: Measurement
    pruned: Measurement


def speed_task(task: Task, work: Work, spec: SpeedConfig) -> Task:
    """Complete the task of one layer shape: speed depends on shapes, not on weights."""
    shapes = [content_key(dataclasses.asdict(work.config(path))) for path in (work.teacher, work.start)]
    # Machines that share a sweep's results measure for themselves.
    machine = {} if work.store is None else {"mesh": vars(work.mesh), "processor": processor()}
    return dataclasses.replace(task, inputs={}, settings={**task.settings, "shapes": shapes, **machine})


def speed_stage(work: Work, spec: SpeedConfig) -> ShapeSpeed:
    """Measure the model in `work.start` in turns with the unpruned model."""
    load = round(os.getloadavg()[0], 1)
    measured = measure_speed({"unpruned": work.load(work.teacher), "pruned": work.load(work.start)}, spec)
    return ShapeSpeed(processor=processor(), load=load, **measured)


def measure_shapes(root: Work, models: Mapping[str, Path]) -> Speed:
    """Measure one of {name: model folder} for each layer shape; write `speed.json`."""
    spec, before, shapes = root.experiment.speed, root.config(root.teacher), dict[ModelConfig, list[str]]()
    for name, folder in models.items():
        shapes.setdefault(root.config(folder), []).append(name)
    image, measured, pairs = spec.with_image(before), list[ShapeSpeed](), list[Pair]()
    row = {"length": spec.prompt_tokens, "images": int(image), "batch": spec.batch_size}
    for shape, names in shapes.items():
        task = root.replace(stage="speed", subject=names[0], start=models[names[0]]).task
        speed: ShapeSpeed = run_task(task, overwrite=True, say=root.say).facts
        prefill, decode = speed_limits(before, shape, **row)
        limits = {"prefill_limit": prefill, "decode_limit": decode}
        pairs.append(Pair(models=names, unpruned=speed.unpruned, pruned=speed.pruned, **limits))
        measured.append(speed)
    workload = SpeedWorkload(**{**vars(spec), "image": image}, dtype=root.model.dtype)
    speeds = Speed(processor=measured[0].processor, load=measured[0].load, workload=workload, pairs=pairs)
    write_artefact(root.workdir / SPEED, speeds)
    return speeds
