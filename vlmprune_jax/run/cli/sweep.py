"""vlmprune sweep --config=FILE.py --workdir=W: run a config with many combinations of settings and compare the results.

Besides get_config(), FILE.py has a function get_hyper(hyper) that returns the settings of each run:
  return hyper.product([hyper.sweep("config.prune.ratio", [0.1, 0.3]), hyper.sweep("config.recover.seed", range(3))])
Also: hyper.zipit, chainit, fixed, named("recovery", {"sft": {...}, "none": {...}}), or a list of dicts.

Each run has a workdir W/runs/NAME; sweep.json, sweep.csv and sweep.html in W compare the runs. Finished runs are
skipped, interrupted runs continue, and failed runs (exit code 2) are repeated by the next call.
  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2
  vlmprune sweep --config=FILE.py --workdir=W --dry_run            # list the runs and the stages that they share
  vlmprune sweep --config=FILE.py --workdir=W --only='*seed=1*'    # only runs with these names
  vlmprune sweep --config=FILE.py --workdir=W --shard=2/8          # on the second of eight machines
"""

from __future__ import annotations

import functools
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.run.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune sweep`."""
    common(values)
    absl_flags.DEFINE_integer("jobs", 1, "number of runs at a time on this machine", flag_values=values)
    absl_flags.DEFINE_string("shard", "1/1", "i/n: only every n-th run, from run i on", flag_values=values)


def run(flags: Any) -> None:
    """Run all runs of a sweep and compare their results."""
    from vlmprune_jax.run.cli.config_files import starting_point
    from vlmprune_jax.run.cli.workdir import place_all, prepare_sweep, start_worker
    from vlmprune_jax.run.sweep.hyper import check_runs, runs_named, shard_of
    from vlmprune_jax.run.sweep.sweep import run_sweep, tell_sharing, tell_unused

    runs, sweep, reporter = prepare_sweep(flags)
    check_runs(runs, flags.jobs)
    mine = shard_of(runs_named(runs, flags.only), flags.shard)
    placed = runs if flags.dry_run else place_all(runs, sweep)
    tell_unused(placed, starting_point(flags), reporter)
    if flags.dry_run:
        tell_sharing(mine, sweep, reporter)
        return
    start = functools.partial(start_worker, sweep)
    run_sweep(placed, sweep, reporter, only=flags.only, shard=flags.shard, jobs=flags.jobs, start=start)
