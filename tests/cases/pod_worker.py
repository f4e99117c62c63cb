"""One process of a run of several: `python pod_worker.py IDS_FILE COMMAND,COMMAND FLAG...`.

Runs the commands one after the other with these flags, and writes the record ids of each training step that this
process was handed to IDS_FILE, a line per step; to IDS_FILE.written what it wrote, renamed or made in the workdir; and
to IDS_FILE.images the images that it prepared.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vlmprune_jax.core.recovery import loop
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.run.cli.main import main


def list_writes(workdir: Path, file: Path) -> None:
    """From here on every path below `workdir` that this process changes is a line of `file`."""
    changing = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.truncate": (0,)}
    said = file.open("a", buffering=1)

    def hook(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            paths = [args[0]]
        else:
            paths = [args[i] for i in changing.get(event, ())]
        for path in paths:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(workdir):
                said.write(f"{Path(path).relative_to(workdir)}\n")

    sys.addaudithook(hook)


def list_images(file: Path) -> None:
    """From here on the name of every image that this process prepares is a line of `file`."""
    original, said = ImageLoader.load, file.open("a", buffering=1)

    def load(self: ImageLoader, path: Path, *args: object) -> object:
        said.write(f"{path.name}\n")
        return original(self, path, *args)

    ImageLoader.load = load


def run(ids_file: str, commands: str, *flags: str) -> int:
    """The exit code of the first command that fails, or 0."""
    original = loop._next

    def listed(*args):
        batch = original(*args)
        with Path(ids_file).open("a") as file:
            file.write(json.dumps(batch.record_ids) + "\n")
        return batch

    loop._next = listed
    list_images(Path(f"{ids_file}.images"))
    workdir = next(Path(flag.removeprefix("--workdir=")) for flag in flags if flag.startswith("--workdir="))
    list_writes(workdir, Path(f"{ids_file}.written"))
    return next((code for code in (main([command, *flags]) for command in commands.split(",")) if code), 0)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
