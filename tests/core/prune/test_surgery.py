"""Applying plans: properties that hold for any model and any plan."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_cases import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, OUTPUTS, UNEQUAL, batch, config, hand_plan, kept_units, model, on_mesh, silenced
from refusal import refused
from stack_cases import decoder_layer, tower_layer

from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.params import (
    count_params,
    flatten,
    param_axes,
    param_shapes,
    unstack_layers,
)
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.core.prune import KeptLayer, PrunePlan, apply_plan, compose, fingerprint, keep_everything
from vlmprune_jax.core.sections import LoraConfig

TOWER = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(2, 2, 7), tower_layer(2, 2, 10))
CFG = config(UNEQUAL, vision=True).with_layers(TOWER, "vision")
STACKS = pytest.mark.parametrize("stack", ["text", "vision"])


def plan_for(one: Model, layers, stack="text") -> PrunePlan:
    return hand_plan(one.cfg, fingerprint(one), "width", "test", **{stack: layers})


@st.composite
def kept_layers(draw, shapes, drop_layers=True, prune_widths=True):
    """Any plan's layers: a subset of layers; of each, whole or halved groups and a subset of neurons."""

    def subset(size):
        return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))

    result = []
    for index in subset(len(shapes)) if drop_layers else range(len(shapes)):
        shape = shapes[index]
        if not prune_widths:
            result.append(KeptLayer.whole(index, shape))
            continue
        group = shape.mixer.q_heads // shape.mixer.kv_heads
        each, kv_heads = draw(st.integers(1, group)), subset(shape.mixer.kv_heads)
        q_heads = []
        for kv in kv_heads:
            q_heads += sorted(draw(st.permutations(range(kv * group, (kv + 1) * group)))[:each])
        result.append(kept_units(index, tuple(q_heads), kv_heads, subset(shape.channel.mlp)))
    return result


def same(a: Model, b: Model) -> None:
    assert a.cfg == b.cfg
    assert_equal(a, b)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray, lambda x: x.astype(ml_dtypes.bfloat16)])
def test_keeping_everything_is_the_identity(as_array):
    one = model(CFG)
    one = one.replace(params=jax.tree.map(as_array, one.params))
    plan = keep_everything(CFG, fingerprint(one), count_params(CFG))
    assert plan.stacks.keys() == {"text", "vision"}
    kept = apply_plan(one, plan)
    same(kept, one)
    assert type(flatten(kept.params)["text/layers/0/mlp/up_proj/weight"]) is type(as_array(np.zeros(2, np.float32)))


@STACKS
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_every_plan_leaves_the_shapes_it_says(stack, data):
    one = model(CFG)
    plan = plan_for(one, data.draw(kept_layers(CFG.stack(stack).layers)), stack)
    pruned = apply_plan(one, plan)
    assert {path: leaf.shape for path, leaf in flatten(pruned.params).items()} == param_shapes(pruned.cfg)
    assert sum(leaf.size for leaf in flatten(pruned.params).values()) == plan.parameters_after
    before, after = (unstack_layers(m.params, m.cfg, stack)[0] for m in (one, pruned))
    heads, neurons = OUTPUTS[stack]
    for layer, new in zip(plan.stacks[stack].layers, after, strict=True):
        old = before[layer.index]
        np.testing.assert_array_equal(new[f"{heads}/weight"], old[f"{heads}/weight"][:, list(layer.kept["q_heads"])])
        np.testing.assert_array_equal(
            new["self_attn/k_proj/bias"], old["self_attn/k_proj/bias"][list(layer.kept["kv_heads"])]
        )
        np.testing.assert_array_equal(new[f"{neurons}/weight"], old[f"{neurons}/weight"][:, list(layer.kept["mlp"])])
        np.testing.assert_array_equal(new[f"{neurons}/bias"], old[f"{neurons}/bias"])


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_depth_and_width_commute(data):
    one = model(CFG)
    widths = data.draw(kept_layers(CFG.text.layers, drop_layers=False))
    depth = data.draw(kept_layers(CFG.text.layers, prune_widths=False))
    alive = [layer.index for layer in depth]
    narrow = apply_plan(one, plan_for(one, widths))
    then_depth = [KeptLayer.whole(i, narrow.cfg.text.layers[i]) for i in alive]
    shallow = apply_plan(one, plan_for(one, depth))
    then_width = [dataclasses.replace(widths[i], index=at) for at, i in enumerate(alive)]
    same(apply_plan(narrow, plan_for(narrow, then_depth)), apply_plan(shallow, plan_for(shallow, then_width)))
    same(apply_plan(shallow, plan_for(shallow, then_width)), apply_plan(one, plan_for(one, [widths[i] for i in alive])))


@pytest.mark.parametrize("stacks", [("text", "text"), ("text", "vision"), ("vision", "text"), ("vision", "vision")])
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_plans_compose(stacks, data):
    one = model(CFG)
    first = plan_for(one, data.draw(kept_layers(CFG.stack(stacks[0]).layers)), stacks[0])
    between = apply_plan(one, first)
    second = plan_for(between, data.draw(kept_layers(between.cfg.stack(stacks[1]).layers)), stacks[1])
    whole = compose(first, second)
    assert list(whole.stacks) == (["text"] if set(stacks) == {"text"} else ["text", "vision"])
    same(apply_plan(one, whole), apply_plan(between, second))
    assert whole.parameters_after == second.parameters_after
    after_all = compose(keep_everything(CFG, first.fingerprint, count_params(CFG)), first)
    assert {name: after_all.stacks[name] for name in first.stacks} == first.stacks
    same(apply_plan(one, after_all), between)


