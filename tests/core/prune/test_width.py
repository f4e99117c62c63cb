"""Width pruning: scores against plain gradients of the whole loss, and the reference case by case."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from block_cases import packed
from decoder_cases import fed_with, golden_decoder
from prune_cases import (
    EQUAL,
    OUTPUTS,
    UNEQUAL,
    assert_scores,
    batch,
    config,
    expanded,
    golden_llava,
    model,
    plain_gradients,
)
from refusal import refused
from repository import load_arrays
from rounding import assert_same_sums

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import Stopped
from vlmprune_jax.core.models.params import count_params, unstack_layers
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.prune import apply_plan, fingerprint, score
from vlmprune_jax.core.prune.criteria import gradients
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import make_plan, prune_iteratively


@functools.cache
def row_gradients(cfg):
    """Gradients of the mean over the labels of each row."""
    rows = [{name: array[j : j + 1] for name, array in batch(cfg).items()} for j in range(4)]
    rows = [row | {"media": {"vision": packed(row.pop("pixel_values"))}} for row in rows]
    return [plain_gradients(model(cfg).params, cfg, row, row["labels"]) for row in rows]


@functools.cache
def gradients_of(cfg, stack):
    """Per layer and weight: W, the gradient of the mean over all labels, the mean of the rows' squared gradients."""
    rows = [unstack_layers(row, cfg, stack)[0] for row in row_gradients(cfg)]
    labels = (batch(cfg)["labels"][:, 1:] != -100).sum(axis=1)

    def of_weight(i, name, w):
        each = np.stack([np.asarray(row[i][name], np.float64) for row in rows])
        return np.asarray(w, np.float64), np.average(each, axis=0, weights=labels), (each**2).mean(axis=0)

    layers = unstack_layers(model(cfg).params, cfg, stack)[0]
    return [{name: of_weight(i, name, w) for name, w in layer.items()} for i, layer in enumerate(layers)]


def channel(variant, w, g, a, axis):
    terms = {"vectorize": w * g, "param_first": w * g, "param_second": w * a * w, "param_mix": w * g - 0.5 * w * a * w}
    return np.abs(terms[variant].sum(axis)) if variant == "vectorize" else np.abs(terms[variant]).sum(axis)


READERS = {"text": ("gate_proj", "up_proj"), "vision": ("fc1",)}


def expected_widths(cfg, variant, gqa, stack):
    heads, neurons = [], []
    (output, down), readers = OUTPUTS[stack], READERS[stack]
    for layer, shape in zip(gradients_of(cfg, stack), cfg.stack(stack).layers, strict=True):
        q, k, v = (channel(variant, *layer[f"self_attn/{n}_proj/weight"], -1).sum(-1) for n in "qkv")
        o = channel(variant, *layer[f"{output}/weight"], 0).sum(-1)
        if gqa == "groups" or shape.mixer.q_heads == shape.mixer.kv_heads:
            heads.append((q + o).reshape(shape.mixer.kv_heads, -1).sum(1) + k + v)
        else:
            heads.append(q + o)
        rows = [channel(variant, *layer[f"mlp/{n}/weight"], -1) for n in readers]
        neurons.append(sum(rows) + channel(variant, *layer[f"{down}/weight"], 0))
    return heads + neurons


@pytest.mark.parametrize("variant", ["vectorize", "param_first", "param_second", "param_mix"])
@pytest.mark.parametrize("gqa", ["groups", "q_heads", pytest.param("tower", marks=pytest.mark.slow)])
def test_taylor_equals_plain_gradients(variant, gqa):
    cfg, stack = config(UNEQUAL, vision=True), "vision" if gqa == "tower" else "text"
    gqa = "groups" if gqa == "tower" else gqa
    scores = score(model(cfg), [batch(cfg)], criterion="taylor", variant=variant, gqa=gqa, stack=stack)
    sizes = "param_first" if variant == "vectorize" else variant
    for mine, plain, size in zip(
        scores.along("q_heads" if gqa == "q_heads" else "kv_heads") + scores.along("mlp"),
        expected_widths(cfg, variant, gqa, stack),
        expected_widths(cfg, sizes, gqa, stack),
        strict=True,
    ):
        assert_same_sums(mine, plain, size)


