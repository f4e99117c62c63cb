"""Execution of a sweep: runs in order, in this process or several, with shared results, and their comparison."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from msgspec.structs import replace

from vlmprune_jax.base.console import Reporter, make_reporter
from vlmprune_jax.base.errors import SharedError, Stopped, UserError, reason
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.base.links import real_path
from vlmprune_jax.base.processes import is_main_process, on_process_zero, process_count
from vlmprune_jax.run.evaluation.metrics.texts import BITS
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment, affecting
from vlmprune_jax.run.experiment.variants import CONTROL
from vlmprune_jax.run.stages.evaluate import evaluation_works
from vlmprune_jax.run.stages.pipeline import make_models, preflight
from vlmprune_jax.run.stages.stage import STAGES
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.sweep.hyper import SweepRun
from vlmprune_jax.run.sweep.workers import Worker, in_processes
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import compare_again
from vlmprune_jax.run.workdir.content import content_key, digest
from vlmprune_jax.run.workdir.evaluation import TEACHER
from vlmprune_jax.run.workdir.groups import comparison_of_sweep
from vlmprune_jax.run.workdir.ledger import remove, write_text
from vlmprune_jax.run.workdir.result import RESULT, Model, Result, Run, Set, read_result
from vlmprune_jax.run.workdir.store import Store
from vlmprune_jax.run.workdir.sweep import FAILED, SWEEP, Entry, RunError, SweepResult, as_csv

PAGE_SECONDS = 300.0  # seconds between updates of the comparison page during a sweep
MOST_MAPS = 15_000  # memory maps of a process; Linux allows 65,530, and XLA:CPU uses several per program
RUNS, SHARED = "runs", "shared"
ERROR = "error.json"  # in the workdir of a run: the error that stopped it


@dataclass(frozen=True)
class Sweep:
    """A sweep: its workdir and config file, and whether to overwrite results."""

    workdir: Path
    config: str
    overwrite: bool

    def folder(self, run: SweepRun) -> Path:
        """Return the workdir of one run of the sweep."""
        return self.workdir / RUNS / run.name

    def work(self, run: SweepRun, reporter: Reporter) -> Work:
        """Return the `Work` of one run; all runs of the sweep share one result store."""
        data, sets = run.experiment.data, evaluation_sets(run.experiment.data, run.experiment.evaluate)
        # Image folders are inputs of no stage, as they hold many files.
        images = [data.images, *(eval_set.images for eval_set in sets.values())]
        store = Store(self.workdir / SHARED, {"images": [path and str(real_path(path)) for path in images]})
        return Work.at(self.folder(run), run.experiment, reporter, overwrite=self.overwrite, store=store)


def with_caches(experiment: Experiment) -> Experiment:
    """Return the experiment with its own cache folders, shared only with runs whose caches have equal content.

    A cache of logits or features refuses entries from another teacher, tower or preprocessing.
    """
    recover, data, sections = experiment.recover, experiment.data, experiment.sections
    model, shared = vars(experiment.model), affecting("teacher_cache", sections)
    if recover.teacher_cache is not None:
        recover = dataclasses.replace(recover, teacher_cache=_below(recover.teacher_cache, [model, shared]))
    if data.feature_cache is not None:
        stages = () if experiment.prune.stack == "text" else ("score", "prune", "reconstruct")
        tower = [affecting(stage, sections) for stage in stages]
        made_from = [model, [shared, data.max_images, data.images, recover.compute_dtype], tower]
        data = dataclasses.replace(data, feature_cache=_below(data.feature_cache, made_from))
    return dataclasses.replace(experiment, recover=recover, data=data)


def _below(folder: str, made_from: Any) -> str:
    return str(Path(folder) / content_key(made_from)[:16])


def read_run(run: SweepRun, sweep: Sweep, *, unchanged: bool = False) -> Result | None:
    """Return a sweep run's results; None if its file is missing, damaged, or of a single `vlmprune run`.

    `unchanged`: also None if the run's settings or inputs have changed since.
    """
    try:
        result = read_result(sweep.folder(run))
    except UserError:
        return None
    return result if result.made_from and not (unchanged and result.made_from != made_from_of(run, sweep)) else None


def read_error(run: SweepRun, sweep: Sweep) -> str | None:
    """Return the error message that stopped a sweep run; None if there is none."""
    try:
        return read_artefact(sweep.folder(run) / ERROR, RunError).error
    except UserError:
        return None


def made_from_of(run: SweepRun, sweep: Sweep) -> str:
    """Return a hash of all inputs of a sweep run: settings, versions and outside files."""
    experiment, tasks = run.experiment, dict[str, Any]()
    root = sweep.work(run, make_reporter(False))
    for task in (step.task for step in (*evaluation_works(root, root.start, TEACHER), *root.steps)):
        files = {name: digest_once(path) for name, path in task.outside.items()}
        tasks[task.name] = (task.settings, files, task.version)
    sections, sets = experiment.sections, evaluation_sets(experiment.data, experiment.evaluate)
    results = [
        {name: eval_set.metric for name, eval_set in sets.items()},
        experiment.evaluate.unrecovered,
        experiment.recover.name,
    ]
    variants = [list(experiment.prune_variants), list(experiment.recover_variants)]
    return content_key(tasks, results, variants, [affecting(stage, sections) for stage in ("speed", "export")])


digest_once = functools.cache(digest)  # once per path and command


def collect(runs: Sequence[SweepRun], sweep: Sweep) -> SweepResult:
    """Collect the results of all complete runs as the content of `sweep.json`."""
    sets, unpruned, models, seen = dict[str, Set](), dict[str, Model](), list[Entry](), set[str]()
    for run in runs:
        settings = {name: getattr(run, name) for name in ("group", "labels", "overrides", "seed")}
        entry = Entry(name=run.name, run=run.name, **settings)
        result = read_run(run, sweep, unchanged=True)
        if result is None:
            models.append(replace(entry, error=read_error(run, sweep)))
            continue
        # perplexities of different vocabularies are compared by bits per byte, in all runs
        sets = {name: metric if metric.main == BITS else sets.get(name, metric) for name, metric in result.sets.items()}
        unpruned.setdefault(result.runs[0].unpruned, result.teacher)
        models += _entries(run, entry, result.runs, seen)
    for number, entry in enumerate(models):  # retention by the same main metric of a set in all runs
        if (model := entry.found) is not None:
            again = compare_again(model.evaluation, unpruned[model.unpruned].evaluation, sets)
            models[number] = replace(entry, found=replace(model, evaluation=again))
    return SweepResult(config=sweep.config, sets=sets, unpruned=unpruned, models=models)


def _entries(run: SweepRun, entry: Entry, models: Sequence[Run], seen: set[str]) -> Iterator[Entry]:
    """Yield the models of a sweep run that no earlier run contains, with paths relative to the sweep's workdir."""
    several = bool(run.experiment.prune_variants or run.experiment.recover_variants)

    def in_sweep(path: str) -> str:
        return path and f"{RUNS}/{run.name}/{path}"

    for number, model in enumerate(models, start=1):
        last, known = number == len(models), model.digest in seen
        seen.add(model.digest)
        if known and not last:
            continue
        paths = {name: in_sweep(getattr(model, name)) for name in ("path", "plan", "metrics")}
        found = replace(model, **paths, scores=[*map(in_sweep, model.scores)])
        part = "" if last and not several else f"/{model.path}"
        yield replace(entry, name=f"{entry.name}{part}", group=f"{entry.group}{part}", found=found)


