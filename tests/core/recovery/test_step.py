"""The step: meshes and accumulation give the same numbers, frozen stays frozen, dropout, dtypes, settings."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases

from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
from vlmprune_jax.core.models.params import flatten, unflatten
from vlmprune_jax.core.models.vlm import encode
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.losses import term_weights
from vlmprune_jax.core.recovery.program import Program, TrainState, _split, batch_sharding, make_program, step_context
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups, partition

CFG = cases.config()
QUIET = {"progress": False}
DISTILL = LossConfig(0.5, 0.5, 0.1, 0.1, (1, -1), 2.0, "student", False, 4)


def train(config, *, cfg=CFG, **options):
    return recover(cases.model(cfg), cases.Stream(cfg), config, **QUIET, **options)


def program_of(config, mesh=None):
    return make_program(CFG, config, teacher_cfg=None, kept_layers=None, mesh=mesh, num_steps=2)


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
    """Everything trained on one device; the caller's arrays survive although the step donates its state."""
    before = {path: np.array(leaf) for path, leaf in flatten(cases.model(CFG).params).items()}
    result = train(cases.settings())
    for path, leaf in flatten(cases.model(CFG).params).items():
        assert np.array_equal(leaf, before[path])
    return result


@pytest.mark.parametrize("shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 4, 2)])
def test_a_mesh_gives_the_same_training(trained_whole, shape):
    sharded, _ = train(cases.settings(), mesh=make_mesh(*shape))
    assert cases.largest_difference(trained_whole[0], sharded) < 1e-5
    for leaf in jax.tree.leaves(sharded.params):
        assert leaf.sharding.mesh.size == 8


def test_everything_moves(trained_whole):
    before = flatten(cases.model(CFG).params)
    still = [path for path, leaf in flatten(trained_whole[0].params).items() if np.array_equal(leaf, before[path])]
    assert not still


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


def test_adapter_dropout_is_seeded(twenty_steps):
    """The same seed gives the same bytes, and dropout does something."""
    lora = dataclasses.replace(cases.LORA, dropout=0.3)
    config = dataclasses.replace(_distillation(), lora=lora)
    one, two = (train(config, teacher=cases.model(CFG, 9))[0] for _ in range(2))
    cases.assert_bitwise(one, two)
    assert cases.largest_difference(one, twenty_steps[0]) > 1e-5


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
        program = Program(model.cfg, config, None, {}, None, {}, None)
        return program.gradients(TrainState(trained, (), step, key), frozen, None, batch, weights)[0]

    once, twice, later = gradient(1, 0), gradient(2, 0), gradient(1, 1)
    for other in (twice, later):
        assert any(np.abs(other[path] - once[path]).max() > 1e-2 * np.abs(once[path]).max() for path in once)


def test_micro_batches_take_rows_from_where_they_lie():
    """Splitting a batch moves nothing between devices."""
    mesh = make_mesh(4, 2, 1)
    rows = jax.device_put(np.arange(48).reshape(16, 3), batch_sharding(mesh, 2))
    with step_context(mesh, "float32"):
        compiled = jax.jit(functools.partial(_split, n=2)).lower(rows).compile()
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


@pytest.mark.slow
def test_a_bfloat16_model_is_returned_in_bfloat16():
    config = cases.settings(compute_dtype="bfloat16", trainable="projector", steps=2, warmup_ratio=0.0)
    trained, _ = recover(cases.model(CFG, 0, "bfloat16"), cases.Stream(CFG), config, **QUIET)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {jnp.dtype(jnp.bfloat16)}
    before = flatten(cases.model(CFG, 0, "bfloat16").params)
    moved = {path for path, leaf in flatten(trained.params).items() if not np.array_equal(leaf, before[path])}
    assert moved
    assert all(path.startswith("projector/") for path in moved)


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
        drawn = _count("shift_left", jax.make_jaxpr(jitted)(trained).jaxpr)  # only random decisions have any
        return jitted(trained), drawn

    (exact, drawn), (same, drawn_dots), (_, drawn_full) = map(gradient, ("none", "dots", "full"))
    for path, grad in exact.items():
        np.testing.assert_allclose(same[path], grad, atol=1e-5 * np.abs(grad).max(), err_msg=path)
    assert 0 < drawn == drawn_dots < drawn_full


def _count(primitive, jaxpr) -> int:
    """How many equations of a primitive there are, inner jaxprs included."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += _count(primitive, inner) if hasattr(inner, "eqns") else 0
    return found


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
        of_rows, of_packs = (jax.jit(functools.partial(_split, n=2))(x) for x in (rows, packs))
    np.testing.assert_array_equal(of_rows // 2, np.repeat(of_packs, 2, axis=1))
