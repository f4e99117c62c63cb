"""Width and hybrid plans, and the plan file."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, UNEQUAL, config, depth_scores, kept_units, model, unit_scores, width_scores
from stack_cases import decoder_layer, tower_layer

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune import (
    KeptStack,
    KeptVocabulary,
    PrunePlan,
    Scores,
    compose,
    keep_everything,
    make_plan,
    score,
)
from vlmprune_jax.prune.fingerprints import shape_digest
from vlmprune_jax.prune.solver import layer_costs

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
        heads, neurons = scores.heads[layer.index], scores.mlp[layer.index]
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
        units=unit_scores(
            (np.array([9.0, 8, 7, 1, 3, 2]), np.array([1.0, 2, 3, 9, 7, 8])), width_scores(cfg).mlp, "q_heads"
        ),
    )
    plan = make_plan(scores, cfg, method="width", sparsity=0.4, mlp_layers=(0, 0))
    assert [layer.kept["q_heads"] for layer in plan.layers] == [(0, 1, 4, 5), (1, 2, 3, 5)]
    assert [layer.kept["kv_heads"] for layer in plan.layers] == [(0, 1), (0, 1)]
    assert plan.parameters_after == count_params(plan.apply_to(cfg))


def test_global_selection_meets_a_ratio():
    cfg = config(EQUAL)
    scores = width_scores(cfg)
    scores = dataclasses.replace(scores, units=unit_scores([5 + h for h in scores.heads], scores.mlp))
    plan = make_plan(scores, cfg, method="width", ratio=0.1, selection="global")
    assert (
        abs(plan.actual_ratio - 0.1) <= 0.5 * layer_costs(cfg).price(cfg.text.layers[0], "mlp") / plan.parameters_total
    )
    kept = np.concatenate([scores.mlp[x.index][list(x.kept["mlp"])] for x in plan.layers])
    gone = np.concatenate([np.delete(scores.mlp[x.index], list(x.kept["mlp"])) for x in plan.layers])
    assert gone.max() < kept.min()
    # layer 1's neurons are all lower than any other: the layer that would lose everything stays whole
    low = dataclasses.replace(
        scores, units=unit_scores(scores.heads, [m - 9 * (i == 1) for i, m in enumerate(scores.mlp)])
    )
    whole = make_plan(low, cfg, method="width", sparsity=0.2, selection="global")  # 14 of 70 units
    assert [len(layer.kept["mlp"]) for layer in whole.layers].count(12) >= 3
    assert whole.layers[1].kept["mlp"] == tuple(range(12))
    assert sum(12 - len(layer.kept["mlp"]) for layer in whole.layers) == 2
    flat = dataclasses.replace(
        scores, units=unit_scores([np.zeros(2) for _ in range(5)], [np.zeros(12) for _ in range(5)])
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
        ({"ratio": 0.1, "base": config(UNEQUAL)}, "base has 4 layers, but the model has 5"),
        ({"ratio": 0.1, "atn_layers": (1, 2)}, "has no 'atn_layers'; did you mean 'attn_layers'"),
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
        (pair[0], {"ratio": 0.3}, r"method 'hybrid' needs a pair \(depth scores, width scores\)"),
        (pair, {}, "'hybrid' needs exactly one of ratio and budget, got none"),
        (pair, {"ratio": 0.3, "depth_share": 1.5}, "depth_share=1.5 must be at least 0 and below 1"),
        (pair, {"ratio": 0.9, "layers_removed": 1}, "cannot be reached by width .* after removing layers: the most is"),
        ((pair[0], dataclasses.replace(pair[1], fingerprint="a-b")), {"ratio": 0.3}, "are for different models"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(scores, cfg, method="hybrid", **options)


def test_json_round_trip_is_exact(tmp_path):
    cfg = config(UNEQUAL)
    pair = (depth_scores(cfg, [0, 1, 2, 3]), score(model(cfg), criterion="l2"))
    pair = (dataclasses.replace(pair[0], fingerprint=pair[1].fingerprint), pair[1])
    plan = make_plan(pair, cfg, method="hybrid", ratio=1 / 3, protect=(1,), depth_share=0.4, attn_layers=(1, 4))
    text = plan.to_json(tmp_path / "deep" / "plan.json")
    assert PrunePlan.from_json(text) == plan
    assert PrunePlan.from_json(tmp_path / "deep" / "plan.json") == plan
    assert PrunePlan.from_json(str(tmp_path / "deep" / "plan.json")).to_json() == text
    data = json.loads(text)
    assert data["reached"] == plan.actual_ratio
    assert [*data["components"]["text"]["kept"]] == [*map(str, plan.kept_layers)]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan.json"]


def plan_data():
    """(a plan as JSON, its part of the decoder)."""
    cfg = config(EQUAL)
    data = json.loads(make_plan(width_scores(cfg), cfg, method="width", ratio=0.2).to_json())
    return data, data["components"]["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, _: d.pop("fingerprint"), "missing required field `fingerprint`.*: plan again"),
        (lambda _, t: t.pop("kept"), "missing required field `kept`.*: plan again"),
        (lambda d, _: d.update(format=7), "this plan has format 7, but .* reads 4: upgrade vlmprune-jax"),
        (lambda d, _: d.update(format=1), "this plan has format 1, but this version of vlmprune reads 4: plan again"),
        (lambda _, t: t.update(kept={}), "no layer is kept"),
        (lambda _, t: t.update(kept=dict(reversed(t["kept"].items()))), r"kept layers \[4, 3, 2, 1, 0\] are not incre"),
        (lambda _, t: t["kept"].update({"5": t["kept"]["4"]}), "layers of text are not numbered from 0 on"),
        (lambda _, t: t["kept"].update({"04": t["kept"]["4"]}), "layers of text are not numbered from 0 on"),
        (lambda _, t: t["sizes_before"].pop("2"), "layers of text are not numbered from 0 on"),
        (lambda _, t: t["kept"]["1"].update(mlp="3,3"), "mlp of layer 1 of text '3' are not ascending .* below 12"),
        (lambda _, t: t["kept"]["1"].update(mlp="3-12"), "'3-12' are not ascending ranges of numbers below 12"),
        (lambda _, t: t["kept"]["1"].update(mlp="5-3"), "'5-3' are not ascending ranges"),
        (lambda _, t: t["kept"]["1"].update(mlp="-1"), "'-1' are not ascending ranges"),
        (lambda _, t: t["kept"]["1"].update(mlp="1,"), "'' are not ascending ranges"),
        (lambda _, t: t["kept"]["1"].update(mlp="\u0663"), "are not ascending ranges"),
        (lambda _, t: t["kept"]["1"].update(mlp=f"0-{10**30}"), "are not ascending ranges of numbers below 12"),
        (lambda _, t: t["kept"]["1"].update(mlp=""), "neurons of layer 1 .* at least one"),
        (lambda _, t: t["kept"]["1"].update(mlp=[1]), r"Expected `str`, got `array` - at `.*kept"),
        (lambda _, t: t["kept"]["1"].pop("mlp"), "layer 1 has axes kv_heads, q_heads, expected kv_heads, q_heads, mlp"),
        (lambda _, t: t["kept"]["1"].update(experts="0"), "axes of layer 1 of text have no size"),
        (
            lambda _, t: t["kept"]["1"].update(q_heads="0-2", kv_heads="0-1"),
            "do not share its key/value heads .* evenly",
        ),
        (lambda _, t: t["kept"]["1"].update(q_heads="0-1", kv_heads="1"), "do not share its key/value heads .* evenly"),
        (lambda _, t: t["kept"].update({"": {"vocab": "0"}}), "layers of text are not numbered"),
        (lambda d, _: d.update(tokenizer="x"), "kept tokens and the digest of their tokenizer belong together"),
        (lambda _, t: t["sizes_before"]["0"].update(mlp=True), "Expected `int`, got `bool`"),
        (
            lambda _, t: t.update(sizes_before={str(i): {} for i in range(10**5)}),
            "Expected `object` of length <= 10001",
        ),
        (lambda d, _: d.update(asked=float("nan")), "Expected `float` >= .*asked"),
        (lambda d, _: d.update(parameters_total=0), "Expected `int` >= 1 - at `.*parameters_total`"),
        (lambda d, _: d.update(format=True), "Expected `int`, got `bool` - at `.*format`"),
    ],
)
def test_from_json_refuses(tmp_path, change, message):
    data, text = plan_data()
    change(data, text)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"plan.json: .*{message}"):
        PrunePlan.from_json(tmp_path / "plan.json")


def earlier(data, version=3):
    """A plan's JSON data in the format of 0.1.0; the same without a vocabulary is format 2."""
    stacks = {}
    for name, part in data["components"].items():
        layers = [
            {"index": int(i), **{old: listed(axes[new]) for old, new in EARLIER_NAMES.items()}}
            for i, axes in part["kept"].items() if i
        ]  # fmt: skip
        before = [[axes[new] for new in EARLIER_NAMES.values()] for i, axes in part["sizes_before"].items() if i]
        stacks[name] = {"kept_layers": [layer["index"] for layer in layers], "layers_before": before, "layers": layers}
    tokens = data["components"]["text"]["kept"].get("")
    vocabulary = tokens and {
        "rows_before": data["components"]["text"]["sizes_before"][""]["vocab"],
        "tokenizer": data["tokenizer"],
        "kept": [[i, i + 1] for i in listed(tokens["vocab"])],
    }
    rest = {name: value for name, value in data.items() if name not in ("components", "tokenizer")}
    return rest | {"format": version, "stacks": stacks} | ({"vocabulary": vocabulary} if version == 3 else {})


