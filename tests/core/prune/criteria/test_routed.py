"""Criteria for experts, from the sums of stored statistics of stock transformers by token type."""

import numpy as np
import pytest
from golden_cases import Golden, cut_layers
from hf_cases import prune
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import assert_scores
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.part import Key
from vlmprune_jax.core.prune.calibration import ANSWER, IMAGE, PROMPT, TOKEN_TYPE_WEIGHTS, TOKEN_TYPES
from vlmprune_jax.core.prune.config import COMBINATIONS
from vlmprune_jax.core.prune.criteria.routed import REAP
from vlmprune_jax.core.prune.routing import SUMS, Routing, measure_routing
from vlmprune_jax.core.prune.tables import affected_tokens

OF_SUMS = {
    "expert_frequency": lambda s: s["count"],
    "expert_norm": lambda s: s["sum_f"],
    "reap": lambda s: s["sum_gf"] / s["count"],
    "man": lambda s: s["sum_f"] / s["count"],
    "msan": lambda s: s["sum_ff"] / s["count"],
}


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gemma4_moe", "internvl_moe", "qwen3_5_moe"])
def test_scores_of_all_tokens_and_of_images(goldens, name):
    golden = Golden(goldens / "families" / name)
    stored = {key: golden.arrays[f"batch_left_{key}"] for key in ("count", "sum_f", "sum_ff", "sum_gf")}
    for criterion, score_of in OF_SUMS.items():
        scores = vp.score(golden.model, [golden.batch("left")], criterion=criterion)
        for actual, sums in (
            (scores.values, {key: x.sum(axis=1) for key, x in stored.items()}),
            (scores.by_token_type["image"], {key: x[:, 1] for key, x in stored.items()}),
        ):
            with np.errstate(invalid="ignore", divide="ignore"):
                expected = score_of(sums)
            for layer, values in enumerate(expected):
                seen = sums["count"][layer] > 0
                values = np.where(seen, values, values[seen].max())  # an expert without tokens is not the first to go
                np.testing.assert_allclose(actual[Key("text", layer, "experts")], values, rtol=1e-4, err_msg=criterion)


def test_experts_of_few_tokens_stay(goldens):
    golden = Golden(goldens / "families/qwen3_vl_moe")
    count = golden.arrays["batch_left_count"].sum(axis=1)
    scores = vp.score(golden.model, [golden.batch("left")], criterion="reap", fewest_tokens=float(np.median(count)))
    for layer, tokens in enumerate(count):
        values = scores.along("experts")[layer]
        assert (values[tokens < np.median(count)] == values.max()).all()
    ids = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int32)}
    refused("needs experts", vp.score, vp.load(goldens / "families/qwen3_vl/ckpt"), [ids], criterion="reap")


@pytest.fixture(scope="module")
def measured(goldens):
    golden = Golden(goldens / "families/qwen3_vl_moe")
    return golden, measure_routing(golden.model, [golden.batch("left")])


def test_sums_equal_stock(measured, tmp_path):
    golden, routing = measured
    names = dict(zip(SUMS, ("count", "sum_g", "sum_f", "sum_ff", "sum_gf", "gf_max"), strict=True))
    for row, (name, stored) in enumerate(names.items()):
        for layer, (text, image) in enumerate(golden.arrays[f"batch_left_{stored}"]):
            own = routing.sums[layer][:, row]
            both = np.maximum(own[PROMPT - 1], own[ANSWER - 1]) if name == "largest" else own[0] + own[ANSWER - 1]
            np.testing.assert_allclose(both, text, rtol=1e-4, err_msg=name)
            np.testing.assert_allclose(own[IMAGE - 1], image, rtol=1e-4, err_msg=name)
    routing.save(tmp_path / "routing.npz")
    again = Routing.load(tmp_path / "routing.npz")
    for criterion in OF_SUMS:
        expected = vp.score(golden.model, [golden.batch("left")], criterion=criterion, token_types="floor")
        scores = vp.score(golden.model, criterion=criterion, routing=again, token_types="floor")
        assert_scores(scores, expected)
    (tmp_path / "routing.npz").write_bytes((tmp_path / "routing.npz").read_bytes()[:-90])
    refused("score again", Routing.load, tmp_path / "routing.npz")
    other = vp.load(golden.folder.parent / "internvl_moe/ckpt")
    refused("this routing is of another model", vp.score, other, criterion="reap", routing=again)
    refused("'l2' does not score experts by a routing", vp.score, golden.model, criterion="l2", routing=again)


