"""Provenance of a stage in the ledger: versions, commit, processor, command and time."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from vlmprune_jax.base.errors import printable
from vlmprune_jax.core.mesh.machine import processor

_PACKAGES = ("vlmprune-jax", "jax", "flax", "optax", "transformers", "numpy")
_SOURCE = Path(__file__).parents[3]


class MadeBy(msgspec.Struct, frozen=True, kw_only=True):
    """Command, machine and code version of a stage's run; `commit` ends in "-dirty" if source was changed."""

    finished: str
    command: str
    processor: str
    versions: dict[str, str]
    commit: str | None


def made_by() -> MadeBy:
    """Return command, machine and code version of this process."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    command = printable(shlex.join(["vlmprune", *sys.argv[1:]]))
    return MadeBy(finished=now, command=command, processor=processor(), versions=versions(), commit=commit())


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
