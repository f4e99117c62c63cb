"""Links in folders from any source: nothing is read or written outside the folder that a command was given."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vlmprune_jax.core.errors import UserError


def check_links(folder: Path) -> None:
    """Raise UserError if a workdir or upload folder contains a link to a folder, or to a file outside it."""
    home, folders = os.path.realpath(folder), [str(folder)]
    while folders:
        # Folders of others, and those that another run removes meanwhile, are left to whoever opens them.
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                inside = Path(os.path.realpath(entry)).is_relative_to(home) if entry.is_symlink() else True
                if not inside or (entry.is_symlink() and os.path.isdir(entry)):
                    raise UserError(
                        f"{entry.path}: is a symbolic link to {os.readlink(entry)}, and vlmprune does not read or "
                        "write through links: replace it by a copy, or use another folder"
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def check_inside(source: Path, folder: Path) -> None:
    """Raise UserError if a file of a model folder links outside the folder, except to the hub cache's `blobs`."""
    real, home = Path(os.path.realpath(source)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and real.parent != blobs:
        raise UserError(
            f"{source}: is a symbolic link to {real}, outside the folder: replace it by a copy, or remove it"
        )
