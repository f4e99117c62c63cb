"""LFM2-VL against stock transformers: short convolutions, their state, NaFlex tower, cuts of both and their exports."""

import json
import shutil

import numpy as np
import pytest
from gguf_cases import SPECIALS, byte_tokenizer, differences
from golden_cases import CLOSE
from hf_cases import LFM2_VL, edit_weights, keep_layers, make_folder, prune
from llama_cpp import MARKER, llama_cpp
from PIL import Image
from prune_cases import kept_units
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.core.models.generate import SharedPrefix, generate
from vlmprune_jax.core.models.inputs import in_cells
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import FAMILIES as families

STOCK = {"class_name": "AutoModelForImageTextToText", "version": "5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("lfm2") / "model", LFM2_VL)


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


def cut_of(model, *, neurons=range(72), groups=range(3), layers=range(5)):
    heads = {"kv_heads": tuple(groups), "q_heads": tuple(2 * g + j for g in groups for j in range(2))}
    attention = {i for i, layer in enumerate(model.cfg.text.layers) if "kv_heads" in layer.sizes}
    kept = [KeptLayer(i, {"mlp": tuple(neurons)} | (heads if i in attention else {})) for i in layers]
    return prune(model, kept)


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


@pytest.mark.parametrize("cut", ["groups", "all", "tower"])
def test_exports_of_cuts_load_in_stock_transformers(folder, model, row, torch_outputs, tmp_path, cut):
    tower = [kept_units(i, range(3), range(3), range(5, 30)) for i in (0, 2)]
    smaller, plan = prune(model, tower, "vision") if cut == "tower" else cut_of(model, **CUTS[cut])
    vp.save(smaller, tmp_path / "out", source_dir=folder, plan=plan, dtype="float32")
    config = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert "block_ff_dim" not in config or cut == "tower"
    logits = torch_outputs(tmp_path / "out", row, **STOCK)["logits"]
    np.testing.assert_allclose(vp.forward(smaller, **row)[0], logits, **CLOSE)
    assert vp.load(tmp_path / "out").cfg.text == smaller.cfg.text


def test_a_decoder_alone(row, torch_outputs, tmp_path):
    """With a head of its own: in LFM2, `tie_embedding` overrides the flag of other classes."""
    config = {**LFM2_VL["text_config"], "architectures": ["Lfm2ForCausalLM"]}
    config |= {"tie_embedding": False, "tie_word_embeddings": True}
    folder = make_folder(tmp_path / "text", config)
    rows = {"input_ids": row["input_ids"] % 180}
    logits = torch_outputs(folder, rows, class_name="AutoModelForCausalLM", version="5")["logits"]
    np.testing.assert_allclose(vp.forward(vp.load(folder), **rows)[0], logits, **CLOSE)


def test_what_cannot_be_cut(model, row):
    refused("needs one layer of full attention: keep one", keep_layers, model, [0, 2, 3])
    fact = r"conv of short_conv cannot be pruned \(transformers gives its gates and state"
    refused(fact, vp.make_plan, None, model, method="width", conv=24)
    fact = "spatial_shapes has shape .* pass both as the processor returns them"
    refused(fact, vp.forward, model, **row | {"spatial_shapes": np.array([[4, 6]])})


SIZES = [(100, 80), (512, 512), (40, 900), (800, 610), (1500, 400), (1900, 1300)]


@pytest.fixture(scope="module")
def images(pair, tmp_path_factory):
    """The loader of a folder with LFM2-VL's processor, and images of these sizes."""
    folder = shutil.copytree(pair[0], tmp_path_factory.mktemp("images") / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Lfm2VlImageProcessorFast"}))
    draw, paths = np.random.default_rng(0), []
    for width, height in SIZES:
        noise = draw.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3)).astype(np.uint8)
        paths.append(folder / f"{width}.png")
        Image.fromarray(noise).resize((width, height), 3).save(paths[-1])
    loader = load_image_processor(folder, DataSpec(aspect_ratio="square", cache_megabytes=0), patches=(768, 2))
    return folder, loader, paths


