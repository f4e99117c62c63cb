"""Pruned model + calibration records -> `reconstructed/`, solved for without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.data import inputs
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.prune.reconstruction import layers_to_solve, reconstruct
from vlmprune_jax.stages.context import Context, load_model, model_inputs, save_model, teacher_folder
from vlmprune_jax.workdir.ledger import Json

RECONSTRUCTED = "reconstructed"


class _Module(TypedDict):
    """What became of one weight; see `prune.reconstruct`. Older versions solved for the decoder, and did not say so."""

    stack: NotRequired[str]
    layer: Count
    module: str
    ridge: Finite | None
    error_before: Finite
    error_after: Finite
    tokens: NotRequired[Count]
    unknowns: NotRequired[Count]


class _Facts(TypedDict):
    samples: Count
    modules: list[_Module]


def cut_folder(experiment: Experiment, folder: Path) -> Path:
    """The model that recovery starts from: what pruning left in `folder`, or what was made of that."""
    return folder / ("pruned" if experiment.reconstruct.method == "none" else RECONSTRUCTED)


def reconstruct_stage(experiment: Experiment, folder: Path, context: Context) -> Json:
    """Pruned model + calibration records -> `reconstructed/`; what was done to each weight is in the facts."""
    pruned, parts, spec = folder / "pruned", folder / ".reconstructed.parts", experiment.reconstruct
    if not pruned.is_dir():
        raise UserError(f"{pruned}: no such folder: run `vlmprune prune` (or `vlmprune run`) first")
    settings = affecting("reconstruct", experiment)
    stage = context.stage(
        "reconstruct",
        folder,
        "reconstruct",
        settings=settings,
        inputs=model_inputs(experiment.model, pruned=pruned, **inputs.record_files(experiment.data, "train")),
        outputs=[folder / RECONSTRUCTED],
        journals=[parts],
        facts=_Facts,
    )

    def body() -> Json:
        plan = PrunePlan.from_json(folder / "plan.json")
        teacher = load_model(experiment.model, experiment.mesh, teacher_folder(experiment.model))
        model = load_model(experiment.model, experiment.mesh, pruned)
        batches = inputs.calibration_batches(experiment.model, experiment.data, spec, teacher.cfg, seed=spec.seed)
        with context.phase("reconstruct", layers_to_solve(plan)) as progress:
            model, modules = reconstruct(
                model,
                plan,
                teacher,
                batches,
                spec,
                progress=progress,
                cache=ArrayCache(parts, {"settings": settings, "mesh": vars(experiment.mesh)}),
            )
        save_model(model, folder / RECONSTRUCTED, experiment.model, pruned, plan, reconstructed=True)
        context.reporter.say(f"  {_summary(modules)}")
        scarce = [one for one in modules if one["tokens"] < one["unknowns"]]
        if scarce:
            context.reporter.say(
                f"  {scarce[0]['tokens']:,} tokens are few for the {scarce[0]['unknowns']:,} unknowns of an output of "
                f"{len(scarce)} weights: more records (reconstruct.samples) win back more"
            )
        return {"samples": spec.samples, "modules": modules}

    return context.run(stage, body)


def _summary(modules: Sequence[dict[str, Any]]) -> str:
    solved = [one for one in modules if one["ridge"] is not None]
    if not solved:
        return f"none of {len(modules)} weights was changed: no change lessened the error on held-out records"
    before, after = (sum(one[f"error_{when}"] for one in solved) / len(solved) for when in ("before", "after"))
    return (
        f"{len(solved)} of {len(modules)} weights solved for; error of the stream behind them, on held-out records: "
        f"{before:.3f} before, {after:.3f} after (mean)"
    )
