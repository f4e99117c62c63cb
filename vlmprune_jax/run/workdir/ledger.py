"""The ledger of a workdir, `.stages/`: what each stage was made from and made, and so which stages are done."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import msgspec
from msgspec.structs import replace

from vlmprune_jax.base.errors import Stopped, UserError, differences, reason
from vlmprune_jax.base.files import Finite, checked, replacing
from vlmprune_jax.base.processes import is_main_process, on_process_zero
from vlmprune_jax.core.mesh.mesh import start_devices
from vlmprune_jax.core.mesh.stop import noticed
from vlmprune_jax.run.workdir.artefact import Artefact, read_artefact, write_artefact
from vlmprune_jax.run.workdir.content import MadeFrom, content_key, digest, made_by, made_from, plain
from vlmprune_jax.run.workdir.store import RECORD, Store, exclusive, link


class StageRecord(Artefact, frozen=True, kw_only=True, tag=1):
    """Ledger entry of a task's last run; an unfinished task has only its inputs.

    `facts`: the result of the task's function. `outputs`: digests of the files and folders that the task made. `by`:
    see `made_by`.
    """

    made_from: MadeFrom
    done: bool
    seconds: Finite = 0.0
    facts: Any = {}
    outputs: dict[str, str] = {}
    by: dict[str, Any] = {}

    def is_intact(self, outputs: Sequence[Path]) -> bool:
        """Return True if the task is done, and these outputs are as it made them."""
        return self.done and all(path.exists() for path in outputs) and self.outputs == _digests(outputs)


FOLDER = ".stages"
# A lost machine keeps its locks on a network disk until its lease ends (NFS: 90 s); the run that takes over waits.
LOCK_SECONDS = 100.0


class NoFacts(msgspec.Struct, frozen=True):
    """Result of a task that reports nothing."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage to run in a workdir: function, settings, input and output files.

    Args:
      name: name of the ledger entry, such as `depth/prune`.
      function: function that makes the outputs and returns facts for the ledger, of type `facts`.
      settings: all settings that influence the result (JSON values).
      inputs: files and folders by name; a text describes remote data.
      outputs: files and folders that the function makes, each written atomically.
      version: number that changes whenever the function gives different results for the same inputs.
      scratch: files from which an interrupted task resumes.
      journals: like `scratch`, but deleted without asking if the inputs changed.
      makers: {pattern of file names in the workdir: command that makes them}, for messages about missing inputs.
      kind: tasks of one kind can reuse each other's results from a `store` that the runs of a sweep share.
      beside: advice on how to make a second result without replacing the first, for messages.
    """

    name: str
    function: Callable[[], msgspec.Struct | None]
    workdir: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path | str] = field(default_factory=dict)
    outputs: Sequence[Path] = ()
    version: int = 1
    facts: type[msgspec.Struct] = NoFacts
    scratch: Sequence[Path] = ()
    journals: Sequence[Path] = ()
    makers: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""
    store: Store | None = None
    beside: str = "use another --workdir"

    @property
    def record(self) -> Path:
        """Path of the task's ledger entry."""
        return self.workdir / FOLDER / f"{self.name.replace('/', '.')}.json"

    @property
    def made_from(self) -> MadeFrom:
        """Settings, digests of input files and version, as in the task's ledger entry."""
        return made_from(self.settings, self.inputs, self.version)

    @property
    def outside(self) -> dict[str, Path | str]:
        """Inputs that are outside the workdir."""
        return {
            name: path
            for name, path in self.inputs.items()
            if isinstance(path, str) or not path.is_relative_to(self.workdir)
        }

    def add(
        self,
        *,
        inputs: Mapping[str, Path | str] = MappingProxyType({}),
        outputs: Sequence[Path] = (),
        journals: Sequence[Path] = (),
        settings: Mapping[str, Any] = MappingProxyType({}),
        without: Collection[str] = (),
    ) -> Task:
        """Return the task with additional inputs, outputs, journals and settings, and `without` some settings."""
        return dataclasses.replace(
            self,
            inputs={**self.inputs, **inputs},
            outputs=[*self.outputs, *outputs],
            journals=[*self.journals, *journals],
            settings={name: value for name, value in self.settings.items() if name not in without} | {**settings},
        )


