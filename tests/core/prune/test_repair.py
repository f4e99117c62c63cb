"""Repair of readers, of experts, of one layer at a time, and of unusual blocks; devices without LAPACK."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import assert_changed_by, real_values, solved_change
from hf_cases import keep_layers, mean_loss
from prune_cases import EQUAL, config, missing, model, narrow, plain_gradients, plan_for, rows, width_scores
from refusal import refused
from stack_cases import decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.prune import apply_plan, gptq, layerwise
from vlmprune_jax.core.prune.criteria import input_weights
from vlmprune_jax.core.prune.criteria.gradients import gradient_channels
from vlmprune_jax.core.prune.expert_repair import _of_experts
from vlmprune_jax.core.prune.layers import Layer
from vlmprune_jax.core.prune.least_squares import RIDGES, Sums, change, held_out_errors, in_blocks
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights
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


# Decoders that normalise what branches write, share keys and values, or have inputs of every layer.

SANDWICH = {"norm_place": "both", "norm_offset": 1.0, "qk_norm": True}
NORMS = [SANDWICH, {"norm_place": "after", "norm": "layer"}]
HEADS, KEYS, NEURONS = tuple(range(4)), (0, 1), tuple(range(12))
VALUES = ("o_proj", "down_proj", "o_proj_out", "down_proj_out", "middle")


def values(one, *batches):
    return real_values(one, *batches, names=VALUES)


def gain_of(one, number, name):
    layer = unstack_layers(one.params, one.cfg)[0][number]
    return np.asarray(layer[f"{name}/weight"], np.float64) + one.cfg.text.block.norm_offset


@pytest.mark.parametrize("norms", NORMS)
def test_a_weight_before_a_norm_equals_least_squares_in_float64(norms):
    """What enters the norm is fitted to its target at the dense model's statistics: heads, and a cut that is closed."""
    teacher = model(config(EQUAL, **norms))
    plan = plan_for(teacher, [
        (0, (0, 1), (0,), NEURONS), (1, HEADS, KEYS, NEURONS), (3, HEADS, KEYS, NEURONS), (4, HEADS, KEYS, NEURONS),
    ])  # fmt: skip
    pruned, batches = apply_plan(teacher, plan), rows(64)
    solved, report = vp.reconstruct(pruned, plan, teacher, batches, held_out=0.25)
    assert [(one["layer"], one["module"]) for one in report] == [(0, "o_proj"), (1, "down_proj")]
    assert all(one["ridge"] is not None and one["error_after"] < one["error_before"] for one in report)
    heads, _ = report
    dense, ours = values(teacher, *batches)[0], values(pruned, *batches)[0]
    out, gain = dense["o_proj_out"], gain_of(teacher, 0, "attention_output_norm")
    centre = out.mean(1, keepdims=True) if "norm" in norms else 0.0
    rate = (((out - centre) ** 2).mean(1, keepdims=True) + teacher.cfg.text.block.norm_eps) ** -0.5
    # of layer 0 the inputs are the same: the norm's affine map takes one output to the other
    residual = gain * rate * (out - ours["o_proj_out"])
    change = solved_change(ours["o_proj"], residual, dense["middle"], heads["ridge"], rate) / gain
    assert_changed_by(change, 0, "self_attn/o_proj", pruned, solved, 1e-3)


def test_contributions_are_of_the_stream_behind_the_norm():
    """The size of a branch before its norm is immaterial to the model and to its scores."""
    one = model(config(EQUAL[:2], **SANDWICH, out_bias=False, mlp_bias=False))
    flat = dict(flatten(one.params))
    for name in ("self_attn/o_proj", "mlp/down_proj"):
        flat[f"text/layers/0/{name}/weight"] = 30 * flat[f"text/layers/0/{name}/weight"]
    louder = Model(unflatten(flat), one.cfg)
    arrays = rows(8)
    for criterion in ("activation", "fluctuation"):
        a, b = (vp.score(m, arrays, criterion=criterion) for m in (one, louder))
        for x, y in zip((*a.along("mlp"), *a.along("kv_heads")), (*b.along("mlp"), *b.along("kv_heads")), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-2)
    weights = unstack_layers(one.params, one.cfg)[0][0]
    gain = gain_of(one, 0, "mlp_output_norm")
    expected = ((gain[:, None] * weights["mlp/down_proj/weight"]) ** 2).sum(0)
    np.testing.assert_allclose(input_weights(one, power=2)[0]["down_proj"], expected, rtol=1e-4)


