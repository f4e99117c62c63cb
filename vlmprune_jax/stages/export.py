"""One folder of the workdir -> `export/`, reloaded and compared before it counts as done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from vlmprune_jax.core.files import Finite
from vlmprune_jax.data.batching import Batch
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.export.card import model_name
from vlmprune_jax.export.gguf_check import check_gguf
from vlmprune_jax.export.imatrix import Importance
from vlmprune_jax.export.reload import check_export
from vlmprune_jax.export.write import save
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.prune.gptq import Rounded, gptq
from vlmprune_jax.prune.importance import importance
from vlmprune_jax.stages import inputs
from vlmprune_jax.stages.context import Context, load_model, model_inputs, teacher_folder
from vlmprune_jax.workdir.ledger import Json, differs_only_in, remove


class _Facts(TypedDict):
    """What `check_export` or `check_gguf` found."""

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite


def export_stage(
    experiment: Experiment,
    model_folder: Path,
    context: Context,
    *,
    reconstructed: bool = False,
    benchmarks: Sequence[Sequence[str]] = (),
) -> Json:
    """One folder of the workdir -> `export/`, reloaded and compared before it counts as done.

    `reconstructed`, `benchmarks`: what the model card says (see `save`).
    """
    out, spec = context.workdir / "export", experiment.export
    shown = {"benchmarks": benchmarks} if benchmarks else {}
    calibrates = spec.rounding == "gptq" or spec.imatrix
    calibration = affecting("reconstruct", experiment) if calibrates else {}
    records = inputs.record_files(experiment.data, "train") if calibrates else {}
    stage = context.stage(
        "export",
        context.workdir,
        "export",
        settings=calibration | affecting("export", experiment) | shown,
        inputs=model_inputs(experiment.model, model=model_folder, **records),
        outputs=[out],
        facts=_Facts,
    )

    def body() -> Json:
        model = load_model(experiment.model, experiment.mesh, model_folder)
        plan = PrunePlan.from_json(model_folder / "plan.json")
        options = {name: value for name, value in vars(spec).items() if name not in ("rounding", "imatrix")}
        save(
            model,
            out,
            source_dir=model_folder,
            **options,
            storage=_compensated(experiment, model, context) if spec.rounding == "gptq" else None,
            imatrix=_importance(experiment, model, context) if spec.imatrix else None,
            plan=plan,
            name=model_name(teacher_folder(experiment.model)),
            reconstructed=reconstructed,
            recovered=model_folder.name == "recovered",
            benchmarks=benchmarks,
        )
        try:
            if spec.format == "gguf":
                return check_gguf(
                    model, out, source_dir=model_folder, uneven=spec.uneven, rolled_positions=spec.rolled_positions
                )
            return check_export(model, out, vision_dir=experiment.model.vision_dir)
        except BaseException:
            if is_main_process():
                remove(out)  # a folder that failed its comparison, or was not compared, is not an export
            raise

    if on_process_zero(lambda: differs_only_in(stage, "benchmarks")):
        context = dataclasses.replace(context, overwrite=True)  # the same weights: only the card is out of date
    return context.run(stage, body)


def _compensated(experiment: Experiment, model: Model, context: Context) -> Rounded:
    """The codes of the model's matrices by the calibration records of `reconstruct`."""
    spec = experiment.export
    options = {name: getattr(spec, name) for name in ("quantize", "group_size", "symmetric", "dtype")}
    if spec.dtype == "source":
        options["dtype"] = experiment.model.dtype
    with context.phase("gptq", len(model.cfg.text.layers)) as progress:
        return gptq(model, _batches(experiment, model), experiment.reconstruct, progress=progress, **options)


def _importance(experiment: Experiment, model: Model, context: Context) -> Importance:
    """What the model's matrices read, of the same records."""
    with context.phase("imatrix", len(model.cfg.text.layers)) as progress:
        return importance(model, _batches(experiment, model), experiment.reconstruct, progress=progress)


def _batches(experiment: Experiment, model: Model) -> list[Batch]:
    repair = experiment.reconstruct
    return inputs.calibration_batches(experiment.model, experiment.data, repair, model.cfg, seed=repair.seed)
