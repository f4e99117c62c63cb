"""vlmprune sweep --config=FILE.py --workdir=W: the runs that a config file lists, what they share made once; one page.

FILE.py has, beside get_config(), `def get_hyper(hyper)` that returns what each run overrides:
  return hyper.product([hyper.sweep("config.prune.ratio", [0.1, 0.3]), hyper.sweep("config.recover.seed", range(3))])
There are hyper.zipit, chainit, fixed, and named("recovery", {"sft": {...}, "none": {...}}); or return a list of dicts.

Each run is a workdir, W/runs/NAME; W/sweep.json, sweep.csv and sweep.html compare them. What is done is skipped, what
was interrupted continues, what failed is listed (exit code 2) and tried again by the next call.
  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2
  vlmprune sweep --config=FILE.py --workdir=W --dry_run            # the runs, and which share what
  vlmprune sweep --config=FILE.py --workdir=W --only='*seed=1*'    # these first
  vlmprune sweep --config=FILE.py --workdir=W --shard=2/8          # every eighth run from the second: one of 8 pods
"""

from __future__ import annotations

import functools
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.cli.flags import Flags, common


def define(values: Flags) -> None:
    """Define the flags of this command."""
    common(values)
    absl_flags.DEFINE_integer("jobs", 1, "runs at once on this machine, each in a process", flag_values=values)
    absl_flags.DEFINE_string("shard", "1/1", "i/n: only every n-th run from the i-th", flag_values=values)


def run(flags: Any) -> None:
    """Do the runs of a sweep, and compare their results."""
    from vlmprune_jax.cli.workdir import place_all, prepare_sweep, start_worker
    from vlmprune_jax.report.comparison import build_comparison, table_of
    from vlmprune_jax.sweep.sweep import check_runs, run_sweep, runs_named, shard_of, tell_sharing

    runs, sweep, reporter = prepare_sweep(flags)
    check_runs(runs, sweep, flags.jobs)
    mine = shard_of(runs_named(runs, flags.only), flags.shard)
    if flags.dry_run:
        tell_sharing(mine, sweep, reporter)
        return
    start = functools.partial(start_worker, sweep)
    placed = place_all(runs, sweep)
    shared = {"only": flags.only, "shard": flags.shard, "jobs": flags.jobs}
    pages: dict[str, Any] = {"page": build_comparison, "table": lambda found: table_of(found).printed}
    run_sweep(placed, sweep, reporter, **shared, **pages, start=start)