def run_task(task: Task, *, overwrite: bool, say: Callable[[str], None]) -> StageRecord:
    """Run a task by calling its function, unless its result is up to date; return its ledger entry.

    Every process of a run must call this function, and the task's function runs on all of them. Process 0 decides
    whether the result is up to date, and writes the ledger.

    A task with unchanged inputs is skipped; an interrupted task starts again (or resumes from its scratch files). Facts
    are kept in the ledger, so a skipped task returns the facts of the run that made its outputs. Seconds spent before
    an interruption are not known.

    Raises:
      UserError: an input is missing, another run is executing this task, there is too little memory, or an output was
        made from other inputs or by hand, and `overwrite` is off.
      Stopped: another process of the run received SIGTERM.
    """
    with contextlib.ExitStack() as held:
        key: str | None = None

        def begin() -> StageRecord | None:
            nonlocal key
            _check_inputs(task)
            _lock(task, say, held)
            record = _begin(task, overwrite, say)
            if record is None and task.store is not None:
                origin = made_from(task.settings, task.inputs, task.version, every_byte=True)
                names = [path.name for path in task.outputs]
                key = f"{task.kind}-{content_key(origin, names, task.store.also)}"
                lock, waits = task.store.folder / f"{key}.lock", f"{task.name}: waiting for another run to compute it"
                held.enter_context(exclusive(lock, math.inf, lambda: say(waits)))
                record = _take(task, key, say)
            return record

        record: StageRecord | None = on_process_zero(begin, StageRecord | None)
        if record is None:
            start = time.perf_counter()
            try:
                if noticed():
                    raise Stopped(f"stopped on SIGTERM before {task.name}; the same command continues with it")
                say(f"{task.name} ...")
                start_devices()
                with in_memory(task.name):
                    facts = task.function() or NoFacts()
                if not isinstance(facts, msgspec.Struct):
                    raise UserError(
                        f"stage {task.kind}: returned a {type(facts).__name__}: it must return a msgspec.Struct or None"
                    )
            except BaseException:
                # A task that wrote nothing never began; otherwise its record lets the same command continue.
                if is_main_process() and not any(map(_holds, (*task.outputs, *task.scratch, *task.journals))):
                    remove(task.record)
                raise
            record = on_process_zero(lambda: _end(task, facts, round(time.perf_counter() - start, 2), key), StageRecord)
        return replace(record, facts=msgspec.convert(record.facts, task.facts))


@contextlib.contextmanager
def in_memory(task: str) -> Iterator[None]:
    """Context that converts a task's out-of-memory error to a one-line UserError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{task}: needs more memory than the device has ({reason(error)}): lower its batch_size or the sequence "
            "length (data.max_length, data.max_images, max_new_tokens, text_window), or use more devices"
        ) from error


def _lock(task: Task, say: Callable[[str], None], held: contextlib.ExitStack) -> None:
    """Lock a task until `held` ends; raise UserError if another process is running it in the same workdir."""
    waits = f"{task.name}: waiting up to {LOCK_SECONDS:.0f} s for another run to finish it"
    if not held.enter_context(exclusive(task.record.with_suffix(".lock"), LOCK_SECONDS, lambda: say(waits))):
        raise UserError(
            f"{task.name}: another run is computing this stage in {task.workdir}: wait until it ends, or use another "
            "--workdir"
        )


def _check_inputs(task: Task) -> None:
    """Raise UserError if an input is missing, with the command that makes it if it is a stage's."""
    for name, path in task.inputs.items():
        if isinstance(path, Path) and not path.exists():
            for pattern, maker in task.makers.items() if name not in task.outside else ():
                if fnmatch.fnmatchcase(path.name, pattern):
                    raise UserError(f"{path}: no such file or folder: run `vlmprune {maker}` (or `vlmprune run`) first")
            raise UserError(f"{task.name}: {name} is {path}: no such file or folder")


def _begin(task: Task, overwrite: bool, say: Callable[[str], None]) -> StageRecord | None:
    """Return the task's ledger entry if it is done; otherwise remove its old outputs and return None."""
    now, last = task.made_from, _read(task.record, task.facts)
    same = last is not None and last.made_from == now
    if last and same and last.is_intact(task.outputs):
        output = task.outputs[0] if task.outputs else task.record
        path = output.relative_to(task.workdir).as_posix() if output.is_relative_to(task.workdir) else output
        records = [path for name, path in task.inputs.items() if name.startswith("data.") and isinstance(path, Path)]
        media = "; files of images and videos are not compared" if any(path.is_file() for path in records) else ""
        say(f"{task.name}: unchanged, skipped ({path} is up to date{media})")
        _clear(task)  # left by a process that was killed just after it had noted the end
        return last
    resumes = last is not None and same and not last.done
    if not resumes and not overwrite:
        _refuse(task, last, now)
    for path in [*task.outputs, *(() if resumes else (*task.scratch, *task.journals))]:
        remove(path)
    write_artefact(task.record, StageRecord(made_from=now, done=False))
    return None


