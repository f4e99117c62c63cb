"""Importances of the unpruned model -> `scores.npz`, of its tower -> `scores_vision.npz`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.files import Count
from vlmprune_jax.data import inputs
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.distributed.mesh import is_main_process
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.prune import CRITERIA, score
from vlmprune_jax.stages.context import (
    Context,
    journal_of,
    journal_path,
    load_model,
    model_inputs,
    teacher_folder,
)
from vlmprune_jax.workdir.ledger import Json

_FILES = {"text": "scores", "vision": "scores_vision"}


def stacks_of(experiment: Experiment) -> tuple[str, ...]:
    """The stacks that lose something."""
    stack = experiment.prune.stack
    return STACKS if stack == "both" else (stack,)


def criteria_of(experiment: Experiment, stack: str | None = None) -> dict[str, str]:
    """Scores file -> criterion, as the method needs them: of all stacks that lose something, or of one."""
    spec, method = experiment.score, experiment.prune.method
    files = {"": spec.depth, "_width": spec.width} if method == "hybrid" else {"": spec.depth}
    if method == "width":
        files = {"": spec.width}
    stacks = stacks_of(experiment) if stack is None else (stack,)
    return {f"{_FILES[of]}{kind}.npz": criterion for of in stacks for kind, criterion in files.items()}


def criterion_files(criteria: Iterable[str]) -> dict[str, Path]:
    """The files of users' own criteria: what these give changes with them."""
    files = {f"criterion {name}": CRITERIA[name].file for name in criteria}
    return {name: path for name, path in files.items() if path is not None}


def _parts(output: Path) -> Path:
    """Where a pass that goes from layer to layer keeps what it has."""
    return output.with_name(f".{output.name}.parts")


class _Facts(TypedDict):
    criteria: dict[str, str]
    samples: Count
    skipped: NotRequired[list[str]]


def score_stage(experiment: Experiment, folder: Path, context: Context) -> Json:
    """Importances of the unpruned model -> `scores.npz` (hybrid: also `scores_width.npz`), or those of its tower."""
    criteria = criteria_of(experiment)
    settings = affecting("score", experiment)
    for name in ("score.depth", "score.width"):  # those of them that the method needs are its criteria
        del settings[name]
    needs_data = any(CRITERIA[criterion].needs_batches for criterion in criteria.values())
    stage = context.stage(
        "score",
        folder,
        "score",
        settings={"criteria": criteria, **settings},
        inputs=model_inputs(
            experiment.model,
            **(inputs.record_files(experiment.data, "train") if needs_data else {}),
            **criterion_files(criteria.values()),
        ),
        outputs=[folder / name for name in criteria],
        journals=[path for name in criteria for path in (journal_path(folder / name), _parts(folder / name))],
        facts=_Facts,
    )

    def body() -> Json:
        model = load_model(experiment.model, experiment.mesh, teacher_folder(experiment.model))
        for stack in stacks_of(experiment):
            model.cfg.stack(stack)  # one that the model does not have is told before the first pass
        batches = None
        if needs_data:
            batches = inputs.calibration_batches(
                experiment.model, experiment.data, experiment.score, model.cfg, seed=experiment.score.seed
            )
        for stack in stacks_of(experiment):
            for name, criterion in criteria_of(experiment, stack).items():
                chosen = CRITERIA[criterion]
                total = chosen.total(model.cfg, batches or [], stack)
                kept: dict[str, Any] = {}
                if chosen.needs == "labels" and chosen.journals and stack == "text":
                    made_from = {"criterion": criterion, "settings": settings, "mesh": vars(experiment.mesh)}
                    kept["cache"] = ArrayCache(_parts(folder / name), made_from)
                else:
                    kept["journal"] = journal_of(experiment.mesh, journal_path(folder / name), total)
                what = criterion if stack == "text" else f"{criterion} of the tower"
                options = {"stack": stack, **kept}
                with context.phase(f"score ({what})", total) as progress:
                    scores = score(model, batches, experiment.score, criterion=criterion, progress=progress, **options)
                if is_main_process():
                    scores.save(folder / name)
        skipped = [name for batch in batches or [] for name, _ in batch.skipped]
        if skipped:
            context.reporter.say(f"  {len(skipped)} unreadable records were passed over: {', '.join(skipped[:5])}")
        facts = {"criteria": criteria, "samples": experiment.score.samples if needs_data else 0}
        return {**facts, "skipped": skipped} if skipped else facts

    return context.run(stage, body)