def run_sweep(
    runs: Sequence[SweepRun],
    mine: Sequence[SweepRun],
    sweep: Sweep,
    reporter: Reporter,
    *,
    jobs: int,
    start: Callable[[], Worker],
) -> None:
    """Run the unfinished ones of the runs `mine`, then write and print the comparison of all runs.

    With `jobs` > 1, this number of worker processes do one run each at a time (`start` prepares a worker). Otherwise,
    runs are done in sequence in this process, or together by all processes of a pod.

    Raises UserError if some runs failed.
    """
    from vlmprune_jax.run.report.tables import tables_of

    digest_once.cache_clear()  # files may have changed since another command of this process
    written = time.monotonic()

    def unfinished() -> list[int]:  # those that failed before at the end
        left = [number for number, run in enumerate(mine) if read_run(run, sweep, unchanged=True) is None]
        return sorted(left, key=lambda number: read_error(mine[number], sweep) is not None)

    left = [*enumerate((mine[number] for number in on_process_zero(unfinished)), start=1)]
    if len(left) < len(mine):
        reporter.say(f"{len(mine) - len(left)} of {len(mine)} runs are done and unchanged, skipped")
    count = len(left)

    def done(item: tuple[int, SweepRun], line: str | None) -> None:
        nonlocal count, written
        count -= 1
        if line is not None:
            write_artefact(sweep.folder(item[1]) / ERROR, RunError(error=line))
        if jobs > 1:
            say = "done" if line is None else f"failed: {line}"
            reporter.say(f"[{item[0]}] {say}; {count} of {len(left)} runs left")
        elif line is not None:
            reporter.say(f"  failed: {line}")
        if time.monotonic() - written > PAGE_SECONDS and is_main_process():
            write_sweep(runs, sweep)
            written = time.monotonic()

    if jobs > 1:
        for number, run in left:
            reporter.say(f"[{number}] {run.name}")
        in_processes(left, jobs, start, done)
    else:
        for number, run in left:
            reporter.say(f"run {number} of {len(left)}: {run.name}")
            done((number, run), attempt(run, sweep, reporter))
    if is_main_process():
        result = write_sweep(runs, sweep)
        if result.done:
            reporter.table(*tables_of(comparison_of_sweep(result), runs=True)[0].printed)
        _finish(result, mine, sweep, reporter)


