"""The ledger of a workdir, `.stages/`: what each stage was made from and made, and so which stages are done."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from vlmprune_jax.core.errors import UserError, differences
from vlmprune_jax.core.files import Finite, checked, read_json, replacing
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.workdir.content import MadeFrom, digest, made_from, plain
from vlmprune_jax.workdir.provenance import MadeBy, made_by
from vlmprune_jax.workdir.store import RECORD, Store, exclusive


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Ledger entry of a stage's last run, finished or not."""

    format: Literal[1] = 1
    made_from: MadeFrom
    done: bool


class Done(Record, frozen=True, kw_only=True):
    """Ledger entry of a finished stage, with digests of its outputs and its result (`facts`)."""

    seconds: Finite
    facts: dict[str, Any]
    outputs: dict[str, str]
    by: MadeBy


FOLDER = ".stages"
# A lost machine keeps its locks on a network disk until its lease ends (NFS: 90 s); the run that takes over waits.
LOCK_SECONDS = 100.0


@dataclass(frozen=True)
class Job:
    """A stage to run in a workdir: settings, input and output files.

    `name`: of its record, as `depth/prune`. `stage`: jobs of one stage can take each other's results from a `store`.
    `settings`: every setting that the result depends on (JSON values). `inputs`: files and folders by name.
    `outputs`: what the stage makes, each written atomically. `scratch`: what an interrupted stage resumes from;
    `journals`: the same, but dropped without asking if the inputs changed. `version`: changes whenever the stage's code
    gives other results. `facts`: the struct that its function returns. `store`: where runs of a sweep share results.
    `beside`: how to get another result beside one that is there, for messages.
    """

    name: str
    version: int
    workdir: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path | str]
    outputs: Sequence[Path]
    facts: type[msgspec.Struct]
    scratch: Sequence[Path] = ()
    journals: Sequence[Path] = ()
    stage: str = ""
    store: Store | None = None
    beside: str = "use another --workdir"

    @property
    def record(self) -> Path:
        """Path of the job's ledger entry."""
        return self.workdir / FOLDER / f"{self.name.replace('/', '.')}.json"


@dataclass(frozen=True)
class Finished:
    """Result of a finished job, and the seconds that it took."""

    facts: Any
    seconds: float


def run_job(job: Job, body: Callable[[], msgspec.Struct], *, overwrite: bool, say: Callable[[str], None]) -> Finished:
    """Run a job by calling `body`, unless its result is up to date.

    Every process of a run calls it, and `body` runs on all of them; process 0 decides what is there, and notes it.

    A job whose inputs are unchanged is skipped; one that was interrupted starts again (or resumes from its scratch).
    Facts are kept in the ledger, so a skipped job returns those of the run that made its outputs. Seconds spent before
    an interruption are not known.

    Raises:
      UserError: an input is missing, another run is at this job, or an output exists that was made from other inputs,
        or by hand, and `overwrite` is off.
    """
    with contextlib.ExitStack() as held:
        key: str | None = None

        def begin() -> Done | None:
            nonlocal key
            held.enter_context(_alone(job, say))
            done = _begin(job, overwrite, say)
            if done is None and job.store is not None:
                key = job.store.key(job.stage, job.settings, job.inputs, job.version, job.outputs)
                held.enter_context(
                    job.store.alone(key, lambda: say(f"{job.name}: waiting for another run to compute it"))
                )
                done = _take(job, key, say)
            return done

        done: Done | None = on_process_zero(begin, Done | None)
        if done is None:
            start = time.perf_counter()
            try:
                facts = body()
            except BaseException:
                # With nothing to show for it the job never began; else its record lets the same command go on.
                if is_main_process() and not any(_holds(path) for path in (*job.outputs, *job.scratch, *job.journals)):
                    remove(job.record)
                raise
            done = on_process_zero(lambda: _end(job, facts, round(time.perf_counter() - start, 2), key), Done)
        return Finished(msgspec.convert(done.facts, job.facts), done.seconds)


@contextlib.contextmanager
def _alone(job: Job, say: Callable[[str], None]) -> Iterator[None]:
    """Context that locks a job; raise UserError if another process is running it in the same workdir."""

    def waiting() -> None:
        say(f"{job.name}: waiting up to {LOCK_SECONDS:.0f} s for another run to finish it")

    with exclusive(job.record.with_suffix(".lock"), LOCK_SECONDS, waiting) as held:
        if not held:
            raise UserError(
                f"{job.name}: another run is computing this stage in {job.workdir}: wait until it ends, or use "
                "another --workdir"
            )
        yield


