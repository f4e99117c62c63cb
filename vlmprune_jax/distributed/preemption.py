"""Orderly stop of a run when the machine is preempted."""

from __future__ import annotations

import itertools
import signal
import threading
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from vlmprune_jax.distributed.mesh import process_count

_calls = itertools.count(1)  # calls of `noticed` over all phases, by which processes agree where to stop


def noticed() -> bool:
    """Return True if any process of the run received SIGTERM (collective).

    Once processes have joined, `jax.distributed` catches the signal, so that it does not kill them.
    """
    return process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_calls))


class StopSignal:
    """Context in which SIGTERM sets a flag instead of ending the process; all processes of a pod stop at the same step.

    Outside the main thread signals cannot be caught, and SIGTERM ends the process as usual.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread() and process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._catch)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self._flag.set()

    def requested(self) -> bool:
        """Return True if the run should save and stop now (collective)."""
        return self._flag.is_set() or noticed()
