"""Depth plans."""

import dataclasses

import numpy as np
import pytest
from prune_cases import (
    EQUAL,
    REFERENCE_TOTAL,
    UNEQUAL,
    config,
    depth_scores,
    layer_scores,
    llava_7b,
    unit_scores,
)

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import Scores
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.io.exports.pruning import make_plan


@pytest.mark.parametrize(
    ("n", "percent", "of_decoder"),
    [(5, 14.33, 15.02), (10, 28.65, 30.03), (15, 42.98, 45.05), (20, 57.31, 60.07), (21, 60.17, 63.07)],
)
def test_llava_7b_ratios_by_layers(n, percent, of_decoder):
    cfg = llava_7b()
    assert count_params(cfg, "text") == 6_738_415_616
    assert count_params(cfg, "projector") == 20_979_712
    scores = depth_scores(cfg, list(range(32)))
    plan = make_plan(scores, cfg, method="depth", layers_removed=n)
    assert round(100 * dataclasses.replace(plan, parameters_total=REFERENCE_TOTAL).actual_ratio, 2) == percent
    assert round(100 * (plan.parameters_before - plan.parameters_after) / 6_738_415_616, 2) == of_decoder
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    assert plan.removed_layers == tuple(range(n))
    # and back: asking for that ratio of the computed model gives the same layers
    assert plan.parameters_total == count_params(cfg) < REFERENCE_TOTAL
    assert make_plan(scores, cfg, method="depth", ratio=plan.actual_ratio).layers == plan.layers


def test_rounding_and_protection():
    cfg = config(EQUAL)
    scores = depth_scores(cfg, [5, 1, 2, 0, 4])
    one = make_plan(scores, cfg, method="depth", layers_removed=1).actual_ratio
    nearest = make_plan(scores, cfg, method="depth", ratio=1.4 * one)
    assert nearest.removed_layers == (3,)
    assert (nearest.target_ratio, nearest.actual_ratio) == (1.4 * one, one)
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
        "angular", shape_digest(cfg) + "-x", {"layers_removed": 2}, values=layer_scores([3, 1, 2, 4, np.inf])
    )
    assert make_plan(scores, cfg, method="depth", layers_removed=2).removed_layers == (1, 2)
    assert make_plan(scores, cfg, method="depth", layers_removed=2, protect=(2,)).removed_layers == (0, 1)
    with pytest.raises(UserError, match=r"there are no 2 consecutive layers without the protected layers \[1, 3\]"):
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
        ({}, "needs exactly one of ratio, layers_removed, layers and budget, got none"),
        ({"ratio": 0.1, "layers_removed": 1}, "needs exactly one of .*, got ratio and layers_removed"),
        ({"ratio": 0.1, "protect": (7,)}, r"protect=\[7\] contains layers that do not exist: the model has 5 layers"),
        ({"ratio": 0.1, "rounding": "up"}, "rounding 'up' is not one of nearest, at_least"),
        ({"ratio": 0.1, "protekt": (1,)}, r"make_plan has no setting 'protekt'; did you mean 'protect'\?"),
        (
            {"ratio": 0.1, "method": "dept"},
            r"method 'dept' is not one of depth, width, hybrid, experts, none; did you mean 'depth'\?",
        ),
    ],
)
def test_depth_plans_refuse(request_, message):
    cfg = config(EQUAL)
    with pytest.raises(UserError, match=message):
        make_plan(depth_scores(cfg, [0, 1, 2, 3, 4]), cfg, **{"method": "depth", **request_})


def test_scores_of_another_model_or_kind_are_refused():
    cfg = config(EQUAL)
    with pytest.raises(UserError, match="these scores are for another model"):
        make_plan(depth_scores(config(UNEQUAL), [0, 1, 2, 3]), cfg, method="depth", layers_removed=1)
    widths = Scores("l1", shape_digest(cfg) + "-x", {}, values=unit_scores((np.ones(2),) * 5, (np.ones(12),) * 5))
    with pytest.raises(UserError, match="l1 does not score layers: for depth pruning, score with block_influence"):
        make_plan(widths, cfg, method="depth", layers_removed=1)
    with pytest.raises(
        UserError, match="block_influence does not score heads and neurons: for width pruning, score with taylor"
    ):
        make_plan(depth_scores(cfg, [0, 1, 2, 3, 4]), cfg, method="width", ratio=0.1)
    with pytest.raises(UserError, match="method 'depth' needs one Scores object, got tuple"):
        make_plan((widths, widths), cfg, method="depth", layers_removed=1)
