"""The runs of a sweep: each a workdir in `runs/`, what they share in `shared/`, and what all of them found."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jax

from vlmprune_jax.checked_files import read_bytes, read_json
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero, process_count
from vlmprune_jax.errors import SharedError, Stopped, UserError, reason
from vlmprune_jax.experiment.arguments import evaluation_sets
from vlmprune_jax.experiment.spec import STAGES, Experiment, affecting
from vlmprune_jax.experiment.sweep import SweepRun
from vlmprune_jax.experiment.variants import check_experiment, prune_runs, recover_runs
from vlmprune_jax.models.flops import forward_flops
from vlmprune_jax.models.params import count_params
from vlmprune_jax.recovery.losses import counted
from vlmprune_jax.report import sweep as report
from vlmprune_jax.report.comparison import build_comparison
from vlmprune_jax.report.result import best_run, describe_sets, make_result
from vlmprune_jax.stages import inputs
from vlmprune_jax.stages.console import Reporter
from vlmprune_jax.stages.context import VERSIONS, Context, model_inputs, open_folder, teacher_folder
from vlmprune_jax.stages.evaluate import set_files
from vlmprune_jax.stages.ledger import Json, digest, remove, write_json, write_text
from vlmprune_jax.stages.run import make_models
from vlmprune_jax.stages.score import criteria_of, criterion_files
from vlmprune_jax.stages.store import Store, whole_digest
from vlmprune_jax.stages.workers import Work, in_processes

RUNS, SHARED = "runs", "shared"
RUN, ERROR = "run.json", "error.json"  # in a run's folder: what it found, or why it stopped
PAGE_SECONDS = 300.0  # between two pages of a sweep that goes on
MOST_MAPS = 15_000  # of a process's memory, of which Linux allows 65,530: XLA:CPU has several for every program


class _Run(TypedDict):
    """`made_from`: see `_made_from`. The rest is what `sweep.json` takes from it."""

    made_from: str
    sets: Json
    unpruned: Json
    models: list[Json]


class _Error(TypedDict):
    error: str


@dataclass(frozen=True)
class Sweep:
    """Where a sweep works, and what all of its runs have in common."""

    workdir: Path
    overwrite: bool

    def folder(self, run: SweepRun) -> Path:
        """The run's own workdir."""
        return self.workdir / RUNS / run.name

    def context(self, run: SweepRun, reporter: Reporter) -> Context:
        """That of a run, with what runs leave for each other."""
        data, sets = run.experiment.data, evaluation_sets(run.experiment)
        images = [
            data.images,
            *(of.images for of in sets.values()),
        ]  # no stage has them as inputs: there are many files
        store = Store(self.workdir / SHARED, {"images": [path and str(Path(path).resolve()) for path in images]})
        return Context(self.folder(run), reporter, self.overwrite, store)


def check_runs(runs: Sequence[SweepRun], sweep: Sweep) -> None:
    """Refuse before anything runs what a stage of any run would refuse hours later.

    Raises:
      UserError: see `check_experiment`; or runs that cannot be compared.
    """
    for run in runs:
        try:
            check_experiment(run.experiment, sweep.folder(run))
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from error
        if evaluation_sets(run.experiment) != evaluation_sets(runs[0].experiment):
            raise UserError(
                f"run {run.name} is evaluated on other sets than {runs[0].name}: give all the same questions"
            )


def shard_of(runs: Sequence[SweepRun], shard: str) -> list[SweepRun]:
    """Of `i/n` every n-th run from the i-th.

    Raises:
      UserError: it is something else, or there are not so many.
    """
    number, mark, count = shard.partition("/")
    if not (mark and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard={shard}: must be i/n with i from 1 to n, as 2/8")
    return list(runs)[int(number) - 1 :: int(count)]


def with_caches(experiment: Experiment) -> Experiment:
    """The experiment with its caches in folders below those it names, one for runs that can share it.

    A cache of logits or features refuses what another teacher, tower or way to prepare records gave.
    """
    teacher, features = experiment.recover.teacher_cache, experiment.data.feature_cache
    model, shared = experiment.model, affecting("teacher_cache", experiment)
    if teacher is not None:
        recover = dataclasses.replace(experiment.recover, teacher_cache=_below(teacher, [vars(model), shared]))
        experiment = dataclasses.replace(experiment, recover=recover)
    if features is not None:
        stages = () if experiment.prune.stack == "text" else ("score", "prune", "reconstruct")
        tower = [affecting(stage, experiment) for stage in stages]
        data = [shared, experiment.data.max_images, experiment.data.images, experiment.recover.compute_dtype]
        own = _below(features, [vars(model), data, tower])
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, feature_cache=own))
    return experiment


