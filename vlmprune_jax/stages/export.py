"""Export a model of the workdir to `export/`, then reload it and compare it with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.data import inputs
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.arguments import export_options
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.export.card import model_name
from vlmprune_jax.export.format import Calibration, Comparison
from vlmprune_jax.export.formats import choose_format
from vlmprune_jax.export.write import check_saved, save
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.prune.gptq import gptq
from vlmprune_jax.prune.importance import importance
from vlmprune_jax.stages.context import Context, load_model, model_inputs, teacher_folder
from vlmprune_jax.workdir.ledger import Json, differs_only_in, remove

# Function of a model and calibration batches, by the name that a format's `Calibration` gives.
CALIBRATIONS: dict[str, Callable[..., Any]] = {"gptq": gptq, "importance": importance}


def export_stage(
    experiment: Experiment,
    model_folder: Path,
    context: Context,
    *,
    reconstructed: bool = False,
    benchmarks: Sequence[Sequence[str]] = (),
) -> Json:
    """Export a folder of the workdir to `export/`; a folder that differs from the model when reloaded is removed.

    `reconstructed`, `benchmarks`: for the model card (see `save`).
    """
    out, spec = context.workdir / "export", experiment.export
    chosen, values = choose_format(spec.format, export_options(spec))
    calibration = chosen.calibration(values)
    repair = affecting("reconstruct", experiment) if calibration else {}
    records = inputs.record_files(experiment.data, "train") if calibration else {}
    code = {} if chosen.file is None else {f"format {spec.format}": chosen.file}
    shown = {"benchmarks": benchmarks} if benchmarks else {}
    stage = context.stage(
        "export",
        context.workdir,
        "export",
        settings=repair | affecting("export", experiment) | shown,
        inputs=model_inputs(experiment.model, model=model_folder, **records, **code),
        outputs=[out],
        facts=Comparison,
    )

    def body() -> Json:
        model = load_model(experiment.model, experiment.mesh, model_folder)
        options = {"format": spec.format, **vars(values)}
        if calibration is not None:
            options[calibration.option] = _calibrate(calibration, experiment, model, context)
        save(
            model,
            out,
            source_dir=model_folder,
            plan=PrunePlan.from_json(model_folder / "plan.json"),
            name=model_name(teacher_folder(experiment.model)),
            reconstructed=reconstructed,
            recovered=model_folder.name == "recovered",
            benchmarks=benchmarks,
            **options,
        )
        try:
            vision_dir = experiment.model.vision_dir
            return {**check_saved(model, out, source_dir=model_folder, vision_dir=vision_dir, **options)}
        except BaseException:
            if is_main_process():
                remove(out)
            raise

    if on_process_zero(lambda: differs_only_in(stage, "benchmarks")):
        context = dataclasses.replace(context, overwrite=True)  # the same weights: only the card is out of date
    return context.run(stage, body)


def _calibrate(calibration: Calibration, experiment: Experiment, model: Model, context: Context) -> Any:
    """Return a calibration's value on the records of `reconstruct`, with its weights of prompts, images and answers."""
    repair = experiment.reconstruct
    batches = inputs.calibration_batches(experiment.model, experiment.data, repair, model.cfg, seed=repair.seed)
    with context.phase(calibration.function, len(model.cfg.text.layers)) as progress:
        function = CALIBRATIONS[calibration.function]
        return function(model, batches, repair, progress=progress, **calibration.settings)
