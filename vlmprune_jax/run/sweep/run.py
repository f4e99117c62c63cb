"""One run of a sweep: its workdir in `runs/`, shared results in `shared/`, and its results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from vlmprune_jax.base.console import Reporter, make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.links import real_path
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.run.evaluation.metrics.texts import BITS
from vlmprune_jax.run.experiment.arguments import evaluation_sets
from vlmprune_jax.run.experiment.spec import Experiment, affecting
from vlmprune_jax.run.stages.pipeline import make_models, tasks_of
from vlmprune_jax.run.stages.preflight import preflight
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.sweep.hyper import SweepRun
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.comparison import compare_again
from vlmprune_jax.run.workdir.content import content_key, digest
from vlmprune_jax.run.workdir.ledger import remove
from vlmprune_jax.run.workdir.result import RESULT, Result, Run, Set, Unpruned, read_result
from vlmprune_jax.run.workdir.store import Store
from vlmprune_jax.run.workdir.sweep import Entry, RunError, SweepResult

RUNS, SHARED = "runs", "shared"
_QUIET = make_reporter(False)
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


def do_run(run: SweepRun, sweep: Sweep, reporter: Reporter) -> None:
    """Run all stages of one sweep run and write its `result.json`; an interrupted run resumes.

    Raises UserError if a stage refuses its settings or inputs.
    """
    folder, made_from = sweep.folder(run), on_process_zero(lambda: made_from_of(run, sweep))
    on_process_zero(lambda: remove(folder / ERROR))
    work = sweep.work(run, reporter)
    preflight(work, "run")
    result = make_models(work)
    if not is_main_process():
        return
    settings = run.experiment
    shared: dict[str, Any] = {"model": settings.model.hf_dir, "image_tokens": settings.data.max_image_tokens}
    models = [replace(model, **shared, digest=digest(folder / model.path, every_byte=True)) for model in result.runs]
    unpruned = replace(result.teacher, image_tokens=shared["image_tokens"])
    write_artefact(folder / RESULT, replace(result, teacher=unpruned, runs=models, made_from=made_from))


def note_error(run: SweepRun, sweep: Sweep, line: str) -> None:
    """Record the error that stopped a sweep run."""
    write_artefact(sweep.folder(run) / ERROR, RunError(error=line))


def read_run(run: SweepRun, sweep: Sweep) -> Result | None:
    """Return a sweep run's results; None if its file is missing, damaged, or of a single `vlmprune run`."""
    try:
        result = read_result(sweep.folder(run))
    except UserError:
        return None
    return result if result.made_from else None


def finished_run(run: SweepRun, sweep: Sweep) -> Result | None:
    """Return the results of a complete sweep run with unchanged settings and inputs; None otherwise."""
    result = read_run(run, sweep)
    return result if result is not None and result.made_from == made_from_of(run, sweep) else None


def read_error(run: SweepRun, sweep: Sweep) -> str | None:
    """Return the error message that stopped a sweep run; None if there is none."""
    try:
        return read_artefact(sweep.folder(run) / ERROR, RunError).error
    except UserError:
        return None


def made_from_of(run: SweepRun, sweep: Sweep) -> str:
    """Return a hash of all inputs of a sweep run: settings, versions and outside files."""
    experiment, tasks = run.experiment, dict[str, Any]()
    for task in tasks_of(sweep.work(run, _QUIET)):
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


@functools.cache
def digest_once(path: Path | str) -> str:
    """Return `digest(path)`, which is computed only once per path and command."""
    return digest(path)


def collect(runs: Sequence[SweepRun], sweep: Sweep) -> SweepResult:
    """Collect the results of all complete runs as the content of `sweep.json`."""
    sets, unpruned, models, seen = dict[str, Set](), dict[str, Unpruned](), list[Entry](), set[str]()
    for run in runs:
        settings = {name: getattr(run, name) for name in ("group", "labels", "overrides", "seed")}
        entry = Entry(name=run.name, run=run.name, **settings)
        result = finished_run(run, sweep)
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
