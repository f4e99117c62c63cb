"""Checkpoints: a run that stopped, was killed or went wrong continues to the same bytes, and only as the same run."""

import dataclasses
import errno
import functools
import json
import os
import resource
import shutil
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import recover_cases as cases
from jax.sharding import NamedSharding, PartitionSpec
from refusal import refused

from vlmprune_jax.base.errors import Stopped, UserError
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.recovery.checkpoint import Checkpointer, weights_digest
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.loop import prepare, recover

CFG = cases.config()
SETTINGS = cases.settings(
    trainable="lora",
    lora=dataclasses.replace(cases.LORA, dropout=0.2),
    losses=LossConfig(ce=0.5, l2=0.5),
    save_every=1,
    keep_checkpoints=3,
)


def train(stream, workdir, config=SETTINGS, **options):
    options = {"teacher": cases.model(CFG, 9), "progress": False, **options}
    return recover(options.pop("model", cases.model(CFG)), stream, config, workdir=workdir, **options)


def mid_epoch_stream() -> grain.IterDataset:
    """Shuffled epochs of 5 batches: step 3 of 6 lies inside the first one."""
    rows = cases.Stream(CFG)
    batches = [next(rows) for _ in range(5)]
    return grain.MapDataset.source(batches).shuffle(seed=4).repeat().to_iter_dataset()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    model, summary = train(mid_epoch_stream(), folder)
    return model, summary, folder