SLICED = [kept_units(0, (0, 1), (0,), (1, 2, 5)), kept_units(1, (0, 3), (0, 1), tuple(range(12))),
          kept_units(2, (1, 3, 4, 6), (0, 1), (0, 9)), kept_units(3, (1, 2), (1, 2), (4,))]  # fmt: skip
DEPTH = [KeptLayer.whole(i, UNEQUAL[i]) for i in (0, 1, 3)]


# A layer gone; heads, neurons and both gone of the others.
SLICED_TOWER = [kept_units(0, (1,), (1,), tuple(range(10))), kept_units(2, (0, 1), (0, 1), (0, 2, 6)),
                kept_units(3, (0,), (0,), (9,))]  # fmt: skip


@pytest.mark.parametrize(("stack", "layers"), [("text", SLICED), ("text", DEPTH), ("vision", SLICED_TOWER)])
def test_slicing_equals_masking(stack, layers):
    one, arrays = model(CFG), batch(CFG)
    plan = plan_for(one, layers, stack)
    inputs = {name: arrays[name] for name in ("pixel_values", "attention_mask")}
    masked, _ = forward(silenced(one, layers, stack), arrays["input_ids"], **inputs)
    sliced, _ = forward(apply_plan(one, plan), arrays["input_ids"], **inputs)
    whole, _ = forward(one, arrays["input_ids"], **inputs)
    real = arrays["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(sliced)[real], np.asarray(masked)[real], atol=1e-5)
    assert np.abs(np.asarray(sliced) - np.asarray(whole))[real].max() > 1e-2  # the test can fail


FOUR = config(vision=True).with_layers((tower_layer(2, 2, 10),) * 4, "vision")
ON_MESH = [
    ("text", [kept_units(i, (0, 3), (0, 1), (0, 2, 3, 11)) for i in (0, 2, 3)]),
    ("vision", [kept_units(0, (0, 1), (0, 1), (0, 2, 3, 9)), kept_units(3, (0, 1), (0, 1), (5, 8))]),
]


@pytest.mark.parametrize(("stack", "layers"), ON_MESH)
def test_a_mesh_keeps_its_shardings_and_numbers(stack, layers):
    one = model(FOUR)
    sharded, plan = on_mesh(one, 2, 2, 2), plan_for(one, layers, stack)
    pruned = apply_plan(sharded, plan)
    same(pruned, apply_plan(one, plan))
    mesh, axes = flatten(sharded.params)["text/norm/weight"].sharding.mesh, param_axes(pruned.cfg)
    for path, leaf in flatten(pruned.params).items():
        assert leaf.sharding.is_equivalent_to(sharding(mesh, axes[path]), leaf.ndim), path


def test_widths_that_the_mesh_does_not_divide_are_refused():
    one = model(FOUR)
    plan, sharded = (
        plan_for(one, [kept_units(i, (0, 1), (0,), tuple(range(11))) for i in range(5)]),
        on_mesh(one, 2, 2, 2),
    )
    refused("kv_heads of text layer 0 = 1; mlp of text layer 0 = 11", apply_plan, sharded, plan)
    tower = plan_for(one, [kept_units(0, (0,), (0,), (0, 1))], "vision")
    refused("kv_heads of vision layer 0 = 1; q_heads of vision", apply_plan, sharded, tower)


def test_adapters_are_pruned_with_their_weights():
    cfg = dataclasses.replace(config(EQUAL), lora=LoraConfig(2, 4.0, 0.0, ("q_proj", "o_proj", "down_proj")))
    one = model(cfg)
    layers = [kept_units(i, (2, 3), (1,), (0, 5)) for i in range(5)]
    pruned = apply_plan(one, plan_for(one, layers))
    assert {path: leaf.shape for path, leaf in flatten(pruned.params).items()} == param_shapes(pruned.cfg)
    old, new = (unstack_layers(m.params, m.cfg)[0][4] for m in (one, pruned))
    np.testing.assert_array_equal(new["self_attn/q_proj/lora_b"], old["self_attn/q_proj/lora_b"][[2, 3]])
    np.testing.assert_array_equal(new["mlp/down_proj/lora_a"], old["mlp/down_proj/lora_a"][:, [0, 5]])


def test_untouched_tensors_are_not_copied():
    one = model(CFG)
    pruned = apply_plan(one, plan_for(one, [KeptLayer.whole(0, CFG.text.layers[0])]))
    for path, leaf in flatten(pruned.params).items():
        if not path.startswith("text/layers/"):
            assert leaf is flatten(one.params)[path], path


def test_plans_of_other_models_are_refused():
    one = model(config(EQUAL))
    plan = plan_for(one, [KeptLayer.whole(i, EQUAL[0]) for i in range(4)])
    refused("sizes are equal, but fingerprints differ", apply_plan, model(config(EQUAL), seed=1), plan)
    refused("text/layers has 5 units in the plan, but 4", apply_plan, apply_plan(one, plan), plan)
    seeing = model(CFG)
    tower = plan_for(seeing, [KeptLayer.whole(0, TOWER[0])], "vision")
    refused("vision/layers has 4 units in the plan, but 1 in this model", apply_plan, apply_plan(seeing, tower), tower)
    refused("vision/layers has 4 units in the plan, but 0 in this model", apply_plan, model(config(UNEQUAL)), tower)
    wider = config((decoder_layer(4, 2, 13),) * 5)
    refused("plan of another model: text/0/mlp has 12 units in the plan, but 13", apply_plan, model(wider), plan)
