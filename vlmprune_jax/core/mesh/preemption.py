"""Orderly stop of a run when the machine is preempted, or the user presses Ctrl-C."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from vlmprune_jax.base.errors import Stopped
from vlmprune_jax.base.processes import process_count

_calls = itertools.count(1)  # calls of `noticed` over all phases, by which processes agree where to stop


def noticed() -> bool:
    """Return True if any process of the run received SIGTERM (collective).

    Once processes have joined, `jax.distributed` catches the signal, so that it does not kill them.
    """
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
