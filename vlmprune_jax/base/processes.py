"""The processes of a run: their number, and exchange of JSON values between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from vlmprune_jax.base.errors import SharedError, UserError


@dataclass(frozen=True)
class Processes:
    """Connection of a run's processes; by default, a single process."""

    count: Callable[[], int] = lambda: 1
    number: Callable[[], int] = lambda: 0  # this process's, from 0
    broadcast: Callable[[bytes], bytes] = lambda message: message  # collective: process 0's message
    gather: Callable[[bytes], list[bytes]] = lambda message: [message]  # collective: all messages, by process number


_processes = Processes()


def install(processes: Processes) -> None:
    """Replace the single process, which is the default."""
    global _processes
    _processes = processes


def process_count() -> int:
    """Return the number of processes in the run, without initialising the accelerator in a single process."""
    return _processes.count()


def process_number() -> int:
    """Return this process's number in the run; 0 in a single process (also under Pathways)."""
    return _processes.number()


def is_main_process() -> bool:
    """Return True in process 0, which writes exports, logs and progress; the accelerator is not initialised."""
    return process_number() == 0


def on_process_zero(compute: Callable[[], Any], kind: Any = Any) -> Any:
    """Run `compute()` on process 0 and return its JSON value on every process (collective).

    Workdir files are read and written by process 0 alone, since other processes could see them before a change.

    Args:
      compute: returns a JSON value, or an instance of `kind`.
      kind: a type that msgspec converts from JSON, such as a Struct.

    Raises:
      SharedError: on every process, if `compute` raised a UserError.
    """
    if process_count() == 1:
        return compute()
    result, failure = _attempt(compute) if is_main_process() else (b"", None)
    message = _processes.broadcast(result)
    if failure is not None:
        raise failure
    return msgspec.convert(_value(message), kind)


def from_all(compute: Callable[[], Any]) -> list[Any]:
    """Run `compute()` on every process and return the JSON values of all processes (collective).

    Raises SharedError on every process if `compute` raised a UserError on any process.
    """
    if process_count() == 1:
        return [compute()]
    result, failure = _attempt(compute)
    messages = _processes.gather(result)
    if failure is not None:
        raise failure
    return [_value(message) for message in messages]


def _attempt(compute: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """Call `compute()`; return its value or error as JSON, and the exception to raise once all processes have that."""
    failure: BaseException | None = None
    try:
        result = {"value": compute()}
    except UserError as error:
        result = {"error": str(error)}
    except BaseException as error:  # otherwise the others would wait for ever
        result, failure = {"error": f"process {process_number()} failed ({type(error).__name__}: {error})"}, error
    return json.dumps(result, default=msgspec.to_builtins).encode(), failure


def _value(message: bytes) -> Any:
    result = json.loads(message)
    if "error" in result:
        raise SharedError(result["error"])
    return result["value"]
