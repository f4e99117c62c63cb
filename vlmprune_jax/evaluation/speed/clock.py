"""Readings of a program by the clock. Without jax, so that a process which needs none does not hold it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

FEWEST, SHORTEST = 3, 0.05  # runs, and seconds, of a reading, which is the fastest of them: others were disturbed
TRIES = 10


class Program(Protocol):
    """Something that computes a prompt, and new tokens after it."""

    def prefill(self) -> None:
        """Compute the prompts and their first tokens."""

    def generate(self) -> None:
        """Compute the prompts and all new tokens."""


def often(program: Program, *, fewest: int = FEWEST, agreed: Callable[[float], float] = float) -> int:
    """How many runs a reading has; `agreed` makes seconds the same in all processes that run the program."""
    return max(fewest, int(SHORTEST / agreed(_seconds(program.prefill))))


def reading(program: Program, times: int, agreed: Callable[[float], float] = float) -> tuple[float, float] | None:
    """Seconds of the prefill and of all new tokens but the first; None where no clock can tell."""
    for _ in range(TRIES):
        first, whole = (agreed(min(_seconds(run) for _ in range(times))) for run in (program.prefill, program.generate))
        if whole > first:
            return first, whole - first
    return None


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
