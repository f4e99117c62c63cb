"""A folder is written whole or not at all, and never over something else."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hf_cases import (
    LLAMA,
    assert_same_tensors,
    keep_layers,
    make_folder,
)
from refusal import refused

from vlmprune_jax.base import atomic
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports import folder
from vlmprune_jax.io.exports.pruning import prune_folder
from vlmprune_jax.io.exports.write import save


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


# All or nothing -------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_existing_output(llama, tmp_path):
    model, out = load(llama), tmp_path / "out"
    out.mkdir()
    save(model, out, source_dir=llama)  # an empty folder is no obstacle
    refused("exists already.*--overwrite", save, model, out, source_dir=llama)
    (out / "stale").write_text("of the first save")
    save(keep_layers(model, [0])[0], out, source_dir=llama, overwrite=True)
    assert not (out / "stale").exists()
    assert len(load(out).cfg.text.layers) == 1
    assert names(tmp_path) == ["llama", "out"]


def test_overwrite_spares_what_is_not_a_model_folder(llama, tmp_path):
    model, home = load(llama), tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    refused("not a model folder", save, model, home, source_dir=llama, overwrite=True)
    refused("not a folder", save, model, home / "thesis.tex", source_dir=llama, overwrite=True)
    assert names(home) == ["thesis.tex"]
    for target in (llama, tmp_path):
        refused("is or contains the source folder", save, model, target, source_dir=llama, overwrite=True)
    load(llama)


def test_full_disk_is_noticed_first(llama, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    refused("needs .* MiB .* free", save, load(llama), tmp_path / "new/out", source_dir=llama)
    assert names(tmp_path) == ["llama"]


def test_weights_that_are_not_finite_are_not_written(llama, tmp_path):
    model = load(llama)
    for dtype, value in (("bfloat16", np.nan), ("float16", 1e5)):
        broken = jax.tree.map(lambda leaf: leaf, model.params)
        broken["text"]["norm"] = {"weight": broken["text"]["norm"]["weight"].at[2].set(value)}
        options = {"source_dir": llama, "dtype": dtype}
        refused("model.norm.weight.*1 NaN or infinite", save, Model(broken, model.cfg), tmp_path / "out", **options)
        assert names(tmp_path) == ["llama"]


def test_where_nothing_can_be_written(llama, tmp_path):
    model = load(llama)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file/out", tmp_path / ("a" * 250)):
        refused(f"{re.escape(str(out))}: .*: nothing was written, check that path", save, model, out, source_dir=llama)
    assert names(tmp_path) == ["file", "llama"]


def test_a_source_that_goes_while_it_is_read(llama, tmp_path, monkeypatch):
    plan, begun = keep_layers(load(llama), [0])[1], folder.write_weights

    def too_late(*args):
        (llama / "model.safetensors").unlink()
        begun(*args)

    monkeypatch.setattr(folder, "write_weights", too_late)
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        prune_folder(llama, plan, tmp_path / "out")
    assert names(tmp_path) == ["llama"]


def test_failure_keeps_the_old_folder(llama, tmp_path, monkeypatch):
    model = load(llama)
    save(model, tmp_path / "out", source_dir=llama, dtype="source")

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(folder, "write_files", fail)
    with pytest.raises(OSError, match="disk gone"):
        save(keep_layers(model, [0])[0], tmp_path / "out", source_dir=llama, overwrite=True)
    assert_same_tensors(tmp_path / "out", llama)
    assert names(tmp_path) == ["llama", "out"]


WRITER = """
import sys, time
from vlmprune_jax.core.models import lazy
from vlmprune_jax.io.exports import weights
from vlmprune_jax.io.exports.write import save
from vlmprune_jax.io.checkpoints.read import load
source, out = sys.argv[1:]
model, plain, count = load(source), lazy.to_host, 0
def slow(*args):
    global count
    count += 1
    if count == 20:
        print("writing", flush=True)
        time.sleep(600)
    return plain(*args)
weights.to_host = slow
save(model, out, source_dir=source, overwrite=True)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_in_the_middle(llama, tmp_path, existing):
    out = tmp_path / "out"
    model = load(llama)
    if existing:
        save(model, out, source_dir=llama, dtype="source")
    command = [sys.executable, "-c", WRITER, str(llama), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".out.partial")]
    assert len(left) == 1
    assert any(path.stat().st_size for path in left[0].iterdir())  # it was in the middle of a shard
    if existing:
        assert_same_tensors(out, llama)
    else:
        assert not out.exists()
    save(model, out, source_dir=llama, dtype="source", overwrite=existing)  # the next run: cleans up and succeeds
    assert names(tmp_path) == ["llama", "out"]
    assert_same_tensors(out, llama)


def test_a_new_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    rename = os.rename

    def once(source, target):
        if ".partial-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(UserError, match="nothing was written"), atomic.atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_kill_between_the_two_renames(tmp_path):
    """The old folder waits beside its place for an instant; whoever comes next puts it back."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    replaced = tmp_path / f".out.replaced-{atomic.socket.gethostname()}-{gone.pid}"
    replaced.mkdir()
    (replaced / "config.json").write_text("old")
    other = tmp_path / f".out.partial-{atomic.socket.gethostname()}-{os.getppid()}"
    other.mkdir()  # of a living process: not ours to remove
    atomic.clean_stale(tmp_path / "out")
    assert names(tmp_path) == [other.name, "out"]
    assert (tmp_path / "out/config.json").read_text() == "old"


def test_what_another_machine_left_goes_once_nothing_is_written_there(tmp_path):
    """The worker of a pod that takes a lost one's place has another name."""
    left = tmp_path / ".out.partial-worker-7-12"
    left.mkdir()
    shard = left / "model.safetensors"
    shard.write_text("half")
    old = time.time() - atomic.ABANDONED_SECONDS - 60
    os.utime(left, (old, old))
    atomic.clean_stale(tmp_path / "out")  # its last file is new
    assert names(tmp_path) == [left.name]
    os.utime(shard, (old, old))
    replaced = tmp_path / ".out.replaced-worker-7-12"
    replaced.mkdir()
    os.utime(replaced, (old, old))
    atomic.clean_stale(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# Options --------------------------------------------------------------------------------------------------------------


def test_wrong_options(goldens, llama, tmp_path):
    model = load(llama)
    for name in ("layout", "uneven", "dtype"):
        refused(f"{name} 'odd' is not one of", save, model, tmp_path / "out", source_dir=llama, **{name: "odd"})
    refused("no such folder", save, model, tmp_path / "out", source_dir=tmp_path / "nothing")
    refused("not the folder from which this llama", save, model, tmp_path / "out", source_dir=goldens / "ckpt/llava_hf")
    other = make_folder(tmp_path / "biased", {**LLAMA, "attention_bias": True})
    refused("has no tensor", save, load(other), tmp_path / "out", source_dir=llama)


def test_lora_must_be_merged(llama, tmp_path):
    from vlmprune_jax.core.sections import LoraConfig

    model = load(llama)
    cfg = model.cfg.__class__(**{**vars(model.cfg), "lora": LoraConfig(2, 4.0, 0.0, ("q_proj",))})
    refused("unmerged LoRA", save, Model(model.params, cfg), tmp_path / "out", source_dir=llama)
