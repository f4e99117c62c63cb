"""Applying plans: properties of any model and any plan; vision towers in files, who loads them, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from block_cases import packed
from hf_cases import assert_equal, edit_config, make_vlm_folder, prune
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_cases import EQUAL, OUTPUTS, UNEQUAL, batch, config, hand_plan, kept_units, model, on_mesh, silenced
from refusal import refused
from stack_cases import decoder_layer, tower_layer
from vlm_cases import internvl_chat_config, internvl_config, llava_config

import vlmprune_jax as vp
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.params import (
    count_params,
    flatten,
    param_axes,
    param_shapes,
    unstack_layers,
)
from vlmprune_jax.core.models.vlm import Model, features_of, forward, to_nnx
from vlmprune_jax.core.prune import KeptLayer, PrunePlan, apply_plan, compose, fingerprint, keep_everything
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.exports.reload import check_export

TOWER = (tower_layer(2, 2, 10), tower_layer(2, 2, 10), tower_layer(2, 2, 7), tower_layer(2, 2, 10))
CFG = config(UNEQUAL, vision=True).with_layers(TOWER, "vision")
STACKS = pytest.mark.parametrize("stack", ["text", "vision"])


def plan_for(one: Model, layers, stack="text") -> PrunePlan:
    return hand_plan(one.cfg, fingerprint(one), "width", "test", **{stack: layers})


def same(a: Model, b: Model) -> None:
    assert a.cfg == b.cfg
    assert_equal(a, b)


@st.composite
def kept_layers(draw, shapes):
    """Any plan's layers: a subset of layers; of each, whole or halved groups and a subset of neurons."""

    def subset(size):
        return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))

    result = []
    for index in subset(len(shapes)):
        shape = shapes[index]
        group = shape.mixer.q_heads // shape.mixer.kv_heads
        each, kv_heads = draw(st.integers(1, group)), subset(shape.mixer.kv_heads)
        q_heads = []
        for kv in kv_heads:
            q_heads += sorted(draw(st.permutations(range(kv * group, (kv + 1) * group)))[:each])
        result.append(kept_units(index, tuple(q_heads), kv_heads, subset(shape.channel.mlp)))
    return result


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


@given(stacks=st.tuples(*[st.sampled_from(["text", "vision"])] * 2), data=st.data())
@settings(max_examples=12, deadline=None)
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


# A layer gone; heads, neurons and both gone of the others.
SLICED = [kept_units(0, (0, 1), (0,), (1, 2, 5)), kept_units(2, (1, 3, 4, 6), (0, 1), (0, 9)),
          kept_units(3, (1, 2), (1, 2), (4,))]  # fmt: skip
SLICED_TOWER = [kept_units(0, (1,), (1,), tuple(range(10))), kept_units(2, (0, 1), (0, 1), (0, 2, 6)),
                kept_units(3, (0,), (0,), (9,))]  # fmt: skip


@pytest.mark.parametrize(("stack", "layers"), [("text", SLICED), ("vision", SLICED_TOWER)])
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


# In files.

# Towers of 4 blocks, 3 of them below the feature layer of LLaVA and of the hub's InternVL-Chat.
CONFIGS = {
    "clip": llava_config("llama", "clip"),
    "siglip": llava_config("phi", "siglip"),
    "internvl": internvl_config("qwen2"),
    "internvl_chat": internvl_chat_config("llama"),
}
SHAPE = tower_layer(3, 3, 40)
SOME = tuple(range(1, 40, 3))
CUTS = {
    "depth": [KeptLayer.whole(0, SHAPE), KeptLayer.whole(2, SHAPE)],
    "neurons": [kept_units(i, (0, 1, 2), (0, 1, 2), SOME) for i in range(3)],
    "heads": [kept_units(0, (0, 2), (0, 2), SOME), kept_units(2, (0, 1), (0, 1), SOME)],
    "uneven": [kept_units(0, (1,), (1,), SOME), kept_units(1, (0, 1), (0, 1), SOME[:4]), KeptLayer.whole(2, SHAPE)],
}


# The other towers come with the slow tests.
@pytest.fixture(params=[name if name == "clip" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def source(request, tmp_path):
    config = CONFIGS[request.param]
    depth = 3 if config.get("vision_feature_layer") == -1 else 4  # as many as are computed and those above
    config = config | {"vision_config": config["vision_config"] | {"num_hidden_layers": depth}}
    return make_vlm_folder(tmp_path / "source", config)


def features(model, seed=0):
    side = model.cfg.vision.image_size
    pixels = np.random.default_rng(seed).standard_normal((2, 3, side, side), np.float32)
    module = to_nnx(model)
    return np.asarray(module.projector(features_of(module.vision, module.cfg, packed(pixels))))


def tower_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return config["vision_config"], config.get("vision_feature_layer", config.get("select_layer"))


@pytest.mark.parametrize("cut", ["heads", "uneven"])
def test_file_surgery_computes_what_masking_does(source, tmp_path, cut):
    model, layers, out = vp.load(source), CUTS[cut], tmp_path / "out"
    pruned, plan = prune(model, layers, "vision")
    uneven = "pad" if cut == "uneven" else "per_layer"
    vp.prune_folder(source, plan, out, dtype="source", uneven=uneven)
    again, expected = vp.load(out), features(silenced(model, layers, "vision"))
    np.testing.assert_allclose(features(pruned), expected, atol=1e-5)
    np.testing.assert_allclose(features(again), expected, atol=1e-5)
    assert np.abs(features(model) - expected).max() > 1e-2  # the test can fail
    vision, feature_layer = tower_of(out)
    n_layers = len(layers)
    heads, neurons = (3, 40) if cut == "uneven" else (2, len(SOME))
    assert (vision["num_hidden_layers"], feature_layer) == (n_layers, -1)
    assert (vision["num_attention_heads"], vision.get("head_dim", 8), vision["intermediate_size"]) == (
        heads,
        8,
        neurons,
    )
    assert vision.get("vision_use_head", True) == (model.cfg.vision.kind != "siglip")
    assert (len(again.cfg.vision.layers), again.cfg.vision.n_layers_total) == (n_layers, n_layers)
    # the blocks above the feature layer do not fit the new widths, and nothing computes them
    blocks = {key.split(".layer")[1].split(".")[1] for key in Checkpoint(out) if "encoder.layer" in key}
    assert blocks == {str(i) for i in range(n_layers)}
    if cut != "uneven":
        assert again.cfg == pruned.cfg
    vp.save(pruned, tmp_path / "saved", source_dir=source, dtype="source", uneven=uneven, plan=plan)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "uneven"), [("depth", "refuse"), ("neurons", "refuse"), ("heads", "pad")])
