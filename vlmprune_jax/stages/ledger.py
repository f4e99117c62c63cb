"""Which stages of a workdir are done: content hashes of their inputs, kept in `.stages/`, and atomic side files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypedDict

from vlmprune_jax.checked_files import Finite, checked, open_file, read_json, replacing
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.errors import UserError, differences

Json = dict[str, Any]


class _MadeFrom(TypedDict):
    settings: Json
    inputs: dict[str, str]
    version: int


class _Record(TypedDict):
    """What the ledger keeps of a stage's last run."""

    made_from: _MadeFrom
    done: bool


class _Done(_Record):
    """`outputs`: digests by name."""

    seconds: Finite
    facts: Json
    outputs: dict[str, str]


FOLDER = ".stages"
# A lost machine keeps its locks on a network disk until its lease ends (NFS: 90 s); the run that takes over waits.
LOCK_SECONDS = 100.0
_WHOLE = 8 << 20  # files up to this size are hashed whole
_BLOCK, _BLOCKS = 64 << 10, 32  # of larger ones these blocks, so that a 13 GB folder takes milliseconds


@dataclass(frozen=True)
class Stage:
    """One step from inputs to outputs.

    `settings`: every option that the result depends on (JSON values). `inputs`: files and folders by name.
    `outputs`: what the stage makes, each written atomically by the stage. `scratch`: what an interrupted stage leaves
    to resume from; `journals`: the same, but dropped without asking where the inputs changed. `version`: changes
    whenever the stage's code gives other results. `facts`: what kind (see checked_files) of facts its body reports.
    """

    name: str
    version: int
    workdir: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Path | str]
    outputs: Sequence[Path]
    scratch: Sequence[Path] = ()
    journals: Sequence[Path] = ()
    facts: Any = Json

    @property
    def record(self) -> Path:
        """Where the ledger keeps this stage's last run."""
        return self.workdir / FOLDER / f"{self.name.replace('/', '.')}.json"


def run_stage(stage: Stage, body: Callable[[], Json], *, overwrite: bool, say: Callable[[str], None]) -> Json:
    """Run `body` unless its result is already there; returns the facts it reported, and `seconds`.

    Every process of a run calls it. `body` runs on all of them; what is there, is decided and noted by process 0.

    A stage whose inputs are unchanged is skipped; one that was interrupted starts again (or resumes from its scratch).
    Facts are kept with the ledger, so a skipped stage returns those of the run that made its outputs. `seconds` are
    those of the attempt that finished: what an interrupted one had spent before is not known.

    Raises:
      UserError: an input is not there, another run is at this stage, or an output exists that was made from other
        inputs, or by hand, and `overwrite` is off.
    """
    with contextlib.ExitStack() as held:

        def begin() -> Json | None:
            held.enter_context(_alone(stage, say))
            return _begin(stage, overwrite, say)

        finished = on_process_zero(begin)
        if finished is not None:
            return finished
        start = time.perf_counter()
        try:
            facts = body()
        except BaseException:
            if is_main_process() and not any(_holds(path) for path in (*stage.scratch, *stage.journals)):
                remove(stage.record)
            raise
        return on_process_zero(lambda: _end(stage, facts, round(time.perf_counter() - start, 2)))


@contextlib.contextmanager
def _alone(stage: Stage, say: Callable[[str], None]) -> Iterator[None]:
    """Refuse a second run of a stage in the same workdir; the system lets go of the lock of a process that is killed.

    Raises:
      UserError: another run is at it, and stays.
    """
    path = stage.record.with_suffix(".lock")
    if path.parent.is_symlink():
        raise UserError(f"{path.parent}: is a link: remove it, or use another --workdir")
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # not through a link, and no FIFO is waited for
    with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        until = None
        while not _locked(file):
            if until is None:
                until = time.monotonic() + LOCK_SECONDS
                say(f"{stage.name}: another run is at it, waiting up to {LOCK_SECONDS:.0f} s for its end")
            if time.monotonic() >= until:
                raise UserError(
                    f"{stage.name}: another run is at it in {stage.workdir}: wait for its end, or use another --workdir"
                )
            time.sleep(min(1.0, LOCK_SECONDS))
        yield


