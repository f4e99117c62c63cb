"""Store of stage results by content key, from which the runs of a sweep reuse each other's results."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from vlmprune_jax.base.atomic import atomic_folder
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file
from vlmprune_jax.run.workdir.content import is_hidden

RECORD = "stage.json"
_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class Store:
    """Folder of stage results that a sweep's runs share; an entry has the outputs of a stage and their ledger entry.

    An entry's name is a hash of all inputs of the result (every byte of them), and of the names of its files.

    The ledger entry is written last. An entry holds hard links to files of the runs (copies on disks without hard
    links), so that it takes no additional space and can be removed at any time. A stage replaces its files and never
    changes them, so that later changes in one run do not affect other runs.

    `also`: JSON values that influence all results, besides settings and inputs, such as the folders of images.
    """

    folder: Path
    also: Mapping[str, Any] = field(default_factory=dict)


def link(source: Path, target: Path) -> None:
    """Hard-link a file or folder to `target`, which then appears complete; hidden files are left out.

    Raises UserError if a symbolic link is among the files.
    """
    if source.is_dir():
        with atomic_folder(target) as folder:
            _link(source, folder)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        _link(source, partial)
        os.replace(partial, target)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        raise UserError(
            f"{source}: is a symbolic link, which a results folder must not contain: remove it and run the same command"
        )
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(path for path in source.iterdir() if not is_hidden(path.relative_to(source))):
            _link(path, target / path.name)
        return
    try:
        os.link(source, target)
    except OSError:  # the disk does not support hard links, or the store is on another disk
        with open_file(source) as file, target.open("wb") as copy:
            while block := file.read(_AT_ONCE):
                copy.write(block)


@contextlib.contextmanager
def exclusive(path: Path, seconds: float, waiting: Callable[[], None]) -> Iterator[bool]:
    """Context that holds a file lock; yields False if another process keeps it beyond the timeout.

    The operating system releases the lock of a killed process. `waiting` is called if another process holds the lock.
    """
    if path.parent.is_symlink():
        raise UserError(f"{path.parent}: is a symbolic link: remove it, or use another --workdir")
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # do not follow links, and do not block on FIFOs
    with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
        until = None
        while not (held := _locked(file)) and (until is None or time.monotonic() < until):
            if until is None:
                until = time.monotonic() + seconds
                waiting()
            time.sleep(min(1.0, seconds))
        yield held


def _locked(file: IO[bytes]) -> bool:
    """Return True if this process now holds the lock, or the disk does not support locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
