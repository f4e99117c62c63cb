"""Width and hybrid plans; and what holds of every plan: more is asked, no more stays, and plans compose."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import (
    EQUAL,
    UNEQUAL,
    config,
    depth_scores,
    hand_plan,
    kept_units,
    layer_scores,
    unit_scores,
    width_scores,
)
from refusal import refused
from stack_cases import decoder_layer, tower_layer

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan, Scores, compose, keep_everything
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.io.exports.pruning import make_plan

shapes = st.builds(lambda kv, group, mlp: decoder_layer(kv * group, kv, mlp), *map(st.integers, (1, 1, 2), (4, 3, 30)))


@given(
    ratio=st.floats(0, 0.95),
    layers=st.lists(shapes, min_size=1, max_size=4),
    gqa=st.sampled_from(["groups", "q_heads"]),
    multiple=st.sampled_from([1, 2]),
)
@settings(max_examples=30, deadline=None)
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
    for bad in ({"neurons_multiple": 2}, {"heads_multiple": 2}):
        refused('needs gqa="groups"', make_plan, scores, cfg, method="width", ratio=0.1, selection="global", **bad)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'width' needs exactly one of ratio, sparsity and budget, got none"),
        ({"ratio": 0.2, "sparsity": 0.2}, "needs exactly one of .*, got ratio and sparsity"),
        ({"ratio": 0.2, "layers_removed": 1}, "layers_removed: method 'width' has no such setting, only depth"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
        ({"sparsity": 0.99}, "sparsity 0.99 would remove all key/value heads of layer 0"),
        ({"ratio": 0.9}, r"ratio 0.9 cannot be reached by width .*attn_layers=all, mlp_layers=all: the most is 0"),
        ({"ratio": 0.1, "attn_layers": (2, 9)}, r"attn_layers=\(2, 9\) must lie within the 5 layers"),
        ({"ratio": 0.1, "mlp_layers": (3, 2)}, r"mlp_layers=\(3, 2\) must lie within the 5 layers"),
        ({"ratio": 0.1, "mlp_layers": "some"}, "mlp_layers='some' must be a tuple"),
        ({"ratio": 0.1, "mlp_layers": (1, 2, 3)}, r"mlp_layers=\(1, 2, 3\) must be a half-open pair"),
        ({"ratio": 0.1, "heads_multiple": 0}, "heads_multiple=0 must be at least 1"),
        ({"ratio": 0.1, "heads_multiple": 3}, "heads_multiple=3 is more than the 2 key/value heads of layer 0"),
        ({"ratio": 0.1, "neurons_multiple": 16}, "neurons_multiple=16 is more than the 12 neurons of layer 0"),
        ({"ratio": 0.1, "selection": "locally"}, "selection 'locally' is not one of local, global; did you mean"),
        ({"ratio": 0.1, "atn_layers": (1, 2)}, "has no setting 'atn_layers'; did you mean 'attn_layers'"),
    ],
)
def test_width_plans_refuse(options, message):
    cfg = config(EQUAL)
    refused(message, make_plan, width_scores(cfg), cfg, method="width", **options)


def test_hybrid_plans_refuse():
    cfg = config(EQUAL)
    pair = (depth_scores(cfg, [0, 1, 2, 3, 4]), width_scores(cfg))
    for scores, options, message in (
        (pair[0], {"ratio": 0.3}, r"method 'hybrid' needs a pair of scores, got Scores: pass scores="),
        (pair, {}, "'hybrid' needs exactly one of ratio and budget, got none"),
        (pair, {"ratio": 0.3, "depth_share": 1.5}, "depth_share=1.5 must be at least 0 and below 1"),
        (pair, {"ratio": 0.9, "layers_removed": 1}, "cannot be reached by width .* after removing layers: the most is"),
        ((pair[0], dataclasses.replace(pair[1], fingerprint="a-b")), {"ratio": 0.3}, "are for different models"),
    ):
        refused(message, make_plan, scores, cfg, method="hybrid", **options)


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


def test_plans_of_another_stack_are_refused():
    cfg = config(UNEQUAL, vision=True).with_layers((*TOWER, TOWER[0]), "vision")

    def moved(scores, component):
        values = {key._replace(component=component): array for key, array in scores.values.items()}
        return dataclasses.replace(scores, values=values)

    for method, scores in (("depth", depth_scores(cfg, [0, 1, 2, 3])), ("width", width_scores(cfg))):
        refused("the vision stack of this model", make_plan, moved(scores, "vision"), cfg, method=method, ratio=0.01)
        refused("no stack of layers 'audio'", make_plan, moved(scores, "audio"), cfg, method=method, ratio=0.01)
    refused("the text stack", make_plan, moved(tower_scores(cfg), "text"), cfg, method="width", ratio=0.01)


@pytest.mark.parametrize("vision", [False, True])
def test_keep_everything(vision):
    cfg = config(UNEQUAL, vision=vision)
    plan = keep_everything(cfg, "a-b", count_params(cfg))
    assert plan.apply_to(cfg) == cfg
    assert (plan.actual_ratio, plan.removed_layers) == (0, ())
    assert plan.stacks.keys() == ({"text", "vision"} if vision else {"text"})
    assert plan.layers[2] == kept_units(2, tuple(range(8)), (0, 1), tuple(range(10)))


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
    refused("heads 'kep' is not one of proportional, keep, auto; did you mean 'keep'", plan, 1.0, "kep")


def plans_at(ratios, scores, cfg, **options):
    """Plans at ascending ratios, as far as there are any."""
    found = []
    for ratio in ratios:
        try:
            found.append(make_plan(scores, cfg, ratio=float(ratio), **options))
        except UserError:
            break
    return found


def units(plan, kind):
    return {(layer.index, unit) for layer in plan.layers for unit in layer.kept[kind]}


@given(
    layers=st.lists(shapes, min_size=1, max_size=4), gqa=st.sampled_from(["groups", "q_heads"]), seed=st.integers(0, 9)
)
@settings(max_examples=15, deadline=None)
def test_of_more_that_is_asked_for_no_more_stays(layers, gqa, seed):
    cfg = config(tuple(layers))
    wide, ratios = width_scores(cfg, seed, gqa), np.arange(0, 1, 0.08)
    order = np.random.default_rng(seed).permutation(len(layers)).astype(float)
    depth = plans_at(ratios, depth_scores(cfg, list(order)), cfg, method="depth")
    kept = plans_at(ratios, wide, cfg, method="width", heads="keep")
    both = plans_at(ratios, wide, cfg, method="width")
    sparse = [make_plan(wide, cfg, method="width", sparsity=s) for s in (0, 0.1, 0.25)] if len(both) > 3 else []
    for family in (depth, kept, both, sparse):
        for less, more in itertools.pairwise(family):
            assert more.parameters_after <= less.parameters_after
            # a head more that goes lets neurons stay: with as many heads neurons are the same or fewer
            heads = [[layer.sizes["q_heads"] for layer in plan.layers] for plan in (less, more)]
            if family is not both or heads[0] == heads[1]:
                assert units(more, "q_heads") <= units(less, "q_heads")
                assert units(more, "mlp") <= units(less, "mlp")


@st.composite
def successive(draw):
    """Three plans by hand, each for what the one before leaves."""
    cfg, plans = config(tuple(draw(st.lists(shapes, min_size=2, max_size=4)))), []
    for step in range(3):
        layers = cfg.text.layers
        alive = sorted(draw(st.sets(st.sampled_from(range(len(layers))), min_size=1)))
        kept = []
        for i in alive:
            shape = layers[i]
            kv = sorted(draw(st.sets(st.sampled_from(range(shape.mixer.kv_heads)), min_size=1)))
            group = shape.mixer.q_heads // shape.mixer.kv_heads
            neurons = sorted(draw(st.sets(st.sampled_from(range(shape.channel.mlp)), min_size=1)))
            q = [head * group + r for head in kv for r in range(group)]
            kept.append(kept_units(i, tuple(q), tuple(kv), tuple(neurons)))
        plans.append(hand_plan(cfg, f"f{step}", "hybrid", f"c{step}", text=kept))
        cfg = plans[-1].apply_to(cfg)
    return plans


def essence(plan):
    """A plan without the record of how it came about."""
    return dataclasses.replace(plan, options={}, criterion="")


@given(plans=successive())
@settings(max_examples=40, deadline=None)
def test_composition_is_associative_and_keeping_everything_its_identity(plans):
    a, b, c = plans
    assert essence(compose(compose(a, b), c)) == essence(compose(a, compose(b, c)))
    before, after = (
        keep_everything(config(tuple(decoder_layer(**axes) for axes in sizes)), a.fingerprint, parameters)
        for sizes, parameters in (
            (a.stacks["text"].sizes_before, a.parameters_before),
            (a.stacks["text"].sizes, a.parameters_after),
        )
    )
    assert essence(compose(before, a)) == essence(compose(a, after)) == essence(a)