def _take(task: Task, key: str, say: Callable[[str], None]) -> StageRecord | None:
    """Reuse the result of another sweep run: link its outputs and return its ledger entry; None if none has it."""
    assert task.store is not None
    entry = task.store.folder / key
    last, sources = _read(entry / RECORD, task.facts), [entry / path.name for path in task.outputs]
    if last is None or not last.is_intact(sources):
        remove(entry)
        return None
    for source, path in zip(sources, task.outputs, strict=True):
        link(source, path)
    write_artefact(task.record, last)
    say(f"{task.name}: linked from another run")
    _clear(task)
    return last


def _end(task: Task, facts: msgspec.Struct, seconds: float, key: str | None) -> StageRecord:
    """Write the ledger entry of a finished task, and share its result with other sweep runs."""
    last = _read(task.record, task.facts)
    assert last is not None
    outputs, by = _digests(task.outputs), made_by()
    done = replace(last, done=True, seconds=seconds, facts=plain(facts), outputs=outputs, by=by)
    write_artefact(task.record, done)
    if task.store is not None and key is not None:
        for path in task.outputs:
            link(path, task.store.folder / key / path.name)
        write_artefact(task.store.folder / key / RECORD, done)
    _clear(task)
    return done


def _clear(task: Task) -> None:
    for path in (*task.scratch, *task.journals):
        remove(path)


def _holds(path: Path) -> bool:
    """Return True if a path exists and is not an empty folder."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _digests(outputs: Sequence[Path]) -> dict[str, str]:
    return {path.name: digest(path) for path in outputs}


def _refuse(task: Task, last: StageRecord | None, now: MadeFrom) -> None:
    left = [*(path for path in task.outputs if path.exists()), *filter(_holds, task.scratch)]
    if not left:
        return
    if last is not None and last.made_from == now:
        reason = "was changed since this stage made it"
    elif last is not None:
        reason = f"was made from other inputs ({'; '.join(_changes(last.made_from, now)[:4])})"
    elif task.record.exists():
        reason = f"exists, but its record {task.record} is damaged, or of another version of vlmprune"
    else:
        reason = "exists and was not made by this stage"
    raise UserError(f"{task.name}: {left[0]} {reason}: add --overwrite to replace it, or {task.beside}")


def _changes(before: MadeFrom, now: MadeFrom) -> list[str]:
    """Return lines "input changed" and "setting was a, now b" for all differences between two runs of a stage."""
    names = sorted({*before.inputs, *now.inputs})
    inputs = [f"{name} changed" for name in names if before.inputs.get(name) != now.inputs.get(name)]
    old, new = ({**origin.settings, "version": origin.version} for origin in (before, now))
    return [*inputs, *differences(old, new)]


def differs_only_in(task: Task, *settings: str) -> bool:
    """Return True if outputs are unmodified and inputs equal those of the last run, except perhaps these settings."""
    last, now = _read(task.record, task.facts), task.made_from
    if last is None or not last.is_intact(task.outputs):
        return False
    ignored: dict[str, Any] = dict.fromkeys(settings)
    before, after = (replace(it, settings={**it.settings, **ignored}) for it in (last.made_from, now))
    return before == after


def finished_stages(workdir: Path) -> dict[str, StageRecord]:
    """Return {stage: ledger entry} of all finished stages in a workdir."""
    records = {path.stem: _read(path, None) for path in sorted((workdir / FOLDER).glob("*.json"))}
    return {name: record for name, record in records.items() if record is not None and record.done}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably (process 0 only)."""
    if not is_main_process():
        return
    with replacing(path) as file:
        # Lone surrogates, in file names and answers, cannot be encoded and are written as JSON escapes.
        file.write(text.encode(errors="backslashreplace"))


def remove(path: Path) -> None:
    """Delete a file or folder of a workdir if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, facts: type[msgspec.Struct] | None) -> StageRecord | None:
    """Read a task's ledger entry; None if it is missing or damaged."""
    try:
        record = read_artefact(path, StageRecord)
        checked(record.facts, dict[str, Any] if facts is None or not record.done else facts, "", "")
    except UserError:
        return None
    return record if record.by or not record.done else None