@pytest.mark.parametrize("norms", NORMS)
def test_rounding_weighs_tokens_by_what_they_add_to_the_stream(norms):
    one = model(config(EQUAL[:2], **norms))
    (arrays,) = rows(4)
    stream = gptq.decoder_stream(one, [arrays], TokenWeights())
    sums = gptq.finite_sums(gptq.input_sums, stream.load(0), stream, "test")
    layer = values(one, arrays)[0]
    for name in ("o_proj", "down_proj"):
        out, x = layer[f"{name}_out"], layer[name]
        centre = out.mean(1, keepdims=True) if "norm" in norms else 0.0
        rate = 1 / (((out - centre) ** 2).mean(1) + one.cfg.text.block.norm_eps)
        weighted = x * (rate / (layer["after"] ** 2).mean(1))[:, None]
        np.testing.assert_allclose(sums[name], weighted.T @ x, rtol=1e-3, atol=1e-5 * sums[name].max())


LAYERS = (
    decoder_layer(4, 2, 12, 5), decoder_layer(4, 2, 12), decoder_layer(4, 2, 12, 5), decoder_layer(4, 2, 12, 5, 2),
    decoder_layer(4, 2, 12, None, 1),
)  # fmt: skip
TRAITS = {"norm_place": "both", "qk_norm": True, "v_norm": True, "scale": 1.0, "layer_scalar": True}


def shared_model(extra=4):
    """Random weights; branch norms and scales of the size that trained models have."""
    made = model(config(LAYERS, layer_inputs=extra, **TRAITS))
    flat = {path: np.array(leaf) for path, leaf in flatten(made.params).items()}
    for path, leaf in flat.items():
        if "layer_scalar" in path:
            flat[path] = 0.7 + 0.4 * np.abs(leaf)
        elif "extra/norm" in path:
            flat[path] = 0.1 * leaf
    return made.replace(params=unflatten(flat))


def labelled(number=4):
    return [{**one, "labels": np.where(one["attention_mask"] == 1, one["input_ids"], -100)} for one in rows(number)]


def raw_gradient(weight, gradient, squared, axis):
    return gradient