def test_images_are_prepared_as_in_transformers(images):
    """Grids of tiles and overview, tokens and their text, and pixels within the last bits of resizing."""
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

    folder, loader, paths = images
    cfg = vp.load(folder).cfg
    stock, template = Lfm2VlImageProcessor(), families["lfm2_vl"].templates[0]
    for path, shape in zip(paths, loader.shapes(paths, "r"), strict=True):
        expected = stock(Image.open(path), return_tensors="np", return_row_col_info=True)
        np.testing.assert_array_equal(np.array(shape.grids)[:, 1:], expected["spatial_shapes"])
        rows, columns = int(expected["image_rows"][0]), int(expected["image_cols"][0])
        assert (shape.rows, shape.columns) == (rows, columns)
        marks = Lfm2VlProcessor._build_image_tokens
        names = type("names", (), {"image_start_token": "<|image_start|>", "image_token": "<image>"})
        names.image_end_token, names.image_thumbnail_token = "<|image_end|>", "<|img_thumbnail|>"
        assert template.image_text(shape) == marks(names, rows, columns, 1, 1, True, True)
        counts = shape.positions_by_mark(0, template.context_tokens(shape))
        assert counts == [a * b // 4 for a, b in expected["spatial_shapes"].tolist()]
        assert sum(counts) == shape.tokens
        cells = in_cells(cfg, expected["pixel_values"], spatial_shapes=expected["spatial_shapes"])
        found = loader.load(path, "r")
        assert found.shape == cells[0].shape
        assert np.abs(found - cells[0]).max() <= 3 / 127.5


def test_records_with_tiles_become_batches(images):
    """Rows of an image in tiles and one without: every token of an image is an image token, in packed rows."""
    folder, loader, paths = images
    data = {"max_length": 4096, "max_images": 1}
    inputs = load_inputs(ModelSpec(hf_dir=str(folder)), DataSpec(**data), vp.load(folder).cfg)
    records = [
        Record(str(i), (("human", "<image>\nWhat?"), ("gpt", "Red.")), (path,)) for i, path in enumerate(paths[4:6])
    ]
    encoder = inputs.encoder(vp.load(folder).cfg, 4096)
    rows = [encoder.training_row(record) for record in records]
    shapes = [encoder.shapes(record)[0] for record in records]
    for row, shape in zip(rows, shapes, strict=True):
        assert (row["input_ids"] == 4).sum() == shape.tokens
        assert shape.slots > 2
    batch = encoder.packed([encoder.images(record) for record in records], encoder.shape_of(records), 1)
    assert [tuple(grid) for grid in batch["vision"].grid[0] if grid.any()] == shapes[0].grids + shapes[1].grids
    small = loader.preparation.with_most_tokens(200, 64)
    assert max(small.plan(*size).tokens for size in SIZES) <= 200
    refused("tokens per image must be at least 64", loader.preparation.with_most_tokens, 60, 64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder that llama.cpp takes: patches of 16 pixels a side, a table of 16 x 16 positions, all bytes as tokens."""
    config = {**LFM2_VL, "text_config": {**LFM2_VL["text_config"], "vocab_size": 300}, "image_token_id": 4}
    config["vision_config"] = {**LFM2_VL["vision_config"], "patch_size": 16, "num_patches": 256}
    source = make_folder(tmp_path_factory.mktemp("lfm2") / "gguf", config)
    edit_weights(source, lambda held: {key: x if "norm" in key else x * np.float32(0.6) for key, x in held.items()})
    marks = ["<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", "<|im_end|>"]
    marks += [f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in range(1, 6)]
    byte_tokenizer(source, (*SPECIALS, "<image>", *marks))
    return source, vp.load(source)


@pytest.mark.parametrize("cut", ["", "layers", "neurons"])
def test_llama_cpp(pair, tmp_path, cut):
    """Log-probabilities, greedy tokens, features of an image and the answer behind it."""
    pytest.importorskip("xllamacpp")
    source, whole = pair
    model = cut_of(whole, **CUTS[cut])[0] if cut else whole
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


def test_what_llama_cpp_cannot_hold(model):
    fact = "other numbers of heads than hidden_size / head_dim"
    assert fact in why_not(cut_of(model, groups=[0])[0].cfg, "gguf")
    assert "of attention alone: keep one" in why_not(keep_layers(model, [1, 4])[0].cfg, "gguf")
