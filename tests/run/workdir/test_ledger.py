"""Stages that are skipped, refused, resumed and written whole, by what their ledger says."""

import fcntl
import json
import os

import msgspec
import pytest
from fuzz_cases import mutants
from refusal import refused

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.workdir import ledger
from vlmprune_jax.run.workdir.ledger import Task, run_task


class Facts(msgspec.Struct):
    number: int


class Other(msgspec.Struct):
    number: str


class Work:
    """A stage that writes one file, and what happened."""

    def __init__(self, folder):
        self.folder, self.runs, self.said = folder, 0, []
        (folder / "in.txt").write_text("input")

    def __call__(self, overwrite=False, **parts):
        return run_task(self.task(**parts), overwrite=overwrite, say=self.said.append)

    def task(self, scratch=(), journals=(), version=1, inputs=None, facts=Facts, **settings):
        return Task(
            name="depth/prune",
            function=self.body,
            version=version,
            workdir=self.folder,
            settings={"ratio": 0.3, **settings},
            inputs={"data.train": self.folder / "in.txt", **(inputs or {})},
            outputs=[self.folder / "out.txt"],
            scratch=scratch,
            journals=journals,
            facts=facts,
        )

    def body(self):
        self.runs += 1
        ledger.write_text(self.folder / "out.txt", f"run {self.runs}")
        return Facts(self.runs)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_a_stage_runs_if_its_output_is_missing(work):
    first = work()
    assert first.facts.number == 1
    assert work() == first
    assert work.runs == 1
    compared = "out.txt is up to date; files of images and videos are not compared"
    assert work.said == ["depth/prune ...", f"depth/prune: unchanged, skipped ({compared})"]
    (work.folder / "out.txt").unlink()
    assert work().facts.number == 2
    assert (work.folder / "out.txt").read_text() == "run 2"
    (work.folder / "in.txt").unlink()
    refused(r"depth/prune: data.train is .*in.txt: no such file or folder", work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda work: {"ratio": 0.4}, "was made from other inputs (ratio was 0.3, now 0.4)"),
        (lambda work: {"version": 2}, "was made from other inputs (version was 1, now 2)"),
        (lambda work: (work.folder / "in.txt").write_text("other") and {}, "other inputs (data.train changed)"),
        (lambda work: {"inputs": {"data.eval": work.folder / "in.txt"}}, "other inputs (data.eval changed)"),
        (lambda work: (work.folder / "out.txt").write_text("mine") and {}, "was changed since this stage made it"),
    ],
)
def test_other_inputs_are_refused_unless_overwritten(work, change, message):
    work()
    settings = change(work)
    with pytest.raises(UserError) as error:
        work(**settings)
    assert message in str(error.value)
    assert "add --overwrite to replace it, or use another --workdir" in str(error.value)
    assert work.runs == 1
    assert work(overwrite=True, **settings).facts.number == 2
    assert work(**settings).facts.number == 2


def test_only_one_setting_differs(work):
    """So a stage may replace its own output where that setting is no reason to ask; by hand changed ones it may not."""
    work()
    changed = work.task(card=[("a", 1)])
    assert ledger.differs_only_in(changed, "card")
    assert not ledger.differs_only_in(changed, "ratio")
    assert not ledger.differs_only_in(work.task(card=[("a", 1)], ratio=0.4), "card")
    assert not ledger.differs_only_in(work.task(card=[("a", 1)], version=2), "card")
    (work.folder / "out.txt").write_text("by hand")
    assert not ledger.differs_only_in(changed, "card")


def test_two_runs_of_a_stage_at_once(work, monkeypatch):
    """The second is refused and changes nothing, whatever its settings; nothing is left in the way afterwards."""
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.01)
    body, errors = work.body, []

    def both():
        work.body = body
        for settings in ({}, {"ratio": 0.4}):
            with pytest.raises(
                UserError, match=r"depth/prune: another run is computing this stage in .*: wait"
            ) as error:
                work(overwrite=True, **settings)
            errors.append(error)
        return body()

    work.body = both
    assert work().facts.number == 1
    assert len(errors) == 2
    assert work().facts.number == 1


def test_a_run_waits_for_the_end_of_the_one_it_replaces(work, monkeypatch):
    lock, waited = work.folder / ".stages/depth.prune.lock", []
    lock.parent.mkdir()
    held = lock.open("a")
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(ledger.time, "sleep", lambda seconds: waited.append(seconds) or held.close())
    assert work().facts.number == 1
    assert waited == [1.0]
    assert "waiting up to 100 s for another run to finish it" in work.said[0]


