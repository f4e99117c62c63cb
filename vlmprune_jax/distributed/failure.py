"""When one process of a run fails all of them end, each with a line that says which one it was.

The others would wait in a collective until the coordination service misses a heartbeat, and end by SIGABRT, which a pod
takes for a preemption and starts again. The failure goes through that service's key-value store. (No jax at the top: a
command's help does without it.)
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

_FAILED, _HEARD, _LEFT = "vlmprune/failed", "vlmprune/heard", "vlmprune/left"
POLL_SECONDS, LEAVE_SECONDS = 0.5, 10.0  # between two looks; for all to hear of a failure, at most
_ending, _done = threading.Event(), threading.Event()  # this process ends: on a failure; in good order
_place: tuple[int, int] | None = None  # own number, and how many processes there are


def watch(number: int, count: int) -> None:
    """From here on the failure (`end`) of any of `count` processes ends this one too; all of them call it, once."""
    global _place
    _place = number, count
    thread = threading.Thread(target=_watch, args=(_store(), number, count), daemon=True)
    thread.start()

    def leave() -> None:
        from jax.errors import JaxRuntimeError

        _done.set()
        thread.join()  # nobody may be in the store when jax disconnects
        # jax would end process 0's service in the moment in which all have disconnected, while it still answers the
        # others: gRPC aborted such a process once ("Check failed: queue.Pop() == nullptr"), after all was done.
        with contextlib.suppress(JaxRuntimeError):  # jax disconnects again, and tells
            _store().shutdown()
        if number == 0:
            time.sleep(POLL_SECONDS)

    atexit.register(leave)


def joined() -> bool:
    """Whether this process is one of several."""
    return _place is not None


def end(text: str, reason: str, code: int) -> int:
    """Print why this process ends and return its exit code; one of several ends all of them with it instead.

    The others print the reason, one line.
    """
    if _place is None:
        print(text, file=sys.stderr)
        return code
    from jax.errors import JaxRuntimeError

    if not _ending.is_set():  # else this is what comes of another's failure: a broken connection, mostly
        _ending.set()
        print(text, file=sys.stderr, flush=True)
        said = {"process": _place[0], "reason": reason, "code": code}
        with contextlib.suppress(JaxRuntimeError):  # another one failed as well and was first
            _store().key_value_set(_FAILED, json.dumps(said))
    time.sleep(3 * LEAVE_SECONDS)  # the watching thread ends the process, unless the store is gone
    os._exit(code)


def _store() -> Any:
    """The store; jax has no public name for it, orbax (slow to import) has one."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _watch(store: Any, number: int, count: int) -> None:
    from jax.errors import JaxRuntimeError

    said: dict[str, Any] = {}
    while not said:
        if _done.wait(POLL_SECONDS):
            return
        with contextlib.suppress(JaxRuntimeError):  # nobody failed
            said = json.loads(store.key_value_try_get(_FAILED))
    if not _ending.is_set():
        _ending.set()
        line = f"vlmprune: error: process {said['process']} failed: {said['reason']}"
        print(
            line, file=sys.__stderr__, flush=True
        )  # what libraries say is kept from `sys.stderr` while a command runs
    with contextlib.suppress(JaxRuntimeError):  # process 0 has gone, and with it the store
        _part(store, number, count)
    sys.stdout.flush()
    os._exit(said["code"])  # not sys.exit, which would wait for all processes to disconnect from jax


def _part(store: Any, number: int, count: int) -> None:
    """Wait until all know of the failure, who would take a broken connection for one otherwise; process 0 goes last,
    for jax aborts those who lose the store.
    """

    def meet(what: str, expected: int) -> None:
        until = time.monotonic() + LEAVE_SECONDS
        while len(store.key_value_dir_get(what)) < expected and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 5)

    store.key_value_set(f"{_HEARD}/{number}", "")
    meet(_HEARD, count)
    if number:
        store.key_value_set(f"{_LEFT}/{number}", "")
    else:
        meet(_LEFT, count - 1)
        time.sleep(POLL_SECONDS)  # they still have to hear that this was written
