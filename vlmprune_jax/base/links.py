"""Paths and links from any source: nothing is read or written outside the folder that a command was given."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vlmprune_jax.base.errors import UserError


def is_path(text: str) -> bool:
    """Return True if the text can be a path: it has no NUL character and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def real_path(path: str | Path) -> Path:
    """Return the absolute path with links resolved; unlike `Path.resolve`, keep a link to itself as it is.

    Raises UserError for a text that cannot be a path.
    """
    if not is_path(str(path)):
        raise UserError(f"{path}: contains a NUL character or half of a surrogate pair: choose another path")
    return Path(os.path.realpath(path))


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Return True if a path lies in the folder after links are resolved; False for a text that cannot be a path."""
    return is_path(str(path)) and real_path(path).is_relative_to(real_path(folder))


def check_links(folder: Path) -> None:
    """Raise UserError if a workdir or upload folder contains a link to a folder, or to a file outside it."""
    folders = [str(folder)]
    while folders:
        # Folders of others, and those that another run removes meanwhile, are left to whoever opens them.
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and (os.path.isdir(entry) or not is_inside(entry.path, folder)):
                    raise UserError(
                        f"{entry.path}: is a symbolic link to {os.readlink(entry)}, and vlmprune does not read or "
                        "write through links: replace it by a copy, or use another folder"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def check_inside(source: Path, folder: Path) -> None:
    """Raise UserError if a file of a model folder links outside the folder, except to the hub cache's `blobs`."""
    real, home = real_path(source), real_path(folder)
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and real.parent != blobs:
        raise UserError(
            f"{source}: is a symbolic link to {real}, outside the folder: replace it by a copy, or remove it"
        )
