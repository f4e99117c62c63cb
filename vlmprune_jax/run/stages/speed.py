"""Speed of the unpruned model and of one pruned model per layer shape, measured in turns -> `speed.json`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import msgspec
from msgspec.structs import asdict

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.machine import processor
from vlmprune_jax.core.prune.cost import speed_limits
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.exports.formats import ExportSpec
from vlmprune_jax.io.exports.pruning import costs_of
from vlmprune_jax.run.evaluation.speed.clock import Measurement, SpeedConfig
from vlmprune_jax.run.evaluation.speed.measure import measure_speed
from vlmprune_jax.run.experiment.arguments import export_dtype, image_tokens
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.ledger import Task, run_task
from vlmprune_jax.run.workdir.result import Costs, Workload
from vlmprune_jax.run.workdir.speed import SPEED, Pair, Speed, SpeedWorkload


def workload_of(work: Work, data: DataSpec, spec: SpeedConfig, export: ExportSpec) -> Workload:
    """Return the prompt for which costs are computed, from the settings of `speed` and `export`."""
    images, tokens = int(spec.with_image(work.config(work.teacher))), image_tokens(data, export) or 0
    dtype = export_dtype(work.model, export)
    return Workload(length=spec.prompt_tokens, images=images, dtype=dtype, image_tokens=tokens if images else 0)


def costs_of_folder(work: Work, folder: Path, workload: Workload, export: ExportSpec) -> Costs:
    """Return the costs of the model in a folder, computed from its layer shapes."""
    return Costs(**costs_of(work.config(folder), uneven=export.uneven, **asdict(workload)))


def _shapes(work: Work) -> list[list[str]]:
    """Group models by layer shape, on which speed depends (not on weight values)."""
    shapes: dict[ModelConfig, list[str]] = {}
    for name, folder in work.models.items():
        shapes.setdefault(work.config(folder), []).append(name)
    return list(shapes.values())


def speed_task(task: Task, work: Work, spec: SpeedConfig) -> Task:
    """Add the speed stage's inputs: one model config per layer shape."""
    shapes = _shapes(work)
    return task.add(
        inputs={names[0]: work.models[names[0]] / "config.json" for names in shapes}, settings={"models": shapes}
    )


class ShapeSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured speed of one layer shape, and of the unpruned model in the same repetitions."""

    unpruned: Measurement
    pruned: Measurement


def speed_stage(work: Work, spec: SpeedConfig) -> Speed:
    """Measure one model of each layer shape, in turns with the unpruned model."""
    load, shapes, pairs = os.getloadavg()[0], _shapes(work), list[Pair]()
    before = work.config(work.teacher)
    image = spec.with_image(before)
    row = {"length": spec.prompt_tokens, "images": int(image), "batch": spec.batch_size}
    with work.phase("speed", len(shapes)) as progress:
        for done, names in enumerate(shapes, start=1):
            folder = work.models[names[0]]
            speed = _shape_speed(work, spec, folder)
            prefill, decode = speed_limits(before, work.config(folder), **row)
            limits = {"prefill_limit": prefill, "decode_limit": decode}
            pairs.append(Pair(models=names, unpruned=speed.unpruned, pruned=speed.pruned, **limits))
            progress(done)
    workload = SpeedWorkload(**{**vars(spec), "image": image}, dtype=work.model.dtype)
    speeds = Speed(processor=processor(), load=round(load, 1), workload=workload, pairs=pairs)
    write_artefact(work.folder / SPEED, speeds)
    return speeds


def _shape_speed(work: Work, spec: SpeedConfig, folder: Path) -> ShapeSpeed:
    """Measure the speed of the model in a folder; runs of a sweep share the result per layer shape."""

    def measure() -> ShapeSpeed:
        models = {"unpruned": work.load(work.teacher), "pruned": work.load(folder)}
        return ShapeSpeed(**measure_speed(models, spec))

    if work.store is None:
        return measure()
    shapes = [content_key(dataclasses.asdict(work.config(path))) for path in (work.teacher, folder)]
    settings = {**vars(spec), "dtype": work.model.dtype, "mesh": vars(work.mesh), "processor": processor()}
    task = Task(
        name=f"speed of {shapes[1][:8]}",
        function=measure,
        workdir=work.workdir,
        settings={**settings, "shapes": shapes},
        facts=ShapeSpeed,
        kind="speed_of_shape",
        store=work.store,
    )
    return run_task(task, overwrite=True, say=work.say).facts