def _below(folder: str, made_from: Any) -> str:
    return str(Path(folder) / hashlib.sha256(json.dumps(made_from, default=str).encode()).hexdigest()[:16])


def run_here(runs: Sequence[SweepRun], sweep: Sweep, reporter: Reporter, page: Callable[[], None]) -> None:
    """One run after the other, in this process (or, together, in all processes of a pod)."""
    written = time.monotonic()
    for number, run in enumerate(runs, start=1):
        reporter.say(f"run {number} of {len(runs)}: {run.name}")
        line = attempt(run, sweep, reporter)
        if line is not None:
            reporter.say(f"  failed: {line}")
        if time.monotonic() - written > PAGE_SECONDS and number < len(runs):
            page()
            written = time.monotonic()


def run_in_processes(
    runs: Sequence[SweepRun],
    sweep: Sweep,
    reporter: Reporter,
    page: Callable[[], None],
    jobs: int,
    start: Callable[[], Work],
) -> None:
    """`jobs` runs at a time, each in one of as many processes."""
    left, written = len(runs), time.monotonic()

    def done(item: tuple[int, SweepRun], line: str | None) -> None:
        nonlocal left, written
        left -= 1
        if line is not None:
            note_error(item[1], sweep, line)
        reporter.say(f"[{item[0]}] {'done' if line is None else f'failed: {line}'}; {left} of {len(runs)} runs left")
        if time.monotonic() - written > PAGE_SECONDS and left:
            page()
            written = time.monotonic()

    for number, run in enumerate(runs, start=1):
        reporter.say(f"[{number}] {run.name}")
    in_processes(list(enumerate(runs, start=1)), jobs, start, done)


def todo(runs: Sequence[SweepRun], sweep: Sweep) -> list[SweepRun]:
    """The runs that are not done, those that stopped with an error last."""

    def ranked() -> list[int]:
        left = [number for number, run in enumerate(runs) if not _is_done(run, sweep)]
        return sorted(left, key=lambda number: _error(runs[number], sweep) is not None)

    return [runs[number] for number in on_process_zero(ranked)]


def attempt(run: SweepRun, sweep: Sweep, reporter: Reporter) -> str | None:
    """Run it, or go on with it; returns one line about what stopped it, if anything did.

    Raises:
      Stopped: SIGTERM.
      Exception: with several processes, an error that the others do not have as well.
    """
    try:
        _run(run, sweep, reporter)
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


def note_error(run: SweepRun, sweep: Sweep, line: str) -> None:
    """Keep what stopped a run."""
    write_json(sweep.folder(run) / ERROR, {"error": line})


def _run(run: SweepRun, sweep: Sweep, reporter: Reporter) -> None:
    folder, made_from = sweep.folder(run), on_process_zero(lambda: _made_from(run.experiment))
    on_process_zero(lambda: remove(folder / ERROR))
    context = sweep.context(run, reporter)
    teacher, models = make_models(run.experiment, context)
    sets = describe_sets(teacher)
    best = best_run(models, sets)["name"]
    if not is_main_process():
        return
    result = make_result(teacher, models, best, None)
    write_json(folder / "result.json", result)
    unpruned = {**_size(run.experiment, teacher_folder(run.experiment.model)), **result["teacher"]}
    unpruned = {name: unpruned[name] for name in ("parameters", "bytes", "forward_flops", "evaluation")}
    found: _Run = {
        "made_from": made_from,
        "sets": sets,
        "unpruned": {run.experiment.model.hf_dir: unpruned},
        "models": [_found(run, model, sweep) for model in models],
    }
    write_json(folder / RUN, found)


