"""Execution of a sweep: runs in order, in this process or several, and the comparison of their results."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import SharedError, Stopped, UserError, error_context, reason
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.base.processes import is_main_process, on_process_zero, process_count
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.experiment.variants import CONTROL, check_experiment
from vlmprune_jax.run.stages.graph import steps_of, task_of
from vlmprune_jax.run.stages.registry import STAGES
from vlmprune_jax.run.stages.unused import unused_lines
from vlmprune_jax.run.stages.work import teacher_folder
from vlmprune_jax.run.sweep.hyper import SweepRun
from vlmprune_jax.run.sweep.run import (
    Sweep,
    collect,
    digest_once,
    do_run,
    is_done,
    note_error,
    read_error,
    read_run,
)
from vlmprune_jax.run.sweep.workers import Worker, in_processes
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.content import content_key
from vlmprune_jax.run.workdir.groups import comparison_of_sweep
from vlmprune_jax.run.workdir.ledger import write_text
from vlmprune_jax.run.workdir.sweep import FAILED, SWEEP, SweepResult, as_csv

PAGE_SECONDS = 300.0  # seconds between updates of the comparison page during a sweep
MOST_MAPS = 15_000  # memory maps of a process; Linux allows 65,530, and XLA:CPU uses several per program


def check_runs(runs: Sequence[SweepRun], sweep: Sweep, jobs: int) -> None:
    """Check the settings of all sweep runs before the first one starts.

    Raises UserError if `check_experiment` refuses a run, runs have different evaluation sets, or `jobs` is not
    possible.
    """
    if jobs < 1 or (jobs > 1 and process_count() > 1):
        raise UserError(f"--jobs={jobs}: must be at least 1, and exactly 1 if several processes share each run")
    for run in runs:
        with error_context(f"run {run.name}"):
            check_experiment(run.experiment, sweep.folder(run))
        sets, first = (evaluation_sets(each.experiment.data, each.experiment.evaluate) for each in (run, runs[0]))
        if sets != first:
            raise UserError(
                f"run {run.name}: its evaluation sets differ from those of {runs[0].name}: use the same sets in all "
                "runs"
            )


def shard_of(runs: Sequence[SweepRun], shard: str) -> list[SweepRun]:
    """Return shard `i/n` of the runs: every n-th run, starting with the i-th.

    Raises UserError unless `shard` has the form i/n with 1 <= i <= n.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard={shard}: must be i/n with i from 1 to n, such as 2/8")
    return list(runs)[number - 1 :: count]


def runs_named(runs: Sequence[SweepRun], pattern: str) -> list[SweepRun]:
    """Return the runs whose names match a pattern with * and ?; "" matches all.

    Raises UserError if no run matches.
    """
    matches = [run for run in runs if not pattern or fnmatch.fnmatchcase(run.name, pattern)]
    if not matches:
        raise UserError(f"--only={pattern}: no run matches (the first is {runs[0].name}): see --dry_run for all names")
    return matches


def run_sweep(
    runs: Sequence[SweepRun],
    sweep: Sweep,
    reporter: Reporter,
    *,
    shard: str,
    jobs: int,
    start: Callable[[], Worker],
    only: str = "",
) -> None:
    """Run all unfinished runs of a shard, then write and print the comparison of all runs.

    With `jobs` > 1, this number of worker processes do one run each at a time (`start` prepares a worker). Otherwise,
    runs are done in sequence in this process, or together by all processes of a pod.

    Raises UserError if some runs failed.
    """
    from vlmprune_jax.run.report.tables import tables_of

    digest_once.cache_clear()  # files may have changed since another command of this process
    mine, written = shard_of(runs_named(runs, only), shard), time.monotonic()
    left = _left(mine, sweep)

    def update_page() -> None:
        nonlocal written
        if time.monotonic() - written > PAGE_SECONDS and is_main_process():
            write_sweep(runs, sweep)
            written = time.monotonic()

    if len(left) < len(mine):
        reporter.say(f"{len(mine) - len(left)} of {len(mine)} runs are done and unchanged, skipped")
    if jobs > 1:
        _run_in_processes(left, sweep, reporter, update_page, jobs, start)
    else:
        _run_here(left, sweep, reporter, update_page)
    if is_main_process():
        result = write_sweep(runs, sweep)
        if result.done:
            reporter.table(*tables_of(comparison_of_sweep(result), runs=True)[0].printed)
        _finish(result, mine, sweep, reporter)


def _run_here(runs: Sequence[SweepRun], sweep: Sweep, reporter: Reporter, update_page: Callable[[], None]) -> None:
    for number, run in enumerate(runs, start=1):
        reporter.say(f"run {number} of {len(runs)}: {run.name}")
        line = attempt(run, sweep, reporter)
        if line is not None:
            reporter.say(f"  failed: {line}")
        update_page()


def _run_in_processes(
    runs: Sequence[SweepRun],
    sweep: Sweep,
    reporter: Reporter,
    update_page: Callable[[], None],
    jobs: int,
    start: Callable[[], Worker],
) -> None:
    left = len(runs)

    def done(item: tuple[int, SweepRun], line: str | None) -> None:
        nonlocal left
        left -= 1
        if line is not None:  # a process that was killed has not recorded it
            note_error(item[1], sweep, line)
        reporter.say(f"[{item[0]}] {'done' if line is None else f'failed: {line}'}; {left} of {len(runs)} runs left")
        update_page()

    for number, run in enumerate(runs, start=1):
        reporter.say(f"[{number}] {run.name}")
    in_processes(list(enumerate(runs, start=1)), jobs, start, done)