def test_stock_classes_load_it(source, tmp_path, cut, uneven):
    """In torch where it is installed, but for the hub's own layout."""
    pruned, plan = prune(vp.load(source), CUTS[cut], "vision")
    vp.prune_folder(source, plan, tmp_path / "out", uneven=uneven, dtype="source")
    found = check_export(pruned, tmp_path / "out")
    assert found["backend"] == ("jax" if pruned.cfg.layout == "original" else "torch")


def test_keeping_everything_changes_no_byte(source, tmp_path):
    model = vp.load(source)
    plan = vp.PrunePlan.from_json(prune(model, [KeptLayer.whole(i, SHAPE) for i in range(3)], "vision")[1].to_json())
    vp.prune_folder(source, plan, tmp_path / "out", dtype="source")
    old, new = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert set(old) == set(new)
    assert all(old.entries[key].raw().tobytes() == new.entries[key].raw().tobytes() for key in old)
    assert tower_of(tmp_path / "out") == tower_of(source)


def test_both_stacks_in_one_plan(source, tmp_path):
    model = vp.load(source)
    first, tower = prune(model, CUTS["neurons"], "vision")
    decoder = prune(first, [KeptLayer.whole(i, first.cfg.text.layers[i]) for i in (0, 2)])[1]
    plan = compose(tower, decoder)
    vp.prune_folder(source, plan, tmp_path / "out", dtype="float32")
    again = vp.load(tmp_path / "out")
    both = vp.apply_plan(first, decoder)
    assert again.cfg == both.cfg
    for path, leaf in flatten(both.params).items():
        np.testing.assert_array_equal(flatten(again.params)[path], leaf, err_msg=path)
    card = (tmp_path / "out/README.md").read_text()
    assert "Decoder layers: 2, " in card
    assert "Vision layers: 3, each with 3 key/value heads, 3 query heads, 13 neurons." in card


def test_unequal_layers_are_refused(source, tmp_path):
    plan = prune(vp.load(source), CUTS["uneven"], "vision")[1]
    for uneven in ("per_layer", "refuse"):
        refused("no transformers class|one width", vp.prune_folder, source, plan, tmp_path / "out", uneven=uneven)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tower"), [("llava_orig", "clip_tower"), ("bunny", "siglip_tower")])
@pytest.mark.parametrize("cut", ["depth", "neurons"])
def test_a_tower_in_its_own_folder(goldens, tmp_path, name, tower, cut):
    """The hub's layouts leave the tower where it is; those of transformers take it in."""
    source, tower = goldens / "ckpt" / name, goldens / "ckpt" / tower
    model = vp.load(source, vision_dir=tower)
    shapes = model.cfg.vision.layers
    layers = [KeptLayer.whole(i, shape) for i, shape in enumerate(shapes) if i or cut != "depth"]
    if cut == "neurons":
        layers = [kept_units(x.index, x.kept["q_heads"], x.kept["kv_heads"], x.kept["mlp"][1:]) for x in layers]
    pruned, plan = prune(model, layers, "vision")
    refused('layout="transformers"', vp.prune_folder, source, plan, tmp_path / "out", vision_dir=tower)
    vp.prune_folder(source, plan, tmp_path / "out", vision_dir=tower, layout="transformers", dtype="source")
    np.testing.assert_allclose(features(vp.load(tmp_path / "out")), features(pruned), atol=1e-5)
    assert check_export(pruned, tmp_path / "out")["backend"] == "torch"


def test_fewer_heads_say_how_they_load(tmp_path):
    source = make_vlm_folder(tmp_path / "source", CONFIGS["clip"])
    layers = [kept_units(0, (0, 2), (0, 2), SOME), kept_units(1, (0, 1), (0, 1), SOME)]
    pruned, plan = prune(vp.load(source), layers, "vision")
    vp.prune_folder(source, plan, tmp_path / "out")
    refused('heads="keep"', vp.prune_folder, source, plan, tmp_path / "refused", uneven="refuse")
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "PyTorch cannot load this folder: its class computes the head size of the tower as hidden_size / heads" in card
    )
    assert "from_pretrained" not in card
    assert check_export(pruned, tmp_path / "out")["backend"] == "jax"
    vp.save(pruned, tmp_path / "integers", source_dir=tmp_path / "out", quantize="w8a16")
    assert "ransformers" not in (tmp_path / "integers/README.md").read_text().partition("## Loading")[2]
    edit_config(tmp_path / "out", vision_config={**tower_of(tmp_path / "out")[0], "head_dim": None})
    refused(r"the weights do not match config.json .*q_proj", vp.load, tmp_path / "out")