def _locked(file: IO[bytes]) -> bool:
    """Whether this process has the file now, or its disk (a mounted bucket) knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _begin(stage: Stage, overwrite: bool, say: Callable[[str], None]) -> Json | None:
    """The facts of a stage that is done, or None where it has to run; then its place is cleared."""
    for name, path in stage.inputs.items():
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{stage.name}: {name} is {path}: no such file or folder")
    now = {"settings": _plain(stage.settings), "inputs": {n: digest(p) for n, p in stage.inputs.items()}}
    now["version"] = stage.version
    last = _read(stage)
    same = last.get("made_from") == now
    present = [path for path in stage.outputs if path.exists()]
    if same and last.get("done") and len(present) == len(stage.outputs) and _unchanged(stage, last):
        say(f"{stage.name}: unchanged, skipped ({_relative(stage.outputs[0], stage.workdir)} is up to date)")
        _clear(stage)  # what a process left that was killed just after it had noted the end
        return {**last["facts"], "seconds": last["seconds"]}
    resumes = same and not last.get("done")
    if not resumes:
        _refuse(stage, present, last, now, overwrite)
    for path in [*stage.outputs, *(() if resumes else (*stage.scratch, *stage.journals))]:
        remove(path)
    write_json(stage.record, {"made_from": now, "done": False})
    return None


def _end(stage: Stage, facts: Json, seconds: float) -> Json:
    """Note in the ledger that the stage is done."""
    made = {path.name: digest(path) for path in stage.outputs}
    done = {**_read(stage), "done": True, "seconds": seconds, "facts": facts, "outputs": made}
    write_json(stage.record, done)
    _clear(stage)
    return {**facts, "seconds": seconds}


def _clear(stage: Stage) -> None:
    for path in (*stage.scratch, *stage.journals):
        remove(path)


def _holds(path: Path) -> bool:
    """Whether something is there; an empty folder (a run failed before its first checkpoint) is nothing."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _unchanged(stage: Stage, last: Json) -> bool:
    return last["outputs"] == {path.name: digest(path) for path in stage.outputs}


def _refuse(stage: Stage, present: Sequence[Path], last: Json, now: Json, overwrite: bool) -> None:
    left = [*present, *(path for path in stage.scratch if _holds(path))]
    if overwrite or not left:
        return
    if last.get("made_from") == now:
        reason = "was changed since this stage made it"
    elif last:
        reason = f"was made from other inputs ({'; '.join(_changes(last['made_from'], now)[:4])})"
    elif stage.record.exists():
        reason = f"exists, but its record {stage.record} is damaged"
    else:
        reason = "exists and was not made by this stage"
    raise UserError(f"{stage.name}: {left[0]} {reason}: use --overwrite to replace it, or another --workdir")


def _changes(before: Json, now: Json) -> list[str]:
    """`input changed` and `setting was a, now b`, for all in which what a stage was made from differs."""
    known, given = before["inputs"], now["inputs"]
    inputs = [f"{name} changed" for name in sorted({*known, *given}) if known.get(name) != given.get(name)]
    old, new = ({**made["settings"], "version": made["version"]} for made in (before, now))
    return [*inputs, *differences(old, new)]


def digest(path: Path | str) -> str:
    """Hash of a file's or folder's content: names, sizes and, for files over 8 MiB, 2 MiB of spread-out blocks.

    A text stands for something elsewhere and is hashed itself.

    Raises:
      UserError: nothing is there.
    """
    total = hashlib.sha256()
    if isinstance(path, str):
        total.update(os.fsencode(path))
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n"))
    elif path.is_file():
        total.update(_file_digest(path).encode())
    else:
        raise UserError(f"{path}: no such file or folder")
    return total.hexdigest()[:20]


def _file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE:
            total.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                total.update(file.read(_BLOCK))
    return f"{size}:{total.hexdigest()}"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut; process 0 does."""
    if not is_main_process():
        return
    with replacing(path) as file:
        # What no encoding has, in names of files as in answers, stands there as JSON would spell it.
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(_plain(value), indent=2) + "\n")


def write_members(path: Path, value: Mapping[str, Any]) -> None:
    """`write_text` of a JSON object, a line for each member: there may be thousands of numbers in one."""
    members = (f"  {json.dumps(name)}: {json.dumps(member)}" for name, member in value.items())
    write_text(path, "{\n" + ",\n".join(members) + "\n}\n")


def remove(path: Path) -> None:
    """Delete a file or folder of this workdir, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(stage: Stage) -> Json:
    """The last run of a stage; a damaged record counts as none (its outputs are then refused, not trusted)."""
    try:
        last = read_json(stage.record, _Record, missing="", unicode=False)
        if last["done"]:
            checked(last, _Done, "", "")
            checked(last["facts"], stage.facts, "", "")
    except UserError:
        return {}
    return dict(last)


def _plain(value: Any) -> Any:
    """The value as JSON would return it (tuples as lists), so that it compares equal after a round trip."""
    return json.loads(json.dumps(value))


def _relative(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).as_posix() if path.is_relative_to(workdir) else str(path)
