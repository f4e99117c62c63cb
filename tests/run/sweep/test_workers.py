"""Worker processes: killed, interrupted, and started in a folder with modules of Python's names."""

import os
import signal

import pytest
from refusal import refused
from worker_cases import start_counting

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.sweep.workers import in_processes


def test_a_process_that_is_killed_costs_its_item_alone():
    told = {}
    items = [1, 2, "die", 3, "fail", 4, 5]
    in_processes(items, 2, start_counting, lambda item, line: told.setdefault(item, line))
    assert set(told) == set(items)
    assert told["die"].startswith("its process ended (SIGKILL), perhaps out of memory")
    assert told["fail"] == "it failed"
    pids = {told[item].split()[0] for item in (1, 2, 3, 4, 5)}
    assert len(pids) in (2, 3)  # and not a process for every item


def test_workers_import_nothing_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("multiprocessing", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()\n")
    told = []
    in_processes([1], 1, start_counting, lambda item, line: told.append(line))
    assert told[0].endswith("1"), told
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which it leaves out where SIGINT is ignored: in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_all_processes():
    told = []

    def stop(item, line):
        told.append(line)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        in_processes(["sleep"] * 50, 2, start_counting, stop)
    pids = {int(line.split()[0]) for line in told}
    assert pids
    assert len(told) < 10
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_goes_wrong_between_items_is_raised():
    def fail(item, line):
        raise UserError("the disk is full")

    refused("the disk is full", in_processes, list(range(50)), 2, start_counting, fail)
