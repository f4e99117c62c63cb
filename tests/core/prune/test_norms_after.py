"""Pruning decoders that normalise the output of each branch (sandwich norms): nothing in prune/ knows of a norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import decoder_values
from prune_cases import EQUAL, batch, config, missing, model, plan_for, rows

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, apply
from vlmprune_jax.core.prune import apply_plan, gptq
from vlmprune_jax.core.prune.criteria import input_weights
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights

SANDWICH = {"norm_place": "both", "norm_offset": 1.0, "qk_norm": True}
NORMS = [SANDWICH, {"norm_place": "after", "norm": "layer"}]
HEADS, KEYS, NEURONS = tuple(range(4)), (0, 1), tuple(range(12))
VALUES = ("o_proj", "down_proj", "o_proj_out", "down_proj_out", "middle")


@functools.cache
def _hooked(cfg):
    def run(params, ids, mask):
        return [
            {"before": block.before, "after": block.after, **block.inputs}
            for block in decoder_values(params, cfg, ids, VALUES, attention_mask=mask)
        ]

    return jax.jit(run)


def values(one, arrays):
    """Per layer the values of a batch's real tokens, float64[tokens, ...]."""
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    hooked = _hooked(one.cfg)(one.params, jnp.asarray(ids), jnp.asarray(mask))
    return [{name: np.asarray(x, np.float64)[mask == 1] for name, x in layer.items()} for layer in hooked]


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
    heads, _ = report
    assert heads["ridge"] is not None
    gram = cross = 0.0
    for arrays in batches:
        dense, ours = values(teacher, arrays)[0], values(pruned, arrays)[0]
        out, target = dense["o_proj_out"], dense["middle"]
        centre = out.mean(1, keepdims=True) if "norm" in norms else 0.0
        rate = (((out - centre) ** 2).mean(1, keepdims=True) + teacher.cfg.text.block.norm_eps) ** -0.5
        # of layer 0 the inputs are the same: the norm's affine map takes one output to the other
        residual = gain_of(teacher, 0, "attention_output_norm") * rate * (out - ours["o_proj_out"])
        x = rate * np.concatenate([ours["o_proj"].reshape(len(out), -1), np.ones((len(out), 1))], axis=1)
        weighted = x / (target**2).mean(1, keepdims=True)
        gram, cross = gram + weighted.T @ x, cross + weighted.T @ residual
    change = np.linalg.solve(gram + heads["ridge"] * np.diag(np.diag(gram)), cross)
    change /= gain_of(teacher, 0, "attention_output_norm")
    before, after = (flatten(one.params["text"]["layers"]["0"]) for one in (pruned, solved))
    parts = {part: after[f"self_attn/o_proj/{part}"][0] - before[f"self_attn/o_proj/{part}"][0]
             for part in ("weight", "bias")}  # fmt: skip
    scale = np.abs(change).max()
    np.testing.assert_allclose(parts["weight"].reshape(20, -1).T, change[:-1], atol=1e-3 * scale, rtol=0)
    np.testing.assert_allclose(parts["bias"], change[-1], atol=1e-3 * scale, rtol=0)
    assert all(one["ridge"] is None or one["error_after"] < one["error_before"] for one in report)
    new = rows(16, seed=1)
    errors = [sum(missing(one, teacher, arrays) for arrays in new) for one in (solved, pruned)]
    assert errors[0] < 0.95 * errors[1]


def test_reported_errors_are_those_of_the_stream_behind_the_norm():
    """Errors before and after are measured with the norm's own statistics."""
    teacher = model(config(EQUAL[:2], **SANDWICH))
    plan = plan_for(teacher, [(0, (0, 1), (0,), NEURONS), (1, HEADS, KEYS, NEURONS)])
    pruned = apply_plan(teacher, plan)
    batches = rows(64)
    solved, (told,) = vp.reconstruct(pruned, plan, teacher, batches)
    assert told["module"] == "o_proj"

    def error(one):
        total = tokens = 0.0
        for arrays in batches:
            dense, ours = values(teacher, arrays)[0]["middle"], values(one, arrays)[0]["middle"]
            total += (((dense - ours) ** 2).mean(1) / (dense**2).mean(1)).sum()
            tokens += len(dense)
        return total / tokens

    # 8 rows of 64 are held out: the means agree as far as samples do
    np.testing.assert_allclose(told["error_before"], error(pruned), rtol=0.25)
    np.testing.assert_allclose(told["error_after"], error(solved), rtol=0.25)
    assert error(solved) < error(pruned)


