"""By what a stage was made: versions, commit, processor, command and time, noted with it in the ledger."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

from vlmprune_jax.core.errors import printable
from vlmprune_jax.distributed.processor import processor

_PACKAGES = ("vlmprune-jax", "jax", "flax", "optax", "transformers", "numpy")
_SOURCE = Path(__file__).parents[2]


class MadeBy(TypedDict):
    """`versions`: of packages, and of Python. `commit`: of the source, with "-dirty" where it was changed; or null."""

    finished: str
    command: str
    processor: str
    versions: dict[str, str]
    commit: str | None


def made_by() -> MadeBy:
    """This process, now."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    command = printable(shlex.join(["vlmprune", *sys.argv[1:]]))
    return {
        "finished": now, "command": command, "processor": processor(), "versions": _versions(), "commit": _commit()
    }  # fmt: skip


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder that is not installed
            continue
    return found


@functools.cache
def _commit() -> str | None:
    """Of the repository that this package lies in, if it lies in one."""
    if not (_SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
