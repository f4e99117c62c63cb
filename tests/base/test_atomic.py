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
from hf_cases import LLAMA, assert_same_tensors, keep_layers, make_folder
from refusal import refused

from vlmprune_jax.base import atomic
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports import folder
from vlmprune_jax.io.exports.pruning import prune_folder
from vlmprune_jax.io.exports.write import save


@pytest.fixture
def llama(tmp_path):
    return make_folder(tmp_path / "llama", LLAMA)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_existing_output(llama, tmp_path, monkeypatch):
    """An old model is replaced on request, and only by a complete one."""
    model, out = load(llama), tmp_path / "out"
    out.mkdir()
    save(model, out, source_dir=llama, dtype="source")  # an empty folder is no obstacle
    refused("exists already.*--overwrite", save, model, out, source_dir=llama)
    (out / "stale").write_text("of the first save")
    shorter, plan = keep_layers(model, [0])
    with monkeypatch.context() as broken:
        broken.setattr(folder, "write_files", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
        with pytest.raises(OSError, match="disk gone"):
            save(shorter, out, source_dir=llama, overwrite=True)
    assert_same_tensors(out, llama)
    assert (out / "stale").exists()
    save(shorter, out, source_dir=llama, overwrite=True)
    assert not (out / "stale").exists()
    assert len(load(out).cfg.text.layers) == 1
    begun = folder.write_weights
    monkeypatch.setattr(folder, "write_weights", lambda *args: (llama / "model.safetensors").unlink() or begun(*args))
    refused(r"model\.safetensors: no such file", prune_folder, llama, plan, tmp_path / "new")
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


def test_what_is_refused_leaves_nothing(goldens, llama, tmp_path, monkeypatch):
    model, out = load(llama), tmp_path / "out"
    for name in ("layout", "uneven", "dtype"):
        refused(f"{name} 'odd' is not one of", save, model, out, source_dir=llama, **{name: "odd"})
    refused("no such folder", save, model, out, source_dir=tmp_path / "nothing")
    refused("not the folder from which this llama", save, model, out, source_dir=goldens / "ckpt/llava_hf")
    biased = load(make_folder(tmp_path / "biased", {**LLAMA, "attention_bias": True}))
    refused("has no tensor", save, biased, out, source_dir=llama)
    cfg = model.cfg.__class__(**{**vars(model.cfg), "lora": LoraConfig(2, 4.0, 0.0, ("q_proj",))})
    refused("unmerged LoRA", save, Model(model.params, cfg), out, source_dir=llama)
    for dtype, value in (("bfloat16", np.nan), ("float16", 1e5)):
        broken = jax.tree.map(lambda leaf: leaf, model.params)
        broken["text"]["norm"] = {"weight": broken["text"]["norm"]["weight"].at[2].set(value)}
        fact = "model.norm.weight.*1 NaN or infinite"
        refused(fact, save, Model(broken, model.cfg), out, source_dir=llama, dtype=dtype)
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file/out", tmp_path / ("a" * 250)):
        refused(f"{re.escape(str(bad))}: .*: nothing was written, check that path", save, model, bad, source_dir=llama)
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    refused("needs .* MiB .* free", save, model, tmp_path / "new/out", source_dir=llama)
    assert names(tmp_path) == ["biased", "file", "llama"]


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


def test_kill_in_the_middle(llama, tmp_path):
    out, model = tmp_path / "out", load(llama)
    save(model, out, source_dir=llama, dtype="source")
    command = [sys.executable, "-c", WRITER, str(llama), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out.partial"))
    assert any(path.stat().st_size for path in left.iterdir())  # it was in the middle of a shard
    assert_same_tensors(out, llama)
    save(model, out, source_dir=llama, dtype="source", overwrite=True)  # the next run: cleans up and succeeds
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
