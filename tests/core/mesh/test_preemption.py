"""SIGTERM or SIGINT in every long phase of a command: one line, nothing half written, and it is continued."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from experiment_cases import record, write_experiment

from vlmprune_jax.base.journal import Journal
from vlmprune_jax.core.mesh.stop import StopSignal
from vlmprune_jax.io.exports import folder
from vlmprune_jax.run.cli.main import main


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, goldens):
    """Callable (workdir) -> flags."""
    root = tmp_path_factory.mktemp("stopping")
    records = [record(f"r{i}", f"img{i % 4}.png", "Is it red?", "yes") for i in range(6)]
    sections = {"data": {"eval": f"{root}/records.json"}, "score": {"samples": 6, "batch_size": 2}}
    sections |= {"prune": {"ratio": 0.2}, "evaluate": {"batch_size": 2, "max_new_tokens": 2}}
    config = write_experiment(root, goldens, records, **sections)
    return lambda workdir: [config, f"--workdir={root / workdir}"]


@pytest.fixture(scope="module")
def straight(experiment):
    """The workdir of a run that nothing disturbed, scored, pruned and evaluated."""
    flags = experiment("straight")
    for command in ("score", "prune", "evaluate"):
        assert main([command, *flags]) == 0
    return Path(flags[1].removeprefix("--workdir="))


@pytest.fixture
def interrupts():
    """SIGINT as a terminal sends it, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def added(monkeypatch, request, interrupts):
    """Numbers of the batches whose results were noted; a signal comes during the second."""
    numbers, original = [], Journal.add

    def add(self, entry):
        original(self, entry)
        numbers.append(len(numbers))
        if len(numbers) == 2:
            os.kill(os.getpid(), request.param)

    monkeypatch.setattr(Journal, "add", add)
    return numbers


ANSWERS = "eval/teacher.answers.jsonl"


def stopped(capsys, *argv: str, code: int = 143) -> str:
    """The one line of a command that a signal ended."""
    before = signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    assert main(argv) == code
    assert signal.getsignal(signal.SIGTERM) is before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("added", "said", "code", "journal", "result"),
    [
        (signal.SIGTERM, "score (block_influence) stopped on SIGTERM", 143, "scores.npz.journal", "scores.npz"),
        (signal.SIGINT, "evaluate teacher stopped on SIGINT", 130, "eval/teacher.json.journal", ANSWERS),
    ],
    indirect=["added"],
)
def test_a_pass_continues_after_its_last_batch(straight, experiment, added, capsys, said, code, journal, result):
    command, *_ = said.split()
    flags = experiment(command)
    line = stopped(capsys, command, *flags, code=code)
    assert line == f"vlmprune: {said} after 2 of 3; the same command continues"
    workdir = Path(flags[1].removeprefix("--workdir="))
    journal = workdir / journal
    assert [path.name for path in journal.parent.glob("[!.]*")] == [journal.name]
    assert main([command, *flags]) == 0
    assert len(added) == 3
    assert not journal.exists()
    assert (workdir / result).read_bytes() == (straight / result).read_bytes()


@pytest.mark.parametrize("added", [signal.SIGTERM], indirect=True)
def test_a_journal_is_not_continued_with_other_settings_nor_in_the_way(experiment, added, capsys):
    flags = experiment("other")
    stopped(capsys, "score", *flags)
    assert main(["score", *flags, "--config.score.samples=4"]) == 0
    assert len(added) == 2 + 2


def test_outside_the_main_thread_signals_stay_what_they_are():
    """Where a notebook or a server calls `recover`."""

    def entered() -> bool:
        with StopSignal() as stop:
            return signal.getsignal(signal.SIGTERM) is before and not stop.requested()

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(entered).result()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_stops_at_once_and_ignored_signals_stay_so(interrupts):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        assert str(stop.stopped("work", "after 1")) == "work stopped on SIGINT after 1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested()


def test_a_folder_that_is_being_written_goes(straight, experiment, monkeypatch, capsys):
    original, once = folder.write_files, []

    def interrupted(*args):
        original(*args)
        if not once:
            once.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(folder, "write_files", interrupted)
    flags = experiment("straight")
    before = sorted(os.listdir(straight))
    assert stopped(capsys, "export", *flags) == "vlmprune: stopped on SIGTERM; the same command continues the work"
    assert sorted(os.listdir(straight)) == before
    assert main(["export", *flags, "--config.export.dtype=float32"]) == 0
    assert sorted(os.listdir(straight)) == sorted([*before, "export"])
