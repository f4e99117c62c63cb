"""Repair of experts: sums over the tokens of each against all at once, errors of layers, experts of few tokens."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import vlmprune_jax as vp
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.prune.expert_repair import _of_experts

FAMILIES = Path(__file__).parents[2] / "goldens/families"


def batches(count, length=60):
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 300, (4, length)).astype(np.int32) for _ in range(count)]
    return [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids]


def test_sums_of_each_expert():
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.float32)  # noqa: E731
    chosen = jnp.asarray([[draw.choice(5, 2, replace=False) for _ in range(20)] for _ in range(2)], jnp.int32)
    routed = Routed(chosen, normal(2, 20, 2), normal(2, 20, 2), normal(2, 20, 6))
    params = {f"mlp/experts/{n}_proj/weight": normal(5, *s) for n, s in (("gate", (3, 6)), ("up", (3, 6)))}
    params["mlp/experts/down_proj/weight"] = normal(5, 6, 3)
    error, scale = normal(2, 20, 6), jnp.asarray(draw.random((2, 20)) * (draw.random((2, 20)) < 0.8), jnp.float32)
    sums = _of_experts(routed, params, error, scale, "relu")
    gate, up = (np.einsum("bsh,eih->bsei", routed.read, params[f"mlp/experts/{n}_proj/weight"]) for n in ("gate", "up"))
    gates = np.zeros((2, 20, 5), np.float32)
    np.put_along_axis(gates, np.asarray(chosen), np.asarray(routed.gates), axis=-1)
    hidden = np.maximum(gate, 0) * up * gates[..., None]
    np.testing.assert_allclose(sums.gram, np.einsum("bs,bsei,bsej->eij", scale, hidden, hidden), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(sums.cross, np.einsum("bs,bsei,bsh->eih", scale, hidden, error), atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(sums.tokens, ((gates != 0) & (np.asarray(scale)[..., None] > 0)).sum(axis=(0, 1)))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "gemma4_moe"])
def test_layers_come_nearer_to_the_unpruned_model(name):
    model, records = vp.load(FAMILIES / name / "ckpt"), batches(8)
    plan = vp.make_plan(vp.score(model, records, criterion="reap"), model, method="experts", experts=6)
    pruned = vp.apply_plan(model, plan)
    repaired, report = vp.reconstruct(pruned, plan, model, records)
    assert [row["module"] for row in report] == ["down_proj", *["o_proj", "down_proj"] * 3]
    assert all(row["error_after"] <= row["error_before"] for row in report)
    experts = [row for row in report if row["module"] == "down_proj"]
    if name == "gemma4_moe":  # behind norms
        assert all(row["ridge"] is None for row in experts)
        return
    assert sum(row["error_after"] < 0.97 * row["error_before"] for row in experts) >= 3
    ids = records[0]["input_ids"]
    whole, cut, mended = (np.asarray(vp.forward(each, ids)[0]) for each in (model, pruned, repaired))
    assert np.square(mended - whole).mean() < np.square(cut - whole).mean()


def test_experts_of_few_tokens_stay():
    model = vp.load(FAMILIES / "qwen3_vl_moe/ckpt")
    plan = vp.make_plan(vp.score(model, criterion="random"), model, method="experts", experts=6)
    _, report = vp.reconstruct(vp.apply_plan(model, plan), plan, model, batches(2, length=2))
    experts = [row for row in report if row["module"] == "down_proj"]
    assert all(row["ridge"] is None and row["tokens"] < row["unknowns"] for row in experts)
