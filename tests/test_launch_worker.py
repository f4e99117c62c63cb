"""launch/worker.sh, which starts vlmprune on a machine of a slice: it outlives its connection and stops in order."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from repository import HANG

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture
def worker(tmp_path):
    """Callable (*arguments) that starts worker.sh in a copy whose vlmprune waits for a file and exits with its text."""
    home = tmp_path / "vlmprune-jax"
    (home / ".venv/bin").mkdir(parents=True)
    (home / "launch").mkdir()
    for name in ("worker.sh", "lib.sh"):
        (home / "launch" / name).write_text((LAUNCH / name).read_text())
    program = home / ".venv/bin/vlmprune"
    program.write_text(
        '#!/usr/bin/env bash\ntrap "echo saved; exit 143" TERM\necho "started: $*"\n'
        'until [[ -f go ]]; do sleep 0.05; done\nexit "$(cat go)"\n'
    )
    program.chmod(0o755)

    def start(*arguments, output=subprocess.PIPE):
        command = ["bash", home / "launch/worker.sh", *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)

    return start, home


def wait_for(path: Path, text: str) -> None:
    for _ in range(20 * HANG):
        if path.exists() and text in path.read_text():
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"{path} never said {text}")


def test_a_worker_outlives_its_connection_and_is_not_started_twice(worker):
    start, home = worker
    first = start("run", "recover", "--a=two words", output=subprocess.DEVNULL)
    wait_for(home / "run.log", "started")
    first.kill()
    first.wait()
    second = start("run", "recover", "--a=two words")
    other = start("run", "score")
    assert "'recover --a=two words' is running here: stop it first" in other.communicate(timeout=HANG)[0]
    assert other.returncode == 2
    (home / "go").write_text("7")
    assert second.communicate(timeout=HANG)[0] == "started: recover --a=two words\n"
    assert second.returncode == 7


def test_a_stopped_worker_saves_and_starts_again(worker):
    start, home = worker
    running = start("run", "recover")
    wait_for(home / "run.log", "started")
    assert start("stop").communicate(timeout=HANG)[0] == ""
    assert running.communicate(timeout=HANG)[0].endswith("saved\n")
    assert running.returncode == 143
    (home / "go").write_text("0")
    again = start("run", "recover")
    again.communicate(timeout=HANG)
    assert again.returncode == 0
    assert (home / "run.log").read_text().count("started: recover") == 2
