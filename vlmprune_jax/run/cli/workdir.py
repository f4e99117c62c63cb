"""From flags to an experiment, or the runs of a sweep, in a workdir: what the commands of cli/stages.py run."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from absl import logging
from transformers.utils.logging import disable_progress_bar

from vlmprune_jax.base.console import PIPE_WIDTH, Reporter, Terminal, make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import is_main_process
from vlmprune_jax.core.mesh.mesh import initialize
from vlmprune_jax.run.cli.config_files import (
    load_file,
    placed,
    read_experiment,
    read_hyper,
    starting_point,
    to_workdir,
)
from vlmprune_jax.run.cli.messages import kept
from vlmprune_jax.run.experiment.arguments import export_in
from vlmprune_jax.run.experiment.variants import check_experiment
from vlmprune_jax.run.stages import pipeline
from vlmprune_jax.run.stages.export import describe_export
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.stages.unused import unused_lines
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.sweep.hyper import SweepRun, check_runs, runs_named, shard_of, sweep_runs
from vlmprune_jax.run.sweep.sweep import Sweep, attempt, run_sweep, tell_sharing, with_caches
from vlmprune_jax.run.sweep.workers import Worker
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import RESULT, read_result
from vlmprune_jax.run.workdir.steps import read_unfinished


def _quiet() -> None:
    logging.set_verbosity(logging.ERROR)  # orbax and grain narrate at lower levels
    disable_progress_bar()  # the bars here are our own


def _join(flags: Any) -> Reporter:
    _quiet()
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    return make_reporter(is_main_process())


def run(name: str, flags: Any) -> None:
    """Check the experiment that the flags name, print its steps, and run one stage, or all if `name` is "run"."""
    reporter = _join(flags)
    experiment = read_experiment(flags.config, only=flags.only, explicit=flags.explicit)
    workdir = to_workdir(flags.workdir)
    experiment = placed(experiment, workdir, dry_run=flags.dry_run)
    works = dict[str, Work]()  # by format of the export: "" is the config's own
    for part in (flags.format if name == "export" else ()) or ("",):
        export = export_in(experiment.export, part, flags.explicit) if part else experiment.export
        changed = dataclasses.replace(experiment, export=export)
        check_experiment(changed)
        works[part] = Work.at(workdir, changed, reporter, overwrite=flags.overwrite)
    for work in works.values():
        pipeline.preflight(work, name)
    sections = () if name == "run" else ("model", *STAGES[name].sections)
    for line in unused_lines([work.experiment for work in works.values()], sections, starting_point(flags)):
        reporter.say(f"  {line}")
    if flags.dry_run:
        return
    if name == "run":
        pipeline.run_all(work)
        finish(workdir, reporter)
    elif name == "evaluate":
        pipeline.evaluate(work)
    elif name == "speed":
        pipeline.measure_speed(work)
    elif name == "export":
        for part, work in works.items():
            pipeline.export(work, part)
    else:
        pipeline.run_stage(work, name, explain=name == "prune" and flags.explain)


def sweep(flags: Any) -> None:
    """Run or continue the runs that a config file lists, or with --dry_run print them and what they share.

    Raises UserError without a config or workdir, or for a setting that is unknown or also set by the command line.
    """
    reporter = _join(flags)
    base, workdir = read_experiment(flags.config, explicit=flags.explicit), to_workdir(flags.workdir)
    runs, swept = sweep_runs(base, read_hyper(flags.config_file)), Sweep(workdir, flags.config_file, flags.overwrite)
    names = {name for run in runs for name in run.overrides}
    for setting in flags.explicit:
        if any(f"{name}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{name}.") for name in names):
            raise UserError(
                f"--config.{setting}: get_hyper sets this setting too: remove the flag, or change get_hyper"
            )
    check_runs(runs, flags.jobs)
    chosen = {run.name for run in shard_of(runs_named(runs, flags.only), flags.shard)}
    if not flags.dry_run:  # models and data are downloaded
        runs = [dataclasses.replace(run, experiment=with_caches(placed(run.experiment, workdir))) for run in runs]
    mine = [run for run in runs if run.name in chosen]
    for line in unused_lines([run.experiment for run in runs], start=starting_point(flags)):
        reporter.say(line)
    if flags.dry_run:
        tell_sharing(mine, swept, reporter)
    else:
        run_sweep(runs, mine, swept, reporter, jobs=flags.jobs, start=functools.partial(start_worker, swept))


def start_worker(sweep: Sweep) -> Worker:
    """Return the function with which a worker process of `vlmprune sweep --jobs` executes one run."""
    _quiet()
    load_file(sweep.config)  # registers the criteria, metrics and so on that the file defines

    def work(item: tuple[int, SweepRun]) -> str | None:
        number, run = item
        console = Terminal(width=PIPE_WIDTH, force_terminal=False)
        with kept() as messages:
            line = attempt(run, sweep, Reporter(console, prefix=f"[{number}]   "))
        messages.tell()
        return line

    return work


def report(flags: Any) -> None:
    """Write the report of a workdir, finished or not."""
    if flags.dry_run or flags.only:
        raise UserError("vlmprune report writes the page of all models: leave --dry_run and --only out")
    finish(to_workdir(flags.workdir), make_reporter(True))


def finish(workdir: Path, reporter: Reporter) -> None:
    """Print the tables of `result.json` and write the report (process 0 only), even if the run is unfinished."""
    if not is_main_process():
        return
    from vlmprune_jax.run.report.build import build_report  # draws figures, which no stage needs
    from vlmprune_jax.run.report.tables import lead, parameter_note, tables_of

    if finished := (workdir / RESULT).exists():
        result = read_result(workdir).distinct()
        comparison = comparison_of_run(result)
        for table in tables_of(comparison):
            reporter.table(*table.printed)
        reporter.say(lead(comparison))
        if note := parameter_note(result.teacher):
            reporter.say(note)
        reporter.say(f"best: {workdir / result.best_run.path}")
        if result.export is not None:
            exported = workdir / result.export.path
            for line in describe_export(exported, result.labels[result.best], result.export):
                reporter.say(line)
        numbers = f", numbers: {workdir / RESULT}"
    else:
        unfinished = read_unfinished(workdir).missing
        numbers = ", of an unfinished run: the page lists what is missing" if unfinished else ""
    page, plot = build_report(workdir), workdir / "report.png"
    shown = f", plot: {plot}" if finished and plot.is_file() else ""
    reporter.say(f"report: {page}{shown}{numbers}")
