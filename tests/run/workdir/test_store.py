"""Stages that runs of a sweep take from each other: by whole content, whole or not at all, one at a time."""

import json
import os
import shutil
import threading
import time

import msgspec
import pytest
from refusal import refused
from repository import HANG

from vlmprune_jax.run.workdir import store as stores
from vlmprune_jax.run.workdir.ledger import Task, run_task, write_text
from vlmprune_jax.run.workdir.store import RECORD, Store


class Facts(msgspec.Struct):
    number: int


class Sweep:
    """Runs of one stage with a file and a folder as outputs, in workdirs of their own; what was made."""

    def __init__(self, folder):
        self.folder, self.made, self.said = folder, [], []
        (folder / "in.bin").write_bytes(b"input" * 1000)

    def __call__(self, name, *, also=(), body=None, outputs=("out.txt", "model"), **settings):
        work = self.folder / name

        def make():
            self.made.append(name)
            (body or (lambda: None))()
            write_text(work / outputs[0], "text")
            (work / "model/inner").mkdir(parents=True)
            (work / "model/inner/weights").write_bytes(b"weights")
            return Facts(len(self.made))

        task = Task(
            name="recover",
            function=make,
            workdir=work,
            settings={"ratio": 0.3, **settings},
            inputs={"data.train": self.folder / "in.bin"},
            outputs=[work / path for path in outputs],
            kind="recover",
            facts=Facts,
            store=Store(self.folder / "shared", dict(also)),
        )

        return run_task(task, overwrite=False, say=self.said.append)


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_a_second_run_takes_what_the_first_one_made(sweep):
    first = sweep("a")
    assert sweep("b") == first
    assert sweep.made == ["a"]
    assert sweep.said == ["recover ...", "recover: linked from another run"]
    for path in ("out.txt", "model/inner/weights"):
        assert os.path.samefile(sweep.folder / "a" / path, sweep.folder / "b" / path)
    assert sweep("b") == first  # from its own ledger
    assert "unchanged, skipped" in sweep.said[-1]
    records = [json.loads((sweep.folder / name / ".stages/recover.json").read_text()) for name in "ab"]
    assert records[0] == records[1]


@pytest.mark.parametrize("change", [{"ratio": 0.4}, {"also": {"images": "elsewhere"}}, {"outputs": ("o.txt", "model")}])
def test_what_differs_is_made_again(sweep, change):
    sweep("a")
    sweep("b", **change)
    assert sweep.made == ["a", "b"]


def test_content_counts_to_the_last_byte(sweep):
    """The ledger samples large files; two models that differ in between are not one here."""
    path = sweep.folder / "in.bin"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    sweep("a")
    with path.open("r+b") as file:
        file.seek((32 << 20) // 3)
        file.write(b"x")
    sweep("b")
    assert sweep.made == ["a", "b"]


def test_no_run_sees_what_another_one_does_later(sweep):
    sweep("a")
    sweep("b")
    write_text(sweep.folder / "a/out.txt", "mine")
    shutil.rmtree(sweep.folder / "a/model")
    assert (sweep.folder / "b/out.txt").read_text() == "text"
    assert (sweep.folder / "b/model/inner/weights").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["record", "output", "half"])
def test_a_damaged_entry_counts_as_none(sweep, damage):
    sweep("a")
    (entry,) = [path for path in (sweep.folder / "shared").iterdir() if path.is_dir()]
    if damage == "record":
        (entry / RECORD).write_text('{"done": true}')
    elif damage == "output":
        (entry / "out.txt").unlink()
        (entry / "out.txt").write_text("other")
    else:
        shutil.rmtree(entry / "model")
    sweep("b")
    assert sweep.made == ["a", "b"]
    sweep("c")
    assert sweep.made == ["a", "b"]


def test_a_failed_stage_leaves_nothing(sweep):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep("a", body=fail)
    sweep("b")
    assert sweep.made == ["a", "b"]


def test_where_the_disk_has_no_links_files_are_copied(sweep, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(stores.os, "link", refuse)
    sweep("a")
    sweep("b")
    assert sweep.made == ["a"]
    weights = [sweep.folder / name / "model/inner/weights" for name in "ab"]
    assert not os.path.samefile(*weights)
    assert weights[1].read_bytes() == b"weights"


def test_one_makes_it_while_another_one_waits(sweep):
    """Two at once, each with its lock (of one process, but of two openings of the file): one of them makes it."""
    waiting = "recover: waiting for another run to compute it"

    def until_the_other_waits():
        while waiting not in sweep.said:
            time.sleep(0.01)

    options = {"kwargs": {"body": until_the_other_waits}, "daemon": True}
    threads = [threading.Thread(target=sweep, args=(name,), **options) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert len(sweep.made) == 1
    assert (sweep.folder / "a/out.txt").read_text() == (sweep.folder / "b/out.txt").read_text() == "text"


@pytest.mark.parametrize("link", ["model/more", "model/inner/key", "model"])
def test_what_lies_elsewhere_is_not_taken(sweep, link):
    sweep("a")
    (sweep.folder / "secret").mkdir()
    (sweep.folder / "secret/key").write_text("secret")
    (entry,) = (sweep.folder / "shared").glob("recover-*/")
    if link == "model":
        shutil.rmtree(entry / link)
    (entry / link).symlink_to(sweep.folder / ("secret" if link != "model/inner/key" else "secret/key"))
    (entry / "model/.hidden").write_text("not part of the result") if link != "model" else None
    sweep("b")  # made anew: the entry is not what was put there
    assert sweep.made == ["a", "b"]
    assert not [path for path in (sweep.folder / "b").rglob("*") if path.name in ("key", ".hidden", "more")]


def test_hidden_files_are_no_part_of_a_result(sweep):
    sweep("a")
    (entry,) = (sweep.folder / "shared").glob("recover-*/")
    (entry / "model/.hidden").write_text("not in the digest")
    sweep("b")
    assert sweep.made == ["a"]
    assert [path.name for path in (sweep.folder / "b/model").iterdir()] == ["inner"]


def test_links_are_not_linked(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path)
    refused("a: is a symbolic link, which a results folder", stores._link, tmp_path / "a", tmp_path / "b")