@pytest.mark.parametrize("norms", NORMS)
def test_neurons_that_are_copies_are_made_up_for_exactly(norms):
    """The removed half of the neurons equals the kept one: the kept weights double, and nothing is missing."""
    teacher = model(config(EQUAL[:2], **norms))
    flat = {path: np.array(leaf) for path, leaf in flatten(teacher.params).items()}
    for name in ("gate_proj", "up_proj"):
        for part in ("weight", "bias"):
            leaf = flat[f"text/layers/0/mlp/{name}/{part}"]
            leaf[:, 6:] = leaf[:, :6]
    teacher = teacher.replace(params=unflatten(flat))
    plan = plan_for(teacher, [(i, HEADS, KEYS, NEURONS[:6]) for i in range(2)])
    pruned, batches = apply_plan(teacher, plan), rows(64)
    solved, report = vp.reconstruct(pruned, plan, teacher, batches)
    assert all(one["ridge"] == 1e-4 for one in report)
    errors = [missing(one, teacher, batches[0]) for one in (solved, pruned)]
    assert errors[0] < 1e-4 * errors[1]


def test_block_influence_and_depth():
    one = model(config(EQUAL, **SANDWICH))
    arrays = rows(4)
    scores = vp.score(one, arrays, criterion="block_influence")
    for found, layer in zip(scores.layers, values(one, arrays[0]), strict=True):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (layer["before"], layer["after"]))
        np.testing.assert_allclose(found, 1 - (a * b).sum(1).mean(), rtol=1e-4)
    plan = vp.make_plan(scores, one.cfg, method="depth", layers_removed=2)
    pruned = vp.apply_plan(one, plan)
    before, after = (unstack_layers(m.params, m.cfg)[0] for m in (one, pruned))
    for number, layer in zip(plan.stacks["text"].kept_layers, after, strict=True):
        assert all(np.array_equal(layer[path], before[number][path]) for path in layer)
    assert vp.score(pruned, arrays, criterion="block_influence").layers.shape == (3,)


def test_taylor_equals_the_gradient_of_the_whole_loss():
    one = model(config(EQUAL[:3], **SANDWICH))
    arrays = batch(one.cfg)
    scores = vp.score(one, [arrays], criterion="taylor", variant="param_first", reduction="sum")

    def loss(params):
        logits, _ = apply(params, one.cfg, arrays["input_ids"], attention_mask=arrays["attention_mask"])
        labels = arrays["labels"][:, 1:]
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), np.maximum(labels, 0)[..., None], -1)[..., 0]
        return jnp.where(labels != IGNORED, each, 0.0).sum() / float((labels != IGNORED).sum())

    gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, one.params))
    weights, grads = (flatten(tree["text"]["layers"]["0"]) for tree in (one.params, gradient))
    product = {path: np.abs(np.asarray(weights[path] * grads[path], np.float64)) for path in grads}
    mlp = sum(product[f"mlp/{name}_proj/weight"].sum(axis) for name, axis in (("gate", 2), ("up", 2), ("down", 1)))
    np.testing.assert_allclose(np.stack(scores.along("mlp")), mlp, rtol=1e-3, atol=1e-6 * mlp.max())


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


def test_layers_by_search_close_their_cuts():
    one = model(config(EQUAL[:4], **SANDWICH))
    arrays = [batch(one.cfg, rows=8, seed=seed) for seed in range(2)]
    for solved in (False, True):
        scores = vp.score(one, arrays, criterion="greedy_loss", solved=solved, search=2)
        assert sorted(scores.layers) == [0, 1, 2, 3]


@pytest.mark.parametrize("norms", NORMS)
def test_rounding_weighs_tokens_by_what_they_add_to_the_stream(norms):
    one = model(config(EQUAL[:2], **norms))
    (arrays,) = rows(4)
    stream = gptq.decoder_stream(one, [arrays], TokenWeights())
    sums = gptq.finite_sums(gptq.input_sums, stream.load(0), stream, "test")
    layer = values(one, arrays)[0]
    for name in ("o_proj", "down_proj"):
        out, x = layer[f"{name}_out"], layer[name].reshape(len(layer["after"]), -1)
        centre = out.mean(1, keepdims=True) if "norm" in norms else 0.0
        rate = 1 / (((out - centre) ** 2).mean(1) + one.cfg.text.block.norm_eps)
        weighted = x * (rate / (layer["after"] ** 2).mean(1))[:, None]
        np.testing.assert_allclose(sums[name], weighted.T @ x, rtol=1e-3, atol=1e-5 * sums[name].max())