def test_affected_tokens_are_those_that_stock_changes(measured):
    golden, routing = measured
    single = {name: golden.arrays[f"single_{name}"][None] for name in ("input_ids", "labels")}
    batch = single | {"attention_mask": np.ones_like(single["input_ids"])} | golden.shown(["single"])
    routing = measure_routing(golden.model, [batch])
    scores = vp.score(golden.model, criterion="reap", routing=routing)
    plan = vp.make_plan(scores, golden.model, method="experts", experts=5)
    _, header, rows = affected_tokens(plan, routing)
    assert header == ["layer", "image tokens", "prompt tokens", "answer tokens"]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "mean"]
    kept = golden.facts["cuts"]["experts"]["experts"][0]
    affected, tokens = golden.facts["first_layer_tokens_with_a_removed_choice"]["single"]
    counts = {name: int((routing.token_types == number).sum()) for name, number in TOKEN_TYPES.items()}
    assert sum(counts.values()) == tokens
    assert sum(share * counts[name] for name, share in routing.affected(0, kept).items()) == pytest.approx(affected)
    smaller, _ = prune(golden.model, cut_layers(golden, "experts"))
    hidden = [
        vp.forward(m, **golden.inputs("single"), capture=("hidden",))[1]["hidden"][1][0]
        for m in (golden.model, smaller)
    ]
    unchanged = np.abs(hidden[0] - hidden[1]).max(axis=-1) < 1e-4
    np.testing.assert_array_equal(unchanged, np.isin(routing.choices[0], kept).all(axis=1))


@given(seed=st.integers(0, 2**16), experts=st.integers(3, 12))
@settings(max_examples=20, deadline=None)
def test_every_token_type_keeps_its_best_experts(seed, experts):
    draw = np.random.default_rng(seed)
    sums, types = draw.random((len(TOKEN_TYPES), len(SUMS), 12)), len(TOKEN_TYPES)
    sums *= draw.random((types, 1, 1)) ** 4  # of very different sizes
    routing = Routing("", {0: sums}, {}, np.zeros(0, np.uint8))
    values = {kind: sums[number - 1, 4] / sums[number - 1, 0] for kind, number in TOKEN_TYPES.items()}
    shares = np.stack([own / own.sum() for own in values.values()])
    weights = dict.fromkeys(TOKEN_TYPE_WEIGHTS, 1.0)
    options = {"fewest_tokens": 0.0, "few_tokens": "protect", **weights}
    scores = {
        how: REAP.function(routing, token_types=how, **options)[0][Key("text", 0, "experts")] for how in COMBINATIONS
    }
    np.testing.assert_allclose(scores["sum"], shares.sum(axis=0))
    np.testing.assert_allclose(scores["max"], shares.max(axis=0))
    np.testing.assert_allclose(scores["pooled"], sums[:, 4].sum(axis=0) / sums[:, 0].sum(axis=0))
    kept = set(np.argsort(scores["floor"])[-experts:])
    for own in values.values():
        assert kept >= set(np.argsort(own)[::-1][: experts // types])


def test_experts_of_few_tokens_are_refused(measured):
    golden, routing = measured
    few = {"fewest_tokens": 50.0, "few_tokens": "refuse"}
    fact = r"layer \d: experts [\d, ]+ compute fewer than 50 calibration tokens: raise"
    refused(fact, vp.score, golden.model, criterion="reap", routing=routing, **few)
