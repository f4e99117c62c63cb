"""The commands that take an experiment: one of every stage, and `run`, `report`, `demo` and `sweep`."""

from __future__ import annotations

import functools
from typing import Any

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.flags import COMMON, Command, Specs
from vlmprune_jax.run.stages.stage import STAGES

RUN = """\
Stages with unchanged inputs are skipped, and an interrupted run continues.
  vlmprune run --config=configs/demo.py --workdir=runs/demo
  vlmprune run --config=configs/llava15_7b.py --workdir=W --config.model.hf_dir=DIR --config.data.train=FILE.json ..."""
DEMO = """\
The same as `vlmprune run --config=demo`, in 3 minutes: removes 30 % of a small LLaVA (56 % of its decoder) by depth and
by width, trains it on 5 % of easy-VQA with hidden-state distillation, evaluates it on 9,673 questions and exports it.
`--config=demo:full` has more recoveries."""
REPORT = """\
The page has retention against cost, example questions with every model's answer, speed, the removed parts and training
curves. For an unfinished run, the page lists the commands that complete it."""
SWEEP = """\
Besides get_config(), FILE.py has a function get_hyper(hyper) that returns the settings of each run:
  return hyper.product([hyper.sweep("config.prune.ratio", [0.1, 0.3]), hyper.sweep("config.recover.seed", range(3))])
Also: hyper.zipit, chainit, fixed, named("recovery", {"sft": {...}, "none": {...}}), or a list of dicts.

Each run has a workdir W/runs/NAME; sweep.json, sweep.csv and sweep.html in W compare the runs. Finished runs are
skipped, interrupted runs continue, and failed runs (exit code 2) are repeated by the next call.
  vlmprune sweep --config=configs/sweeps/demo_cut.py --workdir=runs/cut --jobs=2
  vlmprune sweep --config=FILE.py --workdir=W --dry_run            # list the runs and the stages that they share
  vlmprune sweep --config=FILE.py --workdir=W --only='*seed=1*'    # only runs with these names
  vlmprune sweep --config=FILE.py --workdir=W --shard=2/8          # on the second of eight machines"""
_OWN_FLAGS: dict[str, Specs] = {
    "demo": {"workdir": ("runs/demo", "folder for all files of this run")},
    "prune": {"explain": (False, "print what each layer loses and why")},
    "export": {"format": ([], "write further exports in these formats: gguf,w4a16 -> export-gguf/, export-w4a16/")},
    "sweep": {
        "jobs": (1, "number of runs at a time on this machine"),
        "shard": ("1/1", "i/n: only every n-th run, from run i on"),
    },
}


def commands() -> dict[str, str]:
    """Return {command: one-line help} of the commands that take an experiment, in the order of a run."""
    return {
        "run": "run all stages and report -> result.json, report.html",
        **{name: stage.help for name, stage in STAGES.items()},
        "report": "write the results of a finished or unfinished run as one page -> report.html, report.png",
        "demo": "run the whole pipeline on a bundled model and real data, on a CPU",
        "sweep": "run a config with many combinations of settings and compare the results -> sweep.json, sweep.html",
    }


def stage_command(name: str) -> Command:
    """Return the command of a stage, which a config may have registered, or `run`, `report`, `demo` or `sweep`."""
    about, stage = commands().get(name, ""), STAGES.get(name)
    details = {"run": RUN, "report": REPORT, "demo": DEMO, "sweep": SWEEP}.get(name, "")
    if stage is not None:
        details = f"{stage.details}\nConfig sections: {', '.join(('model', *stage.sections))}.".lstrip()
    config = "" if name in ("report", "demo") else "--config=FILE.py "
    usage = f"vlmprune {name} {config}--workdir=DIR"
    return Command(
        f"{usage}\n\n{about[:1].upper()}{about[1:]}.\n{details}",
        functools.partial(run_command, "run" if name == "demo" else name),
        lambda: {**COMMON, **_OWN_FLAGS.get(name, {})},
        config="demo" if name == "demo" else None,
    )


def run_command(name: str, flags: Any) -> None:
    """Run a command that takes an experiment.

    Raises UserError if there is no such command, built in or added by the config.
    """
    if name not in commands():
        raise UserError(f"no command {name!r}{suggest(name, commands())}")
    from vlmprune_jax.run.cli import workdir  # imports what every stage needs

    if name in ("report", "sweep"):
        (workdir.report if name == "report" else workdir.sweep)(flags)
    else:
        workdir.run(name, flags)
