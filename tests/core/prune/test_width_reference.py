"""Width pruning of the reference, case by case: its scores, the heads and neurons it keeps, and its pruned logits."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from decoder_cases import fed_with, golden_decoder
from prune_cases import expanded, golden_llava
from repository import load_arrays
from rounding import assert_same_sums

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.prune import apply_plan, fingerprint, score
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.exports.pruning import prune_iteratively

# Each criterion, reduction, selection and kind of calibration once; the other ratios and combinations are slow tests.
QUICK = (
    "l1_r25", "l2_sum_r25", "l2_iter2_r50", "first_max_r25", "second_r25", "mix_r50", "vectorize_r25", "first_vlm_r25",
    "first_global_r25", "first_ranges_r25",
)  # fmt: skip
SLOW = (
    "l1_r50", "l2_r25", "l2_r50", "l2_iter2_r25", "l2_global_r25", "first_r25", "first_r50", "first_mean_r25",
    "mix_r25", "vectorize_r50", "first_iter2_r50", "first_iter2_r25", "mix_iter2_r50", "first_global_r50",
    "vectorize_vlm_r50", "second_vlm_r25", "mix_vlm_r25",
)  # fmt: skip
QUICK_OF = {"llama": QUICK, "phi2": QUICK[::4], "phi3": QUICK[1::4]}
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
