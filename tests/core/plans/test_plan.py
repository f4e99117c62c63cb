"""Plan files, what they refuse, and plans that follow each other."""

import dataclasses
import json

import pytest
from prune_cases import EQUAL, UNEQUAL, config, depth_scores, hand_plan, kept_units, model, width_scores
from refusal import refused
from stack_cases import decoder_layer

from vlmprune_jax.core.plans.kept import TOKENS
from vlmprune_jax.core.prune import KeptLayer, KeptVocabulary, PrunePlan, compose, keep_everything, score
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
    assert next(iter(data["kept"])) == "text/layers"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan.json"]


def plan_data():
    cfg = config(EQUAL)
    return json.loads(make_plan(width_scores(cfg), cfg, method="width", ratio=0.2).to_json())


def sized(data, axis, size, kept=None):
    """Give every layer this size along an axis, and perhaps these kept units."""
    for i in range(5):
        data["sizes_before"][f"text/{i}/{axis}"] = size
        data["kept"] |= {f"text/{i}/{axis}": kept} if kept is not None else {}


def keeping(**axes):
    """A change of the kept units of layer 1."""
    return lambda data: data["kept"].update({f"text/1/{axis}": ranges for axis, ranges in axes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("fingerprint"), "missing required field `fingerprint`.*: plan again"),
        (lambda d: d.update(format=7), "has format 7, but .* reads 5: upgrade vlmprune-jax"),
        (lambda d: d.update(format=4), "has format 4, but .* reads 5: run `vlmprune prune` again"),
        (lambda d: d.update(kept={"text/layers": ""}), r"text/layers: kept layers \[\] are not incre"),
        (lambda d: d["kept"].update({"text/layers": "4,3"}), "text/layers '3' are not ascending .* below 5"),
        (lambda d: d["kept"].update({"text/layers": "0,2-4"}), "text/1/.* has kept units, but layer 1 is removed"),
        (lambda d: d["kept"].update({"text/5/mlp": "0"}), "kept axes text/5/mlp are missing in sizes_before"),
        (lambda d: d["sizes_before"].update({"text/x/mlp": 3}), "'text/x/mlp' is no axis of a model"),
        (lambda d: d["sizes_before"].update({"text/7/mlp": 3}), "layers of the text stack are not numbered 0, 1"),
        (lambda d: d["sizes_before"].update({"text/layers": 9}), "layers of the text stack are not numbered 0, 1"),
        (keeping(mlp="3,3"), "text/1/mlp '3' are not ascending .* below 12"),
        (keeping(mlp="3-12"), "'3-12' are not ascending ranges of numbers below 12"),
        (keeping(mlp="5-3"), "'5-3' are not ascending ranges"),
        (keeping(mlp="1,"), "'' are not ascending ranges"),
        (keeping(mlp="\u0663"), "are not ascending ranges"),
        (keeping(mlp=f"0-{10**30}"), "are not ascending ranges of numbers below 12"),
        (keeping(mlp=""), r"text/1/mlp: kept neurons \[\] are not .* at least one"),
        (keeping(mlp=[1]), r"Expected `str`, got `array` - at `.*kept"),
        (keeping(q_heads="0-2", kv_heads="0-1"), "do not share its key/value heads .* evenly"),
        (keeping(q_heads="0,3", kv_heads="1"), "do not share its key/value heads .* evenly"),
        (lambda d: d.update(tokenizer="x"), "has only one of kept tokens and tokenizer digest"),
        (lambda d: sized(d, "mlp", True), "Expected `int`, got `bool`"),
        (lambda d: d.update(sizes_before={f"text/{i}/mlp": 1 for i in range(10**5 + 1)}), "length <= 100000"),
        (lambda d: sized(d, "mlp", 2**24 + 1), "Expected `int` <= 16777216 - at `.*sizes_before"),
        (lambda d: sized(d, "mlp", 2**24 - 1), "has 83,8.* heads, neurons, .* than the maximum of 33,554,432"),
        (lambda d: d["sizes_before"].pop("text/3/kv_heads"), "layer 3 has 4 query heads but 0 key/value heads"),
        (lambda d: sized(d, "kv_heads", 8), "layer 0 has 4 query heads but 8 key/value heads, expected a divisor of"),
        (lambda d: sized(d, "expert_mlp", 8), "layer 0 has 8 neurons of experts but 0 experts, expected a divisor"),
        (lambda d: sized(d, "toes", 8), "'text/0/toes' is no axis of a model"),
        (lambda d: d.update(asked=float("nan")), "Expected `float` >= .*asked"),
        (lambda d: d.update(parameters_total=0), "Expected `int` >= 1 - at `.*parameters_total`"),
        (lambda d: d.update(format=True), "Expected `int`, got `bool` - at `.*format`"),
        (lambda d: d.update(sizes_before={"vision/layers": 1, "vision/0/mlp": 2}, kept={}), "expected text among them"),
    ],
)
def test_from_json_refuses(tmp_path, change, message):
    data = plan_data()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    refused(rf"plan.json: .*{message}", PrunePlan.from_json, tmp_path / "plan.json")


