"""Decoders that normalise what branches write, share keys and values, or have inputs of every layer: layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import assert_changed_by, real_values, solved_change
from hf_cases import keep_layers
from prune_cases import EQUAL, config, missing, model, plan_for, rows, width_scores
from stack_cases import decoder_layer

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten, unflatten, unstack_layers
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.models.vocabulary import cross_entropy
from vlmprune_jax.core.prune import apply_plan, gptq
from vlmprune_jax.core.prune.criteria import input_weights
from vlmprune_jax.core.prune.criteria.gradients import gradient_channels
from vlmprune_jax.core.prune.reconstruct_config import TokenWeights

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
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)

    def loss(params):
        total = 0.0
        for b in batches:
            logits = forward(one.replace(params=params), b["input_ids"], attention_mask=b["attention_mask"])[0]
            wanted = jnp.asarray(b["labels"][:, 1:])
            total += jnp.where(wanted == -100, 0.0, cross_entropy(logits[:, :-1], wanted)).sum()
        return total / count

    expected = unstack_layers(jax.grad(loss)(jax.tree.map(jnp.asarray, one.params)), one.cfg)[0]
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
        logits = forward(cut, arrays["input_ids"], attention_mask=arrays["attention_mask"])[0][:, :-1]
        wanted = jnp.asarray(arrays["labels"][:, 1:])
        return float(jnp.where(wanted == -100, 0.0, cross_entropy(logits, wanted)).sum())

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
