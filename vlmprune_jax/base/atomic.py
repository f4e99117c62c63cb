"""Output folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file
from vlmprune_jax.base.links import real_path

# Free bytes required in addition to the weights, for small files and the file system.
SPARE_BYTES = 16 * 2**20
# Age (s) at which a temporary folder is abandoned; writers pause only while other processes gather a shard.
ABANDONED_SECONDS = 3600.0
# Error numbers of a full disk, an exceeded quota or an exceeded file size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(out_dir: Path, source_dir: Path, overwrite: bool) -> None:
    """Raise UserError if writing to `out_dir` would destroy files of the user.

    That is the case if `out_dir` is or contains the source folder, is not a folder, or has files and `overwrite` is
    off. It is also the case if `out_dir` has files but is not a model folder.
    """
    out, source = real_path(out_dir), real_path(source_dir)
    if out == source or out in source.parents:
        raise UserError(f"{out_dir}: is or contains the source folder {source_dir}: choose another output folder")
    if not os.path.lexists(out_dir):
        return
    if not out_dir.is_dir():
        raise UserError(f"{out_dir}: exists and is not a folder: choose another output folder")
    if not any(out_dir.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out_dir}: exists already: choose another folder or pass --overwrite (overwrite=True)")
    if not (out_dir / "config.json").is_file() and not _has_card(out_dir):
        raise UserError(
            f"{out_dir}: not a model folder (no config.json and no model card), so it is not overwritten: delete it"
        )


def _has_card(folder: Path) -> bool:
    """Return True if a folder's README.md is a model card written by vlmprune."""
    try:
        with open_file(folder / "README.md") as file:
            return file.read(64).startswith(b"---\nlibrary_name:")
    except UserError:
        return False


def check_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk has fewer than `needed` free bytes."""
    free = shutil.disk_usage(next(parent for parent in real_path(folder).parents if parent.is_dir())).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: needs {(needed + SPARE_BYTES) / 2**20:,.0f} MiB but only {free / 2**20:,.0f} MiB are free: "
            "make room or choose another disk"
        )


@contextlib.contextmanager
def atomic_folder(out_dir: Path) -> Iterator[Path]:
    """Context that yields a hidden folder next to `out_dir`, and renames it to `out_dir` if the block succeeds.

    An existing `out_dir` is replaced only at that moment. If the block fails, the hidden folder is removed; if the
    process is killed, the next call for the same `out_dir` removes the hidden folder (`clean_stale`). Raises UserError
    if the disk (or a quota) is full, or a file cannot be read or written.
    """
    owner = f"{socket.gethostname()}-{os.getpid()}"
    partial = out_dir.parent / f".{out_dir.name}.partial-{owner}"
    replaced = out_dir.parent / f".{out_dir.name}.replaced-{owner}"
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(out_dir)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if out_dir.exists():
            os.rename(out_dir, replaced)
        os.rename(partial, out_dir)
    except BaseException as error:
        if os.path.exists(replaced) and not out_dir.exists():
            os.rename(replaced, out_dir)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            what = f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
            todo = "make room or choose another disk" if error.errno in _FULL else "check that path, or choose another"
            raise UserError(f"{out_dir}: {what}: nothing was written, {todo}") from error
        raise
    sync(out_dir.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean_stale(out_dir: Path) -> None:
    """Remove temporary folders of killed writers of `out_dir`; restore `out_dir` if its replacement was interrupted.

    A writer on this machine counts as killed if its process no longer exists. A writer on another machine of a pod
    counts as killed if it wrote nothing for `ABANDONED_SECONDS`.
    """
    for kind in ("replaced", "partial"):
        mark = f".{out_dir.name}.{kind}-"
        for left in sorted(
            path for path in out_dir.parent.iterdir() if path.name.startswith(mark) and not path.is_symlink()
        ):
            host, _, pid = left.name.removeprefix(mark).rpartition("-")
            if not re.fullmatch(r"\d{1,9}", pid, re.ASCII) or _writing(left, host, int(pid)):
                continue
            if kind == "replaced" and not out_dir.exists():
                os.rename(left, out_dir)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _writing(folder: Path, host: str, pid: int) -> bool:
    """Return True if the process that created a temporary folder may still be running."""
    if host == socket.gethostname():
        with contextlib.suppress(PermissionError):  # raised for another user's process, which then exists
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
        return pid != os.getpid()
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:  # being renamed or removed
        return True
    return time.time() - newest < ABANDONED_SECONDS


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
