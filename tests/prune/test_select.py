"""Block Influence, the angular variant and depth plans."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import (
    EQUAL,
    REFERENCE_TOTAL,
    UNEQUAL,
    batch,
    config,
    depth_scores,
    expanded,
    golden_llava,
    llava_7b,
    model,
    on_mesh,
)

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import forward
from vlmprune_jax.prune import Scores, make_plan, score
from vlmprune_jax.prune.criteria.activations import _sums
from vlmprune_jax.prune.criteria.block_influence import cosine_distance
from vlmprune_jax.prune.fingerprint import shape_digest


def golden_samples(goldens):
    arrays = np.load(goldens / "block_influence" / "llava.npz")
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    return [expanded(*(arrays[f"s{n}_{name}"] for name in names)) for n in range(6)], arrays


def test_block_influence_equals_the_reference(goldens):
    samples, arrays = golden_samples(goldens)
    recorded = json.loads((goldens / "block_influence" / "llava.json").read_text())
    one = golden_llava(goldens)
    seen = []
    scores = score(one, samples, criterion="block_influence", reference_compat=True, progress=seen.append)
    np.testing.assert_allclose(scores.importance, arrays["importances"], rtol=1e-5)
    assert seen == [1, 2, 3, 4, 5, 6]
    for n, removed in recorded["removed"].items():
        plan = make_plan(scores, one.cfg, method="depth", layers_removed=int(n))
        assert list(plan.removed_layers) == sorted(removed)
        assert list(plan.kept_layers) == recorded["kept"][n]


def as_one_batch(samples):
    """All samples in one batch, padded on the right."""
    length = max(one["input_ids"].shape[1] for one in samples)
    result = {"pixel_values": np.concatenate([one["pixel_values"] for one in samples])}
    for name in ("input_ids", "attention_mask"):
        result[name] = np.concatenate([np.pad(s[name], ((0, 0), (0, length - s[name].shape[1]))) for s in samples])
    return result


def test_angular_distance_equals_the_reference(goldens):
    samples, arrays = golden_samples(goldens)
    samples = [as_one_batch(samples)]
    recorded = json.loads((goldens / "block_influence" / "llava.json").read_text())
    one = golden_llava(goldens)
    for n in (2, 3, 4, 5):
        scores = score(one, samples, criterion="angular", layers_removed=n, reference_compat=True)
        starts = 6 - n + 1
        np.testing.assert_allclose(scores.importance[:starts], arrays[f"angular_importances_k{n}"][:starts], rtol=1e-5)
        assert np.isinf(scores.importance[starts:]).all()
        plan = make_plan(scores, one.cfg, method="depth", layers_removed=n)
        assert list(plan.removed_layers) == recorded["angular"][str(n)]["removed"]


def straight(cfg, arrays, seed=0):
    """Mean over real tokens of 1 - cos between consecutive hidden states, the plain way."""
    _, aux = forward(
        model(cfg, seed), arrays["input_ids"], pixel_values=arrays.get("pixel_values"),
        attention_mask=arrays["attention_mask"], want=("hidden",),
    )  # fmt: skip
    hidden = np.stack([np.asarray(h, np.float64) for h in aux["hidden"]])
    a, b = hidden[:-1], hidden[1:]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return 1 - cosine


@pytest.mark.parametrize("vision", [False, True])
def test_default_is_the_mean_over_real_tokens(vision):
    cfg = config(UNEQUAL, vision=vision)
    arrays = batch(cfg)
    distance, mask = straight(cfg, arrays), arrays["attention_mask"] == 1
    scores = score(model(cfg), [arrays], criterion="block_influence")
    np.testing.assert_allclose(scores.importance, distance[:, mask].mean(axis=1), rtol=1e-5)
    compat = score(model(cfg), [arrays], criterion="block_influence", reference_compat=True)
    np.testing.assert_allclose(compat.importance, distance.sum(axis=(1, 2)), rtol=1e-5)


def test_padding_and_batching_do_not_change_the_scores():
    cfg = config(EQUAL)
    arrays = batch(cfg)
    expected = score(model(cfg), [arrays], criterion="block_influence").importance
    apart = [{name: array[i : i + 2] for name, array in arrays.items()} for i in (0, 2)]
    np.testing.assert_allclose(score(model(cfg), apart, criterion="block_influence").importance, expected, rtol=1e-5)
    lengths = arrays["attention_mask"].sum(axis=1)
    left = {n: np.stack([np.roll(row, 9 - k) for row, k in zip(a, lengths, strict=True)]) for n, a in arrays.items()}
    filler = {name: np.zeros_like(array) for name, array in arrays.items()}
    for criterion, options in (("block_influence", {}), ("angular", {"layers_removed": 2})):
        plain = score(model(cfg), [arrays], criterion=criterion, **options).importance
        np.testing.assert_allclose(
            score(model(cfg), [left, filler], criterion=criterion, **options).importance, plain, rtol=1e-5
        )


def test_angular_is_the_mean_angle_at_the_last_real_token():
    cfg = config(EQUAL)
    arrays = batch(cfg)
    _, aux = forward(model(cfg), arrays["input_ids"], attention_mask=arrays["attention_mask"], want=("hidden",))
    last = arrays["attention_mask"].sum(axis=1) - 1
    states = np.stack([np.asarray(h, np.float64)[np.arange(4), last] for h in aux["hidden"]])
    a, b = states[:-3], states[3:]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    scores = score(model(cfg), [arrays], criterion="angular", layers_removed=3)
    np.testing.assert_allclose(scores.importance[:3], (np.arccos(cosine) / np.pi).mean(axis=1), rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_the_same_scores():
    cfg = config(EQUAL, vision=True)
    batches = [batch(cfg, rows=8), batch(cfg, rows=3, seed=1)]
    expected = score(model(cfg), batches, criterion="block_influence")
    sharded = score(on_mesh(model(cfg), 2, 2, 2), batches, criterion="block_influence")
    np.testing.assert_allclose(sharded.importance, expected.importance, rtol=1e-5)
    assert sharded.fingerprint == expected.fingerprint


def test_cosine_distance_of_zero_opposite_and_nearly_equal_vectors():
    a = jnp.asarray([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [1.0, 0.0]])
    b = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [-2.0, -4.0], [6.0, 8.0], [1.0, 1e-4]])
    np.testing.assert_allclose(cosine_distance(a, b), [0.5, 0.5, 2.0, 0.0, 5e-9], rtol=1e-4, atol=1e-12)


def test_the_model_is_not_traced_again_for_every_batch():
    cfg = config(EQUAL)
    score(model(cfg), [batch(cfg)], criterion="block_influence")
    before = _sums._cache_size()
    score(model(cfg), [batch(cfg, seed=s) for s in range(3)], criterion="block_influence")
    assert _sums._cache_size() == before


@pytest.mark.parametrize(
    ("n", "percent", "of_decoder"),
    [(5, 14.33, 15.02), (10, 28.65, 30.03), (15, 42.98, 45.05), (20, 57.31, 60.07), (21, 60.17, 63.07)],
)
def test_llava_7b_ratios_by_layers(n, percent, of_decoder):
    cfg = llava_7b()
    assert count_params(cfg, "text") == 6_738_415_616
    assert count_params(cfg, "projector") == 20_979_712
    scores = depth_scores(cfg, list(range(32)))
    plan = make_plan(scores, cfg, method="depth", layers_removed=n, parameters_total=REFERENCE_TOTAL)
    assert round(100 * plan.reached, 2) == percent
    assert round(100 * (plan.parameters_before - plan.parameters_after) / 6_738_415_616, 2) == of_decoder
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    assert plan.removed_layers == tuple(range(n))
    # and back: asking for that ratio of the computed model gives the same layers
    own = make_plan(scores, cfg, method="depth", layers_removed=n)
    assert own.parameters_total == count_params(cfg) < REFERENCE_TOTAL
    assert make_plan(scores, cfg, method="depth", ratio=own.reached).layers == own.layers


def test_rounding_and_protection():
    cfg = config(EQUAL)
    scores = depth_scores(cfg, [5, 1, 2, 0, 4])
    one = make_plan(scores, cfg, method="depth", layers_removed=1).reached
    nearest = make_plan(scores, cfg, method="depth", ratio=1.4 * one)
    assert nearest.removed_layers == (3,)
    assert (nearest.asked, nearest.reached) == (1.4 * one, one)
    assert make_plan(scores, cfg, method="depth", ratio=1.6 * one).removed_layers == (1, 3)
    assert make_plan(scores, cfg, method="depth", ratio=1.4 * one, rounding="at_least").removed_layers == (1, 3)
    assert make_plan(scores, cfg, method="depth", ratio=2 * one, protect=(3, 1)).removed_layers == (2, 4)
    assert make_plan(scores, cfg, method="depth", ratio=0).removed_layers == ()


def test_unequal_layers_count_with_their_own_size():
    cfg = config(UNEQUAL)
    scores = depth_scores(cfg, [3, 0, 1, 2])
    for n in range(4):
        plan = make_plan(scores, cfg, method="depth", layers_removed=n)
        assert plan.parameters_after == count_params(plan.apply_to(cfg))
        assert plan.removed_layers == tuple(sorted([1, 2, 3][:n]))


def test_angular_plans_remove_the_nearest_free_block():
    cfg = config(EQUAL)
    scores = Scores(
        "angular", shape_digest(cfg) + "-x", {"layers_removed": 2}, importance=np.array([3, 1, 2, 4, np.inf])
    )
    assert make_plan(scores, cfg, method="depth", layers_removed=2).removed_layers == (1, 2)
    assert make_plan(scores, cfg, method="depth", layers_removed=2, protect=(2,)).removed_layers == (0, 1)
    with pytest.raises(UserError, match=r"no 2 consecutive layers are free of the protected ones \[1, 3\]"):
        make_plan(scores, cfg, method="depth", layers_removed=2, protect=(1, 3))
    for request in ({"layers_removed": 3}, {"ratio": 0.2}):
        with pytest.raises(UserError, match="angular scores are for removing 2 consecutive layers"):
            make_plan(scores, cfg, method="depth", **request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"ratio": 0.99},
            r"ratio 0.99 cannot be reached by depth .*removing 4 of 5 layers \(0 protected\) gives at most 0\.\d+",
        ),
        ({"ratio": 0.4, "protect": (0, 1, 2, 3)}, r"removing 1 of 5 layers \(4 protected\)"),
        ({"ratio": 30}, r"ratio=30.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
        ({"ratio": -0.1}, "ratio=-0.1 must be at least 0"),
        ({"layers_removed": 5}, r"layers_removed=5 must be between 0 and 4 \(5 layers, 0 protected\)"),
        ({}, "needs exactly one of ratio, layers_removed and budget, got none"),
        ({"ratio": 0.1, "layers_removed": 1}, "needs exactly one of .*, got ratio and layers_removed"),
        ({"ratio": 0.1, "protect": (7,)}, r"protect=\[7\] names layers that do not exist: there are 5"),
        ({"ratio": 0.1, "rounding": "up"}, "rounding 'up' is not one of nearest, at_least"),
        ({"ratio": 0.1, "protekt": (1,)}, r"make_plan has no 'protekt'; did you mean 'protect'\?"),
        ({"ratio": 0.1, "method": "dept"}, r"method 'dept' is not one of depth, width, hybrid; did you mean 'depth'\?"),
    ],
)
def test_depth_plans_refuse(request_, message):
    cfg = config(EQUAL)
    with pytest.raises(UserError, match=message):
        make_plan(depth_scores(cfg, [0, 1, 2, 3, 4]), cfg, **{"method": "depth", **request_})


def test_scores_of_another_model_or_kind_are_refused():
    cfg = config(EQUAL)
    with pytest.raises(UserError, match="scores of another model: their shapes differ"):
        make_plan(depth_scores(config(UNEQUAL), [0, 1, 2, 3]), cfg, method="depth", layers_removed=1)
    widths = Scores("l1", shape_digest(cfg) + "-x", {}, heads=(np.ones(2),) * 5, mlp=(np.ones(12),) * 5)
    with pytest.raises(UserError, match="l1 scores have no layer importances: depth needs block_influence"):
        make_plan(widths, cfg, method="depth", layers_removed=1)
    with pytest.raises(UserError, match="block_influence scores have no widths: width needs taylor"):
        make_plan(depth_scores(cfg, [0, 1, 2, 3, 4]), cfg, method="width", ratio=0.1)
    with pytest.raises(UserError, match="method 'depth' needs one Scores, got tuple"):
        make_plan((widths, widths), cfg, method="depth", layers_removed=1)
