"""Planning of all recoveries and evaluations of an experiment on a TPU slice, with advice if a step does not fit."""

from __future__ import annotations

from pathlib import Path

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.recovery.terms import terms_of
from vlmprune_jax.io.data.inputs import count_records
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import prune_runs, recover_runs
from vlmprune_jax.run.planning.ahead_of_time import DoesNotFit, make_slice
from vlmprune_jax.run.planning.case import Case, estimate, make_case, preparation_of, read_shapes
from vlmprune_jax.run.planning.evaluation import WEIGHT_FORMATS, plan_evaluation
from vlmprune_jax.run.workdir.tpu_plan import PlannedEvaluation, PlannedStep, TpuPlan


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


def fit_all(
    experiment: Experiment,
    workdir: Path | None,
    reporter: Reporter,
    topology: str,
    n_records: int | None,
    evaluation: tuple[str, ...] = (),
) -> TpuPlan:
    """Plan every recovery of an experiment on a TPU slice, and print each.

    `evaluation`: plan the evaluation of each pruned model as well, with these `WEIGHT_FORMATS`.

    Raises UserError if the slice is unknown, a step needs more memory than it has (with advice), or there is nothing to
    plan.
    """
    for form in evaluation:
        one_of("--weights", form, tuple(WEIGHT_FORMATS))
    recoveries, evaluations = dict[str, PlannedStep](), dict[str, PlannedEvaluation]()
    for pruned in prune_runs(experiment, workdir or Path()):
        shapes, spec = read_shapes(pruned, workdir is not None), pruned.experiment
        for run in recover_runs(pruned):
            records = count_records(run.experiment.data) if n_records is None else n_records
            case = make_case(run.experiment, shapes, topology, records)
            reporter.say(f"{run.name}: compiling for {topology} ...")
            try:
                recoveries[run.name] = estimate(case)
            except DoesNotFit as error:
                raise too_large(case, error) from error
            _say(recoveries[run.name], reporter)
            if run.experiment.recover.control and terms_of(case.config.losses, teacher=False):
                reporter.say(
                    "  control       training the unpruned model in the same way, once for all prune variants, needs "
                    "more memory and time than this step (recover.control=False leaves it out)"
                )
        if evaluation:
            cfg, preparation = shapes.plan.apply_to(shapes.cfg), preparation_of(spec.data, shapes.cfg, shapes.folder)
            planned = plan_evaluation(
                cfg, spec.model.dtype, make_slice(topology), preparation, spec.evaluate, evaluation
            )
            reporter.say(f"{pruned.name}, evaluation:")
            _say(planned, reporter)
            evaluations[pruned.name] = planned
    if not recoveries and not evaluations:
        raise UserError('recover.method is "none", so there is no training to plan: set it to "train"')
    return TpuPlan(recoveries=recoveries, evaluations=evaluations)


def _say(planned: PlannedStep | PlannedEvaluation, reporter: Reporter) -> None:
    for name, value in planned.table():
        reporter.say(f"  {name:<13} {value}")
