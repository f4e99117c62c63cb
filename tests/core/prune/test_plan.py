"""Width and hybrid plans."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, UNEQUAL, config, depth_scores, kept_units, layer_scores, unit_scores, width_scores
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
@settings(max_examples=60, deadline=None)
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
        with pytest.raises(UserError, match="cannot be reached by width"):
            make_plan(scores, cfg, **options)
        return
    plan = make_plan(scores, cfg, **options)
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    # off by at most one head in every layer, the coarsest step there is
    no_heads = [{**layer.sizes, "q_heads": 0, "kv_heads": 0} for layer in layers]
    heads = [costs.of(layer) - costs.at(layer)(sizes) for layer, sizes in zip(layers, no_heads, strict=True)]
    neurons = [costs.price(layer, "mlp") * multiple for layer in layers]
    step = sum(map(max, heads, neurons))
    assert abs(plan.actual_ratio - ratio) * plan.parameters_total <= step


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
    scores = dataclasses.replace(
        width_scores(cfg, gqa="q_heads"),
        values=unit_scores(
            (np.array([9.0, 8, 7, 1, 3, 2]), np.array([1.0, 2, 3, 9, 7, 8])), width_scores(cfg).along("mlp"), "q_heads"
        ),
    )
    plan = make_plan(scores, cfg, method="width", sparsity=0.4, mlp_layers=(0, 0))
    assert [layer.kept["q_heads"] for layer in plan.layers] == [(0, 1, 4, 5), (1, 2, 3, 5)]
    assert [layer.kept["kv_heads"] for layer in plan.layers] == [(0, 1), (0, 1)]
    assert plan.parameters_after == count_params(plan.apply_to(cfg))


def test_global_selection_meets_a_ratio():
    cfg = config(EQUAL)
    scores = width_scores(cfg)
    scores = dataclasses.replace(
        scores, values=unit_scores([5 + h for h in scores.along("kv_heads")], scores.along("mlp"))
    )
    plan = make_plan(scores, cfg, method="width", ratio=0.1, selection="global")
    assert (
        abs(plan.actual_ratio - 0.1) <= 0.5 * layer_costs(cfg).price(cfg.text.layers[0], "mlp") / plan.parameters_total
    )
    kept = np.concatenate([scores.along("mlp")[x.index][list(x.kept["mlp"])] for x in plan.layers])
    gone = np.concatenate([np.delete(scores.along("mlp")[x.index], list(x.kept["mlp"])) for x in plan.layers])
    assert gone.max() < kept.min()
    # layer 1's neurons are all lower than any other: the layer that would lose everything stays whole
    low = dataclasses.replace(
        scores,
        values=unit_scores(scores.along("kv_heads"), [m - 9 * (i == 1) for i, m in enumerate(scores.along("mlp"))]),
    )
    whole = make_plan(low, cfg, method="width", sparsity=0.2, selection="global")  # 14 of 70 units
    assert [len(layer.kept["mlp"]) for layer in whole.layers].count(12) >= 3
    assert whole.layers[1].kept["mlp"] == tuple(range(12))
    assert sum(12 - len(layer.kept["mlp"]) for layer in whole.layers) == 2
    flat = dataclasses.replace(
        scores, values=unit_scores([np.zeros(2) for _ in range(5)], [np.zeros(12) for _ in range(5)])
    )
    with pytest.raises(UserError, match="cannot be reached by global selection, which never empties a layer"):
        make_plan(flat, cfg, method="width", ratio=0.3, selection="global")
    for bad in ({"neurons_multiple": 2}, {"heads_multiple": 2}):
        with pytest.raises(UserError, match='selection="global" needs gqa="groups"'):
            make_plan(scores, cfg, method="width", ratio=0.1, selection="global", **bad)


def test_hybrid_takes_its_share_in_layers_and_the_rest_in_widths():
    cfg = config((decoder_layer(4, 2, 40),) * 6)
    pair = (depth_scores(cfg, [5, 0, 4, 1, 3, 2]), width_scores(cfg))
    plan = make_plan(pair, cfg, method="hybrid", ratio=0.5, depth_share=0.6)
    layer_share = layer_costs(cfg).of(cfg.text.layers[0]) / count_params(cfg)
    assert plan.removed_layers == tuple(sorted([1, 3][: round(0.3 / layer_share)]))
    assert (
        abs(plan.actual_ratio - 0.5)
        <= 0.5 * 4 * layer_costs(cfg).price(cfg.text.layers[0], "mlp") / plan.parameters_total
    )
    assert plan.parameters_after == count_params(plan.apply_to(cfg))
    assert plan.criterion == "block_influence + l1"
    given_layers = make_plan(
        pair, cfg, method="hybrid", ratio=0.4, layers_removed=2, mlp_layers=(1, 5), attn_layers=(1, 5)
    )
    assert given_layers.removed_layers == (1, 3)
    assert given_layers.layers[0].sizes == given_layers.layers[-1].sizes == cfg.text.layers[0].sizes
    assert (
        abs(given_layers.actual_ratio - 0.4)
        <= 0.5 * 2 * layer_costs(cfg).price(cfg.text.layers[0], "mlp") / plan.parameters_total
    )
    only_layers = make_plan(pair, cfg, method="hybrid", ratio=1.5 * layer_share, layers_removed=2)
    assert all(layer.sizes == cfg.text.layers[0].sizes for layer in only_layers.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'width' needs exactly one of ratio, sparsity and budget, got none"),
        ({"ratio": 0.2, "sparsity": 0.2}, "needs exactly one of .*, got ratio and sparsity"),
        (
            {"ratio": 0.2, "layers_removed": 1},
            "layers_removed: method 'width' has no such setting, only depth and hybrid",
        ),
        ({"sparsity": 1.0}, r"sparsity=1.0 must be at least 0 and below 1 \(0.3 is 30 %\)"),
        ({"sparsity": 0.99}, "sparsity 0.99 would remove all key/value heads of layer 0"),
        (
            {"ratio": 0.9},
            r"ratio 0.9 cannot be reached by width .*attn_layers=all, mlp_layers=all: the most is 0\.\d{4}",
        ),
        ({"ratio": 0.1, "attn_layers": (2, 9)}, r"attn_layers=\(2, 9\) must lie within the 5 layers"),
        ({"ratio": 0.1, "mlp_layers": (3, 2)}, r"mlp_layers=\(3, 2\) must lie within the 5 layers"),
        ({"ratio": 0.1, "mlp_layers": "some"}, "mlp_layers='some' must be a tuple"),
        ({"ratio": 0.1, "mlp_layers": (1, 2, 3)}, r"mlp_layers=\(1, 2, 3\) must be a half-open pair"),
        ({"ratio": 0.1, "heads_multiple": 0}, "heads_multiple=0 must be at least 1"),
        ({"ratio": 0.1, "heads_multiple": 3}, "heads_multiple=3 is more than the 2 key/value heads of layer 0"),
        ({"ratio": 0.1, "neurons_multiple": 16}, "neurons_multiple=16 is more than the 12 neurons of layer 0"),
        (
            {"ratio": 0.1, "selection": "locally"},
            "selection 'locally' is not one of local, global; did you mean 'local'",
        ),
        ({"ratio": 0.1, "atn_layers": (1, 2)}, "has no setting 'atn_layers'; did you mean 'attn_layers'"),
    ],
)
def test_width_plans_refuse(options, message):
    cfg = config(EQUAL)
    with pytest.raises(UserError, match=message):
        make_plan(width_scores(cfg), cfg, method="width", **options)


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
        with pytest.raises(UserError, match=message):
            make_plan(scores, cfg, method="hybrid", **options)


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
        assert (
            abs(plan.actual_ratio - ratio)
            <= 0.5 * 4 * layer_costs(cfg, "vision").price(cfg.vision.layers[0], "mlp") / plan.parameters_total
        )
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
        with pytest.raises(UserError, match="scores do not match the vision stack of this model"):
            make_plan(moved(scores, "vision"), cfg, method=method, ratio=0.01)
        with pytest.raises(UserError, match=r"this model has no stack of layers 'audio' \(it has text, vision\)"):
            make_plan(moved(scores, "audio"), cfg, method=method, ratio=0.01)
    with pytest.raises(UserError, match="scores do not match the text stack"):
        make_plan(moved(tower_scores(cfg), "text"), cfg, method="width", ratio=0.01)


def test_plans_that_do_not_follow_each_other_are_not_composed():
    cfg = config(EQUAL)
    one = make_plan(width_scores(cfg), cfg, method="width", ratio=0.2)
    with pytest.raises(UserError, match="the plans cannot be composed"):
        compose(one, one)


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
        scores = Scores(
            "l2", shape_digest(cfg) + "-x", {"gqa": "groups"},
            values=unit_scores((head_score * np.arange(1.0, 5.0),) * 3, (np.arange(1.0, 25.0),) * 3),
        )  # fmt: skip
        return make_plan(scores, cfg, method="width", ratio=ratio, heads=heads)

    def widths(made: PrunePlan) -> tuple[int, int]:
        ((kept, neurons),) = {(len(layer.kept["kv_heads"]), len(layer.kept["mlp"])) for layer in made.layers}
        return kept, neurons

    kept, fewest = widths(plan(1000.0, "keep"))
    assert kept == 4
    assert widths(plan(1000.0, "auto")) == (kept, fewest)  # dear heads stay
    left, more = widths(plan(0.001, "auto"))  # cheap ones go, and neurons stay
    assert (left, more > fewest) == (3, True)
    assert widths(plan(0.001, "proportional")) == widths(plan(1000.0, "proportional"))
    for made in (plan(0.001, "auto"), plan(1000.0, "auto"), plan(1000.0, "keep")):
        assert abs(made.actual_ratio - 0.2) < 0.01
        assert made.options["heads"] in ("auto", "keep")
    with pytest.raises(UserError, match="heads kept"):
        plan(1.0, "keep", ratio=0.6)
    with pytest.raises(UserError, match="heads 'kep' is not one of proportional, keep, auto; did you mean 'keep'"):
        plan(1.0, "kep")
