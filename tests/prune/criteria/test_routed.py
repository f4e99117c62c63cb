"""Criteria for experts, from the sums of stored statistics of stock transformers by token type."""

import numpy as np
import pytest
from golden_cases import Golden

import vlmprune_jax as vp
from vlmprune_jax.core.errors import UserError

OF_SUMS = {
    "expert_frequency": lambda s: s["count"],
    "expert_norm": lambda s: s["sum_f"],
    "reap": lambda s: s["sum_gf"] / s["count"],
    "man": lambda s: s["sum_f"] / s["count"],
    "msan": lambda s: s["sum_ff"] / s["count"],
}


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4_moe", "internvl_moe"])
def test_scores_of_all_tokens_and_of_images(goldens, name):
    golden = Golden(goldens / "families" / name)
    stored = {key: golden.arrays[f"batch_left_{key}"] for key in ("count", "sum_f", "sum_ff", "sum_gf")}
    for criterion, score_of in OF_SUMS.items():
        scores = vp.score(golden.model, [golden.batch("left")], criterion=criterion)
        for actual, sums in (
            (scores.units, {key: x.sum(axis=1) for key, x in stored.items()}),
            (scores.by_token_type["image"]["units"], {key: x[:, 1] for key, x in stored.items()}),
        ):
            with np.errstate(invalid="ignore", divide="ignore"):
                expected = score_of(sums)
            for layer, values in enumerate(expected):
                seen = sums["count"][layer] > 0
                values = np.where(seen, values, values[seen].max())  # an expert without tokens is not the first to go
                np.testing.assert_allclose(actual[layer, "experts"], values, rtol=1e-4, err_msg=criterion)


def test_experts_of_few_tokens_stay(goldens):
    golden = Golden(goldens / "families/qwen3_vl_moe")
    count = golden.arrays["batch_left_count"].sum(axis=1)
    scores = vp.score(golden.model, [golden.batch("left")], criterion="reap", fewest_tokens=float(np.median(count)))
    for layer, tokens in enumerate(count):
        values = scores.units[layer, "experts"]
        assert (values[tokens < np.median(count)] == values.max()).all()
    ids = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int32)}
    with pytest.raises(UserError, match="a layer has a dense MLP and no experts, which this needs: use a criterion"):
        vp.score(vp.load(goldens / "families/qwen3_vl/ckpt"), [ids], criterion="reap")