def test_a_damaged_record_is_no_reason_to_trust_an_output(work):
    """Whatever a record says: the facts are those of the run, or the output is refused and stays."""
    assert work(facts=Facts).facts.number == 1
    record = work.folder / ".stages/depth.prune.json"
    good, taken, lines = json.loads(record.read_text()), 0, []
    for where, value in mutants(good):
        record.write_text(json.dumps(value))
        try:
            assert type(work(facts=Facts).facts.number) is int, where
            taken += 1
        except UserError as error:
            lines.append(str(error))
        assert (work.runs, (work.folder / "out.txt").read_text()) == (1, "run 1"), where
    assert all("add --overwrite to replace it" in line for line in lines)
    assert min(taken, len(lines)) > 2
    record.write_text("{")
    refused(r"out.txt exists, but its record .*depth.prune.json is damaged, or of another", work)
    record.unlink()
    refused(r"out.txt exists and was not made by this stage: add --overwrite", work)
    os.mkfifo(record)
    refused("is damaged", work)
    assert work(overwrite=True).facts.number == 2
    refused(r"its record .* is damaged", work, facts=Other)  # facts of another type


def test_nothing_is_written_through_links(work, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    for name in ("out.txt", ".out.txt.partial", ".stages/depth.prune.json", ".stages/.depth.prune.json.partial"):
        (work.folder / name).parent.mkdir(exist_ok=True)
        (work.folder / name).symlink_to(outside / "there")
    assert work().facts.number == 1
    assert list(outside.iterdir()) == []
    (work.folder / ".stages/depth.prune.lock").unlink()
    (work.folder / ".stages/depth.prune.lock").symlink_to(outside / "there")
    with pytest.raises(OSError, match=r"depth.prune.lock"):
        work()
    (work.folder / ".stages/depth.prune.lock").unlink()
    os.mkfifo(work.folder / ".stages/depth.prune.lock")  # is not waited for
    assert work().facts.number == 1


def test_a_failure_after_the_output_was_written_leaves_the_record(work):
    """As a broken pipe of a print, a plot that fails: the same command runs the stage again and is not refused."""
    body = work.body

    def fail():
        body()
        raise BrokenPipeError

    for _ in range(2):
        work.body = fail
        with pytest.raises(BrokenPipeError):
            work()
        assert json.loads((work.folder / ".stages/depth.prune.json").read_text())["done"] is False
    work.body = body
    refused(r"out.txt was made from other inputs \(ratio was 0.3, now 0.4\): add --overw", work, ratio=0.4)
    assert work().facts.number == 3
    assert work().facts.number == 3
    assert "unchanged, skipped" in work.said[-1]


def test_scratch_is_kept_for_the_same_inputs_only(work):
    scratch = work.folder / "checkpoints"
    (scratch / "1").mkdir(parents=True)
    refused("checkpoints exists and was not made by this stage", work, scratch=[scratch])
    (scratch / "1").rmdir()  # an empty folder is nothing to lose

    def stopped():
        (scratch / "1").mkdir(parents=True)
        raise KeyboardInterrupt

    body, work.body = work.body, stopped
    with pytest.raises(KeyboardInterrupt):
        work(scratch=[scratch])
    work.body = body
    refused(r"checkpoints was made from other inputs \(ratio was 0.3, now 0.4\)", work, scratch=[scratch], ratio=0.4)
    seen = []
    work.body = lambda: seen.append(scratch.exists()) or body()
    work(scratch=[scratch])
    assert seen == [True]
    assert not scratch.exists()  # the result is there: its checkpoints are no longer needed
    (scratch / "1").mkdir(parents=True)  # as if killed before they were removed
    work(scratch=[scratch])
    assert (seen, scratch.exists()) == ([True], False)


def test_an_interrupted_stage_starts_again_with_its_journal_if_the_inputs_are_the_same(work):
    """Nothing is left that other settings could clash with."""
    journal, seen, body = work.folder / "out.journal", [], work.body

    def stopped():
        seen.append(journal.exists())
        journal.write_text("half")
        raise KeyboardInterrupt

    work.body = stopped
    for ratio in (0.3, 0.3, 0.4):
        with pytest.raises(KeyboardInterrupt):
            work(journals=[journal], ratio=ratio)
    assert sorted(path.name for path in work.folder.iterdir()) == [".stages", "in.txt", "out.journal"]
    work.body = lambda: seen.append(journal.exists()) or body()
    work(journals=[journal], ratio=0.4)
    assert seen == [False, True, False, True]
    assert not journal.exists()


def test_writing_is_all_or_nothing(work, monkeypatch):
    path, name = work.folder / "a/x.json", os.fsdecode(b"\xff.txt")
    (work.folder / name).write_text("names that are no text are written, and hashed")
    assert work(inputs={"folder": work.folder / name}).facts.number == 1
    ledger.write_text(path, json.dumps({"file": name}, ensure_ascii=False))
    assert json.loads(path.read_text()) == {"file": name}

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        ledger.write_text(path, "[3]")
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"file": name}
