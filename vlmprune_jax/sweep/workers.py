"""Several runs at once on one machine: processes that take one run after the other, and may die alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from vlmprune_jax.core.errors import Stopped

Work = Callable[[Any], str | None]  # an item -> a line about what stopped it


def in_processes(
    items: Sequence[Any], jobs: int, start: Callable[[], Work], done: Callable[[Any, str | None], None]
) -> None:
    """Do every item in one of `jobs` new processes; one that is killed costs the item that it was at.

    An interruption ends the processes with SIGTERM, on which training saves its step.

    Args:
      items: what can be sent to another process.
      jobs: number of processes.
      start: called once in each new process: gives the function that does an item there. It must be importable.
      done: called with an item and what stopped it, here, one item at a time.
    """
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    workers = [_Worker(start) for _ in range(min(jobs, len(items)))]
    told, stopping = threading.Lock(), threading.Event()

    def drive(worker: _Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while not stopping.is_set():
                item = waiting.get_nowait()
                line = worker.do(item)
                with told:
                    if not stopping.is_set():
                        done(item, line)

    threads = ThreadPoolExecutor(max(len(workers), 1))
    try:
        for finished in as_completed([threads.submit(drive, worker) for worker in workers]):
            finished.result()
    finally:
        stopping.set()
        for worker in workers:
            worker.end()
        threads.shutdown()


class _Worker:
    """A process, started when there is something to do, and again where it was killed."""

    def __init__(self, start: Callable[[], Work]):
        self._start = start
        self._context: SpawnContext = multiprocessing.get_context("spawn")  # jax has threads, which a fork would lose
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._starting, self._ended = threading.Lock(), False

    def do(self, item: Any) -> str | None:
        """What the process says of an item, or how it ended over it."""
        process, connection = self._running()
        if process is None or connection is None:
            return None
        try:
            connection.send(item)
            return connection.recv()
        except (EOFError, OSError):
            process.join()
            code, self._process = process.exitcode or 0, None
            what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"its process ended ({what}), perhaps for lack of memory: use fewer --jobs, or smaller batches"

    def _running(self) -> tuple[SpawnProcess | None, Connection | None]:
        with self._starting:
            if self._process is None and not self._ended:
                self._connection, theirs = self._context.Pipe()
                self._process = self._context.Process(target=_serve, args=(theirs, self._start))
                self._process.start()
                theirs.close()
            return self._process, self._connection

    def end(self) -> None:
        """Ask the process to end, and wait until it has."""
        with self._starting:
            self._ended, process = True, self._process
        if process is not None:
            process.terminate()
            process.join()


def _serve(connection: Connection, start: Callable[[], Work]) -> None:
    """The life of a process: do what comes, answer, until nobody asks any more."""
    with contextlib.suppress(EOFError, OSError, Stopped):
        try:
            work = start()
            while True:
                connection.send(work(connection.recv()))
        except KeyboardInterrupt:
            sys.exit(130)