def test_gradients_equal_those_of_the_whole_model():
    """A producer's keys and values get the gradients of all layers that reuse them."""
    one, batches = shared_model(), labelled(8)
    arrays = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    gradient = plain_gradients(one.params, one.cfg, arrays, arrays["labels"])
    expected = unstack_layers(gradient, one.cfg)[0]
    typed = [{**b, "media": {}, "token_types": np.where(b["attention_mask"] == 1, 3, 0)} for b in batches]
    found, _ = gradient_channels(one, typed, raw_gradient)
    assert "self_attn/k_proj/weight" in found[2]
    assert "self_attn/k_proj/weight" not in found[3]
    for layer, other in zip(found, expected, strict=True):
        for name, gradient in layer.items():
            np.testing.assert_allclose(gradient, other[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("extra", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_a_weight_before_the_per_layer_branch_equals_least_squares_in_float64(extra):
    """down_proj is fitted to the stream from which branch and scale make the dense one."""
    teacher = shared_model(extra)
    plan = plan_for(teacher, [(0, HEADS, KEYS, NEURONS[:7]), *((i, HEADS, KEYS, NEURONS) for i in range(1, 5))])
    pruned, batches = apply_plan(teacher, plan), rows(64)
    solved, (told,) = vp.reconstruct(pruned, plan, teacher, batches, held_out=0.25)
    assert told["ridge"] is not None
    layer = unstack_layers(teacher.params, teacher.cfg)[0][0]
    gain, scale = np.float64(layer["mlp_output_norm/weight"]), np.float64(layer["layer_scalar/weight"])
    dense, ours = values(teacher, *batches)[0], values(pruned, *batches)[0]
    out = dense["down_proj_out"]
    rate = scale * ((out**2).mean(1, keepdims=True) + teacher.cfg.text.block.norm_eps) ** -0.5
    residual = gain * rate * (out - ours["down_proj_out"])
    change = solved_change(ours["down_proj"], residual, dense["after"], told["ridge"], rate) / gain
    assert told["error_after"] < told["error_before"]
    assert_changed_by(change, 0, "mlp/down_proj", pruned, solved, 2e-3)


def test_streams_layer_by_layer_are_those_of_the_model():
    """Only a neuron of a layer goes, which uses the keys of another: the reported error is the model's."""
    teacher = shared_model()
    plan = plan_for(teacher, [(i, HEADS, KEYS, NEURONS[: 11 if i == 3 else 12]) for i in range(5)])
    pruned = apply_plan(teacher, plan)
    batches = [{name: np.repeat(array[:1], 4, axis=0) for name, array in rows(4)[0].items()}]  # so are held-out rows
    _, (told,) = vp.reconstruct(pruned, plan, teacher, batches)
    assert (told["layer"], told["module"]) == (3, "down_proj")
    target, ours = values(teacher, *batches)[3]["after"], values(pruned, *batches)[3]["after"]
    error = (((target - ours) ** 2).mean(1) / (target**2).mean(1)).mean()
    np.testing.assert_allclose(told["error_before"], error, rtol=1e-3)


def test_a_cut_producer_is_closed_and_its_consumers_redirected():
    """Of layers that share keys, a producer and a consumer go."""
    teacher = shared_model()
    plan = plan_for(teacher, [(i, HEADS, KEYS, NEURONS) for i in (0, 1, 3)])
    pruned = apply_plan(teacher, plan)
    solved, report = vp.reconstruct(pruned, plan, teacher, rows(64))
    assert [(one["layer"], one["module"]) for one in report] == [(1, "down_proj"), (3, "down_proj")]
    assert all(one["ridge"] is not None for one in report)
    errors = [sum(missing(one, teacher, b) for b in rows(8, seed=1)) for one in (solved, pruned)]
    assert errors[0] < errors[1]


def test_greedy_loss_is_that_of_the_stock_model_that_results(goldens):
    one, (arrays,) = vp.load(goldens / "families/gemma4/ckpt"), labelled(4)

    def loss(cut):
        return mean_loss(
            forward(cut, arrays["input_ids"], attention_mask=arrays["attention_mask"])[0], arrays["labels"]
        )

    costs = {i: loss(keep_layers(one, [j for j in range(9) if j != i])[0]) for i in range(9) if i not in (2, 8)}
    first = min(costs, key=costs.get)
    found = vp.score(one, [arrays], criterion="greedy_loss", search=1).layers
    assert found[first] == 0
    assert set(found[[2, 8]]) == {7, 8}  # no class holds the model without them


def test_layers_that_share_keys_lose_the_same_groups():
    cfg = config(LAYERS, **TRAITS)
    scores = width_scores(cfg)
    plan = vp.make_plan(scores, cfg, method="width", sparsity=0.5, heads="proportional")
    kept = [layer.kept["kv_heads"] for layer in plan.stacks["text"].layers]
    assert kept[2] == kept[3]
    assert kept[1] == kept[4]
    together = scores.along("kv_heads")[2] + scores.along("kv_heads")[3]
    assert kept[2] == (int(np.argmax(together)),)
    assert plan.apply_to(cfg).text.layers[3].mixer.kv_heads == 1
