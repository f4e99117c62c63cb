"""When one process of a run fails all of them end, each with a line that says which one it was.

The others would wait in a collective until the coordination service misses a heartbeat, and end by SIGABRT, which a pod
takes for a preemption and starts again. The failure goes through that service's key-value store.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax

_FAILED, _HEARD = "vlmprune/failed", "vlmprune/heard"
POLL_SECONDS, LEAVE_SECONDS = 0.5, 10.0  # between two looks; for the others to hear of a failure, at most
_ending = threading.Event()


def watch() -> None:
    """From here on the failure (`end`) of any process ends this one too; every process of a run calls it, once."""
    threading.Thread(target=_watch, args=(_store(),), daemon=True).start()


def joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def end(text: str, reason: str, code: int) -> int:
    """Print why this process ends and return its exit code; one of several ends all of them with it instead.

    The others print the reason, one line.
    """
    if not joined():
        print(text, file=sys.stderr)
        return code
    if not _ending.is_set():  # else this is what comes of another's failure: a broken connection, mostly
        _ending.set()
        print(text, file=sys.stderr, flush=True)
        said = {"process": jax.process_index(), "reason": reason, "code": code}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed as well and was first
            _store().key_value_set(_FAILED, json.dumps(said))
    time.sleep(2 * LEAVE_SECONDS)  # the watching thread ends the process, unless the store is gone
    os._exit(code)


def _store() -> Any:
    """The store; jax has no public name for it, orbax (slow to import) has one."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _watch(store: Any) -> None:
    while True:
        try:
            said = store.key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # nobody failed
            time.sleep(POLL_SECONDS)
        else:
            _leave(store, json.loads(said))


def _leave(store: Any, said: dict[str, Any]) -> NoReturn:
    number = jax.process_index()
    if not _ending.is_set():
        _ending.set()
        print(f"vlmprune: error: process {said['process']} failed: {said['reason']}", file=sys.stderr, flush=True)
    if number == 0:  # which holds the store: jax aborts those who lose it
        until = time.monotonic() + LEAVE_SECONDS
        while len(store.key_value_dir_get(_HEARD)) < jax.process_count() - 1 and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 5)
    else:
        store.key_value_set(f"{_HEARD}/{number}", "")
    sys.stdout.flush()
    os._exit(said["code"])  # not sys.exit, which would wait for all processes to disconnect from jax
