"""Caches and journals on disk: what is there is read back exactly, and nothing wrong; values of several processes."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import msgspec
import numpy as np
import pytest
from fuzz_cases import mutants
from refusal import refused

from vlmprune_jax.base import cache as module
from vlmprune_jax.base import processes
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import SharedError, UserError
from vlmprune_jax.base.journal import Journal, continued, is_of

MADE_FROM = {"tower": {"weights": "a1", "layers": 3}, "dtype": "float32"}


def array(number: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((2, 3, 5)).astype(dtype)


def filled(folder, numbers, **changes) -> ArrayCache:
    cache = ArrayCache(folder, {**MADE_FROM, **changes})
    for number in numbers:
        cache.add({f"k{number}": array(number)})
    cache.publish()
    return cache


def shards(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def test_arrays_come_back_as_they_were(tmp_path):
    given = {
        "bfloat16": array(1, ml_dtypes.bfloat16),
        "float16": array(2, np.float16),
        "ids": np.arange(12, dtype=np.int32).reshape(3, 4),
        "transposed": array(3).T,
        "nothing": np.zeros((0, 4), np.float32),
    }
    first = ArrayCache(tmp_path / "new/cache", MADE_FROM)
    assert first.missing(["ids", "other", "ids"]) == ["ids", "other"]
    first.add(given)
    first.publish()
    for cache in (first, ArrayCache(tmp_path / "new/cache", MADE_FROM)):
        assert cache.missing(["ids", "other"]) == ["other"]
        for key, expected in given.items():
            assert cache[key].dtype == expected.dtype
            assert np.array_equal(cache[key], expected), key
    refused("has no array for other: run the same command again", first.__getitem__, "other")


def test_shards_fill_up_and_only_what_is_missing_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 3 * array(0).nbytes)
    filled(tmp_path, range(7))
    assert len(shards(tmp_path)) == 3
    names = shards(tmp_path)
    again = filled(tmp_path, range(7, 9))
    assert set(names) < set(shards(tmp_path))
    assert again.missing(f"k{i}" for i in range(10)) == ["k9"]
    assert all(np.array_equal(again[f"k{i}"], array(i)) for i in range(9))


def test_runs_that_share_a_folder_do_not_replace_each_others_shards(tmp_path):
    """Both begin with the same key."""
    runs = [ArrayCache(tmp_path, MADE_FROM) for _ in range(2)]
    for run, numbers in zip(runs, ((0, 1, 2), (0, 3)), strict=True):
        run.add({f"k{number}": array(number) for number in numbers})
        run.publish()
    assert not ArrayCache(tmp_path, MADE_FROM).missing(f"k{number}" for number in range(4))


def test_many_threads_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 10 * array(0).nbytes)
    cache, together = filled(tmp_path, range(50)), threading.Barrier(4)

    def read(seed: int) -> bool:
        together.wait()
        return all(np.array_equal(cache[f"k{i}"], array(i)) for i in np.random.default_rng(seed).permutation(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_identity_is_readable_and_another_one_is_refused(tmp_path):
    filled(tmp_path, [1])
    assert json.loads((tmp_path / "cache.json").read_text()) == {"version": 1, **MADE_FROM}
    refused(
        'tower.weights was "a1", now "b2"', ArrayCache, tmp_path, {**MADE_FROM, "tower": {"weights": "b2", "layers": 3}}
    )
    refused(r'"bfloat16"; tiles was null, now 4', ArrayCache, tmp_path, {**MADE_FROM, "dtype": "bfloat16", "tiles": 4})


def test_folders_that_cannot_be_a_cache(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("is neither empty nor a cache", ArrayCache, tmp_path, MADE_FROM)
    for folder in (tmp_path / "thesis.tex", tmp_path / "thesis.tex/cache"):
        refused("cannot be used as a cache .*: use another", ArrayCache, folder, MADE_FROM)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.cache.json.host-1.partial").write_text("{")  # of a run that was killed at once
    assert filled(tmp_path / "new", [1]).missing(["k1", "k2"]) == ["k2"]


def test_damaged_files(tmp_path):
    cache = filled(tmp_path, range(3))
    (shard,) = (tmp_path / name for name in shards(tmp_path))
    shard.write_bytes(shard.read_bytes()[:-7])
    refused(r"became shorter while it was read", cache.__getitem__, "k2")  # of a mapped file the process would end
    refused(f"{shard.name}: truncated: .*: remove the file, and run the command again", ArrayCache, tmp_path, MADE_FROM)
    shard.unlink()
    assert ArrayCache(tmp_path, MADE_FROM).missing(["k0"]) == ["k0"]
    os.mkfifo(tmp_path / "0.safetensors")
    refused(r"0\.safetensors: is a FIFO, expected a file", ArrayCache, tmp_path, MADE_FROM)
    for text in ("{", '{"a":' * 900 + "1" + "}" * 900):
        (tmp_path / "cache.json").write_text(text)
        refused(r"cache.json: .*: use another folder or remove this one", ArrayCache, tmp_path, MADE_FROM)
    (tmp_path / "cache.json").unlink()
    os.mkfifo(tmp_path / "cache.json")
    refused(r"cache\.json: is a FIFO, expected a file", ArrayCache, tmp_path, MADE_FROM)


def test_a_full_disk_leaves_whole_shards(tmp_path, monkeypatch):
    cache = filled(tmp_path, range(3))
    cache.add({"k3": array(3)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    refused(r"cannot be written \(No space left on device\): free disk space", cache.publish)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cache.json", *shards(tmp_path)])
    assert ArrayCache(tmp_path, MADE_FROM).missing(f"k{i}" for i in range(4)) == ["k3"]


def test_a_folder_that_others_do_not_see(tmp_path, monkeypatch):
    """Process 1 wrote a shard that this one cannot open; a new folder has none yet, but it is not there either."""
    cache = filled(tmp_path, [1])
    monkeypatch.setattr(module, "from_all", lambda compute: [compute() or [], ["0123.safetensors"]])
    refused(r"0123\.safetensors: written by process 1 of .* use a folder on a disk that all processes", cache.publish)
    monkeypatch.setattr(module, "on_process_zero", lambda begin: [])
    refused(r"new/cache\.json: written by process 0 of .* but not visible", ArrayCache, tmp_path / "new", MADE_FROM)


WRITER = """
import os, sys, time
import numpy as np
from pathlib import Path
from vlmprune_jax.base import cache
cache.SHARD_BYTES, plain, count = 100, os.fsync, 0
def slow(descriptor):
    global count
    count += 1
    if count == 4:  # cache.json and two shards are there
        print("writing", flush=True)
        time.sleep(600)
    plain(descriptor)
