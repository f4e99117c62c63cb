"""LFM2-VL against stock transformers: short convolutions, their state, NaFlex tower, cuts of both and their exports."""

import json

import numpy as np
import pytest
from gguf_cases import SPECIALS, byte_tokenizer, differences
from golden_cases import CLOSE
from hf_cases import edit_config, edit_weights, keep_layers, make_folder, prune
from llama_cpp import MARKER, llama_cpp

import vlmprune_jax as vp
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.export.loads import why_not
from vlmprune_jax.models.generate import SharedPrefix, generate
from vlmprune_jax.prune import KeptLayer

CONFIG = {
    "architectures": ["Lfm2VlForConditionalGeneration"],
    "model_type": "lfm2_vl",
    "image_token_id": 190,
    "downsample_factor": 2,
    "projector_hidden_size": 36,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "lfm2",
        "vocab_size": 199,
        "hidden_size": 48,
        "block_ff_dim": 100,  # 72 neurons: two thirds of it, in whole multiples of 8
        "block_multiple_of": 8,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "full_attn_idxs": [1, 4],
        "conv_L_cache": 3,
        "norm_eps": 2e-5,
        "rope_theta": 500.0,
        "max_position_embeddings": 256,
        "eos_token_id": 7,
    },
    "vision_config": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_patches": 25,
        "patch_size": 4,
        "vision_use_head": False,
    },
}
STOCK = {"class_name": "AutoModelForImageTextToText", "version": "5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("lfm2") / "model", CONFIG)


@pytest.fixture(scope="module")
def model(folder):
    return vp.load(folder)


@pytest.fixture(scope="module")
def row(model):
    """A text with two images, of fewer and of more patches than the table has positions."""
    draw, shapes = np.random.default_rng(0), np.array([[4, 6], [8, 12]])
    pixels, mask = np.zeros((2, 96, 48), np.float32), np.zeros((2, 96), np.int64)
    for image, real, size in zip(pixels, mask, shapes.prod(axis=1), strict=True):
        image[:size], real[:size] = draw.standard_normal((size, 48)), 1
    text = draw.integers(8, 180, 20)
    ids = np.concatenate([text[:5], [190] * 6, text[5:9], [190] * 24, text[9:]])[None]
    images = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **images}


def kept(model, *, neurons=range(72), groups=range(3), layers=range(5)):
    result = []
    for i in layers:
        units = {"mlp": tuple(neurons)}
        if "kv_heads" in model.cfg.text.layers[i].sizes:
            units |= {"kv_heads": tuple(groups), "q_heads": tuple(2 * g + j for g in groups for j in range(2))}
        result.append(KeptLayer(i, units))
    return result


def test_forward_and_generation(folder, model, row, torch_outputs):
    expected = torch_outputs(folder, row, **STOCK, max_new_tokens=6)
    np.testing.assert_allclose(vp.forward(model, **row)[0], expected["logits"], **CLOSE)
    tokens = generate(model, **row, max_new_tokens=6, eos_token_ids=())
    np.testing.assert_array_equal(tokens, expected["tokens"])


def test_padding_reaches_no_state(model, row):
    """Rows padded on either side give the logits and tokens of the row alone, behind a shared prefix too."""
    draw = np.random.default_rng(1)
    ids = draw.integers(8, 180, (2, 9))
    alone = [generate(model, ids[i : i + 1], max_new_tokens=5, eos_token_ids=())[0] for i in (0, 1)]
    logits = vp.forward(model, ids)[0]
    for left, right in ((3, 0), (0, 3), (2, 1)):
        sides = ((0, 0), (left, right))
        padded, mask = np.pad(ids, sides), np.pad(np.ones_like(ids), sides)
        found = vp.forward(model, padded, attention_mask=mask)[0]
        np.testing.assert_allclose(found[:, left : left + 9], logits, **CLOSE)
        tokens = generate(model, padded, attention_mask=mask, max_new_tokens=5, eos_token_ids=())
        np.testing.assert_array_equal(tokens, alone)
    rest, rest_mask = np.pad(ids[:, 6:], ((0, 0), (2, 0))), np.pad(np.ones((2, 3), int), ((0, 0), (2, 0)))
    shared = SharedPrefix(ids[:, :6], np.ones((2, 6), int), np.array([0, 1]))
    tokens = generate(model, rest, attention_mask=rest_mask, prefix=shared, max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens, alone)


CUTS = {
    "layers": {"layers": [0, 1, 3]},
    "neurons": {"neurons": range(3, 50)},
    "groups": {"groups": [0, 2]},
    "all": {"layers": [1, 2, 3], "neurons": range(3, 50), "groups": [1]},
}


@pytest.mark.parametrize("cut", CUTS)
def test_exports_of_cuts_load_in_stock_transformers(folder, model, row, torch_outputs, tmp_path, cut):
    smaller, plan = prune(model, kept(model, **CUTS[cut]))
    assert vp.PrunePlan.from_json(plan.to_json()) == plan
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    config = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert len(config["layer_types"]) == config["num_hidden_layers"]
    assert "block_ff_dim" not in config
    assert not config["block_auto_adjust_ff_dim"]
    logits = torch_outputs(tmp_path / "out", row, **STOCK)["logits"]
    np.testing.assert_allclose(vp.forward(smaller, **row)[0], logits, **CLOSE)
    again = vp.load(tmp_path / "out")
    assert again.cfg.text == smaller.cfg.text
    np.testing.assert_array_equal(vp.forward(again, **row)[0], vp.forward(smaller, **row)[0])


