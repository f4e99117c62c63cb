"""Repair of readers, of experts and of one layer at a time; and the solver of devices without LAPACK."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import EQUAL, config, missing, model, narrow, plan_for, rows
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.prune import apply_plan, layerwise
from vlmprune_jax.core.prune.expert_repair import _of_experts
from vlmprune_jax.core.prune.layers import Layer
from vlmprune_jax.core.prune.least_squares import RIDGES, Sums, change, held_out_errors, in_blocks
from vlmprune_jax.core.prune.reconstruction import reconstruct

SHAPES = {"sequential": {"qk_norm": True}, "parallel": {"parallel": True, "norm": "layer", "gated": False}}


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_read_the_changed_input(shape):
    whole = model(config(EQUAL, **SHAPES[shape]))
    layer = Layer.of(whole.replace(params=jax.tree.map(jnp.asarray, whole.params)), "text", 1)
    draw = np.random.default_rng(0)
    change, x = draw.normal(size=(layer.cfg.hidden_size,) * 2), draw.normal(size=(7, layer.cfg.hidden_size))
    merged = layer.reading(change.astype(np.float32), "mlp")
    own = ("mlp/gate_proj/weight", "mlp/up_proj/weight") if shape == "sequential" else ("mlp/fc1/weight",)
    names = {*own, *((f"self_attn/{name}_proj/weight" for name in "qkv") if shape == "parallel" else ())}
    assert set(merged.changes_from(layer)) == names
    for path in own:
        before, after = (np.asarray(one.params[path], np.float64) for one in (layer, merged))
        np.testing.assert_allclose(x @ after.T, (x + x @ change) @ before.T, atol=1e-4)
    changed = {path for path in layer.params if not jnp.array_equal(layer.params[path], merged.params[path])}
    assert changed == names


@pytest.mark.parametrize("shape", SHAPES)
def test_readers_help_where_much_is_removed_and_only_there(shape):
    teacher, batches = model(config(EQUAL, **SHAPES[shape])), rows(64, batch=16)
    plan = narrow(teacher, 3)
    pruned = apply_plan(teacher, plan)
    without, told = reconstruct(pruned, plan, teacher, batches, readers="none")
    assert {one["module"] for one in told} == {"down_proj"}
    found, told = reconstruct(pruned, plan, teacher, batches)
    readers = [one for one in told if one["module"] in ("self_attn", "mlp")]
    assert readers[0]["ridge"] is None  # the first layer reads the same embeddings
    accepted = [one for one in readers if one["ridge"] is not None]
    assert accepted
    assert all(one["error_after"] < one["error_before"] for one in accepted)
    if shape == "parallel":
        return
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, batch) for batch in new) for one in (found, without, pruned)]
    assert errors[0] < errors[1] < errors[2]
    half = narrow(teacher, 6)
    _, told = reconstruct(apply_plan(teacher, half), half, teacher, batches)
    assert {one["module"] for one in told} == {"down_proj"}


def test_layers_behind_a_cut_come_nearer_to_the_dense_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(layerwise, "RATE", 3e-3)  # a small random model learns slowly
    seen, step = set(), layerwise._step

    def recorded(*arguments):
        seen.add(np.asarray(arguments[4].x).tobytes())
        return step(*arguments)

    monkeypatch.setattr(layerwise, "_step", recorded)
    teacher, batches = model(config(EQUAL)), rows(64, batch=16)
    heads, keys, neurons = tuple(range(4)), (0, 1), tuple(range(12))
    plan = plan_for(teacher, [(i, heads, keys, neurons) for i in (0, 1, 3, 4)])
    pruned = apply_plan(teacher, plan)
    solved, _ = reconstruct(pruned, plan, teacher, batches, refit=False)
    cache = ArrayCache(tmp_path / "parts", {"of": 1})
    trained, told = reconstruct(pruned, plan, teacher, batches, method="layerwise", cache=cache)
    layers = [one for one in told if one["module"] == "layer"]
    assert [one["layer"] for one in layers] == [1, 3, 4]  # from the layer before the cut on
    assert all(one["error_after"] <= one["error_before"] for one in layers)
    assert any(one["ridge"] == 0 for one in layers)
    assert len(seen) == 3 * (64 - 8) // layerwise.ROWS  # of three layers, without the rows held out
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, batch) for batch in new) for one in (trained, solved)]
    assert errors[0] < errors[1]
    cache = ArrayCache(tmp_path / "parts", {"of": 1})
    again, same = reconstruct(pruned, plan, teacher, batches, method="layerwise", cache=cache)
    assert same == told
    assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(trained.params)))


def test_a_plan_without_removed_layers_is_refused():
    teacher = model(config(EQUAL))
    plan = narrow(teacher, 6)
    refused("removes layers", reconstruct, apply_plan(teacher, plan), plan, teacher, rows(), method="layerwise")


@functools.cache
def fewer_experts(goldens, name):
    """(model, plan, pruned model): 6 experts of each layer stay."""
    model = vp.load(goldens / "families" / name / "ckpt")
    plan = vp.make_plan(vp.score(model, criterion="random"), model, method="experts", experts=6)
    return model, plan, vp.apply_plan(model, plan)


def batches(length=60):
    """Of rows with so many tokens."""
    ids = np.random.default_rng(0).integers(0, 300, (8, 4, 60)).astype(np.int32)
    return [{"input_ids": row, "attention_mask": np.ones_like(row) * (np.arange(60) < length)} for row in ids]


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
def test_layers_come_nearer_to_the_unpruned_model(goldens, name):
    (model, plan, pruned), records = fewer_experts(goldens, name), batches()
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


def test_experts_of_few_tokens_stay(goldens):
    model, plan, pruned = fewer_experts(goldens, "qwen3_vl_moe")
    _, report = vp.reconstruct(pruned, plan, model, batches(length=2)[:2])
    experts = [row for row in report if row["module"] == "down_proj"]
    assert all(row["ridge"] is None and row["tokens"] < row["unknowns"] for row in experts)


def sums(n, tokens, seed=0, width=5):
    """Of channels whose sizes differ by orders of magnitude."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((tokens, n)).astype(np.float32) * np.logspace(-1, 1, n, dtype=np.float32)
    r = draw.standard_normal((tokens, width)).astype(np.float32)
    return Sums(x.T @ x, x.T @ r, np.sum(r * r))


