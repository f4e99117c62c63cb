"""Early end of a run: failure of one of its processes, preemption of the machine, or Ctrl-C.

If a process fails, all processes end, each with a line that names the one that failed. Otherwise the others would wait
in a collective until the coordination service misses a heartbeat and end by SIGABRT, which a pod takes for a preemption
and restarts. Failures are published in that service's key-value store. jax is imported inside functions, since a
command's help must not import it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from vlmprune_jax.base.errors import Stopped
from vlmprune_jax.base.processes import process_count

_FAILED, _HEARD, _LEFT = "vlmprune/failed", "vlmprune/heard", "vlmprune/left"
POLL_SECONDS, LEAVE_SECONDS = 0.5, 10.0  # polling interval; maximum time for all processes to hear of a failure
_ending, _done = threading.Event(), threading.Event()  # set when this process ends after a failure; and normally
_position: tuple[int, int] | None = None  # this process's number, number of processes
_calls = itertools.count(1)  # calls of `noticed` over all phases, by which processes agree where to stop


def watch(number: int, count: int) -> None:
    """End this process if another of the run's `count` processes fails; every process must call this once."""
    global _position
    _position = number, count
    thread = threading.Thread(target=_watch, args=(_store(), number, count), daemon=True)
    thread.start()

    def leave() -> None:
        from jax.errors import JaxRuntimeError

        _done.set()
        thread.join()  # no thread may use the store when jax disconnects
        # jax would stop process 0's service as soon as all have disconnected, while it still answers the others; gRPC
        # aborted a finished process then ("Check failed: queue.Pop() == nullptr").
        with contextlib.suppress(JaxRuntimeError):  # jax disconnects again, and may fail
            _store().shutdown()
        if number == 0:
            time.sleep(POLL_SECONDS)

    atexit.register(leave)


def joined() -> bool:
    """Return True if this process belongs to a run of several processes."""
    return _position is not None


def end(text: str, reason: str, code: int) -> int:
    """Print why this process ends and return its exit code; also end the run's other processes.

    The other processes print `reason`, one line.
    """
    if _position is None:
        print(text, file=sys.stderr)
        return code
    from jax.errors import JaxRuntimeError

    if not _ending.is_set():  # otherwise this error follows from another process's failure
        _ending.set()
        print(text, file=sys.stderr, flush=True)
        failure = {"process": _position[0], "reason": reason, "code": code}
        with contextlib.suppress(JaxRuntimeError):  # another process published its failure first
            _store().key_value_set(_FAILED, json.dumps(failure))
    time.sleep(3 * LEAVE_SECONDS)  # the watching thread ends the process earlier, unless the store is gone
    os._exit(code)


def _store() -> Any:
    """Return jax's distributed key-value store, by which processes announce a failure."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _watch(store: Any, number: int, count: int) -> None:
    from jax.errors import JaxRuntimeError

    failure: dict[str, Any] = {}
    while not failure:
        if _done.wait(POLL_SECONDS):
            return
        with contextlib.suppress(JaxRuntimeError):  # no failure yet
            failure = json.loads(store.key_value_try_get(_FAILED))
    if not _ending.is_set():
        _ending.set()
        line = f"vlmprune: error: process {failure['process']} failed: {failure['reason']}"
        print(line, file=sys.__stderr__, flush=True)  # `sys.stderr` is redirected while a command runs
    with contextlib.suppress(JaxRuntimeError):  # process 0 has ended, and with it the store
        _leave_together(store, number, count)
    sys.stdout.flush()
    os._exit(failure["code"])  # sys.exit would wait for all processes to disconnect from jax


def _leave_together(store: Any, number: int, count: int) -> None:
    """Wait until all processes have read the failure message; process 0, which hosts the key-value store, ends last.

    Otherwise the others would see a broken connection, and jax aborts processes that lose the store.
    """

    def meet(key: str, expected: int) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        while len(store.key_value_dir_get(key)) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)

    store.key_value_set(f"{_HEARD}/{number}", "")
    meet(_HEARD, count)
    if number:
        store.key_value_set(f"{_LEFT}/{number}", "")
    else:
        meet(_LEFT, count - 1)
        time.sleep(POLL_SECONDS)  # the others still have to receive the confirmation


def noticed() -> bool:
    """Return True if any process of the run received SIGTERM (collective).

    Once processes have joined, `jax.distributed` catches the signal, so that it does not kill them.
    """
    from jax.experimental import multihost_utils

    return process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_calls))


class StopSignal:
    """Context in which SIGTERM sets a flag instead of ending the process; all processes of a pod stop at the same step.

    In a single process, SIGINT does the same, and a second SIGINT interrupts at once. Signals that are ignored remain
    ignored. Outside the main thread, signals cannot be caught, and they end the process as usual.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: dict[int, Any] = {}
        self.signal = "SIGTERM"

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread() and process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            if self._flag.is_set():
                raise KeyboardInterrupt
            os.write(1, b"\n  stopping after this step; press Ctrl-C again to stop at once\n")  # print() may be busy
        self.signal = signal.Signals(signum).name
        self._flag.set()

    def requested(self) -> bool:
        """Return True if the run should save and stop now (collective)."""
        return self._flag.is_set() or noticed()

    def stopped(self, what: str, then: str) -> Stopped:
        """Return the exception that ends the command; `what`: what the signal stopped, `then`: what is saved."""
        return Stopped(f"{what} stopped on {self.signal} {then}", self.signal)
