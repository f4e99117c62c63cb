"""A process that fails ends the others of its run (over real connections; no jax, whose collectives would wait)."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from vlmprune_jax.distributed import failure

PROCESS = """
import json, os, sys, time
from pathlib import Path
from vlmprune_jax.distributed import failure

number, work, failing = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")

def from_main(compute):  # what process 0 finds goes through a file here
    said = work / "said.json"
    if number == 0:
        (work / "partial").write_text(json.dumps(compute()))
        os.rename(work / "partial", said)
    while not said.exists():
        time.sleep(0.01)
    return json.loads(said.read_text())

failure.join(number, 3, "127.0.0.1", from_main)
if str(number) in failing:
    sys.exit(failure.end(f"first line\\nvlmprune: error: record r{number}", f"record r{number}", 2))
if failing != ["none"]:
    time.sleep(60)  # a collective that the failing ones never join
elif number != 1:
    time.sleep(failure.GRACE_SECONDS + 0.5)
"""


@pytest.fixture
def run(tmp_path):
    """Callable (numbers that fail) -> [(exit code, standard error)] of three processes."""

    def start(failing: str) -> list[tuple[int, str]]:
        command = [sys.executable, "-c", PROCESS]
        processes = [
            subprocess.Popen([*command, str(n), str(tmp_path), failing], stderr=subprocess.PIPE, text=True)
            for n in range(3)
        ]
        told = [process.communicate(timeout=30)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]

    return start


@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_ends_all_and_names_it(run, failing):
    for number, (code, text) in enumerate(run(str(failing))):
        own = f"first line\nvlmprune: error: record r{failing}\n"
        assert (code, text) == (
            2,
            own if number == failing else f"vlmprune: error: process {failing} failed: record r{failing}\n",
        )


def test_all_may_fail_at_once(run):
    """Nobody waits for the others to go: that would take ten seconds."""
    start = time.monotonic()
    ends = run("0,1,2")
    assert time.monotonic() - start < failure.LEAVE_SECONDS
    for number, (code, text) in enumerate(ends):
        assert code == 2
        assert text.count("vlmprune: error: ") == 1, (number, text)


def test_who_ends_well_ends_nobody(run):
    assert run("none") == [(0, "")] * 3


def test_alone_the_line_is_printed_and_the_code_returned(capsys):
    assert not failure.joined()
    assert failure.end("vlmprune: error: wrong", "wrong", 2) == 2
    assert capsys.readouterr().err == "vlmprune: error: wrong\n"