def _left(runs: Sequence[SweepRun], sweep: Sweep) -> list[SweepRun]:
    """Return the unfinished runs, with runs that failed before at the end."""

    def ranked() -> list[int]:
        left = [number for number, run in enumerate(runs) if not is_done(run, sweep)]
        return sorted(left, key=lambda number: read_error(runs[number], sweep) is not None)

    return [runs[number] for number in on_process_zero(ranked)]


def attempt(run: SweepRun, sweep: Sweep, reporter: Reporter) -> str | None:
    """Run or resume one sweep run; return its error as one line, or None.

    Raises:
      Stopped: on SIGTERM.
      Exception: with several processes, an error that only this process has.
    """
    try:
        do_run(run, sweep, reporter)
        return None
    except Stopped:
        raise
    except Exception as error:
        if process_count() > 1 and not isinstance(error, SharedError):
            raise
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}"
        note_error(run, sweep, line)
        return line
    finally:
        _forget_programs()


def _forget_programs() -> None:
    """Discard compiled programs before the process exceeds its limit of memory maps."""
    maps = Path("/proc/self/maps")
    if maps.exists() and read_bytes(maps).count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def write_sweep(runs: Sequence[SweepRun], sweep: Sweep) -> SweepResult:
    """Write `sweep.json`, `sweep.csv` and `sweep.html` from the results so far."""
    from vlmprune_jax.run.report import build  # draws figures, which no stage needs

    result = collect(runs, sweep)
    write_artefact(sweep.workdir / SWEEP, result)
    write_text(sweep.workdir / "sweep.csv", as_csv(result))
    if result.done:
        build.build_sweep_page(sweep.workdir)
    return result


def _finish(result: SweepResult, mine: Sequence[SweepRun], sweep: Sweep, reporter: Reporter) -> None:
    """Print which runs failed, and the paths of the comparison files.

    Raises UserError if a run of this call failed.
    """
    names = {run.name for run in mine}
    failed = [entry for entry in result.models if entry.status == FAILED]
    for entry in failed:
        reporter.say(f"failed: {entry.name}: {entry.error}")
    there = [name for name in (SWEEP, "sweep.csv", "sweep.html") if (sweep.workdir / name).is_file()]
    reporter.say(f"comparison: {', '.join(str(sweep.workdir / name) for name in reversed(there))}")
    ours = [entry for entry in failed if entry.run in names]
    if ours:
        raise UserError(
            f"{len(ours)} of {len(mine)} runs failed, first {ours[0].name}: {ours[0].error}: run the same command to "
            "retry"
        )


def tell_unused(runs: Sequence[SweepRun], start: Experiment, reporter: Reporter) -> None:
    """Print the user's settings that have no effect in any run.

    Runs whose model cannot be read are skipped, because each reports its own error. `start`: see `unused_settings`.
    """
    configs = dict[ModelSpec, ModelConfig]()
    for model in dict.fromkeys(run.experiment.model for run in runs):
        with contextlib.suppress(UserError):
            tower = None if model.vision_dir is None else Path(model.vision_dir)
            configs[model] = read_config(teacher_folder(model), tower)[1]
    pairs = ((run.experiment, configs[run.experiment.model]) for run in runs if run.experiment.model in configs)
    for line in unused_lines(pairs, start=start):
        reporter.say(line)


def tell_sharing(runs: Sequence[SweepRun], sweep: Sweep, reporter: Reporter) -> None:
    """Print every run's state, and which runs share the results of a stage."""
    stages = [*(name for name, stage in STAGES.items() if stage.per in ("variant", "recovery")), CONTROL]
    first: dict[str, int] = {}
    labels = tuple(dict.fromkeys(label for run in runs for label in run.labels))
    times, rows = dict.fromkeys(stages, 0), []
    for number, run in enumerate(runs, start=1):
        keys, cells = _stage_keys(run, sweep, reporter), []
        for stage in stages:
            by = first.setdefault(keys[stage], number) if stage in keys else None
            times[stage] += by == number
            cells.append("" if by is None else "makes" if by == number else f"of {by}")
        state = "failed" if read_error(run, sweep) else "there" if read_run(run, sweep) else ""
        rows.append((str(number), *(run.labels.get(label, "") for label in labels), *cells, state))
    reporter.table(f"{len(runs)} runs", ("run", *labels, *stages, "state"), rows)
    counts = ", ".join(f"{stage} {count} times" for stage, count in times.items() if count)
    reporter.say(f"{len(runs)} runs: {counts}; the unpruned model, and equal models, are evaluated once")


def _stage_keys(run: SweepRun, sweep: Sweep, reporter: Reporter) -> dict[str, str]:
    """Return {stage: content key} of a run; runs with equal keys share the stage's result."""
    data = run.experiment.data
    data = dataclasses.replace(data, train=data.train or "train.json", eval=data.eval or "eval.json")  # not written yet
    keys: dict[str, str] = {}
    run = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, data=data))
    for step in steps_of(sweep.work(run, reporter)):
        task = task_of(step)
        before = [keys[earlier.stage] for earlier in step.before]
        stage = CONTROL if step.is_control else step.stage
        keys[stage] = content_key(step.stage, task.settings, sorted(map(str, task.outside.values())), before)
    return keys
