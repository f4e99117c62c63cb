"""Stages that are done, by content: what one run of a sweep made, the others take instead of making it again."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import open_file, replacing
from vlmprune_jax.hf.disk.atomic import atomic_folder

RECORD = "stage.json"
_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class Store:
    """A folder with an entry for every stage that was done: its outputs, and `stage.json`, the ledger's record.

    An entry appears whole or not at all, and holds hard links to files that the runs have as well (copies, where the
    disk knows no links): it takes no room, and may be removed at any time. A stage replaces its files and never changes
    them, so no run sees what another one does later.

    `also`: what all results depend on beside settings and inputs, as where images are.
    """

    folder: Path
    also: Mapping[str, Any] = field(default_factory=dict)

    def key(
        self, kind: str, made_from: Mapping[str, Any], inputs: Mapping[str, Path | str], names: Sequence[str]
    ) -> str:
        """What a stage's result is known by: everything that it is made from, and what it is called.

        The ledger samples large files, which tells a file that was replaced; here two models that differ in their
        projectors alone must not be one, so inputs are read whole (once, as long as they stay the same).
        """
        inputs = {name: whole_digest(path) for name, path in inputs.items()}
        known = {**made_from, "kind": kind, "inputs": inputs, "outputs": list(names), "also": dict(self.also)}
        return f"{kind}-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]}"

    @contextlib.contextmanager
    def alone(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the only process that makes this result, after waiting for one that does."""
        with exclusive(self.folder / f"{key}.lock", math.inf, waiting):
            yield

    def put(self, key: str, outputs: Sequence[Path], record: Mapping[str, Any]) -> None:
        """Keep what a stage made."""
        with atomic_folder(self.folder / key) as entry:
            for path in outputs:
                _link(path, entry / path.name)
            with replacing(entry / RECORD) as file:
                file.write(json.dumps(record, indent=2).encode())

    def take(self, key: str, outputs: Sequence[Path]) -> None:
        """Put what another run made where this one would have put it."""
        for path in outputs:
            made = self.folder / key / path.name
            if made.is_dir():
                with atomic_folder(path) as folder:
                    _link(made, folder)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f".{path.name}.partial")
                partial.unlink(missing_ok=True)
                _link(made, partial)
                os.replace(partial, path)


def _link(source: Path, target: Path) -> None:
    """Hard links to a file, or to all files of a folder."""
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(source.iterdir()):
            _link(path, target / path.name)
        return
    try:
        os.link(source, target)
    except OSError:  # the disk has no links, or is another one
        with open_file(source) as file, target.open("wb") as copy:
            while block := file.read(_AT_ONCE):
                copy.write(block)


def whole_digest(path: Path | str) -> str:
    """Hash of all content of a file or folder; a text stands for something elsewhere and is hashed itself."""
    total = hashlib.sha256()
    if isinstance(path, str):
        total.update(os.fsencode(path))
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{_digest(file)}\n"))
    else:
        total.update(_digest(path).encode())
    return total.hexdigest()[:32]


def _digest(path: Path) -> str:
    with open_file(path) as file:
        found = os.fstat(file.fileno())
        return _content(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _content(path: Path, *state: int) -> str:
    del state  # part of the key: a file that is written again is read again
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(path: Path, seconds: float, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock; False where another process still holds it after so many seconds.

    The system lets go of the lock of a process that is killed. `waiting` is called where it has to be waited for.

    Raises:
      UserError: its folder is a link.
    """
    if path.parent.is_symlink():
        raise UserError(f"{path.parent}: is a link: remove it, or use another --workdir")
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # not through a link, and no FIFO is waited for
    with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        until = None
        while not (held := _locked(file)) and (until is None or time.monotonic() < until):
            if until is None:
                until = time.monotonic() + seconds
                waiting()
            time.sleep(min(1.0, seconds))
        yield held


def _locked(file: IO[bytes]) -> bool:
    """Whether this process has the file now, or its disk (a mounted bucket) knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