def test_resuming_after_sigterm_is_bitwise_the_same(uninterrupted, tmp_path, capsys):
    """Half way, in the middle of an epoch, with adapter dropout; a new stream, state and step function go on."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"SIGTERM after step 3 of 6; saved in .*checkpoints"):
        train(cases.Watched(mid_epoch_stream(), cases.terminate_at(2)), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [line["step"] for line in cases.metrics_of(tmp_path)] == [1, 2, 3]
    model, summary = train(mid_epoch_stream(), tmp_path, progress=True)
    assert summary["resumed_from"] == 3
    assert f"train: continues after step 3 of 6, saved in {tmp_path}/checkpoints\n" in capsys.readouterr().out
    cases.assert_bitwise(model, uninterrupted[0])
    same = ("step", "loss", "ce", "l2", "grad_norm", "learning_rate", "padding")
    runs = [cases.metrics_of(path) for path in (tmp_path, uninterrupted[2])]
    ours, straight = ([{name: line[name] for name in same} for line in lines] for lines in runs)
    assert ours == straight
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_trained_again(uninterrupted):
    """Not even with other settings, if they have no influence on the weights."""
    assert {path.name for path in (uninterrupted[2] / "checkpoints").iterdir()} == {"4", "5", "6"}
    assert list((uninterrupted[2] / "tensorboard").glob("events*"))
    model, summary = train(mid_epoch_stream(), uninterrupted[2])
    assert (summary["resumed_from"], summary["tokens"]) == (6, 0)
    assert summary["last"]["loss"] == uninterrupted[1]["last"]["loss"]
    cases.assert_bitwise(model, uninterrupted[0])
    free = dataclasses.replace(SETTINGS, save_every=3, log_every=5, keep_checkpoints=1, merge_lora=False)
    model, _ = train(mid_epoch_stream(), uninterrupted[2], free)
    assert model.cfg.lora == SETTINGS.lora


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"config": dataclasses.replace(SETTINGS, learning_rate=1.0)}, r"config.learning_rate was 0.003, now 1.0"),
        ({"config": dataclasses.replace(SETTINGS, steps=9)}, r"config.steps was 6, now 9; num_steps was 6, now 9"),
        ({"model": cases.model(CFG, 5)}, r"model.weights was \"\w+\", now"),
        ({"teacher": cases.model(CFG, 5)}, r"teacher.weights was .*use another folder"),
        ({"stream": cases.Stream(CFG)}, r"not one of these batches \(KeyError\('at'\)\)"),
        ({"stream": [next(cases.Stream(CFG))]}, "no get_state/set_state"),
    ],
)
def test_another_run_does_not_resume(uninterrupted, changes, fact):
    refused(fact, train, changes.pop("stream", None) or mid_epoch_stream(), uninterrupted[2], **changes)


def test_data_states_of_other_processes(uninterrupted, tmp_path):
    """Saved by three processes: in one place all of them, any number continues; in their own places, only three."""
    shutil.copytree(uninterrupted[2] / "checkpoints/6", tmp_path / "checkpoints/6")
    file = tmp_path / "checkpoints/6/meta/metadata"
    meta = json.loads(file.read_text())
    own = meta["data"][0]
    file.write_text(json.dumps({**meta, "digest": "0" * 16}))
    refused("the arrays differ from the saved ones", train, mid_epoch_stream(), tmp_path)
    file.write_text(json.dumps({**meta, "data": [own] * 3}))
    assert train(mid_epoch_stream(), tmp_path)[1]["resumed_from"] == 6
    file.write_text(json.dumps({**meta, "data": [own, own, "jnull"]}))
    refused("saved by 3 processes .* there are 1: continue with 3", train, mid_epoch_stream(), tmp_path)


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run(uninterrupted, tmp_path):
    """The last one, which no later save looks at; the last good checkpoint is continued from."""
    at, unlimited = 5, resource.RLIM_INFINITY
    config, saved = dataclasses.replace(SETTINGS, log_every=100), tmp_path / f"checkpoints/{at}"

    def fill(number):
        """As soon as step `at` is saved, no file can grow beyond 4 KiB any more."""
        while number == at and not saved.exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if number == at else unlimited, unlimited))

    try:
        refused(f"last .* step {at}: free disk", train, cases.Watched(mid_epoch_stream(), fill), tmp_path, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    model, summary = train(mid_epoch_stream(), tmp_path, dataclasses.replace(config, save_every=0))
    assert summary["resumed_from"] == at
    cases.assert_bitwise(model, uninterrupted[0])
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())  # the half-written one is gone


def test_a_save_that_failed_in_the_background_ends_the_next_step(tmp_path, monkeypatch):
    """Not only the next save, which may be hours away."""
    cfg, looks = cases.config(vision=False, layers=1), []

    def look(manager):
        looks.append(manager)
        if len(looks) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "check_for_errors", look)
    train_one = functools.partial(recover, cases.model(cfg), cases.Stream(cfg), workdir=tmp_path, progress=False)
    refused(r"cannot save a checkpoint \(No space .*no complete checkpoint: free disk", train_one, cases.settings())
    assert [line["step"] for line in cases.metrics_of(tmp_path)] == [1]


@pytest.mark.parametrize(("keep", "count"), [(1, 2), (4, 4)])
def test_a_disk_that_is_too_small_for_the_checkpoints(tmp_path, monkeypatch, keep, count):
    """It has room for those that are kept and the one that replaces the oldest, before the first step."""
    cfg, needed = cases.config(vision=False, layers=1), []
    config = dataclasses.replace(cases.settings(), save_every=1, keep_checkpoints=keep, steps=4)

    def check_space(folder, size):
        needed.append(size)
        raise UserError(f"{folder}: needs more")

    monkeypatch.setattr("vlmprune_jax.core.recovery.checkpoint.check_space", check_space)
    model = cases.model(cfg)
    refused("checkpoints: needs more", recover, model, cases.Stream(cfg), config, workdir=tmp_path, progress=False)
    state = prepare(model, config, None, None, None, 4).state
    assert needed == [count * sum(leaf.nbytes for leaf in jax.tree.leaves(state))]
    assert not cases.metrics_of(tmp_path)


def test_a_half_written_checkpoint_that_is_still_written_to_is_removed(tmp_path, monkeypatch):
    """Storage goes on with the other files of a save when one has failed."""
    half, remove, tries = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp", shutil.rmtree, []
    (half / "state").mkdir(parents=True)

    def rmtree(path, *args, **kwargs):
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with Checkpointer(tmp_path / "checkpoints", {}, 1):
        assert tries == [half, half]
        assert not half.exists()


def test_what_went_wrong_first_is_told(tmp_path, monkeypatch):
    """A disk that fails in a step fails when the last save is waited for as well."""
    saver = Checkpointer(tmp_path / "checkpoints", {}, 1)
    close = saver._manager.close

    def failing():
        close()
        raise OSError("the disk is gone")

    monkeypatch.setattr(saver._manager, "close", failing)
    with pytest.raises(UserError, match="the step"), saver:
        raise UserError("the step")
    refused(r"cannot save a checkpoint \(the disk is gone\); no complete checkpoint", saver.__exit__, None, None, None)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("meta/metadata", None, r"/6: cannot be read \("),
        ("meta/metadata", lambda _: b"[]", r"/6: (does not have the expected content|cannot be read)"),
        ("meta/metadata", lambda _: b'{"identity": 1, "data": ["j1"]}', r"/6: does not have the expected content"),
        ("meta/metadata", os.mkfifo, r"meta/metadata: is a FIFO, expected a file"),
        ("state/_METADATA", lambda _: b"\xff{", r"/6: cannot be read \("),
        ("state/_METADATA", lambda _: b'{"tree_metadata": {}}', r"/6: cannot be read \("),
        ("state/manifest.ocdbt", None, r"/6: cannot be read \("),
        ("state/d/*", lambda content: content[:10], r"/6: cannot be read \(.*\): remove that folder, and run"),
        ("state/d/*", _flipped, r"/6: (cannot be read \(|the arrays differ from the saved ones)"),
    ],
)
def test_damage_of_any_file_of_a_checkpoint(uninterrupted, tmp_path, file, damage, message):
    """In a line that says what to remove."""
    shutil.copytree(uninterrupted[2] / "checkpoints", tmp_path, dirs_exist_ok=True)
    for name in ("-1", "0x", "1.5", "²", "a\nb"):  # are no checkpoints
        (tmp_path / name).mkdir()
    run = prepare(cases.model(CFG), SETTINGS, cases.model(CFG, 9), None, None, 6)
    damaged = [path for path in (tmp_path / "6").glob(file) if path.is_file()]
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        path.unlink()
        if damage is os.mkfifo:
            os.mkfifo(path)
        elif damage is not None:
            path.write_bytes(damage(content))

    def restore():
        with Checkpointer(tmp_path, run.identity, 3) as saver:
            saver.restore(run.state)

    refused(message, restore)


def test_any_change_of_weights_changes_their_digest():
    """A number, their order along any axis, two leaves in each other's place; but not where they lie."""
    draw = np.random.default_rng(0)
    params = {name: draw.standard_normal((8, 6)).astype(np.float32) for name in "ab"} | {"c": np.ones(3, np.float16)}
    digest = weights_digest(jax.tree.map(jnp.asarray, params))
    spread = NamedSharding(make_mesh(2, 4, 1), PartitionSpec("fsdp", "data"))
    assert weights_digest({**params, "a": jax.device_put(params["a"], spread)}) == digest
    changed = [{"a": params["a"][::-1]}, {"a": params["a"][:, ::-1]}, {"a": params["b"], "b": params["a"]}]
    changed += [{"a": np.where(params["a"] == params["a"][1, 1], 0, params["a"])}, {"c": -params["c"]}]
    changed += [{"a": params["a"].reshape(6, 8)}, {"b": params["a"], "a": params["a"]}]
    assert len({digest, *(weights_digest({**params, **change}) for change in changed)}) == 8