EARLIER_NAMES = {"q_heads": "q_heads", "kv_heads": "kv_heads", "neurons": "mlp"}


def listed(ranges):
    """The indices in "0-2,5"."""
    pairs = [part.split("-") for part in ranges.split(",")]
    return [i for pair in pairs for i in range(int(pair[0]), int(pair[-1]) + 1)]


@pytest.mark.parametrize("version", [2, 3])
def test_plans_of_earlier_formats_are_read(version):
    cfg = config(UNEQUAL, vision=True)
    pair = (depth_scores(cfg, [0, 1, 2, 3]), width_scores(cfg))
    plan = make_plan(pair, cfg, method="hybrid", ratio=1 / 3, protect=(1,))
    if version == 3:
        plan = dataclasses.replace(plan, vocabulary=KeptVocabulary(62, (*range(40), 50, 61), "digest"))
    assert PrunePlan.from_json(json.dumps(earlier(json.loads(plan.to_json()), version))) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers"), "missing required field `layers`.*: plan again"),
        (lambda t: t["layers"].reverse(), "kept_layers disagree with layers"),
        (lambda t: (t["layers"].reverse(), t.pop("kept_layers")), r"kept layers \[4, 3, 2, 1, 0\] are not increasing"),
        (lambda t: t["layers"][1].update(neurons=[0.5, 1.5]), r"Expected `int`, got `float` - at `.*neurons\[0\]`"),
        (lambda t: t["layers"][1].update(neurons=[3, 3]), "'3' are not ascending ranges of numbers below 12"),
        (lambda t: t.update(layers_before=[[4, 4]]), "Expected `array` of length 3, got 2"),
        (lambda t: t.update(layers_before=[[4, 2, 12]] * 4), "layers of text are not numbered from 0 on"),
    ],
)
def test_hostile_plans_of_earlier_formats_are_refused(change, message):
    data = earlier(plan_data()[0])
    change(data["stacks"]["text"])
    with pytest.raises(UserError, match=rf"plan JSON: .*{message}"):
        PrunePlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (lambda t: {"vision": t}, "components are vision, expected text among them"),
        (lambda t: [t], "Expected `object`, got `array` - at `.*components`"),
    ],
)
def test_from_json_refuses_components(components, message):
    data, text = plan_data()
    with pytest.raises(UserError, match=f"plan JSON: .*{message}"):
        PrunePlan.from_json(json.dumps(data | {"components": components(text)}))


