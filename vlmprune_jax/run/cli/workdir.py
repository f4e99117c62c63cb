"""Shared start of the stage commands: from flags to an experiment or the runs of a sweep, and their workdir."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from absl import logging
from transformers.utils.logging import disable_progress_bar

from vlmprune_jax.base.console import PIPE_WIDTH, Reporter, Terminal, make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import is_main_process
from vlmprune_jax.core.mesh.mesh import initialize
from vlmprune_jax.run.cli.config_files import load_file, placed, read_experiment, read_hyper, to_experiment, to_workdir
from vlmprune_jax.run.cli.messages import kept
from vlmprune_jax.run.experiment.arguments import export_in
from vlmprune_jax.run.experiment.variants import check_experiment
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.sweep.hyper import SweepRun, sweep_runs
from vlmprune_jax.run.sweep.sweep import Sweep, attempt, with_caches
from vlmprune_jax.run.sweep.workers import Worker


def prepare(flags: Any, formats: Sequence[str]) -> dict[str, Work]:
    """Return {"": `Work` of a stage command}, with its experiment, workdir and console output.

    With `formats`, return {format: `Work` of the experiment with this export format}.
    """
    reporter = _join(flags)
    experiment, workdir = to_experiment(
        flags.config, flags.workdir, only=flags.only, explicit=flags.explicit, dry_run=flags.dry_run
    )
    experiments = {
        name: dataclasses.replace(experiment, export=export_in(experiment.export, name, flags.explicit))
        for name in formats
    } or {"": experiment}
    for each in experiments.values():
        check_experiment(each, workdir)
    return {name: Work.at(workdir, each, reporter, overwrite=flags.overwrite) for name, each in experiments.items()}


def prepare_sweep(flags: Any) -> tuple[list[SweepRun], Sweep, Reporter]:
    """Return the runs listed in a config file, their `Sweep`, and a console reporter.

    Raises UserError without a config or workdir, or for a setting that is unknown or also set by the command line.
    """
    reporter = _join(flags)
    base, workdir = read_experiment(flags.config, explicit=flags.explicit), to_workdir(flags.workdir)
    runs = sweep_runs(base, read_hyper(flags.config_file))
    swept = {name for run in runs for name in run.overrides}
    for setting in flags.explicit:
        if any(f"{name}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{name}.") for name in swept):
            raise UserError(
                f"--config.{setting}: get_hyper sets this setting too: remove the flag, or change get_hyper"
            )
    return runs, Sweep(workdir, flags.config_file, flags.overwrite), reporter


def place_all(runs: Sequence[SweepRun], sweep: Sweep) -> list[SweepRun]:
    """Return sweep runs whose experiments use local paths instead of hub ids; models are downloaded."""
    experiments = (with_caches(placed(run.experiment, sweep.workdir)) for run in runs)
    return [dataclasses.replace(run, experiment=experiment) for run, experiment in zip(runs, experiments, strict=True)]


def start_worker(sweep: Sweep) -> Worker:
    """Return the function with which a worker process of `vlmprune sweep --jobs` executes one run."""
    _quiet()
    load_file(sweep.config)  # registers the criteria, metrics and so on that the file defines
    return functools.partial(_work, sweep)


def _work(sweep: Sweep, item: tuple[int, SweepRun]) -> str | None:
    number, run = item
    console = Terminal(width=PIPE_WIDTH, force_terminal=False)
    with kept() as messages:
        line = attempt(run, sweep, Reporter(console, prefix=f"[{number}]   "))
    messages.tell()
    return line


def _join(flags: Any) -> Reporter:
    _quiet()
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    return make_reporter(is_main_process())


def _quiet() -> None:
    logging.set_verbosity(logging.ERROR)  # orbax and grain narrate at lower levels
    disable_progress_bar()  # the bars here are our own
