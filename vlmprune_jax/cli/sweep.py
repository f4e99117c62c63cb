"""vlmprune sweep --config=FILE.py --workdir=W: the runs that a config file lists, what they share made once; one page.

FILE.py has, beside get_config(), `def get_hyper(hyper)` that returns what each run overrides:
  return hyper.product([hyper.sweep("config.prune.ratio", [0.1, 0.3]), hyper.sweep("config.recover.seed", range(3))])
There are hyper.zipit, chainit, fixed, and named("recovery", {"sft": {...}, "none": {...}}); or return a list of dicts.

Each run is a workdir, W/runs/NAME; W/sweep.json, sweep.csv and sweep.html compare them. What is done is skipped, what
was interrupted continues, what failed is listed (exit code 2) and tried again by the next call.
  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2
  vlmprune sweep --config=FILE.py --workdir=W --dry_run            # the runs, and which share what
  vlmprune sweep --config=FILE.py --workdir=W --shard=2/8          # every eighth run from the second: one of 8 pods
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags, common

if TYPE_CHECKING:
    from vlmprune_jax.experiment.sweep import SweepRun
    from vlmprune_jax.stages.sweep import Sweep
    from vlmprune_jax.stages.workers import Work


def define(values: Flags) -> None:
    """Flags of this command."""
    common(values)
    absl_flags.DEFINE_integer("jobs", 1, "runs at once on this machine, each in a process", flag_values=values)
    absl_flags.DEFINE_string("shard", "1/1", "i/n: only every n-th run from the i-th", flag_values=values)
    absl_flags.DEFINE_bool("dry_run", False, "list the runs and what they share, run nothing", flag_values=values)


def run(flags: Any) -> None:
    """Do the runs, and compare them."""
    from vlmprune_jax.cli.config_files import placed
    from vlmprune_jax.cli.workdir import quiet
    from vlmprune_jax.distributed.mesh import initialize, is_main_process, process_count
    from vlmprune_jax.errors import UserError
    from vlmprune_jax.stages import sweep as stages
    from vlmprune_jax.stages.console import make_reporter

    quiet()
    initialize(flags.coordinator, flags.num_processes, flags.process_id)
    reporter = make_reporter(is_main_process())
    runs, sweep = read_sweep_config(flags)
    stages.check_runs(runs, sweep)
    mine = stages.shard_of(runs, flags.shard)
    if flags.jobs < 1 or (flags.jobs > 1 and process_count() > 1):
        raise UserError(
            f"--jobs={flags.jobs}: must be at least 1, and 1 on a pod, whose processes do each run together"
        )
    if flags.dry_run:
        stages.tell_sharing(mine, sweep, reporter)
        return
    runs, mine = (
        [dataclasses.replace(run, experiment=stages.with_caches(placed(run.experiment, sweep.workdir))) for run in some]
        for some in (runs, mine)
    )
    config = flags["config"].config_filename
    page = functools.partial(stages.write_sweep, runs, sweep, config)
    left = stages.todo(mine, sweep)
    if len(left) < len(mine):
        reporter.say(f"{len(mine) - len(left)} of {len(mine)} runs are done and unchanged, skipped")
    if flags.jobs > 1:
        start = functools.partial(start_worker, config, sweep)
        stages.run_in_processes(left, sweep, reporter, page, flags.jobs, start)
    else:
        stages.run_here(left, sweep, reporter, page)
    if is_main_process():
        stages.finish(page(), mine, sweep, reporter)


def read_sweep_config(flags: Any) -> tuple[list[SweepRun], Sweep]:
    """The runs that the config file lists, and where they work.

    Raises:
      UserError: no config or workdir, a setting that does not exist, or one that the command line sets as well.
    """
    from ml_collections import config_flags

    from vlmprune_jax.cli.config_files import read_experiment, read_hyper, to_workdir
    from vlmprune_jax.errors import UserError
    from vlmprune_jax.experiment.sweep import sweep_runs
    from vlmprune_jax.stages.sweep import Sweep

    base = read_experiment(flags.config)
    if not flags.workdir:
        raise UserError("no workdir given: --workdir=DIR, for the runs and their comparison")
    runs = sweep_runs(base, read_hyper(flags["config"].config_filename))
    for setting in config_flags.get_override_values(flags["config"]):
        if any(setting in run.overrides for run in runs):
            raise UserError(f"--config.{setting}: the sweep sets it for every run: leave it out, or change get_hyper")
    return runs, Sweep(to_workdir(flags.workdir), flags.overwrite)


def start_worker(config: str, sweep: Sweep) -> Work:
    """What a process of --jobs does with each run that it gets."""
    from vlmprune_jax.cli.config_files import load_file
    from vlmprune_jax.cli.workdir import quiet

    quiet()
    load_file(config)
    return functools.partial(_work, sweep)


def _work(sweep: Sweep, item: tuple[int, SweepRun]) -> str | None:
    from rich.console import Console

    from vlmprune_jax.cli.messages import kept
    from vlmprune_jax.stages.console import PIPE_WIDTH, Reporter
    from vlmprune_jax.stages.sweep import attempt

    number, one = item
    with kept() as messages:
        line = attempt(one, sweep, Reporter(Console(width=PIPE_WIDTH, force_terminal=False), prefix=f"[{number}]   "))
    messages.tell()
    return line
