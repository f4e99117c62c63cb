"""What one process of a run finds reaches all of them as JSON; errors too."""

import json
import subprocess
import sys

import msgspec
import pytest
from refusal import refused

from vlmprune_jax.base import processes
from vlmprune_jax.base.errors import SharedError, UserError


@pytest.fixture
def process(monkeypatch):
    """Callable (number, messages of the two others): this is process `number` of three."""

    def install(number, *others):
        messages = [json.dumps(other).encode() for other in others]

        def gather(message):
            return [*messages[:number], message, *messages[number:]]

        three = processes.Processes(lambda: 3, lambda: number, lambda message: gather(message)[0], gather)
        monkeypatch.setattr(processes, "_processes", three)

    return install


class _Point(msgspec.Struct):
    x: int


def _fails(error):
    def compute():
        raise error

    return compute


def test_what_process_0_finds_is_what_all_find(process):
    assert processes.on_process_zero(lambda: {"a": [1, None]}) == {"a": [1, None]}
    refused("wrong", processes.on_process_zero, _fails(UserError("wrong")))
    process(0, {}, {})
    assert processes.on_process_zero(lambda: _Point(3), _Point) == _Point(3)
    process(2, {"value": {"x": 4}}, {})
    assert processes.on_process_zero(_fails(AssertionError("only process 0 computes")), _Point) == _Point(4)


def test_values_of_all_come_by_process_number(process):
    assert processes.from_all(lambda: 1) == [1]
    process(1, {"value": 10}, {"value": [12]})
    assert processes.from_all(lambda: 11) == [10, 11, [12]]


def test_an_error_of_one_process_is_raised_on_all(process):
    process(1, {"error": "no disk"}, {})
    for together in (processes.on_process_zero, processes.from_all):
        with pytest.raises(SharedError, match=r"^no disk$"):
            together(lambda: 1)
    process(1, {"value": 1}, {"value": 2})
    with pytest.raises(SharedError, match=r"^mine$"):
        processes.from_all(_fails(UserError("mine")))
    with pytest.raises(ZeroDivisionError):  # the others read that this process failed
        processes.from_all(lambda: 1 / 0)


def test_caches_and_journals_do_without_jax():
    code = (
        "import sys, vlmprune_jax.base.cache, vlmprune_jax.base.journal, vlmprune_jax.base.processes as run;"
        "assert run.from_all(lambda: 1) == [1] and run.is_main_process();"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:] or "jax was imported"
