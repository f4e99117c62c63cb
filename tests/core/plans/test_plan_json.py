"""The plan file."""

import dataclasses
import json

import pytest
from prune_cases import EQUAL, UNEQUAL, config, depth_scores, model, width_scores

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.prune import KeptVocabulary, PrunePlan, compose, keep_everything, score
from vlmprune_jax.io.exports.pruning import make_plan


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


def widened(text, **sizes):
    """Give every layer of a component other sizes, of which all but the last unit stay."""
    for before, kept in zip(text["sizes_before"].values(), text["kept"].values(), strict=True):
        before |= sizes
        kept |= {axis: f"0-{size - 2}" for axis, size in sizes.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, _: d.pop("fingerprint"), "missing required field `fingerprint`.*: plan again"),
        (lambda _, t: t.pop("kept"), "missing required field `kept`.*: plan again"),
        (lambda d, _: d.update(format=7), "this plan has format 7, but .* reads 4: upgrade vlmprune-jax"),
        (lambda d, _: d.update(format=3), "has format 3, but .* reads 4: make it again with `vlmprune prune`"),
        (lambda _, t: t.update(kept={}), "no layer is kept"),
        (lambda _, t: t.update(kept=dict(reversed(t["kept"].items()))), r"kept layers \[4, 3, 2, 1, 0\] are not incre"),
        (lambda _, t: t["kept"].update({"5": t["kept"]["4"]}), "layers of the text stack are not numbered 0, 1"),
        (lambda _, t: t["kept"].update({"04": t["kept"]["4"]}), "layers of the text stack are not numbered 0, 1"),
        (lambda _, t: t["sizes_before"].pop("2"), "layers of the text stack are not numbered 0, 1"),
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
        (lambda _, t: t["kept"]["1"].update(experts="0"), "kept axes experts of layer 1 .text stack. are missing"),
        (
            lambda _, t: t["kept"]["1"].update(q_heads="0-2", kv_heads="0-1"),
            "do not share its key/value heads .* evenly",
        ),
        (lambda _, t: t["kept"]["1"].update(q_heads="0-1", kv_heads="1"), "do not share its key/value heads .* evenly"),
        (lambda _, t: t["kept"].update({"": {"vocab": "0"}}), "layers of the text stack are not numbered"),
        (lambda d, _: d.update(tokenizer="x"), "has only one of kept tokens and tokenizer digest"),
        (lambda _, t: t["sizes_before"]["0"].update(mlp=True), "Expected `int`, got `bool`"),
        (
            lambda _, t: t.update(sizes_before={str(i): {} for i in range(10**5)}),
            "Expected `object` of length <= 10001",
        ),
        (lambda _, t: t["sizes_before"]["0"].update(mlp=2**24 + 1), "Expected `int` <= 16777216 - at `.*sizes_before"),
        (lambda _, t: widened(t, mlp=2**24 - 1), "have 83,886,105 heads, neurons, .* than the maximum of 33,554,432"),
        (
            lambda _, t: [layers["3"].pop("kv_heads") for layers in t.values()],
            "layer 3 has 4 query heads but 0 key/value heads",
        ),
        (lambda _, t: widened(t, kv_heads=8), "layer 0 has 4 query heads but 8 key/value heads, expected a divisor of"),
        (lambda _, t: widened(t, expert_mlp=8), "layer 0 has 8 neurons of experts but 0 experts, expected a divisor"),
        (lambda _, t: widened(t, toes=8), "layer 0 has an unknown axis 'toes' .known: kv_heads, q_heads, "),
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
