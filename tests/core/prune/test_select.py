"""Depth plans, those for engines that hold only some orders of layers, and kept layers and tokens."""

import dataclasses

import numpy as np
import pytest
from prune_cases import (
    EQUAL,
    REFERENCE_TOTAL,
    UNEQUAL,
    config,
    depth_scores,
    hand_plan,
    kept_units,
    layer_scores,
    llava_7b,
    unit_scores,
)
from refusal import refused
from stack_cases import decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.plans.kept import KeptLayer, KeptVocabulary
from vlmprune_jax.core.prune import Scores, compose
from vlmprune_jax.core.prune.fingerprints import fingerprint, shape_digest
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
    values = layer_scores([3, 1, 2, 4, np.inf])
    scores = Scores("angular", shape_digest(cfg) + "-x", {"layers_removed": 2}, values=values)
    assert make_plan(scores, cfg, method="depth", layers_removed=2).removed_layers == (1, 2)
    assert make_plan(scores, cfg, method="depth", layers_removed=2, protect=(2,)).removed_layers == (0, 1)
    refused(r"no 2 .*layers \[1, 3\]", make_plan, scores, cfg, method="depth", layers_removed=2, protect=(1, 3))
    for request in ({"layers_removed": 3}, {"ratio": 0.2}):
        refused("angular scores are for removing 2 consecutive", make_plan, scores, cfg, method="depth", **request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"ratio": 0.99}, r"ratio 0.99 cannot be reached by depth .*removing 4 of 5 layers \(0 protected\) gives"),
        ({"ratio": 0.4, "protect": (0, 1, 2, 3)}, r"removing 1 of 5 layers \(4 protected\)"),
        ({"ratio": 30}, r"ratio=30.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
        ({"ratio": -0.1}, "ratio=-0.1 must be at least 0"),
        ({"layers_removed": 5}, r"layers_removed=5 must be between 0 and 4 \(5 layers, 0 protected\)"),
        ({}, "needs exactly one of ratio, layers_removed, layers and budget, got none"),
        ({"ratio": 0.1, "layers_removed": 1}, "needs exactly one of .*, got ratio and layers_removed"),
        ({"ratio": 0.1, "protect": (7,)}, r"protect=\[7\] contains layers that do not exist: the model has 5 layers"),
        ({"ratio": 0.1, "rounding": "up"}, "rounding 'up' is not one of nearest, at_least"),
        ({"ratio": 0.1, "protekt": (1,)}, r"make_plan has no setting 'protekt'; did you mean 'protect'\?"),
        ({"ratio": 0.1, "method": "dept"}, r"method 'dept' is not one of depth, width, hybrid, experts, none; did you"),
    ],
)
def test_depth_plans_refuse(request_, message):
    cfg = config(EQUAL)
    refused(message, make_plan, depth_scores(cfg, [0, 1, 2, 3, 4]), cfg, **{"method": "depth", **request_})


def test_scores_of_another_model_or_kind_are_refused():
    cfg = config(EQUAL)
    depth, other = depth_scores(cfg, [0, 1, 2, 3, 4]), depth_scores(config(UNEQUAL), [0, 1, 2, 3])
    widths = Scores("l1", shape_digest(cfg) + "-x", {}, values=unit_scores((np.ones(2),) * 5, (np.ones(12),) * 5))
    refused("these scores are for another model", make_plan, other, cfg, method="depth", layers_removed=1)
    refused("l1 does not score layers: for depth pruning", make_plan, widths, cfg, method="depth", layers_removed=1)
    refused("block_influence does not score heads and neurons", make_plan, depth, cfg, method="width", ratio=0.1)
    refused("one Scores object, got tuple", make_plan, (widths, widths), cfg, method="depth", layers_removed=1)


def test_engines_that_hold_only_some_orders_of_layers(goldens):
    """Windows in all but every third of six layers: they go from the end, or in a block that keeps the order."""
    model = vp.load(goldens / "families/gemma3/ckpt")

    def removed(importance, n, loads_in=("gguf",), protect=(), **options):
        scores = vp.Scores("by hand", fingerprint(model), options, layer_scores(importance))
        plan = make_plan(scores, model, method="depth", layers_removed=n, loads_in=loads_in, protect=protect)
        return plan.removed_layers

    assert removed([0, 1, 5, 4, 3, 2], 2, ()) == (0, 1)
    assert removed([0, 1, 5, 4, 3, 2], 2) == (4, 5)
    # the reason names the engine and an alternative
    fact = r"0 and 0 .*loads_in='gguf': .*full attention in .*remove n consec"
    refused(fact, removed, range(6), 2, protect=(2, 5))
    # three consecutive layers may go anywhere, the first two not
    assert removed([3, 0, 1, 2, np.inf, np.inf], 3, layers_removed=3) == (1, 2, 3)
    assert removed([*range(5), np.inf], 2, layers_removed=2) == (1, 2)


BEFORE = (decoder_layer(6, 3, 10), decoder_layer(4, 2, 8), decoder_layer(6, 3, 10))
CFG = config(BEFORE)
FIRST = hand_plan(CFG, text=[kept_units(0, (0, 1, 4, 5), (0, 2), (1, 3, 8)), KeptLayer.whole(2, BEFORE[2])])


def test_a_stack_pruned_twice_is_one_stack_in_original_numbers():
    after = FIRST.apply_to(CFG)
    second = hand_plan(after, text=[kept_units(0, (2, 3), (1,), (0, 2))])
    assert compose(FIRST, second).stacks == hand_plan(CFG, text=[kept_units(0, (4, 5), (2,), (1, 8))]).stacks
    assert compose(hand_plan(CFG), FIRST).kept == FIRST.kept == compose(FIRST, hand_plan(after)).kept
    assert (FIRST.kept_layers, FIRST.removed_layers) == ((0, 2), (1,))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), r"text/layers: kept layers \[\] are not increasing numbers below 3, at least one"),
        ((KeptLayer.whole(2, BEFORE[2]), KeptLayer.whole(0, BEFORE[0])), r"kept layers \[2, 0\] are not increasing"),
        ((kept_units(1, (0, 4), (0, 1), (0,)),), r"text/1/q_heads: kept query heads \[0, 4\] are not increasing"),
        ((kept_units(1, (0, 1), (0,), ()),), r"kept neurons \[\] are not increasing numbers below 8, at least one"),
        ((kept_units(1, (0, 1, 2), (0, 1), (0,)),), r"keeps query heads \[0, 1, 2\] that do not share its .* evenly"),
    ],
)
def test_plans_refuse(layers, message):
    refused(f"prune plan: .*{message}", hand_plan, CFG, text=layers)


def test_plans_and_vocabularies_that_do_not_fit():
    for kept in ((), (3, 2), (700,)):
        vocabulary = KeptVocabulary(640, kept, "")
        refused("text/vocab: kept tokens .* are not increasing numbers below 640", hand_plan(CFG).trimming, vocabulary)
    refused(f"9 rows, this model's {CFG.text.vocab_size}", KeptVocabulary(9, (1, 2), "").apply_to, CFG)
    refused("the plans cannot be composed", compose, FIRST, FIRST)
