"""One stage applied to one variant in a workdir, and the entry in `result.json` of the model that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.stages.answers import evaluate_model
from vlmprune_jax.stages.job import Sections, make_job, run_stage
from vlmprune_jax.stages.recover import RecoverFacts
from vlmprune_jax.stages.registry import STAGES
from vlmprune_jax.stages.score import criteria_of
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.evaluation import Evaluated
from vlmprune_jax.workdir.ledger import Finished, Job
from vlmprune_jax.workdir.result import Control, Run, RunEvaluation
from vlmprune_jax.workdir.unfinished import StepRecord


@dataclass(frozen=True, eq=False)
class Step:
    """One stage applied to one variant, in a workdir.

    `name`, `recovery`: of the model that it makes, in results. `evaluated`: if that model is. `before`: the steps that
    led to it, the first one first.
    """

    stage: str
    name: str
    recovery: str
    evaluated: bool
    sections: Sections
    work: Work
    before: tuple[Step, ...]

    @property
    def makes_model(self) -> bool:
        """True if the stage writes a model folder."""
        return bool(STAGES[self.stage].model)

    @property
    def path(self) -> str:
        """Path of the step's model folder, relative to the workdir."""
        return self.work.out.relative_to(self.work.workdir).as_posix()

    @property
    def job(self) -> Job:
        """Job of the step: settings, input and output files."""
        return make_job(self.stage, self.work, self.sections)

    @property
    def planned(self) -> StepRecord:
        """Record of the step for the workdir's list of steps."""
        stage, places = STAGES[self.stage], (self.work.variant, self.work.folder)
        variant, folder = (place.relative_to(self.work.workdir).as_posix() for place in places)
        return StepRecord(
            stage=self.stage,
            name=self.name,
            recovery=self.recovery,
            about=stage.help,
            variant=variant,
            folder=folder,
            outputs=list(stage.outputs),
            model=stage.model,
            evaluated=self.evaluated,
            control=not self.work.pruned,
        )

    def run(self) -> Finished:
        """Run the step's stage unless its result is up to date."""
        return run_stage(self.stage, self.work, self.sections)

    def evaluate(self) -> dict[str, Evaluated]:
        """Evaluate the model that the step wrote."""
        return evaluate_model(
            dataclasses.replace(self.work, start=self.work.out, part=self.work.out.name), self.sections
        )


def _entry(step: Step, seconds: float, evaluation: RunEvaluation, trained: RecoverFacts | None) -> dict[str, Any]:
    """Return the fields of `result.json` that pruned models and controls have in common."""
    entry = {
        "name": step.name,
        "recovery": step.recovery,
        "seconds": seconds,
        "path": step.path,
        "evaluation": evaluation,
    }
    if trained is None:
        return entry
    metrics = step.work.folder.relative_to(step.work.workdir) / "training" / "metrics.jsonl"
    return entry | {
        "data_fraction": step.sections["data"].fraction,
        "training_records": trained.records,
        "training_steps": trained.steps,
        "loss_terms": trained.terms,
        "metrics": metrics.as_posix() if step.stage == "recover" else None,
    }


def as_control(step: Step, done: Finished, evaluation: RunEvaluation) -> Control:
    """Return the entry in `result.json` of a control (an unpruned model that was trained)."""
    return Control(**_entry(step, done.seconds, evaluation, done.facts))


def as_run(step: Step, finished: Sequence[Finished], evaluation: RunEvaluation) -> Run:
    """Return the entry in `result.json` of a pruned model."""
    facts = {member.stage: done.facts for member, done in zip((*step.before, step), finished, strict=True)}
    plan, settings = facts["prune"], step.sections
    scores, variant = criteria_of(settings["score"], settings["prune"]), step.work.variant
    variant = variant.relative_to(step.work.workdir)
    seconds = round(sum(done.seconds for done in finished), 2)
    return Run(
        **_entry(step, seconds, evaluation, facts.get("recover")),
        method=plan.method,
        criterion=plan.criterion,
        ratio_asked=plan.ratio_asked,
        ratio_reached=plan.ratio_reached,
        decoder_ratio=plan.decoder_ratio,
        parameters=plan.parameters,
        removed_layers=plan.removed_layers,
        reconstruct=settings["reconstruct"].method,
        plan=(variant / "plan.json").as_posix(),
        scores=[(variant / name).as_posix() for name in scores],
    )
