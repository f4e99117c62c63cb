"""One process of a run of several: `python pod_worker.py IDS_FILE COMMAND,COMMAND FLAG...`.

Runs the commands one after the other with these flags, and writes the record ids of each training step that this
process was handed to IDS_FILE, a line per step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vlmprune_jax.cli.main import main
from vlmprune_jax.recover import loop


def run(ids_file: str, commands: str, *flags: str) -> int:
    """The exit code of the first command that fails, or 0."""
    original = loop._next

    def listed(*args):
        batch = original(*args)
        with Path(ids_file).open("a") as file:
            file.write(json.dumps(batch.record_ids) + "\n")
        return batch

    loop._next = listed
    return next((code for code in (main([command, *flags]) for command in commands.split(",")) if code), 0)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
