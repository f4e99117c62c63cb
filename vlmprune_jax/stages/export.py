"""One folder of the workdir -> `export/`, reloaded and compared before it counts as done."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from vlmprune_jax.checked_files import Finite
from vlmprune_jax.distributed.mesh import is_main_process
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.hf.export.card import model_name
from vlmprune_jax.hf.export.gguf_check import check_gguf
from vlmprune_jax.hf.export.reload import check_export
from vlmprune_jax.hf.export.write import save
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.stages.context import Context, load_model, model_inputs, teacher_folder
from vlmprune_jax.stages.ledger import Json, remove


class _Facts(TypedDict):
    """What `check_export` or `check_gguf` found."""

    backend: str
    max_abs_logit_difference: Finite
    tolerance: Finite


def export_stage(experiment: Experiment, model_folder: Path, context: Context, *, reconstructed: bool = False) -> Json:
    """One folder of the workdir -> `export/`, reloaded and compared before it counts as done.

    `reconstructed`: whether the model card says that weights were solved for.
    """
    out, spec = context.workdir / "export", experiment.export
    stage = context.stage(
        "export",
        context.workdir,
        "export",
        settings=affecting("export", experiment),
        inputs=model_inputs(experiment.model, model=model_folder),
        outputs=[out],
        facts=_Facts,
    )

    def body() -> Json:
        model = load_model(experiment.model, experiment.mesh, model_folder)
        plan = PrunePlan.from_json(model_folder / "plan.json")
        save(
            model,
            out,
            source_dir=model_folder,
            **vars(spec),
            plan=plan,
            name=model_name(teacher_folder(experiment.model)),
            reconstructed=reconstructed,
            recovered=model_folder.name == "recovered",
        )
        try:
            if spec.format == "gguf":
                options = {"uneven": spec.uneven, "rolled_positions": spec.rolled_positions}
                return check_gguf(model, out, source_dir=model_folder, **options)
            return check_export(model, out, vision_dir=experiment.model.vision_dir)
        except BaseException:
            if is_main_process():
                remove(out)  # a folder that failed its comparison, or was not compared, is not an export
            raise

    return context.run(stage, body)