cache.os.fsync = slow
made = cache.ArrayCache(Path(sys.argv[1]), {"a": 1})
for i in range(9):
    made.add({f"k{i}": np.full(50, i, np.float32)})
"""


def test_a_killed_writer_leaves_whole_shards(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert len(left) == 1
    assert left[0].name.endswith(f"-{writer.pid}.partial")  # nobody else writes to it
    cache = ArrayCache(tmp_path, {"a": 1})
    assert cache.missing(f"k{i}" for i in range(4)) == ["k2", "k3"]
    assert np.array_equal(cache["k1"], np.full(50, 1, np.float32))
    assert left[0].exists()  # perhaps another run writes it at this moment
    os.utime(left[0], (0, 0))
    ArrayCache(tmp_path, {"a": 1})
    assert not left[0].exists()


def test_a_pass_continues_after_the_last_whole_line(tmp_path):
    path, asked = tmp_path / "eval/a.journal", []

    def third_root(number: int) -> list[float]:
        asked.append(number)
        return [number ** (1 / 3), math.inf]

    entries = continued(third_root, range(5), Journal(path, {"batches": 5}))
    first = [next(entries) for _ in range(3)]
    path.write_text(path.read_text()[:-5])  # cut off by a kill
    again = list(continued(third_root, range(5), Journal(path, {"batches": 5})))
    assert asked == [0, 1, 2, 2, 3, 4]
    assert again == [third_root(number) for number in range(5)]
    assert again[:3] == first
    assert len(Journal(path, {"batches": 5}).entries) == 5
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:-5], *lines[4:]]))  # damaged in the middle
    assert Journal(path, {"batches": 5}).entries == again[:2]


def test_a_journal_of_another_pass_starts_again(tmp_path):
    path = tmp_path / "a.journal"
    Journal(path, {"mesh": [1, 1, 1]}).add(7)
    assert Journal(path, {"mesh": [1, 1, 1]}).entries == [7]
    assert Journal(path, {"mesh": [8, 1, 1]}).entries == []
    assert not path.exists()  # a pass that is refused leaves nothing
    path.write_bytes(b"\x00\xff no journal")
    assert Journal(path, {"mesh": [8, 1, 1]}).entries == []


def test_damaged_entries_are_computed_again(tmp_path):
    """From the first one on that is not what a batch gives."""
    path = tmp_path / "a.journal"
    good = [{"batches": 3}, [1.5, 0.0], [1.5, 1.0], [1.5, 2.0]]

    def fits(batch, entry):
        return is_of(list[float], entry) and len(entry) == 2

    for _, value in mutants(good, 0.4):
        lines = value if isinstance(value, list) else [value]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        pass_ = continued(lambda number: [1.5, float(number)], range(3), Journal(path, {"batches": 3}), fits)
        found = list(pass_)
        assert all(fits(None, entry) for entry in found)
        assert len(found) == 3
        assert Journal(path, {"batches": 3}).entries[:3] == json.loads(json.dumps(found))
    path.unlink()
    os.mkfifo(path)
    assert Journal(path, {"batches": 3}).entries == []


# What one process of a run finds reaches all of them as JSON; errors too.


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


def test_what_a_process_finds_is_what_all_find(process):
    assert processes.on_process_zero(lambda: {"a": [1, None]}) == {"a": [1, None]}
    refused("wrong", processes.on_process_zero, _fails(UserError("wrong")))
    process(0, {}, {})
    assert processes.on_process_zero(lambda: _Point(3), _Point) == _Point(3)
    process(2, {"value": {"x": 4}}, {})
    assert processes.on_process_zero(_fails(AssertionError("only process 0 computes")), _Point) == _Point(4)
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
