"""The registry of loss terms: what a term may ask for, what is refused, and `vp.losses` as the values of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.params import place_params, unflatten
from vlmprune_jax.core.models.vlm import Model, apply
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.terms import check_losses, needs_teacher
from vlmprune_jax.core.recovery.trainable import add_lora

CFG = cases.config()


@pytest.fixture
def terms():
    """`vp.losses`, as it was afterwards."""
    before = dict(vp.losses)
    yield vp.losses
    vp.losses.clear()
    vp.losses.update(before)


@pytest.mark.slow
def test_values_of_a_batch_are_those_of_a_step():
    """All five terms, with the plan's layers; with adapters, in the config's precision, on a mesh."""
    student, teacher, batch = cases.model(CFG, 1), cases.model(CFG, 9), next(cases.Stream(CFG))
    loss = vp.LossConfig(ce=0.5, l2=0.5, kl=0.1, rkl=0.1, cosine=0.2, l2_layers=(1, -1), chunk=4)
    config = cases.settings(losses=loss, steps=1, learning_rate=1e-3)
    _, summary = recover(student, iter([batch]), config, teacher=teacher, progress=False)
    found = vp.losses(student, batch, config, teacher=teacher)
    assert list(found) == ["ce", "l2", "cosine", "kl", "rkl", "total"]
    for name, value in found.items():
        assert value == pytest.approx(summary["last"]["loss" if name == "total" else name], rel=1e-6), name
    assert vp.losses(student, batch.arrays, loss, teacher=teacher) == pytest.approx(found, rel=1e-6)
    adapted = add_lora(student, cases.LORA, jax.random.key(0))  # which change nothing at first
    assert vp.losses(adapted, batch, loss, teacher=teacher) == pytest.approx(found, rel=1e-5)
    mesh = make_mesh(4, 2, 1)
    both = [Model(unflatten(place_params(one, mesh)), one.cfg) for one in (student, teacher)]
    assert vp.losses(both[0], batch, loss, teacher=both[1]) == pytest.approx(found, rel=1e-5)
    half = vp.losses(student, batch, cases.settings(losses=loss, compute_dtype="bfloat16"), teacher=teacher)
    assert half["total"] != found["total"]
    assert half["total"] == pytest.approx(found["total"], rel=0.02)


def test_values_without_a_teacher_or_of_what_does_not_fit():
    student, batch = cases.model(CFG, 1), next(cases.Stream(CFG))
    found = vp.losses(student, batch, vp.LossConfig())
    assert found.keys() == {"ce", "total"}
    assert found["ce"] == found["total"] > 0
    refused("kl needs a teacher", vp.losses, student, batch, vp.LossConfig(kl=1.0))
    unlabelled = {name: array for name, array in batch.arrays.items() if name != "labels"}
    refused("the batch has no labels", vp.losses, student, unlabelled, vp.LossConfig())


@pytest.mark.slow
def test_a_term_on_the_students_states_alone(terms):
    """No teacher runs; the mean is over real tokens and layers; another function of the same name is compiled anew."""
    terms["small"] = vp.LossTerm(lambda h: jnp.sum(h * h, axis=-1), needs=("hidden",), counts="features")
    loss = vp.LossConfig(extra={"small": 0.1}, l2_layers=(0, 1, -1))
    assert not needs_teacher(loss)
    student, batch = cases.model(CFG, 1), next(cases.Stream(CFG, rows=2))
    found = vp.losses(student, batch, loss)
    ids = jnp.asarray(batch.arrays["input_ids"])
    mask, media = batch.arrays["attention_mask"], check_batch(CFG, batch.arrays)["media"]
    _, aux = apply(student.params, CFG, ids, capture=("hidden",), attention_mask=mask, media=media)
    states = [np.asarray(aux["hidden"][i], np.float64)[batch.arrays["attention_mask"] == 1] for i in (0, 1, -1)]
    assert found["small"] == pytest.approx(np.mean([np.square(x).mean() for x in states]), rel=1e-5)
    assert found["total"] == pytest.approx(found["ce"] + 0.1 * found["small"], rel=1e-6)
    terms["small"] = vp.LossTerm(lambda h: 2 * jnp.sum(h * h, axis=-1), needs=("hidden",), counts="features")
    assert vp.losses(student, batch, loss)["small"] == pytest.approx(2 * found["small"], rel=1e-6)


def test_a_term_of_the_students_distribution_beside_a_cached_teacher(terms):
    """Its entropy, which needs no teacher and sees all of the vocabulary."""
    terms["entropy"] = vp.LossTerm(
        lambda p: -jnp.sum(jnp.exp(p) * p, axis=-1), needs=("log_probs",), counts="positions"
    )
    loss = vp.LossConfig(kl=0.5, extra={"entropy": 1.0}, teacher_top_k=3, teacher_inputs="own", chunk=4)
    cfg = cases.config(vision=False)
    batch = next(cases.Stream(cfg))
    shape = batch.arrays["input_ids"].shape
    batch.arrays["teacher_ids"] = np.tile(np.arange(3, dtype=np.int32), (*shape, 1))
    batch.arrays["teacher_logprobs"] = np.full((*shape, 4), np.log(0.25), np.float32)
    found = vp.losses(cases.model(cfg), batch, loss)
    assert 0 < found["entropy"] <= 4 * np.log(64)  # temperature 2, squared
    assert found["total"] == pytest.approx(found["ce"] + 0.5 * found["kl"] + found["entropy"], rel=1e-6)
    flops = step_flops(cfg, cfg, loss, ["text/lm_head/weight"], rows=2, length=8, images=0)
    assert flops.teacher == 0


def test_what_is_no_term(terms):
    with pytest.raises(UserError, match="'a b' must be a Python identifier"):
        terms["a b"] = terms["kl"]
    with pytest.raises(UserError, match="its value a LossTerm, got"):
        terms["mine"] = jnp.sum
    terms["mine"] = vp.LossTerm(lambda a, b: a - b, needs=("teacher_logits", "logits"), counts="positions")
    refused(
        "mine cannot be computed from cached top-k logits of a teacher \\(only kl can\\)",
        check_losses,
        vp.LossConfig(kl=1.0, extra={"mine": 1.0}, teacher_top_k=3, teacher_inputs="own"),
    )
    terms["tokens"] = vp.LossTerm(lambda x: x[..., 0], needs=("logits",), counts="labels")
    config = cases.settings(steps=1, losses=vp.LossConfig(extra={"tokens": 1.0}))
    refused("name of a training metric", recover, cases.model(CFG), cases.Stream(CFG), config, progress=False)
