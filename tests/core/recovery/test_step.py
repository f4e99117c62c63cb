"""The step: meshes and accumulation give the same numbers, frozen stays frozen, dropout, dtypes."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from refusal import refused

from vlmprune_jax.base.errors import Stopped
from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import encode
from vlmprune_jax.core.recovery import program
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.loop import prepare, recover
from vlmprune_jax.core.recovery.losses import term_weights
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups, partition
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates

CFG, DECODER = cases.config(), cases.config(vision=False)
QUIET = {"progress": False}
DISTILL = LossConfig(0.5, 0.5, 0.1, 0.1, (1, -1), 2.0, "student", False, 4)


def train(config, *, cfg=CFG, stream=None, **options):
    return recover(cases.model(cfg), stream or cases.Stream(cfg), config, **{**QUIET, **options})


def program_of(config, mesh=None):
    return program.make_program(CFG, config, teacher_cfg=None, kept_layers=None, mesh=mesh, num_steps=2)


def _distillation(**changes):
    return cases.settings(trainable="lora", lora=cases.LORA, losses=DISTILL, merge_lora=False, steps=20, **changes)


@pytest.mark.parametrize("blank", ["labels", "rows"])
def test_a_batch_with_nothing_to_learn_from_changes_nothing(blank):
    """Answers that were all cut off, or records that were all skipped: losses of 0, not 0 / 0."""

    class Blank(cases.Stream):
        def __next__(self):
            batch = super().__next__()
            batch.arrays["labels"][:] = -100
            if blank == "rows":
                batch.arrays["attention_mask"][:] = 0
            return batch

    losses = LossConfig() if blank == "labels" else DISTILL
    config = cases.settings(trainable="decoder", losses=losses, steps=2, weight_decay=0.0)
    model = cases.model(CFG).replace(source=Path("DIR"))
    trained, summary = recover(model, Blank(CFG), config, teacher=cases.model(CFG, 9), **QUIET)
    cases.assert_bitwise(trained, model)
    assert trained.source == model.source
    assert summary["last"]["loss"] == summary["last"]["ce"] == summary["last"]["grad_norm"] == 0


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory):
    """(adapted model, its metrics) after 20 steps of LoRA with every loss term on one device."""
    folder = tmp_path_factory.mktemp("twenty")
    model, _ = train(_distillation(), teacher=cases.model(CFG, 9), workdir=folder)
    return model, cases.metrics_of(folder)


@pytest.mark.parametrize(
    ("shape", "accumulation"),
    [(None, 4), *(pytest.param(*one, marks=pytest.mark.slow) for one in (((1, 8, 1), 1), ((2, 2, 2), 2)))],
)
def test_twenty_steps_are_the_same_on_any_devices(twenty_steps, tmp_path, shape, accumulation):
    """Losses and gradient norms of every step, and the parameters in the end."""
    mesh = None if shape is None else make_mesh(*shape)
    model, _ = train(_distillation(accumulation=accumulation), teacher=cases.model(CFG, 9), workdir=tmp_path, mesh=mesh)
    ours, theirs = cases.metrics_of(tmp_path), twenty_steps[1]
    assert [line["step"] for line in ours] == list(range(1, 21))
    for name in ("loss", "ce", "l2", "kl", "rkl", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], rtol=1e-5)
    assert cases.largest_difference(model, twenty_steps[0]) < 1e-5


@pytest.fixture(scope="module")
def trained_whole():
    """Everything trained on one device and moved; the caller's arrays survive although the step donates its state."""
    before = {path: np.array(leaf) for path, leaf in flatten(cases.model(CFG).params).items()}
    result = train(cases.settings())
    after = flatten(result[0].params)
    for path, leaf in flatten(cases.model(CFG).params).items():
        assert np.array_equal(leaf, before[path])
        assert not np.array_equal(leaf, after[path]), path
    return result


def test_a_mesh_gives_the_same_training(trained_whole):
    sharded, _ = train(cases.settings(), mesh=make_mesh(1, 4, 2))
    assert cases.largest_difference(trained_whole[0], sharded) < 1e-5
    for leaf in jax.tree.leaves(sharded.params):
        assert leaf.sharding.mesh.size == 8


