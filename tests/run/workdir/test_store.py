"""Stages that runs of a sweep take from each other, and the content keys that tell which: whole or not at all."""

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
from vlmprune_jax.run.workdir.content import _SAMPLED, content_key, digest, made_from
from vlmprune_jax.run.workdir.ledger import Task, run_task, write_text
from vlmprune_jax.run.workdir.store import RECORD, Store

# --- content keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_byte", [False, True])
def test_a_digest_is_of_names_and_content(tmp_path, every_byte):
    """Downloads of the hub and clones of git leave folders of their own beside, and below, the model's files."""

    def of(path):
        return digest(path, every_byte=every_byte)

    model = tmp_path / ".cache/model"  # may lie in one
    (model / "more").mkdir(parents=True)
    (model / "more/config.json").write_text("{}")
    (tmp_path / "a").mkdir()
    (model / "linked").symlink_to(tmp_path / "a")
    first = of(model)
    for name in (".cache/huggingface/download/config.json.metadata", ".git/HEAD", "more/.git/HEAD", ".hidden"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("of this copy")
    (tmp_path / "a/inner").write_text("a linked folder counts by its name")
    assert of(model) == of(shutil.copytree(model, tmp_path / "copy", symlinks=True)) == first
    (model / "linked").unlink()
    others = [of(model)]
    (model / "linked").symlink_to(tmp_path / ".cache")
    others.append(of(model))
    (model / "more/config.json").write_text("[]")
    others.append(of(model))
    (model / "more/config.json").rename(model / "more/other.json")
    others += [of(model), of("text"), of("texts")]
    assert len({first, *others}) == 7
    refused("no such file or folder", digest, tmp_path / "none", every_byte=every_byte)


def test_large_files_are_sampled_or_read_to_the_last_byte(tmp_path):
    path = tmp_path / "weights"
    found = []
    for place, text in ((0, b""), (_SAMPLED * 2 // 3, b"x"), (_SAMPLED * 2 - 1, b"x")):
        path.write_bytes(bytes(_SAMPLED * 2))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(text)
        found.append((digest(path), digest(path, every_byte=True)))
    sampled, full = zip(*found, strict=True)
    assert sampled[0] == sampled[1] != sampled[2]  # the sample has the end, and little in between
    assert len(set(full)) == 3


def test_the_holes_of_a_sparse_file_take_no_time(tmp_path):
    """A terabyte, of which a page was written: what was written counts, and where; in samples, the file's size too."""
    sampled, full = set(), set()
    for size, at, text in ((40, 0, b"a"), (40, 0, b"b"), (40, 1 << 39, b"a"), (41, 0, b"a")):
        with (tmp_path / "weights").open("wb") as file:
            file.truncate(1 << size)
            file.seek(at)
            file.write(text * 4096)
        sampled.add(digest(tmp_path))
        full.add(digest(tmp_path, every_byte=True))
    assert (len(sampled), len(full)) == (4, 3)


def test_a_key_is_of_settings_inputs_and_version(tmp_path):
    (tmp_path / "in.txt").write_text("input")
    inputs, settings = {"data.train": tmp_path / "in.txt"}, {"ratio": 0.3, "layers": (1, 2)}
    first = made_from(settings, inputs, 1)
    assert first == made_from({"ratio": 0.3, "layers": [1, 2]}, dict(inputs), 1)
    others = [made_from(settings | {"ratio": 0.4}, inputs, 1), made_from({"ratio": 0.3}, inputs, 1)]
    others += [made_from(settings, inputs, 2), made_from(settings, {}, 1)]
    assert len({content_key(one) for one in [first, *others]} | {content_key(first, "more")}) == 6


# --- the store -------------------------------------------------------------------------------------------------------


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

    @property
    def entry(self):
        (folder,) = (self.folder / "shared").glob("recover-*/")
        return folder


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_a_second_run_takes_what_the_first_one_made(sweep):
    first = sweep("a")
    (sweep.entry / "model/.hidden").write_text("no part of a result")
    assert sweep("b") == first
    assert sweep.made == ["a"]
    assert sweep.said == ["recover ...", "recover: linked from another run"]
    for path in ("out.txt", "model/inner/weights"):
        assert os.path.samefile(sweep.folder / "a" / path, sweep.folder / "b" / path)
    assert [path.name for path in (sweep.folder / "b/model").iterdir()] == ["inner"]
    assert sweep("b") == first  # from its own ledger
    assert "unchanged, skipped" in sweep.said[-1]
    records = [json.loads((sweep.folder / name / ".stages/recover.json").read_text()) for name in "ab"]
    assert records[0] == records[1]
    write_text(sweep.folder / "a/out.txt", "mine")  # no run sees what another one does later
    shutil.rmtree(sweep.folder / "a/model")
    assert (sweep.folder / "b/out.txt").read_text() == "text"
    assert (sweep.folder / "b/model/inner/weights").read_bytes() == b"weights"


CHANGES = [{"ratio": 0.4}, {"also": {"images": "elsewhere"}}, {"outputs": ("o.txt", "model")}, {}]


@pytest.mark.parametrize("change", CHANGES, ids=["settings", "others", "outputs", "content"])
def test_what_differs_is_made_again(sweep, change):
    """Content counts to the last byte, where the ledger samples large files."""
    with (sweep.folder / "in.bin").open("r+b") as file:
        file.truncate(32 << 20)
        sweep("a")
        if not change:
            file.seek((32 << 20) // 3)
            file.write(b"x")
            file.flush()
        sweep("b", **change)
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


@pytest.mark.parametrize("damage", ["record", "output", "half", "model", "model/more", "model/inner/key"])
def test_a_damaged_entry_is_made_anew(sweep, damage):
    """Nothing that lies elsewhere is taken either, where a link leads there."""
    sweep("a")
    secret, entry = sweep.folder / "secret", sweep.entry
    secret.mkdir()
    (secret / "key").write_text("secret")
    if damage == "record":
        (entry / RECORD).write_text('{"done": true}')
    elif damage == "output":
        (entry / "out.txt").unlink()
        (entry / "out.txt").write_text("other")
    elif damage == "half":
        shutil.rmtree(entry / "model")
    else:
        if damage == "model":
            shutil.rmtree(entry / "model")
        (entry / damage).symlink_to(secret / "key" if damage.endswith("key") else secret)
    sweep("b")
    sweep("c")
    assert sweep.made == ["a", "b"]
    assert not [path for name in "bc" for path in (sweep.folder / name).rglob("*") if path.name in ("key", "more")]


def test_links_are_not_linked(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path)
    refused("a: is a symbolic link, which a results folder", stores._link, tmp_path / "a", tmp_path / "b")