def test_long_rows_are_unembedded_in_chunks(monkeypatch):
    cfg = config(EQUAL)
    expected = score(model(cfg), [batch(cfg)], criterion="taylor")
    monkeypatch.setattr(gradients, "CHUNK", 4)  # 8 positions of 4 rows: one of each at a time
    gradients._loss_gradients.clear_cache()
    again = score(model(cfg), [batch(cfg)], criterion="taylor")
    gradients._loss_gradients.clear_cache()
    assert_scores(again, expected, rtol=1e-5)


@pytest.mark.parametrize("budget", [0, 60_000])
def test_products_that_do_not_fit_are_computed_again_to_the_bit(budget, monkeypatch):
    cfg, made = config(EQUAL, vision=True), []
    run = gradients._run_with_products
    monkeypatch.setattr(gradients, "_run_with_products", lambda *args: made.append(args) or run(*args))
    batches = [batch(cfg), batch(cfg, seed=3)]
    expected = score(model(cfg), batches, criterion="taylor")
    assert len(made) == 10  # layers x steps
    again = score(model(cfg), batches, criterion="taylor", memory_budget=budget)
    assert len(made) - 10 == (20 if budget == 0 else 17)  # three of the ten fit
    assert "memory_budget" not in again.options
    assert_scores(again, expected)


