"""Scores by kind of token, and what tokens of a kind count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, batch, config, layer_scores, model

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.prune import CRITERIA, Scores, score
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.criteria import gradients

CFG = config(EQUAL, vision=True)
OPTIONS = {"angular": {"layers_removed": 2}, "taylor": {"by_token_type": True, "variant": "vectorize"}}
SPLITTING = ("block_influence", "angular", "activation", "fluctuation", "taylor")


@functools.cache
def found(criterion, **weights):
    return score(model(CFG), [batch(CFG)], criterion=criterion, **OPTIONS.get(criterion, {}), **weights)


def flat(parts):
    parts = parts.values if isinstance(parts, Scores) else parts
    return np.concatenate([*parts.values()])


def test_these_split():
    of_experts = {"reap", "man", "msan", "expert_norm", "expert_frequency"}  # test_routed
    assert {name for name, criterion in CRITERIA.items() if criterion.splits} == {*SPLITTING, *of_experts}


@pytest.mark.slow
@pytest.mark.parametrize("criterion", SPLITTING)
def test_scores_of_a_kind_are_the_scores_if_only_that_kind_counts(criterion):
    scores = found(criterion)
    assert list(scores.by_token_type) == ["image", "prompt", "answer"]
    only = {f"{kind}_weight": float(kind == "image") for kind in scores.by_token_type}
    np.testing.assert_allclose(flat(scores.by_token_type["image"]), flat(found(criterion, **only)), rtol=1e-6)
    apart = {flat(parts).tobytes() for parts in (scores, *scores.by_token_type.values())}
    assert len(apart) == (3 if criterion == "angular" else 4)  # a row's last token is of its answer


def test_weights_of_kinds_that_are_all_doubled_change_nothing_but_a_gradient():
    doubled = {f"{kind}_weight": 2.0 for kind in ("image", "prompt", "answer")}
    for criterion in ("block_influence", "activation"):
        np.testing.assert_allclose(flat(found(criterion, **doubled)), flat(found(criterion)), rtol=1e-6)
    np.testing.assert_allclose(flat(found("taylor", **doubled)), 2 * flat(found("taylor")), rtol=1e-6)


def whole_gradient(w, g, a, axis):
    return g


def test_shares_of_kinds_add_up_to_the_gradient():
    batches = calibration_batches([batch(CFG)], CFG, labels=True)
    layers, kinds = gradients.gradient_channels(
        model(CFG), batches, whole_gradient, rows_per_step=2, memory_budget=0, by_token_type=True
    )
    added = jax.tree.map(lambda *shares: sum(shares), *kinds.values())
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-7, rtol=1e-4), added, layers)


def test_text_has_two_kinds_and_one_kind_is_not_told_apart():
    cfg = config(EQUAL)
    arrays = batch(cfg)
    assert list(score(model(cfg), [arrays], criterion="block_influence").by_token_type) == ["prompt", "answer"]
    unlabelled = {name: array for name, array in arrays.items() if name != "labels"}
    assert score(model(cfg), [unlabelled], criterion="block_influence").by_token_type == {}
    compat = score(model(cfg), [arrays], criterion="block_influence", reference_compat=True)
    assert compat.by_token_type == {}


def test_a_kind_that_alone_counts_must_be_there():
    cfg = config(EQUAL)
    with pytest.raises(UserError, match="contain only padding"):
        score(model(cfg), [batch(cfg)], criterion="block_influence", prompt_weight=0, answer_weight=0)
    with pytest.raises(UserError, match="has no option 'image_weight'"):
        score(model(cfg), criterion="l1", image_weight=0.5)


def test_files_hold_them(tmp_path):
    for criterion in ("block_influence", "activation"):
        scores = found(criterion)
        scores.save(tmp_path / "scores.npz")
        again = Scores.load(tmp_path / "scores.npz")
        for one, other in zip(
            (scores, *scores.by_token_type.values()), (again, *again.by_token_type.values()), strict=True
        ):
            np.testing.assert_array_equal(flat(one), flat(other))
    dataclasses.replace(scores, by_token_type={}).save(tmp_path / "total.npz")
    assert Scores.load(tmp_path / "total.npz").by_token_type == {}
    with np.load(tmp_path / "total.npz") as file:
        total = dict(file)
    np.savez(tmp_path / "cut.npz", **{**total, "text/0/mlp@image": np.zeros(3)})
    with pytest.raises(UserError, match="scores by token type and total scores have different shapes"):
        Scores.load(tmp_path / "cut.npz")


def test_a_criterion_that_weighs_nothing_is_not_split(monkeypatch):
    own = dataclasses.replace(
        CRITERIA["block_influence"], function=lambda layer, tokens: {"one": jnp.float32(1)},
        finish=lambda sums, model: layer_scores([layer["one"] for layer in sums]), options={}, splits=False,
    )  # fmt: skip
    monkeypatch.setitem(CRITERIA, "own", own)
    assert score(model(CFG), [batch(CFG)], criterion="own").by_token_type == {}
    with pytest.raises(UserError, match="reads no tokens"):
        dataclasses.replace(CRITERIA["l1"], splits=True)