# The tower ------------------------------------------------------------------------------------------------------------

TOWER = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(2, 2, 7), tower_layer(2, 2, 10))


def tower_scores(cfg, seed=0):
    draw = np.random.default_rng(seed)
    layers = cfg.vision.layers
    heads, neurons = (tuple(draw.random(layer.sizes[name]) for layer in layers) for name in ("kv_heads", "mlp"))
    mark, units = shape_digest(cfg) + "-x", unit_scores(heads, neurons)
    return Scores("l1", mark, {"gqa": "groups"}, draw.random(len(layers)), units, "vision")


@pytest.mark.parametrize("method", ["depth", "width", "hybrid"])
def test_plans_of_the_tower(method):
    cfg = config(UNEQUAL, vision=True).with_layers(TOWER, "vision")
    scores = tower_scores(cfg)
    pair = (scores, scores) if method == "hybrid" else scores
    ratio = 1.5 * layer_costs(cfg, "vision").of(TOWER[2]) / count_params(cfg)
    plan = make_plan(pair, cfg, method=method, ratio=ratio)
    assert plan.stacks["text"] == KeptStack.whole(UNEQUAL)
    assert plan.parameters_after == count_params(plan.apply_to(cfg)) < plan.parameters_before
    if method == "width":
        assert plan.stacks["vision"].kept_layers == (0, 1, 2, 3)
        assert (
            abs(plan.actual_ratio - ratio)
            <= 0.5 * 4 * layer_costs(cfg, "vision").price(cfg.vision.layers[0], "mlp") / plan.parameters_total
        )
    else:
        assert plan.stacks["vision"].removed_layers[:1] == (int(np.argmin(scores.importance)),)
    assert PrunePlan.from_json(plan.to_json()) == plan
    same = compose(keep_everything(cfg, plan.fingerprint, plan.parameters_before), plan)
    assert (same.stacks, plan.apply_to(cfg)) == (plan.stacks, same.apply_to(cfg))