def test_the_tower_is_cut(folder, model, row, torch_outputs, tmp_path):
    layers = [KeptLayer(i, {"kv_heads": (0, 1, 2), "q_heads": (0, 1, 2), "mlp": tuple(range(5, 30))}) for i in (0, 2)]
    smaller, plan = prune(model, layers, "vision")
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    logits = torch_outputs(tmp_path / "out", row, **STOCK)["logits"]
    np.testing.assert_allclose(vp.forward(smaller, **row)[0], logits, **CLOSE)


def test_a_decoder_alone(model, row, torch_outputs, tmp_path):
    config = {**CONFIG["text_config"], "architectures": ["Lfm2ForCausalLM"], "tie_word_embeddings": True}
    folder = make_folder(tmp_path / "text", config)
    rows = {"input_ids": row["input_ids"] % 180}
    logits = torch_outputs(folder, rows, class_name="AutoModelForCausalLM", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(vp.load(folder), **rows)[0], logits, **CLOSE)


def test_scores_plans_and_reconstruction(model):
    draw = np.random.default_rng(0)
    ids = draw.integers(8, 180, (4, 4, 30)).astype(np.int32)
    batches = [{"input_ids": x, "attention_mask": np.ones_like(x), "labels": x} for x in ids]
    for criterion in ("taylor", "activation"):
        scores = vp.score(model, batches, criterion=criterion)
        assert [unit for unit in scores.units if unit[1] != "mlp"] == [(1, "kv_heads"), (4, "kv_heads")]
    plan = vp.make_plan(scores, model.cfg, method="width", ratio=0.2)
    assert min(layer.sizes["mlp"] for layer in plan.layers) < 72
    scores = vp.score(model, batches, criterion="block_influence")
    assert len(vp.make_plan(scores, model.cfg, method="depth", ratio=0.2).layers) < 5
    pruned, plan = prune(model, kept(model, neurons=range(36), groups=[0, 2]))
    solved, report = vp.reconstruct(pruned, plan, model, batches)
    assert [(line["layer"], line["module"]) for line in report if line["module"] == "o_proj"] == [
        (1, "o_proj"),
        (4, "o_proj"),
    ]
    assert sum(line["module"] == "down_proj" for line in report) == 5
    whole, cut, mended = (np.asarray(vp.forward(m, ids[0])[0]) for m in (model, pruned, solved))
    assert np.abs(mended - whole).mean() < np.abs(cut - whole).mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["conv"] * 4}, "num_hidden_layers is 5 but layer_types lists 4 layers"),
        ({"layer_types": ["mamba"] * 5}, r"layer_types \['mamba'\] are not supported"),
        ({"full_attn_idxs": []}, "layer_types has no full_attention"),
        ({"conv_bias": True}, "conv_bias true is not supported"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, changes, message):
    folder = make_folder(tmp_path / "model", CONFIG)
    edit_config(folder, text_config={**CONFIG["text_config"], **changes})
    with pytest.raises(UserError, match=message):
        vp.load(folder)


def test_what_cannot_be_cut(model, row):
    with pytest.raises(UserError, match="needs one layer of full attention: keep one"):
        keep_layers(model, [0, 2, 3])
    with pytest.raises(UserError, match=r"spatial_shapes has shape .* pass both as the processor returns them"):
        vp.forward(model, **row | {"spatial_shapes": np.array([[4, 6]])})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder that llama.cpp takes: patches of 16 pixels a side, a table of 16 x 16 positions, 260 tokens."""
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": 264}, "image_token_id": 4}
    config["vision_config"] = {**CONFIG["vision_config"], "patch_size": 16, "num_patches": 256}
    source = make_folder(tmp_path_factory.mktemp("lfm2") / "gguf", config)
    edit_weights(source, lambda held: {key: x if "norm" in key else x * np.float32(0.6) for key, x in held.items()})
    marks = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    byte_tokenizer(source, (*SPECIALS, "<image>", *marks))
    return source, vp.load(source)


@pytest.mark.parametrize("cut", ["", "layers", "neurons"])
def test_llama_cpp(pair, tmp_path, cut):
    """Log-probabilities, greedy tokens, features of an image and the answer behind it."""
    pytest.importorskip("xllamacpp")
    source, whole = pair
    model = prune(whole, kept(whole, **CUTS[cut]))[0] if cut else whole
    vp.save(model, tmp_path / "out", source_dir=source, format="gguf", dtype="float32")
    draw = np.random.default_rng(0)
    ids, image = draw.integers(9, 260, (1, 40)), draw.integers(0, 256, (256, 512, 3)).astype(np.uint8)
    found = llama_cpp(
        tmp_path / "out", rows=ids, prompts=ids, greedy=6, image=image, prompt=f"{MARKER}what", texts=["what"]
    )
    assert differences(vp.forward(model, ids)[0][0], found["logits"][0])[0] <= 0.05
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=6, eos_token_ids=())[0], found["tokens"][0])
    pixels = (image.reshape(16, 16, 32, 16, 3).swapaxes(1, 2).reshape(1, 512, -1) / 127.5 - 1).astype(np.float32)
    row = np.array([[5, *[4] * 128, 6, *found["ids"][0]]])
    shown = {"pixel_values": pixels, "spatial_shapes": np.array([[16, 32]])}
    logits, wanted = vp.forward(model, row, **shown, capture=("image_features",))
    features = np.asarray(wanted["image_features"])
    assert np.abs(found["features"] - features).max() <= 2e-3 * np.abs(features).max()
    assert differences(logits[0, -1], found["answer"])[0] <= 0.1


def test_what_llama_cpp_cannot_hold(pair):
    model = pair[1]
    assert "other numbers of heads than hidden_size / head_dim" in why_not(
        prune(model, kept(model, groups=[0]))[0].cfg, "gguf"
    )
    assert "of attention alone: keep one" in why_not(keep_layers(model, [1, 4])[0].cfg, "gguf")