def test_frozen_leaves_keep_their_bytes_and_have_no_moments():
    trained, summary = train(cases.settings(trainable="projector", steps=2))
    before = flatten(cases.model(CFG).params)
    for path, leaf in flatten(trained.params).items():
        same = np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()
        assert same != path.startswith("projector/"), path
    count = sum(x.size for p, x in before.items() if p.startswith("projector/"))
    assert summary["trained_parameters"] == count
    assert summary["frozen_parameters"] == sum(x.size for x in before.values()) - count
    trainable = {p: x for p, x in before.items() if p.startswith("projector/")}
    state = program_of(cases.settings(trainable="projector")).init(trainable)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * count


def test_moments_are_sharded_like_their_parameters():
    mesh = make_mesh(1, 4, 2)
    flat = flatten(cases.model(CFG).params)
    state = program_of(cases.settings(), mesh).init(flat)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(flat)
    for masters in (moments[: len(flat)], moments[len(flat) :]):
        for path, moment in zip(sorted(flat), masters, strict=True):
            assert moment.sharding == state.params[path].sharding, path
    assert any(not x.sharding.is_fully_replicated for x in moments)


@pytest.mark.slow
def test_micro_batches_and_steps_draw_dropout_of_their_own():
    """Two of the same row would otherwise have the gradient of one, and the next step that of this one."""
    lora = dataclasses.replace(cases.LORA, dropout=0.5)
    model = add_lora(cases.model(cases.config(vision=False, layers=1)), lora, jax.random.key(0))
    flat = flatten(model.params)
    trained, frozen = partition(flat, assign_groups(list(flat), "lora"))
    key = jax.random.key_data(jax.random.key(0))
    row = {name: array[:1] for name, array in next(cases.Stream(model.cfg)).arrays.items()}

    @functools.partial(jax.jit, static_argnames="copies")
    def gradient(copies, step):
        config = cases.settings(batch_size=copies, accumulation=copies, losses=LossConfig(), remat="none")
        batch = {name: jnp.concatenate([jnp.asarray(array)] * copies) for name, array in row.items()}
        weights = term_weights(config.losses, model.cfg, batch["labels"], batch["attention_mask"])
        state = program.TrainState(trained, (), step, key)
        compiled = program.Program(model.cfg, config, None, {}, None, {}, None)
        return compiled.gradients(state, frozen, None, batch, weights)[0]

    once, twice, later = gradient(1, 0), gradient(2, 0), gradient(1, 1)
    for other in (twice, later):
        assert any(np.abs(other[path] - once[path]).max() > 1e-2 * np.abs(once[path]).max() for path in once)


def test_micro_batches_take_rows_from_where_they_lie():
    """Splitting a batch moves nothing between devices."""
    mesh = make_mesh(4, 2, 1)
    rows = jax.device_put(np.arange(48).reshape(16, 3), program.batch_sharding(mesh, 2))
    with program.step_context(mesh, "float32"):
        compiled = jax.jit(functools.partial(program._split, n=2)).lower(rows).compile()
    moves = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
    assert not re.search(moves, compiled.as_text())
    assert sorted(np.asarray(compiled(rows))[:, :, 0].ravel()) == list(range(0, 48, 3))


@pytest.mark.slow
def test_bfloat16_follows_float32(trained_whole):
    exact = trained_whole[1]["last"]["loss"]
    half = cases.settings(compute_dtype="bfloat16")
    trained, summary = train(half)
    assert summary["last"]["loss"] != exact
    assert abs(summary["last"]["loss"] - exact) < 0.02 * exact
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype(jnp.float32)}
    assert cases.largest_difference(trained_whole[0], trained) < 0.02
    config = dataclasses.replace(half, trainable="projector", steps=2, warmup_ratio=0.0)
    model = cases.model(CFG, 0, "bfloat16")  # which is returned so
    trained, _ = recover(model, cases.Stream(CFG), config, **QUIET)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype(jnp.bfloat16)}
    before = flatten(model.params)
    moved = {path for path, leaf in flatten(trained.params).items() if not np.array_equal(leaf, before[path])}
    assert {path.split("/")[0] for path in moved} == {"projector"}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_nothing(trained_whole, remat):
    trained, _ = train(cases.settings(remat=remat))
    assert cases.largest_difference(trained_whole[0], trained) < 1e-5


