"""The commands that take an experiment: one of every stage, and `run`, `report` and `demo`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.cli.flags import Flags, common
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


def commands() -> dict[str, str]:
    """Return {command: one-line help} of all commands, in the order in which a run uses them."""
    return {
        "run": "run all stages and report -> result.json, report.html",
        **{name: stage.help for name, stage in STAGES.items()},
        "report": "write the results of a finished or unfinished run as one page -> report.html, report.png",
        "demo": "run the whole pipeline on a bundled model and real data, on a CPU",
    }


class StageCommand:
    """Command that runs one stage, or `run`, `report` or `demo`; its docstring is the help text."""

    def __init__(self, name: str):
        self.name, stage = name, STAGES.get(name)
        self.run = functools.partial(run_command, "run" if name == "demo" else name)
        details = {"run": RUN, "report": REPORT, "demo": DEMO}.get(name, "" if stage is None else _details(name))
        config = "" if name in ("report", "demo") else "--config=FILE.py "
        self.CONFIG = "demo" if name == "demo" else None  # the default
        about = commands().get(name, "")
        self.__doc__ = f"vlmprune {name} {config}--workdir=DIR\n\n{about[:1].upper()}{about[1:]}.\n{details}"

    def define(self, values: Flags) -> None:
        """Define the command-line flags of a stage command."""
        common(values)
        if self.name == "demo":
            values["workdir"].value = "runs/demo"
        if self.name == "prune":
            absl_flags.DEFINE_bool("explain", False, "print what each layer loses and why", flag_values=values)
        if self.name == "export":
            about = "write further exports in these formats or quantisations: gguf,w4a16 -> export-gguf/, export-w4a16/"
            absl_flags.DEFINE_list("format", [], about, flag_values=values)


def _details(name: str) -> str:
    stage = STAGES[name]
    return f"{stage.details}\nConfig sections: {', '.join(('model', *stage.sections))}.".lstrip()


def run_command(name: str, flags: Any) -> None:
    """Load the experiment and workdir that the flags name, and run a command on them.

    Raises UserError if there is no such command, built in or added by the config.
    """
    if name not in commands():
        raise UserError(f"no command {name!r}{suggest(name, commands())}")
    from vlmprune_jax.run.cli.config_files import starting_point
    from vlmprune_jax.run.cli.workdir import prepare
    from vlmprune_jax.run.stages import pipeline
    from vlmprune_jax.run.stages.preflight import preflight
    from vlmprune_jax.run.stages.unused import unused_lines

    if name == "report":
        _report(flags)
        return
    works = prepare(flags, flags.format if name == "export" else ())
    work = next(iter(works.values()))
    for each in works.values():
        preflight(each, name)
    used = [(each.experiment, work.config(work.teacher)) for each in works.values()]
    for line in unused_lines(used, () if name == "run" else ("model", *STAGES[name].sections), starting_point(flags)):
        work.say(f"  {line}")
    if flags.dry_run:
        return
    if name == "run":
        pipeline.run_all(work)
        finish(work.workdir, work.reporter)
    elif name == "evaluate":
        pipeline.evaluate(work)
    elif name == "speed":
        pipeline.measure_speed(work)
    elif name == "export":
        for part, each in works.items():
            pipeline.export(each, part)
    else:
        pipeline.run_stage(work, name, explain=name == "prune" and flags.explain)


def _report(flags: Any) -> None:
    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.run.cli.config_files import to_workdir

    if not flags.workdir:
        raise UserError("no workdir given: add --workdir=DIR, the workdir of a finished or unfinished `vlmprune run`")
    if flags.dry_run or flags.only:
        raise UserError("vlmprune report writes the page of all models: leave --dry_run and --only out")
    finish(to_workdir(flags.workdir), make_reporter(True))


def finish(workdir: Path, reporter: Reporter) -> None:
    """Print the tables of `result.json` and write the report (process 0 only), even if the run is unfinished."""
    from vlmprune_jax.base.processes import is_main_process
    from vlmprune_jax.run.report.build import build_report
    from vlmprune_jax.run.report.tables import key_numbers, lead, parameter_note, tables_of
    from vlmprune_jax.run.stages.export import describe_export
    from vlmprune_jax.run.workdir.groups import comparison_of_run
    from vlmprune_jax.run.workdir.result import RESULT, read_result
    from vlmprune_jax.run.workdir.steps import read_unfinished

    if not is_main_process():
        return
    if finished := (workdir / RESULT).exists():
        result = read_result(workdir).distinct()
        comparison = comparison_of_run(result)
        for table in tables_of(comparison):
            reporter.table(*table.printed)
        reporter.say("; ".join([lead(comparison), *map(" ".join, key_numbers(comparison))]))
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
