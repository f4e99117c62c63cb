"""The speed of the unpruned model and of every pruned shape, in turns -> `speed.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.distributed.processor import processor
from vlmprune_jax.evaluation.speed.measure import measure_speed
from vlmprune_jax.experiment.arguments import export_dtype
from vlmprune_jax.experiment.spec import Experiment, ModelSpec, affecting
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.prune.cost import costs_of
from vlmprune_jax.report.speed import SPEED, Measured
from vlmprune_jax.stages.context import Context, load_model, model_inputs, teacher_folder
from vlmprune_jax.workdir.ledger import Json, write_json


def config_of(spec: ModelSpec, folder: Path) -> ModelConfig:
    """The shapes of the model in a folder of this experiment."""
    return read_config(folder, None if spec.vision_dir is None else Path(spec.vision_dir))[1]


def workload_of(experiment: Experiment) -> Json:
    """What the costs of models are of: the prompt that speed is measured on, and the export's dtype."""
    spec, cfg = experiment.speed, config_of(experiment.model, teacher_folder(experiment.model))
    return {
        "length": spec.prompt_tokens, "images": int(spec.with_image(cfg)), "dtype": export_dtype(experiment)
    }  # fmt: skip


def costs_of_folder(experiment: Experiment, folder: Path) -> Json:
    """What the model in a folder costs by its shapes."""
    cfg, workload = config_of(experiment.model, folder), workload_of(experiment)
    return costs_of(cfg, uneven=experiment.export.uneven, **workload)


def check_speed(experiment: Experiment) -> None:
    """Refuse at the start prompts that the model cannot have, which would be seen when everything else is done.

    Raises:
      UserError: see `SpeedConfig.check`.
    """
    if experiment.speed.rounds:
        experiment.speed.check(config_of(experiment.model, teacher_folder(experiment.model)))


def speed_stage(experiment: Experiment, models: Mapping[str, Path], context: Context) -> Json | None:
    """Measure one of all models (folders by name) that have the same shape, beside the unpruned one -> `speed.json`.

    What weights hold makes no difference. Returns what the file holds, or None where nothing is to be measured.
    """
    spec, out = experiment.speed, context.workdir / SPEED
    if not spec.rounds:
        return None
    shapes: dict[ModelConfig, list[str]] = {}
    for name, folder in models.items():
        shapes.setdefault(config_of(experiment.model, folder), []).append(name)
    groups = list(shapes.values())
    stage = context.stage(
        "speed",
        context.workdir,
        "speed",
        settings={**affecting("speed", experiment), "models": groups},
        inputs=model_inputs(experiment.model, **{names[0]: models[names[0]] / "config.json" for names in groups}),
        outputs=[out],
        facts=Measured,
    )

    def body() -> Json:
        found = _measure(experiment, groups, models, context)
        write_json(out, found)
        return found

    return dataclasses.replace(context, overwrite=True).run(stage, body)  # it takes moments, nobody minds


def _measure(
    experiment: Experiment, groups: Sequence[Sequence[str]], models: Mapping[str, Path], context: Context
) -> Json:
    spec, load = experiment.speed, os.getloadavg()[0]
    unpruned = load_model(experiment.model, experiment.mesh, teacher_folder(experiment.model))
    pairs = []
    with context.phase("speed", len(groups)) as progress:
        for done, names in enumerate(groups, start=1):
            pruned = load_model(experiment.model, experiment.mesh, models[names[0]])
            speeds = measure_speed({"unpruned": unpruned, names[0]: pruned}, spec)
            before, after = (msgspec.to_builtins(speed) for speed in speeds.values())
            pairs.append({"models": list(names), "unpruned": before, "pruned": after})
            progress(done)
    workload = {**vars(spec), "image": spec.with_image(unpruned.cfg), "dtype": experiment.model.dtype}
    return {"processor": processor(), "load": round(load, 1), "workload": workload, "pairs": pairs}
