"""Planning of recoveries on a TPU slice: cost of the step, a search for what fits, and advice if a step does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.recovery.config import REMAT
from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.io.data.inputs import count_records
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import prune_runs, recover_runs
from vlmprune_jax.run.planning.ahead_of_time import DoesNotFit, make_slice
from vlmprune_jax.run.planning.case import Case, estimate, make_case, preparation_of, read_shapes
from vlmprune_jax.run.planning.evaluation import EvaluationCase, plan_evaluation
from vlmprune_jax.run.planning.questions import WEIGHT_FORMATS
from vlmprune_jax.run.workdir.tpu_plan import (
    GIB,
    Planned,
    PlannedEvaluation,
    PlannedStep,
    TpuPlan,
    as_rows,
    evaluation_rows,
)

Attempts = dict[Case, PlannedStep | UserError]


def search(case: Case, say: Callable[[str], None], tried: Attempts) -> dict[str, PlannedStep]:
    """Search for training settings whose compiled step fits in the TPU slice's memory.

    Returns the cheapest "remat", the largest micro-"batch" with this remat, and the smallest "slice" with unchanged
    settings; an entry is missing if no setting fits. `tried` caches compiled cases, and is extended.
    """
    fits: dict[str, PlannedStep] = {}
    cheapest = _first_fit([(f"remat {name}", _with(case, remat=name)) for name in REMAT], say, tried)
    if cheapest is not None:
        fits["remat"] = fits["batch"] = cheapest
        larger = _doubled(_with(case, remat=cheapest.remat))
        while larger is not None:
            best = _first_fit([(f"micro-batch of {larger.config.batch_size} rows", larger)], say, tried)
            if best is None:
                break
            fits["batch"], larger = best, _doubled(larger)
    generation, most = case.slice.name.partition(":")[0], len(case.slice.devices)
    names = [f"{generation}:{grid}" for grid in case.slice.chip.slices]
    slices = [case.slice if name == case.slice.name else make_slice(name) for name in names]
    smaller = [(grid.name, dataclasses.replace(case, slice=grid)) for grid in slices if len(grid.devices) <= most]
    smallest = _first_fit(smaller, say, tried)
    if smallest is not None:
        fits["slice"] = smallest
    return fits


def _first_fit(cases: Sequence[tuple[str, Case]], say: Callable[[str], None], tried: Attempts) -> PlannedStep | None:
    for what, case in cases:
        attempt = tried[case] = tried.get(case) or _attempt(case)
        if isinstance(attempt, PlannedStep):
            say(f"  {what}: fits, {attempt.hbm.free / GIB:.2f} GiB free")
            return attempt
        say(f"  {what}: {attempt}")
    return None


def _attempt(case: Case) -> PlannedStep | UserError:
    """Estimate the training step for these settings; return the error instead if it does not fit or compile."""
    try:
        return estimate(case)
    except UserError as error:
        return error


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, config=dataclasses.replace(case.config, **changes))


def _doubled(case: Case) -> Case | None:
    """Return planning inputs with a doubled micro-batch, without accumulation; None beyond 1,024 rows per chip."""
    rows = 2 * case.config.batch_size // case.config.accumulation
    return _with(case, batch_size=rows, accumulation=1) if rows <= 1024 * len(case.slice.devices) else None


def too_large(case: Case, error: DoesNotFit) -> UserError:
    """Return an error that the training step needs too much memory, with advice on settings to change."""
    config, chip = case.config, case.slice.chip
    ways = [] if config.remat == "full" else ["recover.remat=full"]
    if config.batch_size // config.accumulation > len(case.slice.devices):
        ways.append(f"recover.accumulation={2 * config.accumulation}")
    place = chip.slices.index(grid) if (grid := case.slice.name.partition(":")[2]) in chip.slices else -1
    if place + 1 < len(chip.slices):
        ways.append(f"--topology={case.slice.name.partition(':')[0]}:{chip.slices[place + 1]}")
    return UserError(f"the recovery step on {case.slice.name} {error}: try {' or '.join(ways) or 'shorter sequences'}")


def plan_recovery(case: Case, searching: bool, say: Callable[[str], None]) -> Planned:
    """Compile one recovery step for a TPU slice and print its cost; with `searching`, also find settings that fit.

    Raises UserError if the step needs too much memory and `searching` is False (with advice), or the settings
    contradict the model or the slice.
    """

    def say_rows(planned: Planned) -> None:
        for what, value in as_rows(planned):
            say(f"  {what:<13} {value}")

    first = _attempt(case)
    if isinstance(first, PlannedStep):
        planned = Planned(step=first)
    elif isinstance(first, DoesNotFit):
        problem = too_large(case, first)
        if not searching:
            raise problem from first
        planned = Planned(problem=str(problem))
    else:
        raise first
    say_rows(planned)
    if searching:
        fits = search(case, say, {case: first})
        say_rows(Planned(search=fits))
        planned = replace(planned, search=fits)
    return planned


def fit_all(
    experiment: Experiment,
    workdir: Path | None,
    reporter: Reporter,
    topology: str,
    n_records: int | None,
    search: bool,
    evaluation: tuple[str, ...] = (),
) -> TpuPlan:
    """Plan every recovery of an experiment on a TPU slice.

    `search`: also search for settings that fit. `evaluation`: plan the evaluation of each pruned model as well,
    with these formats of weights (`planning.questions.WEIGHT_FORMATS`).

    Raises UserError if the slice is unknown, a step needs more memory than it has (with advice), or there is nothing to
    plan.
    """
    for form in evaluation:
        one_of("--weights", form, tuple(WEIGHT_FORMATS))
    recoveries, evaluations = dict[str, Planned](), dict[str, PlannedEvaluation]()
    for pruned in prune_runs(experiment, workdir or Path()):
        shapes = read_shapes(pruned, workdir is not None)
        for run in recover_runs(pruned):
            records = count_records(run.experiment.data) if n_records is None else n_records
            case = make_case(run.experiment, shapes, topology, records)
            reporter.say(f"{run.name}: compiling for {topology} ...")
            recoveries[run.name] = plan_recovery(case, search, reporter.say)
            if run.experiment.recover.control and terms_of(case.config.losses, teacher=False):
                reporter.say(
                    "  control       training the unpruned model in the same way, once for all prune variants, needs "
                    "more memory and time than this step (recover.control=False leaves it out)"
                )
        if evaluation:
            reporter.say(f"{pruned.name}, evaluation: compiling for {topology} ...")
            spec = pruned.experiment
            case_of_evaluation = EvaluationCase(
                cfg=shapes.plan.apply_to(shapes.cfg),
                dtype=spec.model.dtype,
                slice=make_slice(topology),
                preparation=preparation_of(spec.data, shapes.cfg, shapes.folder),
                rows=spec.evaluate.batch_size,
                mesh=spec.evaluate.mesh,
                weights=evaluation,
            )
            evaluations[pruned.name] = plan_evaluation(case_of_evaluation)
            for what, value in evaluation_rows(evaluations[pruned.name]):
                reporter.say(f"  {what:<13} {value}")
    if not recoveries and not evaluations:
        raise UserError('recover.method is "none", so there is no training to plan: set it to "train"')
    return TpuPlan(recoveries=recoveries, evaluations=evaluations)