def _begin(job: Job, overwrite: bool, say: Callable[[str], None]) -> Done | None:
    """Return the job's ledger entry if it is done; otherwise remove its old outputs and return None."""
    for name, path in job.inputs.items():
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{job.name}: {name} is {path}: no such file or folder")
    now = made_from(job.settings, job.inputs, job.version)
    last = _read(job.record, job.facts)
    same = last is not None and last.made_from == now
    present = [path for path in job.outputs if path.exists()]
    if same and isinstance(last, Done) and len(present) == len(job.outputs) and last.outputs == _digests(job.outputs):
        output = job.outputs[0] if job.outputs else job.record
        path = output.relative_to(job.workdir).as_posix() if output.is_relative_to(job.workdir) else output
        say(f"{job.name}: unchanged, skipped ({path} is up to date)")
        _clear(job)  # left by a process that was killed just after it had noted the end
        return last
    resumes = same and not isinstance(last, Done)
    if not resumes and not overwrite:
        _refuse(job, present, last, now)
    for path in [*job.outputs, *(() if resumes else (*job.scratch, *job.journals))]:
        remove(path)
    write_json(job.record, Record(made_from=now, done=False))
    return None


def _take(job: Job, key: str, say: Callable[[str], None]) -> Done | None:
    """Reuse the result of another sweep run: link its outputs and return its ledger entry; None if none has it."""
    assert job.store is not None
    entry = job.store.folder / key
    last, begun = _read(entry / RECORD, job.facts), _read(job.record, job.facts)
    sources = [entry / path.name for path in job.outputs]
    if not isinstance(last, Done) or not all(path.exists() for path in sources) or last.outputs != _digests(sources):
        remove(entry)
        return None
    assert begun is not None
    job.store.take(key, job.outputs)
    write_json(job.record, msgspec.structs.replace(last, made_from=begun.made_from))
    say(f"{job.name}: linked from another run")
    _clear(job)
    return last


def _end(job: Job, facts: msgspec.Struct, seconds: float, key: str | None) -> Done:
    """Write the ledger entry of a finished job, and share its result with other sweep runs."""
    last = _read(job.record, job.facts)
    assert last is not None
    done = Done(
        made_from=last.made_from,
        done=True,
        seconds=seconds,
        facts=plain(facts),
        outputs=_digests(job.outputs),
        by=made_by(),
    )
    write_json(job.record, done)
    if job.store is not None and key is not None:
        job.store.put(key, job.outputs, msgspec.to_builtins(done))
    _clear(job)
    return done


def _clear(job: Job) -> None:
    for path in (*job.scratch, *job.journals):
        remove(path)


def _holds(path: Path) -> bool:
    """Return True if a path exists and is not an empty folder."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _digests(outputs: Sequence[Path]) -> dict[str, str]:
    return {path.name: digest(path) for path in outputs}


def _refuse(job: Job, present: Sequence[Path], last: Record | None, now: MadeFrom) -> None:
    left = [*present, *(path for path in job.scratch if _holds(path))]
    if not left:
        return
    if last is not None and last.made_from == now:
        reason = "was changed since this stage made it"
    elif last is not None:
        reason = f"was made from other inputs ({'; '.join(_changes(last.made_from, now)[:4])})"
    elif job.record.exists():
        reason = f"exists, but its record {job.record} is damaged, or of another version of vlmprune"
    else:
        reason = "exists and was not made by this stage"
    raise UserError(f"{job.name}: {left[0]} {reason}: add --overwrite to replace it, or {job.beside}")


def _changes(before: MadeFrom, now: MadeFrom) -> list[str]:
    """Return lines "input changed" and "setting was a, now b" for all differences between two runs of a stage."""
    names = sorted({*before.inputs, *now.inputs})
    inputs = [f"{name} changed" for name in names if before.inputs.get(name) != now.inputs.get(name)]
    old, new = ({**origin.settings, "version": origin.version} for origin in (before, now))
    return [*inputs, *differences(old, new)]


def differs_only_in(job: Job, setting: str) -> bool:
    """Return True if outputs are unmodified and inputs differ from the last run in at most one setting."""
    last = _read(job.record, job.facts)
    if not isinstance(last, Done) or not all(path.exists() for path in job.outputs):
        return False
    if last.outputs != _digests(job.outputs):
        return False
    now = made_from(job.settings, job.inputs, job.version)
    before, after = ({k: v for k, v in origin.settings.items() if k != setting} for origin in (last.made_from, now))
    return (before, last.made_from.inputs, last.made_from.version) == (after, now.inputs, now.version)


def finished_stages(workdir: Path) -> dict[str, Done]:
    """Return {stage: ledger entry} of all finished stages in a workdir."""
    records = {path.stem: _read(path, None) for path in sorted((workdir / FOLDER).glob("*.json"))}
    return {name: record for name, record in records.items() if isinstance(record, Done)}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably (process 0 only)."""
    if not is_main_process():
        return
    with replacing(path) as file:
        # What no encoding has, in names of files as in answers, stands there as JSON would spell it.
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically (process 0 only)."""
    write_text(path, json.dumps(value, indent=2, default=msgspec.to_builtins) + "\n")


def remove(path: Path) -> None:
    """Delete a file or folder of a workdir if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, facts: type[msgspec.Struct] | None) -> Record | None:
    """Read a job's ledger entry; None if it is missing or damaged."""
    try:
        record = read_json(path, Record, missing="", unicode=False)
        kind = Done if record["done"] else Record
        checked(record, kind, "", "")
        if kind is Done and facts is not None:
            checked(record["facts"], facts, "", "")
    except UserError:
        return None
    return msgspec.convert(record, kind)
