"""The speed of the unpruned model and of every pruned shape, in turns -> `speed.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import asdict

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.source import ModelSpec
from vlmprune_jax.distributed.processor import processor
from vlmprune_jax.evaluation.speed.measure import measure_speed
from vlmprune_jax.experiment.arguments import export_dtype
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.prune.cost import costs_of
from vlmprune_jax.stages.context import Context, load_model, model_inputs, teacher_folder
from vlmprune_jax.workdir.artefact import as_kind, to_json, write_artefact
from vlmprune_jax.workdir.ledger import Json
from vlmprune_jax.workdir.result import Costs, Workload
from vlmprune_jax.workdir.speed import SPEED, MedianSpeed, Pair, Speed, SpeedWorkload


def config_of(spec: ModelSpec, folder: Path) -> ModelConfig:
    """The shapes of the model in a folder of this experiment."""
    return read_config(folder, None if spec.vision_dir is None else Path(spec.vision_dir))[1]


def workload_of(experiment: Experiment) -> Workload:
    """Return the row that costs are for: the prompt that speed is measured on, and the export's dtype."""
    spec, cfg = experiment.speed, config_of(experiment.model, teacher_folder(experiment.model))
    images = int(spec.with_image(cfg))
    return Workload(length=spec.prompt_tokens, images=images, dtype=export_dtype(experiment))


def costs_of_folder(experiment: Experiment, folder: Path) -> Costs:
    """Return the costs of the model in a folder, by its shapes."""
    cfg, workload = config_of(experiment.model, folder), workload_of(experiment)
    return Costs(**costs_of(cfg, uneven=experiment.export.uneven, **asdict(workload)))


def check_speed(experiment: Experiment) -> None:
    """Refuse at the start prompts that the model cannot have, which would be seen when everything else is done.

    Raises:
      UserError: see `SpeedConfig.check`.
    """
    if experiment.speed.rounds:
        experiment.speed.check(config_of(experiment.model, teacher_folder(experiment.model)))


def speed_stage(experiment: Experiment, models: Mapping[str, Path], context: Context) -> dict[str, MedianSpeed]:
    """Measure one of all models (folders by name) that have the same shape, beside the unpruned one -> `speed.json`.

    The values of weights make no difference. Returns the medians by name, the unpruned model's as ""; empty if nothing
    is to be measured.
    """
    spec, out = experiment.speed, context.workdir / SPEED
    if not spec.rounds:
        return {}
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
        facts=Speed,
    )

    def body() -> Json:
        found = _measure(experiment, groups, models, context)
        write_artefact(out, found)
        facts: Json = to_json(found)
        return facts

    facts = dataclasses.replace(context, overwrite=True).run(stage, body)  # it takes moments, nobody minds
    return as_kind(facts, Speed, out).medians()


def _measure(
    experiment: Experiment, groups: Sequence[Sequence[str]], models: Mapping[str, Path], context: Context
) -> Speed:
    spec, load = experiment.speed, os.getloadavg()[0]
    unpruned = load_model(experiment.model, experiment.mesh, teacher_folder(experiment.model))
    pairs = list[Pair]()
    with context.phase("speed", len(groups)) as progress:
        for done, names in enumerate(groups, start=1):
            pruned = load_model(experiment.model, experiment.mesh, models[names[0]])
            speeds = measure_speed({"unpruned": unpruned, names[0]: pruned}, spec)
            before, after = speeds.values()
            pairs.append(Pair(models=list(names), unpruned=before, pruned=after))
            progress(done)
    given = {**vars(spec), "image": spec.with_image(unpruned.cfg)}
    workload = SpeedWorkload(**given, dtype=experiment.model.dtype)
    return Speed(processor=processor(), load=round(load, 1), workload=workload, pairs=pairs)
