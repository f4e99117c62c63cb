"""Content keys, by which ledger, store and sweeps compare results: hashes of all inputs; and who made a result.

Files are hashed by one of two rules. The ledger asks if a file changed since a stage read it: whoever replaces a large
file changes blocks all over it, so a sample of 2 MiB tells, in milliseconds for a 13 GB checkpoint. A sweep's store
asks if two models are the same: models that differ in their projectors alone share almost every block, so there every
byte is read, once for each version of a file.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vlmprune_jax.base.errors import UserError, printable
from vlmprune_jax.base.files import open_file, written
from vlmprune_jax.core.mesh.machine import processor

_PACKAGES = ("vlmprune-jax", "jax", "flax", "optax", "transformers", "numpy")
_SOURCE = Path(__file__).parents[3]

_SAMPLED = 8 << 20  # bytes: larger files are sampled
_BLOCK, _BLOCKS = 64 << 10, 32
_AT_ONCE = 1 << 20


class MadeFrom(msgspec.Struct, frozen=True, kw_only=True):
    """All inputs of a stage's result: settings, digests of input files, and the stage's version."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    version: int


def made_from(
    settings: Mapping[str, Any], inputs: Mapping[str, Path | str], version: int, *, every_byte: bool = False
) -> MadeFrom:
    """Hash the inputs of a stage; with `every_byte`, large files are read completely."""
    digests = {name: digest(path, every_byte=every_byte) for name, path in inputs.items()}
    return MadeFrom(settings=plain(settings), inputs=digests, version=version)


def content_key(*values: Any) -> str:
    """Return a hash (32 hex digits) of JSON values or structs."""
    return hashlib.sha256(json.dumps(plain(values), sort_keys=True).encode()).hexdigest()[:32]


def digest(path: Path | str, *, every_byte: bool = False) -> str:
    """Hash a file or folder: names, sizes and content (a sample of files over 8 MiB, unless `every_byte`).

    Hidden files and folders are left out. If `path` is a text (a description of remote data), the text is hashed.

    Raises UserError if the path does not exist.
    """
    total = hashlib.sha256()
    if isinstance(path, str):
        total.update(os.fsencode(path))
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if not is_hidden(p.relative_to(path))):
            if file.is_file():
                content = _file_digest(file, every_byte)
            elif file.is_symlink():  # to a folder, which is not read
                content = f"-> {os.readlink(file)}"
            else:
                continue
            total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{content}\n"))
    elif path.is_file():
        total.update(_file_digest(path, every_byte).encode())
    else:
        raise UserError(f"{path}: no such file or folder")
    return total.hexdigest()[:32]


def is_hidden(path: Path) -> bool:
    """Return True if a name in a relative path begins with a dot, as for files of git, the hub's cache and editors."""
    return any(name.startswith(".") for name in path.parts)


def _file_digest(path: Path, every_byte: bool) -> str:
    with open_file(path) as file:
        state = os.fstat(file.fileno())
        if every_byte:
            return _every_byte(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        total = hashlib.sha256()
        if state.st_size <= _SAMPLED:
            total.update(file.read())
        else:
            for i in range(_BLOCKS):
                file.seek((state.st_size - _BLOCK) * i // (_BLOCKS - 1))
                total.update(file.read(_BLOCK))
    return f"{state.st_size}:{total.hexdigest()}"


@functools.lru_cache(maxsize=100_000)
def _every_byte(path: Path, *state: int) -> str:
    del state  # part of the cache's key: a file that is written again is read again
    total = hashlib.sha256()
    with open_file(path) as file:
        for start, end in written(file.fileno(), os.fstat(file.fileno()).st_size):
            total.update(f"{start}-{end}:".encode())
            file.seek(start)
            while start < end and (block := file.read(min(_AT_ONCE, end - start))):
                total.update(block)
                start += len(block)
    return total.hexdigest()


def plain(value: Any) -> Any:
    """Convert a value to JSON values (tuples to lists), so that it equals its copy read from a file."""
    return json.loads(json.dumps(value, default=msgspec.to_builtins))


def made_by() -> dict[str, Any]:
    """Return command, machine and code version of this process; `commit` ends in "-dirty" if source was changed."""
    return {
        "finished": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": printable(shlex.join(["vlmprune", *sys.argv[1:]])),
        "processor": processor(),
        "versions": versions(),
        "commit": commit(),
    }


@functools.cache
def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Return {package: version} of Python and the installed dependencies."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
            continue
    return installed


@functools.cache
def commit() -> str | None:
    """Return the Git commit of vlmprune's source; None if the source is not in a repository."""
    if not (_SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
