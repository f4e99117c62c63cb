"""Plan files, what they refuse, plans that follow each other, what is printed of them, and the layers that stay."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hf_cases import copy_llava
from prune_cases import EQUAL, UNEQUAL, config, depth_scores, hand_plan, kept_units, model, width_scores
from refusal import refused
from stack_cases import changed, decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.core import limits
from vlmprune_jax.core.layer import keep_layers, layer_runs, scan_groups
from vlmprune_jax.core.limits import ENGINES, Engine, Limit, check_loads, keeps_heads, why_not
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.models.flops import layer_costs
from vlmprune_jax.core.models.vlm import encode, stack_module
from vlmprune_jax.core.plans.kept import TOKENS
from vlmprune_jax.core.prune import KeptLayer, KeptVocabulary, PrunePlan, compose, keep_everything, score
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.tables import compare, explain
from vlmprune_jax.io.exports.pruning import make_plan
from vlmprune_jax.run.cli.main import main


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


# What `vlmprune prune --explain` and `vlmprune diff` print of plans.

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config(method):
    config = experiment_config()
    config.model.hf_dir = "{folder}/teacher"
    config.score.depth, config.score.width = "random", "l2"
    config.prune.method, config.prune.ratio = method, 0.25
    return config
"""


def rows_of(out):
    """The cells of a printed table by layer, its header as "layer"."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()]
    return {cells[0]: cells for cells in lines if cells and (cells[0] in ("layer", "all") or cells[0].isdigit())}


def test_plans_of_a_golden_are_explained_and_compared(goldens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # room for every column
    copy_llava(goldens, tmp_path / "teacher")
    (tmp_path / "e.py").write_text(CONFIG.format(folder=tmp_path))
    for method in ("width", "hybrid"):
        flags = [f"--config={tmp_path / 'e.py'}:{method}", f"--workdir={tmp_path / method}"]
        assert main(["score", *flags]) == 0
        assert main(["prune", *flags, "--explain"]) == 0
        first = capsys.readouterr().out
        assert main(["prune", *flags, "--explain"]) == 0
        second = capsys.readouterr().out
        assert "unchanged, skipped" in second
        assert rows_of(first) == rows_of(second) != {}
    assert "decoder: what each layer lost (hybrid by random + l2)" in second
    plan, cfg = vp.PrunePlan.from_json(tmp_path / "hybrid/plan.json"), vp.load(tmp_path / "teacher").cfg
    depth, width = (vp.Scores.load(tmp_path / "hybrid" / name) for name in ("scores.npz", "scores_width.npz"))
    rows, cost = rows_of(second), layer_costs(cfg).of
    gone = int(plan.removed_layers[0])
    assert rows[str(gone)][1:5] == ["0 of 8", "0 of 80", f"{cost(cfg.text.layers[gone]):,}", "100.0 %"]
    assert rows[str(gone)][6:] == [f"1 of {len(cfg.text.layers)}", "-", "-", "removed"]
    layer = plan.layers[0]
    lost = cost(cfg.text.layers[layer.index]) - cost(cfg.text.layers[layer.index].resized(layer.sizes))
    neurons = width.along("mlp")[layer.index]
    share = 1 - neurons[list(layer.kept["mlp"])].sum() / neurons.sum()
    cells = rows[str(layer.index)]
    assert cells[1:4] == [f"{len(layer.kept['q_heads'])} of 8", f"{len(layer.kept['mlp'])} of 80", f"{lost:,}"]
    assert (cells[5], cells[8]) == (f"{depth.layers[layer.index]:.4g}", f"{100 * share:.1f} %")
    assert rows["all"][3] == f"{plan.parameters_before - plan.parameters_after:,}"
    assert main(["diff", str(tmp_path / "width"), str(tmp_path / "hybrid/plan.json")]) == 0
    rows, other = rows_of(capsys.readouterr().out), vp.PrunePlan.from_json(tmp_path / "width/plan.json")
    assert rows[str(gone)] == [str(gone), "A", "-", "-", "-", "-"]
    a, b = (set(one.kept["mlp"]) for one in (other.layers[layer.index], layer))
    assert rows[str(layer.index)][4:] == [f"{len(a)} / {len(b)}", f"{100 * len(a & b) / len(a | b):.1f} %"]
    assert rows["all"][1] == f"both: {100 * (1 - 1 / len(other.layers)):.1f} %"


def test_what_a_layer_was_spared_for_is_said():
    cfg = config(EQUAL)
    width, depth = width_scores(cfg), depth_scores(cfg, [0.0, 1, 2, 3, 4])
    spec = PlanConfig(protect=(0,))
    ((_, header, rows),) = explain(make_plan(depth, cfg, method="depth", ratio=0.2, protect=(0,)), cfg, spec, [depth])
    assert header[-3:] == ["score", "rank", "why"]
    assert [row[-1] for row in rows] == ["protected", "removed", "kept", "kept", "kept", "4 layers kept"]
    spec = PlanConfig(attn_layers=(1, 3), mlp_layers=(2, 5), neurons_multiple=2)
    options = {"attn_layers": (1, 3), "mlp_layers": (2, 5), "neurons_multiple": 2}
    plan = make_plan(width, cfg, method="width", ratio=0.2, **options)
    ((_, _, rows),) = explain(plan, cfg, spec, [width])
    assert [row[-1] for row in rows[:4]] == [
        "heads out of range, neurons out of range",
        "neurons out of range, neurons_multiple=2",
        "neurons_multiple=2",
        "heads out of range, neurons_multiple=2",
    ]
    refused("text/layers has 5 units in the plan, but 3 in this model", explain, plan, config(EQUAL[:3]), spec, [width])


def test_overlaps_of_plans_and_plans_that_have_none(tmp_path, capsys):
    cfg = config(EQUAL)
    plans = [make_plan(width_scores(cfg, seed), cfg, method="width", ratio=0.3) for seed in (0, 1)]
    there, back = compare(*plans)[0][2], compare(*reversed(plans))[0][2]
    assert [row[3::2] for row in there] == [row[3::2] for row in back]
    assert {cell for row in compare(plans[0], plans[0])[0][2] for cell in row[3::2]} == {"100.0 %"}
    sets = [{(layer.index, n) for layer in plan.layers for n in layer.kept["mlp"]} for plan in plans]
    assert there[-1][-1] == f"{100 * len(sets[0] & sets[1]) / len(sets[0] | sets[1]):.1f} %"
    for name, plan in (("a", plans[0]), ("b", keep_everything(cfg, "another", 9))):
        plan.to_json(tmp_path / name / "plan.json")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "these plans are for different models (fingerprints" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "a")]) == 2
    assert "diff takes two plans: vlmprune diff A B" in capsys.readouterr().err
    assert main(["diff", str(tmp_path / "a"), str(tmp_path)]) == 2
    assert "plan.json: no such plan" in capsys.readouterr().err
    data = json.loads((tmp_path / "a/plan.json").read_text())
    del data["sizes_before"]["text/4/mlp"]
    (tmp_path / "b/plan.json").write_text(json.dumps(data))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2


# Layers: their scans, keys of others, and limits of engines that planning reads.


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ("AAAA", ["A*4"]),
        ("ABC", ["A*1", "B*1", "C*1"]),
        ("LLLF" * 8, ["LLLF*8"]),
        ("LLLF" * 3 + "LLF" + "LLLF" * 4, ["LLLF*3", "L*2", "F*1", "LLLF*4"]),
        ("SSSSSF" * 5 + "SSSS", ["SSSSSF*5", "S*4"]),
        ("SSSSSF" * 2, ["SSSSSF*2"]),
        ("AABAAB" + "B", ["AAB*2", "B*1"]),
        ("", []),
    ],
)
def test_the_fewest_blocks_are_compiled(layers, groups):
    """Equal neighbours are one run, alone and in every repetition of a pattern."""
    scans = scan_groups(tuple(layers))
    texts = ["".join(run.layer * (len(run.numbers) // scan.repetitions) for run in scan.runs) for scan in scans]
    assert [f"{text}*{scan.repetitions}" for text, scan in zip(texts, scans, strict=True)] == groups
    runs = layer_runs(tuple(layers))
    neighbours = sum(a != b for a, b in itertools.pairwise(layers)) + bool(layers)
    assert len(runs) == sum(len(scan.runs) for scan in scans) <= neighbours
    assert sorted(number for run in runs for number in run.numbers) == [*range(len(layers))]
    assert all(layers[number] == run.layer for run in runs for number in run.numbers)


WINDOWED, FULL = decoder_layer(4, 2, 12, 5), decoder_layer(4, 2, 12)
SHARING = (WINDOWED, FULL, WINDOWED, WINDOWED.reading(2), FULL.reading(1), WINDOWED.reading(2))


@pytest.mark.parametrize(
    ("numbers", "sources"),
    [
        (range(6), [None, None, None, 2, 1, 2]),
        ([1, 2, 3, 4], [None, None, 1, 0]),
        ([0, 1, 3, 5], [None, None, 0, 0]),  # layer 0 takes the place of layer 2
        ([1, 3, 4], [None, NO_LAYER, 0]),
    ],
)
def test_sources_follow_the_kept_layers(numbers, sources):
    kept = keep_layers(SHARING, list(numbers))
    assert [layer.mixer.source for layer in kept] == sources
    assert keep_layers(kept, range(len(kept))) == kept


def test_keys_come_from_the_source():
    """Layers 0 and 1 are alike and one scan; layer 3 reads the one that its config names, whatever layer 2 reads."""
    ids, outputs = np.arange(12, dtype=np.int32)[None], []
    for source in (0, 1):
        text = config((WINDOWED, WINDOWED, WINDOWED.reading(source))).text
        assert [text.supplies(number) for number in range(3)] == [source, source or None, None]
        both = model(config((WINDOWED, WINDOWED, WINDOWED.reading(1 - source), WINDOWED.reading(source))))
        assert scan_groups(both.cfg.text.layers)[0].runs[0].numbers == (0, 1)
        outputs.append(encode(both.params, both.cfg, ids)[0])
    assert float(abs(outputs[0] - outputs[1]).max()) > 1e-3


def test_layers_of_one_window_have_their_own_rotation():
    slow = changed(WINDOWED, {"rope": dataclasses.replace(WINDOWED.mixer.rope, theta=1e6)})
    cfg = config((WINDOWED, slow)).text
    patterns = stack_module("text", cfg).context(np.ones((1, 12), np.int32)).patterns
    first, second = (patterns[layer.mixer.pattern].rope[0] for layer in cfg.layers)
    assert float(abs(first - second).max()) > 0.1


@pytest.mark.parametrize(
    ("fields", "layers", "holds"),
    [
        ({"equal": True}, EQUAL, True),
        ({"equal": True}, UNEQUAL, False),
        ({"allowed": ()}, EQUAL, False),
        ({"axes": ("kv_heads",), "multiple": 7}, EQUAL, False),
        ({"axes": ("kv_heads",), "multiple": 1}, EQUAL, True),
        ({"axes": ("mlp",), "allowed": (-1,)}, EQUAL, False),
        ({"axes": ("experts",), "allowed": (-1,)}, EQUAL, True),  # no layer has experts
        ({"component": "vision", "allowed": ()}, EQUAL, True),  # the model has no tower
    ],
)
def test_a_limit_is_about_the_sizes_of_its_axes(fields, layers, holds):
    assert Limit("mine", "reason", **fields).holds(config(layers)) == holds


def test_planning_reads_the_rows(monkeypatch):
    cfg = config(EQUAL)
    heads = {layer.mixer.q_heads for layer in cfg.text.layers}
    mine = Engine("mine 1", lambda cfg: [Limit("mine", "it has one number of heads", axes=("q_heads",), allowed=heads)])
    monkeypatch.setitem(ENGINES, "mine", mine)
    assert why_not(cfg, "mine") is None
    assert keeps_heads(cfg, "text", ["mine"])
    fewer = cfg.with_layers([layer.smaller(layer.mixer.root) for layer in cfg.text.layers])
    refused(r"loads_in='mine': .* could not load the pruned model: it has one number", check_loads, fewer, ["mine"])
    refused(r"loads_in 'mine2' is not one of .*; did you mean 'mine'", why_not, cfg, "mine2")
    always = dataclasses.replace(mine, always=mine.limits)
    monkeypatch.setitem(ENGINES, "mine", always)
    assert limits.why_no_class(fewer) == "it has one number of heads"
