"""A process that fails ends the others of its run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from repository import HANG

from vlmprune_jax.core.mesh import stop

PROCESS = """
import sys
import jax, numpy
from jax.experimental import multihost_utils
from vlmprune_jax.core.mesh import mesh, stop

jax.config.update("jax_platforms", "cpu")
address, number, failing = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
stop.POLL_SECONDS = 1e-4 if failing == ["none"] else 0.01 if str(number) in failing else 1.0  # hear of it late
mesh.initialize(address, 3, number)
multihost_utils.process_allgather(numpy.zeros(1))  # connects all with all
print("so far")
if str(number) in failing:
    sys.exit(stop.end(f"first line\\nvlmprune: error: record r{number}", f"record r{number}", 2))
try:
    multihost_utils.process_allgather(numpy.zeros(1))  # which the failing ones never join
except Exception as error:
    sys.exit(stop.end(f"vlmprune: error: {error}", "a broken connection", 134))
"""


BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is printed stays in the process until it is flushed
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": BUFFERED}


def run(failing: str) -> list[tuple[int, list[str]]]:
    """(exit code, own lines on standard error) of each of three processes; what they had printed is there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(n), failing], text=True, **PIPES)
        for n in range(3)
    ]
    said = [process.communicate(timeout=HANG) for process in processes]
    assert all("so far" in out.splitlines() for out, _ in said)
    told = [lines.splitlines() for _, lines in said]
    ours = [[line for line in lines if "vlmprune" in line or line == "first line"] for lines in told]
    return [(process.returncode, lines) for process, lines in zip(processes, ours, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_ends_all_and_names_it(failing):
    for number, end in enumerate(run(str(failing))):
        own = ["first line", f"vlmprune: error: record r{failing}"]
        assert end == (
            2,
            own if number == failing else [f"vlmprune: error: process {failing} failed: record r{failing}"],
        )


@pytest.mark.slow
def test_all_may_fail_at_once():
    """Each tells of one failure, and nobody waits for the others in vain."""
    for number, (code, lines) in enumerate(run("0,1,2")):
        assert (code, sum("vlmprune: error: " in line for line in lines)) == (2, 1), (number, lines)


@pytest.mark.slow
def test_those_who_end_well_end_nobody():
    assert run("none") == [(0, [])] * 3


def test_alone_the_line_is_printed_and_the_code_returned(capsys):
    assert not stop.joined()
    assert stop.end("vlmprune: error: wrong", "wrong", 2) == 2
    assert capsys.readouterr().err == "vlmprune: error: wrong\n"