def attempt(run: SweepRun, sweep: Sweep, reporter: Reporter) -> str | None:
    """Run or resume all stages of one sweep run and write its `result.json`; return its error as one line, or None.

    Raises:
      Stopped: on SIGTERM.
      Exception: with several processes, an error that only this process has.
    """
    try:
        folder, made_from = sweep.folder(run), on_process_zero(lambda: made_from_of(run, sweep))
        on_process_zero(lambda: remove(folder / ERROR))
        work = sweep.work(run, reporter)
        preflight(work, "run")
        result = make_models(work)
        if is_main_process():
            tokens = run.experiment.data.max_image_tokens
            shared: dict[str, Any] = {"model": run.experiment.model.hf_dir, "image_tokens": tokens}
            digests = [digest(folder / model.path, every_byte=True) for model in result.runs]
            models = [replace(m, **shared, digest=each) for m, each in zip(result.runs, digests, strict=True)]
            teacher = replace(result.teacher, image_tokens=tokens)
            write_artefact(folder / RESULT, replace(result, teacher=teacher, runs=models, made_from=made_from))
        return None
    except Stopped:
        raise
    except Exception as error:
        if process_count() > 1 and not isinstance(error, SharedError):
            raise
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {reason(error)}"
    finally:
        maps = Path("/proc/self/maps")
        if maps.exists() and read_bytes(maps).count(b"\n") > MOST_MAPS:
            jax.clear_caches()  # discards compiled programs


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


def tell_sharing(runs: Sequence[SweepRun], sweep: Sweep, reporter: Reporter) -> None:
    """Print every run's state, and which runs share the results of a stage."""
    stages = [*(name for name, stage in STAGES.items() if stage.per in ("variant", "recovery")), CONTROL]
    first: dict[str, int] = {}
    labels = tuple(dict.fromkeys(label for run in runs for label in run.labels))
    times, rows = dict.fromkeys(stages, 0), []
    for number, run in enumerate(runs, start=1):
        data = run.experiment.data  # a data set may not be written yet
        data = dataclasses.replace(data, train=data.train or "train.json", eval=data.eval or "eval.json")
        written = dataclasses.replace(run, experiment=dataclasses.replace(run.experiment, data=data))
        keys, cells = dict[str, str](), []  # runs with equal keys share a stage's result
        for step in sweep.work(written, reporter).steps:
            inputs, before = sorted(map(str, step.task.outside.values())), [keys[done.stage] for done in step.before]
            key = content_key(step.stage, step.task.settings, inputs, before)
            keys[CONTROL if step.record.control else step.stage] = key
        for stage in stages:
            by = first.setdefault(keys[stage], number) if stage in keys else None
            times[stage] += by == number
            cells.append("" if by is None else "makes" if by == number else f"of {by}")
        state = "failed" if read_error(run, sweep) else "there" if read_run(run, sweep) else ""
        rows.append((str(number), *(run.labels.get(label, "") for label in labels), *cells, state))
    reporter.table(f"{len(runs)} runs", ("run", *labels, *stages, "state"), rows)
    counts = ", ".join(f"{stage} {count} times" for stage, count in times.items() if count)
    reporter.say(f"{len(runs)} runs: {counts}; the unpruned model, and equal models, are evaluated once")