def test_plans_of_another_stack_are_refused():
    cfg = config(UNEQUAL, vision=True).with_layers((*TOWER, TOWER[0]), "vision")
    for method, scores in (("depth", depth_scores(cfg, [0, 1, 2, 3])), ("width", width_scores(cfg))):
        with pytest.raises(UserError, match="scores do not match the vision stack of this model"):
            make_plan(dataclasses.replace(scores, stack="vision"), cfg, method=method, ratio=0.01)
        with pytest.raises(UserError, match=r"this model has no stack of layers 'audio' \(it has text, vision\)"):
            make_plan(dataclasses.replace(scores, stack="audio"), cfg, method=method, ratio=0.01)
    with pytest.raises(UserError, match="scores do not match the text stack"):
        make_plan(dataclasses.replace(tower_scores(cfg), stack="text"), cfg, method="width", ratio=0.01)


def test_from_json_refuses_files_that_are_not_plans(tmp_path):
    with pytest.raises(UserError, match=r"none.json: no such plan"):
        PrunePlan.from_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match=r"half.json: is not valid JSON .*: plan again"):
        PrunePlan.from_json(tmp_path / "half.json")
    with pytest.raises(UserError, match=r"plan JSON: .*missing required field `format`"):
        PrunePlan.from_json("{}")


def test_a_plan_that_lists_many_heads_is_checked_at_once():
    """Not each with each."""
    many = 40_000
    data, text = plan_data()
    text["sizes_before"] = {"0": {"kv_heads": many, "q_heads": many, "mlp": 1}}
    text["kept"] = {"0": {"kv_heads": f"0-{many - 1}", "q_heads": f"0-{many - 1}", "mlp": "0"}}
    assert PrunePlan.from_json(json.dumps(data)).layers[0].sizes == text["sizes_before"]["0"]
    text["kept"]["0"]["q_heads"] = f"0-{many - 2}"
    with pytest.raises(UserError, match="do not share its key/value heads") as error:
        PrunePlan.from_json(json.dumps(data))
    assert len(str(error.value)) <= 2000


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
            units=unit_scores((head_score * np.arange(1.0, 5.0),) * 3, (np.arange(1.0, 25.0),) * 3),
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


def test_vocabularies_compose_and_are_ranges_in_json():
    first, second = KeptVocabulary(10, (0, 2, 3, 7), "first"), KeptVocabulary(4, (1, 3), "second")
    plan = keep_everything(config(), "f", 100)
    both = compose(dataclasses.replace(plan, vocabulary=first), dataclasses.replace(plan, vocabulary=second))
    assert both.vocabulary == KeptVocabulary(10, (2, 7), "first")
    assert compose(dataclasses.replace(plan, vocabulary=first), plan).vocabulary == first
    with pytest.raises(UserError, match="the second plan is for another vocabulary than the first plan leaves"):
        compose(dataclasses.replace(plan, vocabulary=first), dataclasses.replace(plan, vocabulary=first))
    text = dataclasses.replace(plan, vocabulary=first).to_json()
    data = json.loads(text)
    assert (data["tokenizer"], data["components"]["text"]["kept"][""]) == ("first", {"vocab": "0,2-3,7"})
    assert PrunePlan.from_json(text).vocabulary == first
    for kept in (f"0-{2**31 - 1}", "3,0", "2-1", "0-1,1"):
        data["components"]["text"]["kept"][""]["vocab"] = kept
        with pytest.raises(UserError, match=r"vocab of text .* are not ascending ranges of numbers below 10"):
            PrunePlan.from_json(json.dumps(data))
