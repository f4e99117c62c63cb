"""Width pruning of the reference, case by case: its scores, the heads and neurons it keeps, and its pruned logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from rounding import assert_same_sums

from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.prune import PrunePlan, Scores, apply_plan, score
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


def options_of(case: dict[str, Any]) -> dict[str, str]:
    """Return the options of `score` that compute a case's scores."""
    if case["pruner"] == "taylor":
        return {"variant": case["taylor"], "reduction": case.get("reduction", "sum")}
    return {"reduction": case.get("mag_reduction", "mean")}


def check_scores(
    scores: Scores, arrays: dict[str, np.ndarray], case: str, step: int, magnitudes: Scores | None
) -> None:
    """Compare the scores of a step with all that the reference recorded; `magnitudes`: see `assert_same_sums`."""
    checked, recorded = 0, sum(key.startswith(f"{case}__step{step}_layer") for key in arrays)
    recorded -= sum(key.startswith(f"{case}__step{step}_layer") and "channel" in key for key in arrays)
    for kind, axis in zip(("head", "mlp"), scores.axes, strict=True):
        for i, part in enumerate(scores.along(axis)):
            golden = arrays.get(f"{case}__step{step}_layer{i}_{kind}_importance")
            if golden is not None:
                assert_same_sums(part, golden, golden if magnitudes is None else magnitudes.along(axis)[i])
                checked += 1
    assert checked == recorded >= 4  # the layers in range, both kinds


def replayed(
    want: dict[str, Any], case: str, arrays: dict[str, np.ndarray], model: Model, batch: Any, first: Scores
) -> PrunePlan:
    """Prune as the reference did, step by step with `first` as the first scores; return one plan after checking it."""
    steps = want.get("iterative_steps", 1)
    pruned, plan, used = prune_iteratively(
        model,
        lambda _: [batch],
        criterion=want["pruner"],
        scores=first,
        score_options=options_of(want),
        steps=steps,
        sparsity=want["ratio"],
        attn_layers=want["attn_range"],
        mlp_layers=want["mlp_range"],
        selection="global" if want.get("global") else "local",
        heads="proportional",
    )
    for step, scores in enumerate(used):
        signed, options = want.get("taylor") == "vectorize", {**options_of(want), "variant": "param_first"}
        assert steps == 1 or not signed  # magnitudes are those of the first step
        magnitudes = score(model, [batch], criterion="taylor", **options) if signed else None
        check_scores(scores, arrays, case, step, magnitudes)
    for layer in plan.layers:
        assert list(layer.kept["q_heads"]) == want["kept_heads"][str(layer.index)]
        assert list(layer.kept["mlp"]) == want["kept_neurons"][str(layer.index)]
    assert count_params(pruned.cfg, "text") == want["params_after"]
    assert plan.parameters_after == count_params(pruned.cfg)
    return plan


def check_pruned(case: str, arrays: dict[str, np.ndarray], original: Model, plan: PrunePlan) -> None:
    """Compare the pruned model's logits with the reference's."""
    logits, _ = forward(apply_plan(original, plan), arrays["test_input_ids"])
    np.testing.assert_allclose(logits[0, -1], arrays[f"{case}__test_logits_last"], atol=1e-4)
    if f"{case}__test_logits" in arrays:
        np.testing.assert_allclose(logits[0], arrays[f"{case}__test_logits"], atol=1e-4)