@pytest.mark.slow
def test_dots_gives_the_same_adapter_gradients_and_draws_dropout_once():
    model = add_lora(cases.model(CFG), dataclasses.replace(cases.LORA, dropout=0.3), jax.random.key(0))
    flat = flatten(model.params)
    trained, frozen = partition(flat, assign_groups(list(flat), "lora"))
    ids = jax.random.randint(jax.random.key(2), (4, 40), 0, CFG.text.vocab_size)  # equal ones leave q no gradient

    def gradient(remat):
        def total(some):
            params = unflatten({**frozen, **some})
            final, _ = encode(params, model.cfg, ids, remat=remat, dropout_key=jax.random.key(1))
            return jnp.sum(final * final)

        jitted = jax.jit(jax.grad(total))
        drawn = str(jax.make_jaxpr(jitted)(trained)).count("shift_left")  # only random decisions have any
        return jitted(trained), drawn

    (exact, drawn), (same, drawn_dots), (_, drawn_full) = map(gradient, ("none", "dots", "full"))
    for path, grad in exact.items():
        np.testing.assert_allclose(same[path], grad, atol=1e-5 * np.abs(grad).max(), err_msg=path)
    assert 0 < drawn == drawn_dots < drawn_full


def test_epochs_count_rows():
    config = cases.settings(steps=None, epochs=2.5)
    assert config.num_steps(100) == 31
    assert dataclasses.replace(config, steps=7).num_steps(100) == 7
    assert config.num_steps(1) == 1