@pytest.mark.parametrize("ends", [1, 4])
def test_an_interrupted_taylor_pass_continues_to_the_byte(ends, tmp_path):
    cfg, seen = config(EQUAL, vision=True), []
    batches = [batch(cfg), batch(cfg, seed=3)]
    expected = score(model(cfg), batches, criterion="taylor", by_token_type=True)

    def stop(done):
        if done == ends:
            raise Stopped("stopped")

    options = {"criterion": "taylor", "by_token_type": True}
    with pytest.raises(Stopped):
        score(model(cfg), batches, **options, progress=stop, cache=ArrayCache(tmp_path, {}))
    again = score(model(cfg), batches, **options, progress=seen.append, cache=ArrayCache(tmp_path, {}))
    assert seen == list(range(ends + 1, 6))
    assert_scores(again, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first"])
def test_reductions_are_over_the_tensors_of_a_group_channel_by_channel(reduction):
    cfg = config(UNEQUAL)
    layer = unstack_layers(model(cfg).params, cfg)[0][3]  # 4 heads, 4 key/value heads
    q, k, v = (np.abs(layer[f"self_attn/{n}_proj/weight"]).sum(-1) for n in "qkv")
    attention = np.stack([q, np.abs(layer["self_attn/o_proj/weight"]).sum(0), v, k])
    mlp = np.stack([*(np.abs(layer[f"mlp/{n}_proj/weight"]).sum(-1) for n in ("gate", "up")),
                    np.abs(layer["mlp/down_proj/weight"]).sum(0)])  # fmt: skip
    reduce = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod, "first": lambda x, axis: x[0]}[reduction]
    scores = score(model(cfg), criterion="l1", reduction=reduction)
    np.testing.assert_allclose(scores.along("kv_heads")[3], reduce(attention, axis=0).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(scores.along("mlp")[3], reduce(mlp, axis=0), rtol=1e-5)


def test_biases_do_not_count():
    cfg = config(UNEQUAL)
    one = model(cfg)
    changed = jax.tree.map_with_path(lambda path, x: x * 3 if path[-1].key == "bias" else x, one.params)
    for mine, other in zip(
        score(one, criterion="l2").along("kv_heads"),
        score(one.replace(params=changed), criterion="l2").along("kv_heads"),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, other)


def test_random_scores_follow_their_seed():
    cfg = config(UNEQUAL)
    first, again, other = (score(model(cfg), criterion="random", seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.layers, again.layers)
    assert all((a == b).all() for a, b in zip(first.values.values(), again.values.values(), strict=True))
    assert (first.layers != other.layers).all()
    assert [h.size for h in first.along("kv_heads")] == [2, 2, 2, 4]
    assert all((m >= 0).all() and (m < 1).all() for m in first.along("mlp"))
    assert max(h.max() for h in first.along("kv_heads")) > 1  # a head is the sum of its 6 channels' draws


def test_all_layers_by_word():
    """Ranges are (start, stop) or "all", which is the default."""
    whole = model(config(UNEQUAL))
    scores = score(whole, None, criterion="l2")
    named = make_plan(scores, whole.cfg, method="width", ratio=0.2, attn_layers="all", mlp_layers="all")
    assert named == make_plan(scores, whole.cfg, method="width", ratio=0.2)
    refused("steps=2 need new scores before each", make_plan, scores, whole.cfg, method="width", ratio=0.2, steps=2)


# Each criterion, reduction, selection and kind of calibration once; the other ratios and combinations are slow tests.
QUICK = (
    "l1_r25", "l2_sum_r25", "l2_iter2_r25", "first_max_r25", "second_r25", "mix_r25", "vectorize_r25", "first_vlm_r25",
    "first_global_r25", "first_ranges_r25",
)  # fmt: skip
SLOW = (
    "l1_r50", "l2_r25", "l2_r50", "l2_iter2_r50", "l2_global_r25", "first_r25", "first_r50", "first_mean_r25",
    "mix_r50", "vectorize_r50", "first_iter2_r50", "first_iter2_r25", "mix_iter2_r50", "first_global_r50",
    "vectorize_vlm_r50", "second_vlm_r25", "mix_vlm_r25",
)  # fmt: skip
QUICK_OF = {"llama": QUICK, "phi2": ("l1_r25", "second_r25"), "phi3": ("l2_sum_r25", "mix_r25")}
CASES = [
    pytest.param(name, case, marks=() if case in quick else pytest.mark.slow)
    for name, quick in QUICK_OF.items()
    for case in (*QUICK, *SLOW)
]


class Reference(NamedTuple):
    """A golden decoder, what the reference did to it, and what calibrates it: {kind: (model, batch)}."""

    model: Model
    cases: dict[str, Any]
    arrays: dict[str, np.ndarray]
    calibration: dict[str, tuple[Model, dict[str, np.ndarray]]]


@functools.cache
def reference(goldens: Path, folder: Path, name: str) -> Reference:
    cases = json.loads((goldens / f"width/{name}.json").read_text())
    arrays = load_arrays(goldens / f"width/{name}.npz")
    golden = load_arrays(
        goldens / "forward" / {"llama": "llava.npz", "phi2": "bunny.npz", "phi3": "internvl.npz"}[name]
    )
    if name == "llama":
        model = golden_llava(goldens)
        vlm = expanded(*(golden[part] for part in ("input_ids", "attention_mask", "labels", "pixel_values")))
        np.testing.assert_array_equal(vlm["labels"], golden["merged_labels"])
        spliced = model, vlm
    else:
        model = load(golden_decoder(goldens, name, folder / name))
        fed, ids = fed_with(model, golden["inputs_embeds"])
        prefix = "merged_" if name == "phi2" else ""
        vlm = {part: golden[prefix + part] for part in ("labels", "attention_mask")}
        spliced = fed, {"input_ids": ids, **vlm}
    ids = arrays["calib_input_ids"]
    text = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    return Reference(model, cases, arrays, {"text": (model, text), "vlm": spliced})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


def options_of(case):
    """Return the options of `score` that compute a case's scores."""
    if case["pruner"] == "taylor":
        return {"variant": case["taylor"], "reduction": case.get("reduction", "sum")}
    return {"reduction": case.get("mag_reduction", "mean")}


@functools.cache
def first_scores(goldens, folder, name, calib, criterion, options):
    model, batch = reference(goldens, folder, name).calibration[calib]
    return score(model, [batch], criterion=criterion, **dict(options))


def check_scores(scores, arrays, case, step, magnitudes):
    """Compare the scores of a step with all that the reference recorded; `magnitudes`: see `assert_same_sums`."""
    recorded = {key for key in arrays if key.startswith(f"{case}__step{step}_layer") and "channel" not in key}
    checked = set()
    for kind, axis in zip(("head", "mlp"), scores.axes, strict=True):
        for i, part in enumerate(scores.along(axis)):
            key = f"{case}__step{step}_layer{i}_{kind}_importance"
            if key in arrays:
                assert_same_sums(part, arrays[key], arrays[key] if magnitudes is None else magnitudes.along(axis)[i])
                checked.add(key)
    assert checked == recorded
    assert len(checked) >= 4  # the layers in range, both kinds


@pytest.mark.parametrize(("name", "case"), CASES)
def test_width_equals_the_reference(goldens, folder, name, case):
    """Step by step, as the reference pruned."""
    original, cases, arrays, calibration = reference(goldens, folder, name)
    want = cases[case]
    model, batch = calibration[want["calib"]]
    options, steps = options_of(want), want.get("iterative_steps", 1)
    first = first_scores(goldens, folder, name, want["calib"], want["pruner"], tuple(sorted(options.items())))
    pruned, plan, used = prune_iteratively(
        model, lambda _: [batch], criterion=want["pruner"], scores=first, score_options=options, steps=steps,
        sparsity=want["ratio"], attn_layers=want["attn_range"], mlp_layers=want["mlp_range"],
        selection="global" if want.get("global") else "local", heads="proportional",
    )  # fmt: skip
    for step, scores in enumerate(used):
        signed = want.get("taylor") == "vectorize"
        assert steps == 1 or not signed  # magnitudes are those of the first step
        sizes = {**options, "variant": "param_first"}
        check_scores(scores, arrays, case, step, score(model, [batch], criterion="taylor", **sizes) if signed else None)
    for layer in plan.layers:
        assert list(layer.kept["q_heads"]) == want["kept_heads"][str(layer.index)]
        assert list(layer.kept["mlp"]) == want["kept_neurons"][str(layer.index)]
    assert count_params(pruned.cfg, "text") == want["params_after"]
    assert plan.parameters_after == count_params(pruned.cfg)
    plan = dataclasses.replace(plan, fingerprint=fingerprint(original))
    logits, _ = forward(apply_plan(original, plan), arrays["test_input_ids"])
    np.testing.assert_allclose(logits[0, -1], arrays[f"{case}__test_logits_last"], atol=1e-4)
    if f"{case}__test_logits" in arrays:
        np.testing.assert_allclose(logits[0], arrays[f"{case}__test_logits"], atol=1e-4)


def test_prune_iteratively_is_score_plan_apply_repeated(goldens, folder):
    original, cases, _, calibration = reference(goldens, folder, "llama")
    want, ids, asked = cases["l2_iter2_r25"], calibration["text"][1]["input_ids"], []
    settings = {"steps": 2, "criterion": "l2", "sparsity": 0.25, "attn_layers": (1, 5), "mlp_layers": (1, 5)}

    def batches(step):
        asked.append(step)
        return [calibration["text"][1]]

    pruned, plan, scores = prune_iteratively(original, batches, **settings)
    assert asked == [0, 1]
    first, second = scores
    assert len(second.along("mlp")[1]) < len(first.along("mlp")[1])
    assert prune_iteratively(original, batches, scores=first, **settings)[1] == plan
    assert asked == [0, 1, 1]
    assert [list(layer.kept["q_heads"]) for layer in plan.layers] == [want["kept_heads"][str(i)] for i in range(6)]
    assert [list(layer.kept["mlp"]) for layer in plan.layers] == [want["kept_neurons"][str(i)] for i in range(6)]
    assert (pruned.cfg, pruned.plan, pruned.source) == (plan.apply_to(original.cfg), plan, original.source)
    np.testing.assert_array_equal(*(forward(one, ids)[0] for one in (apply_plan(original, plan), pruned)))
    _, by_ratio, (whole, half) = prune_iteratively(original, lambda _: (), steps=2, criterion="l1", ratio=0.2)
    sizes = [len(scores.along("mlp")[0]) for scores in (whole, half)]
    assert by_ratio.layers[0].sizes["mlp"] < sizes[1] < sizes[0]
    assert by_ratio.target_ratio == 0.2
    assert abs(by_ratio.actual_ratio - 0.2) < 0.5 * 6 * 3 * 48 / by_ratio.parameters_before
