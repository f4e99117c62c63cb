"""Bound on the memory of the images and videos that all threads of a process decode at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class MemoryBudget:
    """Bytes that several threads share; a thread waits until enough of them are free, and no later one overtakes it.

    A request above the whole budget waits until nothing else is in use, and then proceeds alone. A thread that holds
    bytes must not request more, which could wait forever.
    """

    def __init__(self, total: int) -> None:
        self._total, self._used = total, 0
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Context that holds `size` bytes of the budget."""
        with self._turn, self._changed:  # one thread waits for bytes, all others for their turn
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._total)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


DECODING = MemoryBudget(2**31)  # one image or clip at the default limits, or many usual ones
