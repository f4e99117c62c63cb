"""Stopping in good order when the machine is taken away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, SIGTERM sets a flag instead of ending the process; on a pod all processes agree on the step.

    Outside the main thread signals cannot be caught, and SIGTERM keeps its usual meaning.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._catch)
            self._installed = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self._flag.set()

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        if jax.process_count() > 1:  # jax.distributed hears the notice and picks a step that no process has passed
            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag.is_set()