def test_files_that_are_not_plans_and_many_heads_at_once(tmp_path):
    """A plan that lists many heads is not checked each with each."""
    refused(r"none.json: no such plan", PrunePlan.from_json, tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": 1,')
    refused(r"half.json: is not valid JSON .*: plan again", PrunePlan.from_json, tmp_path / "half.json")
    refused(r"plan JSON: .*missing required field `format`", PrunePlan.from_json, "{}")
    many = 40_000
    data = plan_data()
    sizes = {"text/0/kv_heads": many, "text/0/q_heads": many, "text/0/mlp": 1}
    data |= {"sizes_before": {"text/layers": 1, **sizes}, "kept": {}}
    assert PrunePlan.from_json(json.dumps(data)).layers[0].sizes == {"kv_heads": many, "q_heads": many, "mlp": 1}
    data["kept"] = {"text/0/q_heads": f"0-{many - 2}"}
    error = refused("do not share its key/value heads", PrunePlan.from_json, json.dumps(data))
    assert len(error) <= 2000


BEFORE = (decoder_layer(6, 3, 10), decoder_layer(4, 2, 8), decoder_layer(6, 3, 10))


def test_a_stack_pruned_twice_is_one_stack_in_original_numbers():
    cfg = config(BEFORE)
    first = hand_plan(cfg, text=[kept_units(0, (0, 1, 4, 5), (0, 2), (1, 3, 8)), KeptLayer.whole(2, BEFORE[2])])
    after = first.apply_to(cfg)
    second = hand_plan(after, text=[kept_units(0, (2, 3), (1,), (0, 2))])
    assert compose(first, second).stacks == hand_plan(cfg, text=[kept_units(0, (4, 5), (2,), (1, 8))]).stacks
    assert compose(hand_plan(cfg), first).kept == first.kept == compose(first, hand_plan(after)).kept
    assert (first.kept_layers, first.removed_layers) == ((0, 2), (1,))
    refused("the plans cannot be composed", compose, first, first)
    turned = (KeptLayer.whole(2, BEFORE[2]), KeptLayer.whole(0, BEFORE[0]))
    refused(r"prune plan: .*kept layers \[2, 0\] are not increasing", hand_plan, cfg, text=turned)


def test_vocabularies_compose_and_are_ranges_in_json():
    first, second = KeptVocabulary(61, (0, 2, 3, 7), "first"), KeptVocabulary(4, (1, 3), "second")
    plan = keep_everything(config(), "f", 100)
    rest = dataclasses.replace(plan, sizes_before={**plan.sizes_before, TOKENS: 4})
    both = compose(plan.trimming(first), plan.trimming(second))
    assert both.vocabulary == KeptVocabulary(61, (2, 7), "first")
    assert compose(plan.trimming(first), rest).vocabulary == first
    refused("make the second plan for the model that the first", compose, plan.trimming(first), plan.trimming(first))
    text = plan.trimming(first).to_json()
    data = json.loads(text)
    assert (data["tokenizer"], data["kept"]) == ("first", {"text/vocab": "0,2-3,7"})
    assert PrunePlan.from_json(text).vocabulary == first
    for ids in ((), (3, 2), (700,)):
        fact = "text/vocab: kept tokens .* are not increasing numbers below 61"
        refused(fact, plan.trimming, KeptVocabulary(61, ids, ""))
    refused("9 rows, this model's 62", KeptVocabulary(9, (1, 2), "").apply_to, config())
    for kept in (f"0-{2**31 - 1}", "3,0", "2-1", "0-1,1"):
        data["kept"]["text/vocab"] = kept
        refused(r"text/vocab .* are not ascending ranges of numbers below 61", PrunePlan.from_json, json.dumps(data))