@pytest.mark.parametrize("devices", [1, 2])
def test_packed_rows_are_split_as_their_rows(devices):
    """8 rows with 4 packed rows of images, 2 for each micro-batch."""
    mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
    rows, packs = jnp.arange(8), jnp.arange(4)
    with use_mesh(mesh):
        of_rows, of_packs = (jax.jit(functools.partial(program._split, n=2))(x) for x in (rows, packs))
    np.testing.assert_array_equal(of_rows // 2, np.repeat(of_packs, 2, axis=1))


@pytest.mark.slow
def test_gradients_are_clipped_by_their_global_norm():
    """With a huge eps and no decay a first step moves along the clipped gradient: clipping scales all moves equally.

    The model is a plain decoder with tied embeddings.
    """
    cfg = cases.config(vision=False, tie_embeddings=True, qkv_bias=False, out_bias=False)
    base = {"trainable": "decoder", "steps": 1, "warmup_ratio": 0.0, "weight_decay": 0.0}
    base |= {"eps": 1e4, "learning_rate": 10.0}
    free, summary = train(cases.settings(**base, clip_norm=None), cfg=cfg)
    clip = summary["last"]["grad_norm"] / 4
    clipped, same = train(cases.settings(**base, clip_norm=clip), cfg=cfg)
    assert same["last"]["grad_norm"] == pytest.approx(summary["last"]["grad_norm"])  # reported before clipping
    start, one, two = (flatten(m.params) for m in (cases.model(cfg), free, clipped))
    moves = [(np.asarray(one[p] - start[p]).ravel(), np.asarray(two[p] - start[p]).ravel()) for p in start]
    whole, quarter = (np.concatenate([move[i] for move in moves]) for i in (0, 1))
    np.testing.assert_allclose(np.linalg.norm(whole) / np.linalg.norm(quarter), 4, rtol=1e-3)


# --- batches of several lengths, with empty rows ----------------------------------------------------------------------


class Padded(cases.Stream):
    """The batches padded to `lengths` in turn, with `empty` rows behind every batch."""

    def __init__(self, lengths, empty=0, **options):
        super().__init__(DECODER, **options)
        self.lengths, self.empty = lengths, empty

    def __next__(self):
        length = self.lengths[self.at % len(self.lengths)]
        batch = super().__next__()
        padding = ((0, self.empty), (0, length - self.length))
        arrays = {
            name: np.pad(array, padding, constant_values=-100 if name == "labels" else 0)
            for name, array in batch.arrays.items()
        }
        skipped = tuple((f"lost-{self.at}-{row}", "why") for row in range(self.empty))
        return Batch(arrays, batch.record_ids + ("",) * self.empty, skipped=skipped)


def test_empty_rows_and_longer_batches_train_the_same():
    config = cases.settings(batch_size=6, accumulation=2, steps=3)
    plain, before = train(config, cfg=DECODER, stream=Padded((11,), rows=6))
    config = dataclasses.replace(config, batch_size=8)
    with_empty, summary = train(config, cfg=DECODER, stream=Padded((11, 20), rows=6, empty=2))
    assert cases.largest_difference(plain, with_empty) < 1e-6
    assert (before["skipped_rows"], summary["skipped_rows"]) == (0, 6)
    assert (before["last"]["empty_rows"], summary["last"]["empty_rows"]) == (0, 2)


@pytest.fixture(scope="module")
def batches(goldens):
    """Texts of 134, 188 and 251 tokens in three buckets."""
    answers = ["It is 10:45. " * (1, 1, 7, 14)[n % 4] for n in range(64)]
    records = [Record(f"r{n}", (("human", "Say it."), ("gpt", text)), ()) for n, text in enumerate(answers)]
    tokenizer, lengths = load_tokenizer(goldens / "tokenizers/llava"), (140, 200, 260)
    encoder = Encoder(tokenizer, templates()["llava_v1"], lengths[-1], None, -1, 0, 1, False, length_buckets=lengths)
    sizes = measure(records, encoder, on_error="stop", threads=1)
    order = {"seed": 3, "group_by": "length", "epochs": None, "drop_remainder": True}
    return train_batches(records, encoder, batch_size=8, sizes=sizes, threads=1, **order)


def test_nothing_is_compiled_in_mid_run(batches, tmp_path, capsys):
    """Of three buckets, with checkpoints, stopped and resumed; and the numbers are those of the jitted step."""
    cfg = cases.config(vision=False, layers=1)
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, vocab_size=512))
    config, mesh = cases.settings(steps=7, save_every=2), make_mesh(2, 1, 1, jax.devices()[:2])
    log, told = [], {}

    def note(event, seconds, *, fun_name="", **_):
        # orbax cuts what is replicated before it saves it for the first time: some copies, of milliseconds
        if event == "/jax/core/compile/backend_compile_duration" and fun_name != "jit(slice)":
            log.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for name, stop in (("stopped", 2), ("resumed", None)):
            log.clear()
            try:
                stopping = cases.terminate_at(stop)
                watched = cases.Watched(batches, lambda at, stop=stopping: (log.append("batch"), stop(at)))
                trained, summary = recover(cases.model(cfg), watched, config, workdir=tmp_path, mesh=mesh)
            except Stopped:
                assert stop is not None
            told[name] = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
            first = log.index("batch")
            assert log[:first].count("jit(_step)") == (3 if stop else 2)
            assert log[first:] == ["batch"] * (3 if stop else 4), name
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert told == {
        "stopped": ["  train: compiling 3 programs: sequences of 260, 200, 140 tokens"],
        "resumed": ["  train: compiling 2 programs: sequences of 260, 140 tokens"],
    }
    lines = cases.metrics_of(tmp_path)
    assert summary["compile_seconds"] > lines[4]["seconds"]
    run = prepare(cases.model(cfg), config, None, None, mesh, 7)
    state = run.state
    with program.step_context(mesh, "float32"):
        for line, batch in zip(lines, itertools.islice(batches, 7), strict=True):
            rows = program.place_rows(batch.arrays, mesh)
            state, metrics = run.program.step(state, run.frozen, run.teacher_params, rows)
            assert line["loss"] == float(metrics["loss"])
    whole = flatten(jax.device_get(trained.params))
    assert all(np.array_equal(whole[path], master) for path, master in jax.device_get(state.params).items())


@pytest.mark.slow
def test_nan_stops_and_names_the_records(tmp_path):
    """Batch 3 is poisoned: steps 1 to 3 are saved, nothing of step 4 is."""
    config = cases.settings(save_every=1)
    train = functools.partial(recover, cases.model(CFG), config=config, workdir=tmp_path, progress=False)
    fact = r"step 4: loss nan.* records record-3-0, record-3-1.* last checkpoint: step 3"
    refused(fact, train, cases.Stream(CFG, poison=3))
    listed = json.loads((tmp_path / "nonfinite-0.json").read_text())
    assert (listed["step"], listed["records"]) == (4, [f"record-3-{row}" for row in range(8)])
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 3
    _, summary = train(cases.Stream(CFG))
    assert summary["resumed_from"] == 3


def test_ids_outside_the_vocabulary_are_refused():
    cfg = cases.config(vision=False, layers=1, vocab_size=32)
    run = functools.partial(recover, cases.model(cfg), cases.Stream(cfg), cases.settings(), progress=False)
    refused("outside the vocabulary of 32", run)