@pytest.mark.parametrize("n", [7, 300, 1030])
def test_blocks_solve_what_float64_solves(n):
    gram, cross, *_ = sums(n, 2 * n)
    scale = np.sqrt(np.diag(gram))[:, None]  # what a change of each channel weighs
    for ridge in (RIDGES[1], 1.0):
        matrix = gram + np.diag(ridge * np.diag(gram))
        expected = scale * np.linalg.solve(matrix.astype(np.float64), cross.astype(np.float64))
        for found in (jax.jit(in_blocks)(matrix, cross), change(Sums(gram, cross, 0.0), ridge)):
            np.testing.assert_allclose(scale * found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_devices_of_a_mesh_share_the_solves():
    fit, held, ridges = sums(7, 14), sums(7, 14, seed=1), np.float32(RIDGES)  # 9 on 8 devices
    expected, best = np.asarray(held_out_errors(fit, held, ridges)), change(fit, ridges[0])
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found, shared = held_out_errors(fit, held, ridges), change(fit, ridges[0])
    assert found.is_fully_replicated
    assert shared.is_fully_replicated
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(shared, best, rtol=1e-5)


def test_what_cannot_be_solved_is_nan_and_not_chosen():
    broken = sums(7, 14)
    broken = broken._replace(gram=-broken.gram)
    assert np.isnan(np.asarray(held_out_errors(broken, broken, np.float32(RIDGES)))).all()
    assert np.isnan(np.asarray(jax.jit(in_blocks)(broken.gram, broken.cross))).all()
