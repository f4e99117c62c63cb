"""From scores to a plan: layers, heads and neurons of decoders and towers, engines' limits, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import (
    EQUAL,
    REFERENCE_TOTAL,
    UNEQUAL,
    config,
    depth_scores,
    layer_scores,
    llava_7b,
    unit_scores,
    width_scores,
)
from refusal import refused
from stack_cases import decoder_layer, tower_layer

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan, Scores, compose, keep_everything
from vlmprune_jax.core.prune.fingerprints import fingerprint, shape_digest
from vlmprune_jax.io.exports.pruning import make_plan

# Layers.


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
    unequal = config(UNEQUAL)
    for n in range(4):  # unequal layers count with their own size
        plan = make_plan(depth_scores(unequal, [3, 0, 1, 2]), unequal, method="depth", layers_removed=n)
        assert plan.parameters_after == count_params(plan.apply_to(unequal))
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


# Heads and neurons.

shapes = st.builds(lambda kv, group, mlp: decoder_layer(kv * group, kv, mlp), *map(st.integers, (1, 1, 2), (4, 3, 30)))


@given(
    ratio=st.floats(0, 0.95),
    layers=st.lists(shapes, min_size=1, max_size=4),
    gqa=st.sampled_from(["groups", "q_heads"]),
    multiple=st.sampled_from([1, 2]),
)
@settings(max_examples=20, deadline=None)
def test_any_ratio_is_planned_honestly_or_refused(ratio, layers, gqa, multiple):
    cfg = config(tuple(layers))
    costs = layer_costs(cfg)
    options = {"method": "width", "ratio": ratio, "neurons_multiple": multiple}
    scores = width_scores(cfg, gqa=gqa)
    least = 0
    for shape in layers:  # one group, or one query head in every group
        kv_heads = shape.mixer.kv_heads
        narrowest = (shape.mixer.group, 1) if gqa == "groups" else (kv_heads, kv_heads)
        least += costs.of(decoder_layer(*narrowest, multiple))
    if ratio * count_params(cfg) > sum(map(costs.of, layers)) - least:
        refused("cannot be reached by width", make_plan, scores, cfg, **options)
        return
    plan = make_plan(scores, cfg, **options)
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    # off by at most one head in every layer, the coarsest step there is
    no_heads = [{**layer.sizes, "q_heads": 0, "kv_heads": 0} for layer in layers]
    heads = [costs.of(layer) - costs.at(layer)(sizes) for layer, sizes in zip(layers, no_heads, strict=True)]
    neurons = [costs.price(layer, "mlp") * multiple for layer in layers]
    step = sum(map(max, heads, neurons))
    assert abs(plan.actual_ratio - ratio) * plan.parameters_total <= step


def assert_reached(plan, ratio, cfg, layers, stack="text"):
    """The plan comes within half a neuron of so many layers."""
    neuron = layer_costs(cfg, stack).price(cfg.stack(stack).layers[0], "mlp")
    assert abs(plan.actual_ratio - ratio) <= 0.5 * layers * neuron / plan.parameters_total


def with_scores(scores, heads, mlp, gqa="groups"):
    return dataclasses.replace(scores, values=unit_scores(heads, mlp, gqa))


def test_the_lowest_scores_go():
    cfg = config(EQUAL)
    scores = width_scores(cfg)
    plan = make_plan(scores, cfg, method="width", sparsity=0.5, attn_layers=(1, 3), mlp_layers=(0, 2))
    for layer in plan.layers:
        heads, neurons = scores.along("kv_heads")[layer.index], scores.along("mlp")[layer.index]
        if 1 <= layer.index < 3:
            best = int(np.argmax(heads))
            assert (layer.kept["kv_heads"], layer.kept["q_heads"]) == ((best,), (2 * best, 2 * best + 1))
        else:
            assert layer.kept["q_heads"] == (0, 1, 2, 3)
        expected = np.sort(np.argsort(neurons)[6:]) if layer.index < 2 else np.arange(12)
        assert layer.kept["mlp"] == tuple(expected)


def test_query_heads_go_evenly_inside_their_groups():
    cfg = config((decoder_layer(6, 2, 8),) * 2)
    heads = (np.array([9.0, 8, 7, 1, 3, 2]), np.array([1.0, 2, 3, 9, 7, 8]))
    scores = with_scores(width_scores(cfg, gqa="q_heads"), heads, width_scores(cfg).along("mlp"), "q_heads")
    plan = make_plan(scores, cfg, method="width", sparsity=0.4, mlp_layers=(0, 0))
    assert [layer.kept["q_heads"] for layer in plan.layers] == [(0, 1, 4, 5), (1, 2, 3, 5)]
    assert [layer.kept["kv_heads"] for layer in plan.layers] == [(0, 1), (0, 1)]
    assert plan.parameters_after == count_params(plan.apply_to(cfg))


def test_global_selection_meets_a_ratio():
    cfg = config(EQUAL)
    scores = width_scores(cfg)
    scores = with_scores(scores, [5 + h for h in scores.along("kv_heads")], scores.along("mlp"))
    plan = make_plan(scores, cfg, method="width", ratio=0.1, selection="global")
    assert_reached(plan, 0.1, cfg, layers=1)
    kept = np.concatenate([scores.along("mlp")[x.index][list(x.kept["mlp"])] for x in plan.layers])
    gone = np.concatenate([np.delete(scores.along("mlp")[x.index], list(x.kept["mlp"])) for x in plan.layers])
    assert gone.max() < kept.min()
    # layer 1's neurons are all lower than any other: the layer that would lose everything stays whole
    mlp = [m - 9 * (i == 1) for i, m in enumerate(scores.along("mlp"))]
    low = with_scores(scores, scores.along("kv_heads"), mlp)
    whole = make_plan(low, cfg, method="width", sparsity=0.2, selection="global")  # 14 of 70 units
    assert [len(layer.kept["mlp"]) for layer in whole.layers].count(12) >= 3
    assert whole.layers[1].kept["mlp"] == tuple(range(12))
    assert sum(12 - len(layer.kept["mlp"]) for layer in whole.layers) == 2
    flat = with_scores(scores, [np.zeros(2)] * 5, [np.zeros(12)] * 5)
    refused("never empties a layer", make_plan, flat, cfg, method="width", ratio=0.3, selection="global")


def test_heads_are_kept_or_traded_for_neurons_by_their_scores():
    cfg = config((decoder_layer(8, 4, 24),) * 3)

    def plan(head_score: float, heads: str, ratio: float = 0.2) -> PrunePlan:
        values = unit_scores((head_score * np.arange(1.0, 5.0),) * 3, (np.arange(1.0, 25.0),) * 3)
        scores = Scores("l2", shape_digest(cfg) + "-x", {"gqa": "groups"}, values)
        return make_plan(scores, cfg, method="width", ratio=ratio, heads=heads)

    def widths(made: PrunePlan) -> tuple[int, int]:
        (found,) = {(len(layer.kept["kv_heads"]), len(layer.kept["mlp"])) for layer in made.layers}
        return found

    kept, fewest = widths(plan(1000.0, "keep"))
    assert kept == 4
    assert widths(plan(1000.0, "auto")) == (kept, fewest)  # dear heads stay
    left, more = widths(plan(0.001, "auto"))  # cheap ones go, and neurons stay
    assert (left, more > fewest) == (3, True)
    assert widths(plan(0.001, "proportional")) == widths(plan(1000.0, "proportional"))
    for made in (plan(0.001, "auto"), plan(1000.0, "auto"), plan(1000.0, "keep")):
        assert abs(made.actual_ratio - 0.2) < 0.01
        assert made.options["heads"] in ("auto", "keep")
    refused("heads kept", plan, 1.0, "keep", ratio=0.6)


@given(
    layers=st.lists(shapes, min_size=1, max_size=4), gqa=st.sampled_from(["groups", "q_heads"]), seed=st.integers(0, 9)
)
@settings(max_examples=8, deadline=None)
def test_of_more_that_is_asked_for_no_more_stays(layers, gqa, seed):
    cfg = config(tuple(layers))
    wide, ratios = width_scores(cfg, seed, gqa), np.arange(0, 1, 0.18)
    order = np.random.default_rng(seed).permutation(len(layers)).astype(float)

    def plans(scores, **options):
        """Plans at ascending ratios, as far as there are any."""
        for ratio in ratios:
            try:
                yield make_plan(scores, cfg, ratio=float(ratio), **options)
            except UserError:
                return

    def units(plan, axis):
        return {(layer.index, unit) for layer in plan.layers for unit in layer.kept[axis]}

    for scores, options in (
        (depth_scores(cfg, list(order)), {"method": "depth"}),
        (wide, {"method": "width", "heads": "keep"}),
        (wide, {"method": "width"}),
    ):
        for less, more in itertools.pairwise(plans(scores, **options)):
            assert more.parameters_after <= less.parameters_after
            # a head more that goes lets neurons stay: with as many heads neurons are the same or fewer
            heads = [[layer.sizes["q_heads"] for layer in plan.layers] for plan in (less, more)]
            if options != {"method": "width"} or heads[0] == heads[1]:
                assert units(more, "q_heads") <= units(less, "q_heads")
                assert units(more, "mlp") <= units(less, "mlp")


# Both, and towers.


def test_hybrid_takes_its_share_in_layers_and_the_rest_in_widths():
    cfg = config((decoder_layer(4, 2, 40),) * 6)
    pair = (depth_scores(cfg, [5, 0, 4, 1, 3, 2]), width_scores(cfg))
    plan = make_plan(pair, cfg, method="hybrid", ratio=0.5, depth_share=0.6)
    layer_share = layer_costs(cfg).of(cfg.text.layers[0]) / count_params(cfg)
    assert plan.removed_layers == tuple(sorted([1, 3][: round(0.3 / layer_share)]))
    assert_reached(plan, 0.5, cfg, layers=4)
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    assert plan.criterion == "block_influence + l1"
    ranges = {"mlp_layers": (1, 5), "attn_layers": (1, 5)}
    given = make_plan(pair, cfg, method="hybrid", ratio=0.4, layers_removed=2, **ranges)
    assert given.removed_layers == (1, 3)
    assert given.layers[0].sizes == given.layers[-1].sizes == cfg.text.layers[0].sizes
    assert_reached(given, 0.4, cfg, layers=2)
    only_layers = make_plan(pair, cfg, method="hybrid", ratio=1.5 * layer_share, layers_removed=2)
    assert all(layer.sizes == cfg.text.layers[0].sizes for layer in only_layers.layers)


TOWER = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(2, 2, 7), tower_layer(2, 2, 10))


def tower_scores(cfg, seed=0):
    draw = np.random.default_rng(seed)
    layers = cfg.vision.layers
    heads, neurons = (tuple(draw.random(layer.sizes[name]) for layer in layers) for name in ("kv_heads", "mlp"))
    values = layer_scores(draw.random(len(layers)), "vision") | unit_scores(heads, neurons, component="vision")
    return Scores("l1", shape_digest(cfg) + "-x", {"gqa": "groups"}, values)


@pytest.mark.parametrize("method", ["depth", "width", "hybrid"])
def test_plans_of_the_tower(method):
    cfg = config(UNEQUAL, vision=True).with_layers(TOWER, "vision")
    scores = tower_scores(cfg)
    pair = (scores, scores) if method == "hybrid" else scores
    ratio = 1.5 * layer_costs(cfg, "vision").of(TOWER[2]) / count_params(cfg)
    plan = make_plan(pair, cfg, method=method, ratio=ratio)
    assert plan.stacks["text"].is_whole
    assert plan.parameters_after == count_params(plan.apply_to(cfg)) < plan.parameters_before
    if method == "width":
        assert plan.stacks["vision"].kept_layers == (0, 1, 2, 3)
        assert_reached(plan, ratio, cfg, layers=4, stack="vision")
    else:
        assert plan.stacks["vision"].removed_layers[:1] == (int(np.argmin(scores.layers)),)
    assert PrunePlan.from_json(plan.to_json()) == plan
    same = compose(keep_everything(cfg, plan.fingerprint, plan.parameters_before), plan)
    assert (same.stacks, plan.apply_to(cfg)) == (plan.stacks, same.apply_to(cfg))


# Refusals, of scores for five equal layers.

WIDTH = [
    ({}, "'width' needs exactly one of ratio, sparsity and budget, got none"),
    ({"ratio": 0.2, "sparsity": 0.2}, "needs exactly one of .*, got ratio and sparsity"),
    ({"ratio": 0.2, "layers_removed": 1}, "layers_removed: method 'width' has no such setting, only depth"),
    ({"sparsity": 1.0}, r"sparsity=1.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
    ({"sparsity": 0.99}, "sparsity 0.99 would remove all key/value heads of layer 0"),
    ({"ratio": 0.9}, r"ratio 0.9 cannot be reached by width .*attn_layers=all, mlp_layers=all: the most is 0"),
    ({"ratio": 0.1, "attn_layers": (2, 9)}, r"attn_layers=\(2, 9\) must lie within the 5 layers"),
    ({"ratio": 0.1, "mlp_layers": (3, 2)}, r"mlp_layers=\(3, 2\) must lie within the 5 layers"),
    ({"ratio": 0.1, "mlp_layers": (1, 2, 3)}, r"mlp_layers=\(1, 2, 3\) must be a half-open pair"),
    ({"ratio": 0.1, "heads_multiple": 3}, "heads_multiple=3 is more than the 2 key/value heads of layer 0"),
    ({"ratio": 0.1, "neurons_multiple": 16}, "neurons_multiple=16 is more than the 12 neurons of layer 0"),
    ({"ratio": 0.1, "heads": "kep"}, "heads 'kep' is not one of proportional, keep, auto; did you mean 'keep'"),
    ({"ratio": 0.1, "selection": "global", "neurons_multiple": 2}, 'needs gqa="groups", .*no multiples'),
    ({"ratio": 0.1, "steps": 2}, "steps=2 need new scores before each"),
    ({"ratio": 0.1, "align_to": "tpus"}, "align_to 'tpus' is not one of tpu, gguf, gguf_k, int4; did you mean 'tpu'"),
    ({"ratio": 0.1, "align_to": "tpu", "neurons_multiple": 100}, "neurons_multiple=100 is not a multiple of 128,"),
    ({"ratio": 0.1, "tensor_parallel": 4, "heads": "keep"}, "2 key/value heads, which tensor_parallel=4 does not"),
]
DEPTH = [
    ({"ratio": 0.99}, r"ratio 0.99 cannot be reached by depth .*removing 4 of 5 layers \(0 protected\) gives"),
    ({"ratio": 0.4, "protect": (0, 1, 2, 3)}, r"removing 1 of 5 layers \(4 protected\)"),
    ({"ratio": 30}, r"ratio=30.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
    ({"layers_removed": 5}, r"layers_removed=5 must be between 0 and 4 \(5 layers, 0 protected\)"),
    ({}, "needs exactly one of ratio, layers_removed, layers and budget, got none"),
    ({"ratio": 0.1, "layers_removed": 1}, "needs exactly one of .*, got ratio and layers_removed"),
    ({"ratio": 0.1, "protect": (7,)}, r"protect=\[7\] contains layers that do not exist: the model has 5 layers"),
    ({"ratio": 0.1, "protekt": (1,)}, r"make_plan has no setting 'protekt'; did you mean 'protect'\?"),
    ({"ratio": 0.1, "align_to": "tpu"}, "prune.align_to: method 'depth' has no such setting, only width"),
    ({"ratio": 0.1, "method": "dept"}, r"method 'dept' is not one of depth, width, hybrid, experts, none; did you"),
]
HYBRID = [
    ({}, "'hybrid' needs exactly one of ratio and budget, got none"),
    ({"ratio": 0.3, "depth_share": 1.5}, "depth_share=1.5 must be at least 0 and below 1"),
    ({"ratio": 0.9, "layers_removed": 1}, "cannot be reached by width .* after removing layers: the most is"),
]
CFG = config(EQUAL)
BY_DEPTH, BY_WIDTH = depth_scores(CFG, [0, 1, 2, 3, 4]), width_scores(CFG)
SCORES = {"depth": BY_DEPTH, "width": BY_WIDTH, "hybrid": (BY_DEPTH, BY_WIDTH)}
TABLE = {"depth": DEPTH, "width": WIDTH, "hybrid": HYBRID}


@pytest.mark.parametrize(("method", "options", "fact"), [(name, *row) for name, rows in TABLE.items() for row in rows])
def test_plans_refuse(method, options, fact):
    refused(fact, make_plan, SCORES[method], CFG, **{"method": method, **options})


def moved(scores, component):
    values = {key._replace(component=component): array for key, array in scores.values.items()}
    return dataclasses.replace(scores, values=values)


def test_scores_of_another_model_stack_or_kind_are_refused():
    seeing = config(EQUAL, vision=True).with_layers(TOWER, "vision")
    for cfg, scores, method, fact in (
        (CFG, depth_scores(config(UNEQUAL), [0, 1, 2, 3]), "depth", "these scores are for another model"),
        (CFG, BY_WIDTH, "depth", "l1 does not score layers: for depth pruning"),
        (CFG, BY_DEPTH, "width", "block_influence does not score heads and neurons"),
        (CFG, (BY_WIDTH, BY_WIDTH), "depth", "one Scores object, got tuple"),
        (CFG, BY_DEPTH, "hybrid", "method 'hybrid' needs a pair of scores, got Scores: pass scores="),
        (CFG, (BY_DEPTH, dataclasses.replace(BY_WIDTH, fingerprint="a-b")), "hybrid", "are for different models"),
        (CFG, moved(BY_DEPTH, "audio"), "depth", "no stack of layers 'audio'"),
        (CFG, moved(BY_WIDTH, "audio"), "width", "no stack of layers 'audio'"),
        (seeing, moved(depth_scores(seeing, [*range(5)]), "vision"), "depth", "the vision stack of this model"),
        (seeing, moved(width_scores(seeing), "vision"), "width", "the vision stack of this model"),
        (seeing, moved(tower_scores(seeing), "text"), "width", "the text stack"),
    ):
        refused(fact, make_plan, scores, cfg, method=method, ratio=0.01)