def _found(run: SweepRun, model: Json, sweep: Sweep) -> Json:
    """`report.sweep.Found` of one of `runs` of a result."""
    path, untrained = sweep.folder(run) / model["path"], model["data_fraction"] == 0
    plain = [name for name in report.Found.__annotations__ if name in model]
    return {
        **{name: model[name] for name in plain},
        **_size(run.experiment, path),
        "model": run.experiment.model.hf_dir,
        "recovery": "none" if untrained else model["recovery"],
        "reconstruct": "none" if path.name == "pruned" else model["reconstruct"],
        "digest": whole_digest(path),
        "path": path.relative_to(sweep.workdir).as_posix(),
    }


def _size(experiment: Experiment, folder: Path) -> Json:
    """Parameters, bytes and FLOPs of a model."""
    cfg, workload = open_folder(experiment.model, folder).cfg, experiment.prune.budget
    length = min(workload.context, cfg.text.max_positions)
    images = min(workload.images, length // cfg.tokens_per_image) if cfg.vision is not None else 0
    return {
        "parameters": count_params(cfg),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "forward_flops": forward_flops(cfg, length=length, images=images),
    }


def _forget_programs() -> None:
    """Drop compiled programs before they are too many for one process: every shape of a model has its own."""
    maps = Path("/proc/self/maps")
    if maps.exists() and read_bytes(maps).count(b"\n") > MOST_MAPS:
        jax.clear_caches()


def _is_done(run: SweepRun, sweep: Sweep) -> bool:
    found = _read(run, sweep)
    return found is not None and found["made_from"] == _made_from(run.experiment)


def _read(run: SweepRun, sweep: Sweep) -> Json | None:
    """What a run found; a damaged file counts as none."""
    try:
        return read_json(sweep.folder(run) / RUN, _Run, missing="", unicode=False)
    except UserError:
        return None


def _error(run: SweepRun, sweep: Sweep) -> str | None:
    try:
        return read_json(sweep.folder(run) / ERROR, _Error, missing="", unicode=False)["error"]
    except UserError:
        return None


def _made_from(experiment: Experiment) -> str:
    """Hash of all that decides what a run finds: every setting that changes it, and what its files hold."""
    settings: Json = {stage: affecting(stage, experiment) for stage in STAGES}
    settings["evaluate.metrics"] = {name: of.metric for name, of in evaluation_sets(experiment).items()}
    settings["evaluate.unrecovered"] = experiment.evaluate.unrecovered
    settings["recover"] = {name: getattr(experiment.recover, name) for name in ("method", "name")}
    settings["budget"] = dataclasses.asdict(experiment.prune.budget)
    settings["variants"] = [dict(experiment.prune_variants), dict(experiment.recover_variants)]
    known = {
        "settings": settings,
        "versions": VERSIONS,
        "inputs": {n: _digest(p) for n, p in _inputs(experiment).items()},
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def _inputs(experiment: Experiment) -> dict[str, Path | str]:
    """Every file that a run reads from elsewhere, by name."""
    found = model_inputs(experiment.model)
    if experiment.data.train is not None:
        found |= inputs.record_files(experiment.data, "train")
    for name, of in evaluation_sets(experiment).items():
        found |= {f"{name}: {what}": path for what, path in set_files(experiment, name, of).items()}
    for pruned in prune_runs(experiment, Path()):
        found |= criterion_files(criteria_of(pruned.experiment).values())
        for run in recover_runs(pruned):
            terms = counted(run.experiment.recover.losses).items()
            found |= {f"loss {name}": term.file for name, term in terms if term.file is not None}
    return found


@functools.cache
def _digest(path: Path | str) -> str:
    """`ledger.digest`, once for all runs of a command."""
    return digest(path)


def collect(runs: Sequence[SweepRun], sweep: Sweep, config: str) -> Json:
    """`sweep.json` of what the runs have found by now."""
    sets, unpruned, models, seen = dict[str, Any](), dict[str, Any](), list[Json](), set[str]()
    for run in runs:
        entry = {
            **{name: getattr(run, name) for name in ("group", "labels", "overrides", "seed")},
            **{"name": run.name, "run": run.name, "status": report.PENDING, "error": None},
        }
        found = _read(run, sweep)
        if found is None or found["made_from"] != _made_from(run.experiment):
            line = _error(run, sweep)
            models.append(entry if line is None else {**entry, "status": report.FAILED, "error": line})
            continue
        sets, unpruned = sets or found["sets"], {**found["unpruned"], **unpruned}
        models += _entries(run, entry, found["models"], seen)
    return report.make_sweep(config, sets, unpruned, models)


def _entries(run: SweepRun, entry: Json, models: Sequence[Json], seen: set[str]) -> Iterator[Json]:
    """The models of a run: its last one has the run's name, others only where no run before had the same."""
    several = bool(run.experiment.prune_variants or run.experiment.recover_variants)
    for number, model in enumerate(models, start=1):
        last, known = number == len(models), model["digest"] in seen
        seen.add(model["digest"])
        if known and not last:
            continue
        own = Path(model["path"]).relative_to(Path(RUNS) / run.name).as_posix()
        names = {} if last and not several else {name: f"{entry[name]}/{own}" for name in ("name", "group")}
        yield {**entry, **names, "status": report.DONE, **model}


def write_sweep(runs: Sequence[SweepRun], sweep: Sweep, config: str) -> Json:
    """`sweep.json`, `sweep.csv` and `sweep.html` of what the runs have found by now."""
    found = collect(runs, sweep, config)
    write_json(sweep.workdir / report.FILE, found)
    write_text(sweep.workdir / "sweep.csv", report.as_csv(found))
    if report.done(found):
        build_comparison(sweep.workdir)
    return found


def finish(found: Json, mine: Sequence[SweepRun], sweep: Sweep, reporter: Reporter) -> None:
    """Print the table of what was found, and where it is.

    Raises:
      UserError: a run of this call failed.
    """
    header, rows = report.table_of(found)
    reporter.table("Retained in % of the unpruned model's score", header, rows)
    names = {run.name for run in mine}
    failed = [one for one in found["models"] if one["status"] == report.FAILED]
    for one in failed:
        reporter.say(f"failed: {one['name']}: {one['error']}")
    there = [name for name in (report.FILE, "sweep.csv", "sweep.html") if (sweep.workdir / name).is_file()]
    reporter.say(f"comparison: {', '.join(str(sweep.workdir / name) for name in reversed(there))}")
    ours = [one for one in failed if one["run"] in names]
    if ours:
        raise UserError(
            f"{len(ours)} of {len(mine)} runs failed, the first: {ours[0]['name']}: {ours[0]['error']}; the same "
            "command tries them again"
        )


def tell_sharing(runs: Sequence[SweepRun], sweep: Sweep, reporter: Reporter) -> None:
    """List the runs, what became of them, and by which of them each stage is done, as far as settings tell."""
    first: dict[str, int] = {}
    made, rows = dict.fromkeys(SHARED_STAGES, 0), []
    for number, run in enumerate(runs, start=1):
        cells = []
        for stage, key in zip(SHARED_STAGES, _stage_keys(run.experiment), strict=True):
            by = None if key is None else first.setdefault(key, number)
            made[stage] += by == number
            cells.append("" if by is None else "makes" if by == number else f"of {by}")
        state = "failed" if _error(run, sweep) else "there" if _read(run, sweep) else ""
        rows.append((f"{number} {run.name}", *cells, state))
    reporter.table(f"{len(runs)} runs", ("run", *SHARED_STAGES, "state"), rows)
    counts = ", ".join(f"{count} of {stage}" for stage, count in made.items() if count)
    reporter.say(f"{len(runs)} runs, made of {counts}; the unpruned model and equal models are evaluated once")


SHARED_STAGES = ("score", "prune", "reconstruct", "recover")


def _stage_keys(experiment: Experiment) -> Iterator[str | None]:
    """What stages of one run without variants have in common with others': a text each, None where there is none."""
    wanted = {"reconstruct": experiment.reconstruct.method != "none", "recover": experiment.recover.method != "none"}
    before = json.dumps([experiment.model.hf_dir, experiment.data.train, criteria_of(experiment)])
    for stage in SHARED_STAGES:
        settings = affecting(stage, experiment)
        if stage == "score":
            settings = {name: value for name, value in settings.items() if name not in ("score.depth", "score.width")}
        if not wanted.get(stage, True):
            yield None
            continue
        before = f"{before} {stage} {json.dumps(settings, default=str)}"
        yield before
