"""Order of the stages of all variants of an experiment, and conversion of one stage to a ledger task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.experiment.variants import CONTROL, NO_RECOVERY, Variant, prune_runs, recover_runs
from vlmprune_jax.run.stages import evaluate, export, prune, reconstruct, recover, score, speed
from vlmprune_jax.run.stages.registry import STAGES
from vlmprune_jax.run.stages.task import make_task
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.ledger import Task
from vlmprune_jax.run.workdir.steps import StepRecord

# Functions `run` and `task` of the built-in stages, which import jax.
BUILT_IN: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "score": (score.score_stage, score.score_task),
    "prune": (prune.prune_stage, prune.prune_task),
    "reconstruct": (reconstruct.reconstruct_stage, None),
    "recover": (recover.recover_stage, recover.recover_task),
    "evaluate": (evaluate.evaluate_stage, evaluate.evaluate_task),
    "speed": (speed.speed_stage, speed.speed_task),
    "export": (export.export_stage, export.export_task),
}


def task_of(work: Work) -> Task:
    """Return the task of `work`: the stage's settings, inputs and outputs for this variant and folder."""
    return make_task(work, *BUILT_IN.get(work.stage, (None, None)))


def steps_of(root: Work) -> list[Work]:
    """Return the stages to run for every prune variant and its recovery variants, in order.

    A recovery's control comes after the first model with this recovery. `root`: the `Work` of the command.
    """
    steps, controls = list[Work](), dict[str, Work]()
    for pruned in prune_runs(root.experiment, root.workdir):
        recoveries = recover_runs(pruned)
        variant = root.replace(
            experiment=pruned.experiment,
            variant=pruned.folder,
            folder=pruned.folder,
            name=pruned.name,
            recovery=NO_RECOVERY,
            pruned=pruned.experiment.prune.method != "none",
        )
        shared = _chain("variant", variant, last=not recoveries)
        steps += shared
        for run in recoveries:
            work = root.replace(
                experiment=run.experiment,
                variant=pruned.folder,
                folder=run.folder,
                name=run.name,
                recovery=run.experiment.recover.name,
                before=tuple(shared),
                pruned=variant.pruned,
            )
            known, control = len(controls), _control(root, run, pruned, controls)
            steps += _chain("recovery", work.replace(control=None if control is None else control.out))
            steps += [control] if control is not None and len(controls) > known else []
    return steps


def _chain(scope: str, place: Work, *, last: bool = True) -> list[Work]:
    """Return the stages of one variant that change the model, in order; `place` is the `Work` of the variant's folder.

    `last`: True if no recovery follows, so that the last model is evaluated in any case.
    """
    steps, settings = list[Work](), place.sections
    stages = {name: stage for name, stage in STAGES.items() if stage.per == scope and stage.off(settings) is None}
    final = [name for name, stage in stages.items() if stage.model and last][-1:]
    for name, stage in stages.items():
        chain, title, recovery = (*place.before, *steps), place.name, place.recovery
        starts = [step.out for step in (place.before or steps) if makes_model(step)]
        if any(makes_model(step) for step in steps):
            title = f"{title}-{stage.model}"
            recovery = stage.model if recovery == NO_RECOVERY else f"{recovery}-{stage.model}"
        steps.append(
            place.replace(
                stage=name,
                name=title,
                recovery=recovery,
                evaluated=scope == "recovery" or place.experiment.evaluate.unrecovered or name in final,
                before=chain,
                start=starts[-1] if starts else place.start,
                out=place.folder / stage.model,
                reconstructed="reconstruct" in (name, *(step.stage for step in chain)),
                recovered=scope == "recovery",
            )
        )
    return steps


def _control(root: Work, run: Variant, pruned: Variant, known: dict[str, Work]) -> Work | None:
    """Return the step that trains the control (an unpruned model) for a recovery; None if not wanted.

    A model that is not pruned needs none. `known`: the controls so far, by everything that they depend on, to which a
    new one is added.
    """
    spec, below = run.experiment, run.folder.relative_to(pruned.folder)
    if not (spec.recover.control and terms_of(spec.recover.losses, teacher=False)) or spec.prune.method == "none":
        return None
    if spec.prune.stack != "text" or spec.prune.vocabulary.size is not None:  # whose caches are of another model
        for section, cache in (("data", "feature_cache"), ("recover", "teacher_cache")):
            folder = getattr(spec.sections[section], cache)
            if folder is not None:
                changed: dict[str, Any] = {cache: str(Path(folder) / CONTROL)}
                changed = {section: dataclasses.replace(spec.sections[section], **changed)}
                spec = dataclasses.replace(spec, **changed)

    def step(folder: Path, title: str) -> Work:
        return root.replace(
            stage="recover",
            experiment=spec,
            name=title,
            recovery=spec.recover.name,
            evaluated=True,
            variant=folder,
            folder=folder,
            out=folder / "recovered",
            recovered=True,
            pruned=False,
            is_control=True,
        )

    name = CONTROL if below == Path() else f"{CONTROL}-{spec.recover.name}"
    first, settings = step(root.workdir / CONTROL / below, name), affecting("recover", spec.sections)
    key = content_key(settings, [spec.data.train, spec.data.images, spec.model.hf_dir])
    taken = any(other.folder == first.folder for other in known.values())
    control = step(pruned.folder / CONTROL / below, f"{pruned.name}-{name}") if taken else first
    return known.setdefault(key, control)


def makes_model(work: Work) -> bool:
    """Return True if the stage writes a model folder."""
    return bool(STAGES[work.stage].model)


def record_of(step: Work) -> StepRecord:
    """Return the record of a step for the workdir's list of steps."""
    stage = STAGES[step.stage]
    variant, folder = (place.relative_to(step.workdir).as_posix() for place in (step.variant, step.folder))
    return StepRecord(
        stage=step.stage,
        name=step.name,
        recovery=step.recovery,
        about=stage.help,
        variant=variant,
        folder=folder,
        outputs=list(stage.outputs),
        model=stage.model,
        evaluated=step.evaluated,
        pruned=step.pruned,
        control=step.is_control,
        compared_with="" if step.control is None else step.control.relative_to(step.workdir).as_posix(),
    )
