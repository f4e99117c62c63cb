"""Worker processes for several runs at once on one machine; a killed worker costs only its current run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from vlmprune_jax.base.errors import Stopped

_ENVIRONMENT = threading.Lock()  # protects this process's environment variables, which workers inherit

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
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    workers = [_Worker(start) for _ in range(min(jobs, len(items)))]
    lock, stopping = threading.Lock(), threading.Event()

    def drive(worker: _Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while not stopping.is_set():
                item = waiting.get_nowait()
                line = worker.do(item)
                with lock:
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
    """Child process that starts with its first item, and restarts after it was killed."""

    def __init__(self, start: Callable[[], Worker]):
        self._start = start
        self._context: SpawnContext = multiprocessing.get_context("spawn")  # a fork would lose the threads of jax
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._starting, self._ended = threading.Lock(), False

    def do(self, item: Any) -> str | None:
        """Process one item in the child process; return its error as one line, or None."""
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
            return f"its process ended ({what}), perhaps out of memory: use fewer --jobs, or smaller batches"

    def _running(self) -> tuple[SpawnProcess | None, Connection | None]:
        with self._starting:
            if self._process is None and not self._ended:
                self._connection, theirs = self._context.Pipe()
                self._process = self._context.Process(target=_serve, args=(theirs, self._start))
                with _safe_path():
                    self._process.start()
                theirs.close()
            return self._process, self._connection

    def end(self) -> None:
        """End the child process and wait for it."""
        with self._starting:
            self._ended, process = True, self._process
        if process is not None:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Context in which child processes cannot import modules from the current folder."""
    with _ENVIRONMENT:
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            del os.environ["PYTHONSAFEPATH"]
            if before is not None:
                os.environ["PYTHONSAFEPATH"] = before


def _serve(connection: Connection, start: Callable[[], Worker]) -> None:
    """Process items in the child process until the connection is closed."""
    with contextlib.suppress(EOFError, OSError, Stopped):
        try:
            work = start()
            while True:
                connection.send(work(connection.recv()))
        except KeyboardInterrupt:
            sys.exit(130)
