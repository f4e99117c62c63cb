"""A pruned vision tower in files: what it computes, what its config.json says, who loads it, and what is refused."""

import json

import numpy as np
import pytest
from block_cases import packed
from hf_cases import edit_config, prune
from prune_cases import kept_units, silenced
from refusal import refused
from stack_cases import tower_layer
from vlm_cases import internvl_chat_config, internvl_config, llava_config, make_vlm_folder

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.models.vlm import features_of, to_nnx
from vlmprune_jax.core.prune import KeptLayer, compose
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.exports.reload import check_export

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


@pytest.mark.parametrize("cut", CUTS)
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
    assert (vision["num_hidden_layers"], feature_layer) == (n_layers, -1)
    heads = 3 if cut == "uneven" else layers[0].sizes["q_heads"]
    assert (vision["num_attention_heads"], vision.get("head_dim", 8)) == (heads, 8)
    assert vision.get("vision_use_head", True) == (model.cfg.vision.kind != "siglip")
    assert vision["intermediate_size"] == (40 if cut == "uneven" else layers[0].sizes["mlp"])
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


@pytest.mark.parametrize("uneven", ["per_layer", "refuse"])
def test_unequal_layers_are_refused(source, tmp_path, uneven):
    plan = prune(vp.load(source), CUTS["uneven"], "vision")[1]
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
