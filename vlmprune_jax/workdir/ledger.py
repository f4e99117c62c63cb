"""Which stages of a workdir are done: content hashes of their inputs, kept in `.stages/`, and atomic side files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vlmprune_jax.core.errors import UserError, differences
from vlmprune_jax.core.files import Finite, checked, open_file, read_json, replacing
from vlmprune_jax.distributed.mesh import is_main_process, on_process_zero
from vlmprune_jax.workdir.provenance import MadeBy, made_by
from vlmprune_jax.workdir.store import RECORD, Store, exclusive

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
    """`outputs`: digests by name; `by`: what made them, which older versions did not note."""

    seconds: Finite
    facts: Json
    outputs: dict[str, str]
    by: NotRequired[MadeBy]


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
    whenever the stage's code gives other results. `facts`: what kind (see core.files) of facts its body reports.
    `store`: where runs of a sweep leave for each other what they made; stages of one `kind` can stand in for another.
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
    kind: str = ""
    store: Store | None = None

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
        key: str | None = None

        def begin() -> Json | None:
            nonlocal key
            held.enter_context(_alone(stage, say))
            finished = _begin(stage, overwrite, say)
            if finished is None and stage.store is not None:
                key = _key(stage)
                held.enter_context(stage.store.alone(key, lambda: say(f"{stage.name}: another run makes it, waiting")))
                finished = _take(stage, key, say)
            return finished

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
        return on_process_zero(lambda: _end(stage, facts, round(time.perf_counter() - start, 2), key))


@contextlib.contextmanager
def _alone(stage: Stage, say: Callable[[str], None]) -> Iterator[None]:
    """Refuse a second run of a stage in the same workdir.

    Raises:
      UserError: another run is at it, and stays.
    """

    def waiting() -> None:
        say(f"{stage.name}: another run is at it, waiting up to {LOCK_SECONDS:.0f} s for its end")

    with exclusive(stage.record.with_suffix(".lock"), LOCK_SECONDS, waiting) as held:
        if not held:
            raise UserError(
                f"{stage.name}: another run is at it in {stage.workdir}: wait for its end, or use another --workdir"
            )
        yield


def _begin(stage: Stage, overwrite: bool, say: Callable[[str], None]) -> Json | None:
    """The facts of a stage that is done, or None where it has to run; then its place is cleared."""
    for name, path in stage.inputs.items():
        if isinstance(path, Path) and not path.exists():
            raise UserError(f"{stage.name}: {name} is {path}: no such file or folder")
    now = {"settings": _plain(stage.settings), "inputs": {n: digest(p) for n, p in stage.inputs.items()}}
    now["version"] = stage.version
    last = _read(stage.record, stage.facts)
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


def _key(stage: Stage) -> str:
    """What the stage's result is known by among the runs of a sweep."""
    assert stage.store is not None
    made_from = {"settings": _plain(stage.settings), "version": stage.version}
    return stage.store.key(stage.kind, made_from, stage.inputs, [path.name for path in stage.outputs])


def _take(stage: Stage, key: str, say: Callable[[str], None]) -> Json | None:
    """The facts of a stage that another run of the sweep did, with its outputs in place; None where none did."""
    assert stage.store is not None
    entry = stage.store.folder / key
    last = _read(entry / RECORD, stage.facts)
    made = [entry / path.name for path in stage.outputs]
    if not last.get("done") or not all(path.exists() for path in made) or last["outputs"] != _digests(made):
        remove(entry)
        return None
    stage.store.take(key, stage.outputs)
    write_json(stage.record, {**last, "made_from": _read(stage.record, stage.facts)["made_from"]})
    say(f"{stage.name}: taken from another run")
    _clear(stage)
    return {**last["facts"], "seconds": last["seconds"]}


def _end(stage: Stage, facts: Json, seconds: float, key: str | None) -> Json:
    """Note in the ledger that the stage is done, and keep it for other runs of the sweep."""
    last, made = _read(stage.record, stage.facts), _digests(stage.outputs)
    done = {**last, "done": True, "seconds": seconds, "facts": facts, "outputs": made, "by": made_by()}
    write_json(stage.record, done)
    if stage.store is not None and key is not None:
        stage.store.put(key, stage.outputs, _plain(done))
    _clear(stage)
    return {**facts, "seconds": seconds}


def _clear(stage: Stage) -> None:
    for path in (*stage.scratch, *stage.journals):
        remove(path)


def _holds(path: Path) -> bool:
    """Whether something is there; an empty folder (a run failed before its first checkpoint) is nothing."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _unchanged(stage: Stage, last: Json) -> bool:
    return last["outputs"] == _digests(stage.outputs)


def _digests(outputs: Sequence[Path]) -> dict[str, str]:
    return {path.name: digest(path) for path in outputs}


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


def differs_only_in(stage: Stage, setting: str) -> bool:
    """Whether the stage's outputs are as its last run left them, and were made from the same but for one setting."""
    last = _read(stage.record, stage.facts)
    if not last.get("done") or not all(path.exists() for path in stage.outputs) or not _unchanged(stage, last):
        return False
    settings = [{k: v for k, v in of.items() if k != setting} for of in (stage.settings, last["made_from"]["settings"])]
    same = _plain(settings[0]) == settings[1] and last["made_from"]["version"] == stage.version
    return same and last["made_from"]["inputs"] == {name: digest(path) for name, path in stage.inputs.items()}


def finished_stages(workdir: Path) -> dict[str, Json]:
    """Name -> record of every stage of a workdir that is done; a damaged record is none."""
    found = {}
    for path in sorted((workdir / FOLDER).glob("*.json")):
        try:
            record = read_json(path, _Record, missing="", unicode=False)
            if record["done"]:
                found[path.stem] = checked(record, _Done, "", "")
        except UserError:
            continue
    return found


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


def _read(record: Path, facts: Any) -> Json:
    """The last run of a stage; a damaged record counts as none (its outputs are then refused, not trusted)."""
    try:
        last = read_json(record, _Record, missing="", unicode=False)
        if last["done"]:
            checked(last, _Done, "", "")
            checked(last["facts"], facts, "", "")
    except UserError:
        return {}
    return dict(last)


def _plain(value: Any) -> Any:
    """The value as JSON would return it (tuples as lists), so that it compares equal after a round trip."""
    return json.loads(json.dumps(value))


def _relative(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).as_posix() if path.is_relative_to(workdir) else str(path)
