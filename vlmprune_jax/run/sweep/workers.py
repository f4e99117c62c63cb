"""Worker processes for several runs at once on one machine; a killed worker costs only its current run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from vlmprune_jax.base.errors import Stopped

Worker = Callable[[Any], str | None]  # processes an item; returns its error as one line, or None


def in_processes(
    items: Sequence[Any], jobs: int, start: Callable[[], Worker], done: Callable[[Any, str | None], None]
) -> None:
    """Process items in `jobs` child processes; if one is killed, only its current item fails.

    An interruption ends the processes with SIGTERM, on which training saves its state.

    Args:
      items: picklable items.
      jobs: number of processes.
      start: importable function, called once in each new process, which returns the function that processes an item.
      done: called in this process with each finished item and its error (or None), one at a time.
    """
    context = multiprocessing.get_context("spawn")  # a fork would lose the threads of jax
    before = os.environ.get("PYTHONSAFEPATH", "")
    pending, processes = list(reversed(items)), list[SpawnProcess]()
    busy = dict[Connection, tuple[SpawnProcess, Any]]()

    def launch() -> None:
        connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, start))
        process.start()
        processes.append(process)
        theirs.close()
        give(connection, process)

    def give(connection: Connection, process: SpawnProcess) -> None:
        item = pending.pop()
        busy[connection] = process, item
        with contextlib.suppress(OSError):  # of a process that has just been killed, which `wait` reports
            connection.send(item)

    os.environ["PYTHONSAFEPATH"] = "1"  # child processes import nothing from the current folder
    try:
        while pending and len(processes) < jobs:
            launch()
        while busy:
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                process, item = busy.pop(connection)
                try:
                    line = connection.recv()
                    if pending:
                        give(connection, process)
                except (EOFError, OSError):
                    process.join()
                    code = process.exitcode or 0
                    what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    line = f"its process ended ({what}), perhaps out of memory: use fewer --jobs, or smaller batches"
                    if pending:
                        launch()
                done(item, line)
    finally:
        os.environ["PYTHONSAFEPATH"] = before  # empty is as good as unset
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(connection: Connection, start: Callable[[], Worker]) -> None:
    """Process items in the child process until the connection is closed."""
    with contextlib.suppress(EOFError, OSError, Stopped, KeyboardInterrupt):
        work = start()
        while True:
            connection.send(work(connection.recv()))
