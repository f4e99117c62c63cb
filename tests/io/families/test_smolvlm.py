"""What is SmolVLM's alone: masks of patches, positions spread over the table, sub-images, their prompt, bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hf_cases import prune
from PIL import Image
from prune_cases import kept_units
from refusal import refused
from vlm_cases import row_of

import vlmprune_jax as vp
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tiling import Splitting
from vlmprune_jax.io.families import templates
from vlmprune_jax.io.families.tiles import ImageShape

HUB = Splitting(384, 1536, True, (0.5,) * 3, (0.5,) * 3, 1)


@pytest.fixture(scope="module")
def folder(goldens):
    return goldens / "families/smolvlm/ckpt"


@pytest.fixture(scope="module")
def model(folder):
    return vp.load(folder)


@pytest.fixture
def row(model):
    """A row of two slots, the second of them padding, and masks of their pixels: rows of 24, columns of 24."""
    cfg, draw = model.cfg, np.random.default_rng(0)
    ids = np.concatenate([[9, 8], [cfg.image_token_id] * cfg.tokens_per_image, [7, 6]])[None]
    pixels, mask = np.zeros((1, 2, 3, 24, 24), np.float32), np.zeros((1, 2, 24, 24), np.int64)
    mask[0, 0, :16, :22] = 1
    pixels[0, 0, :, :16, :22] = draw.standard_normal((3, 16, 22), np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": mask}


def test_a_masked_image_equals_transformers(folder, model, row, torch_outputs):
    found = np.asarray(vp.forward(model, **row)[0])
    expected = torch_outputs(folder, row, class_name="AutoModelForImageTextToText", version="5", max_new_tokens=4)
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)
    unmasked = np.asarray(vp.forward(model, row["input_ids"], pixel_values=row["pixel_values"])[0])
    assert np.abs(unmasked - found).max() > 0.01  # both what padding shows and where patches are depend on the mask
    whole = row | {"pixel_attention_mask": row["pixel_attention_mask"] | [[[[1]], [[0]]]]}
    np.testing.assert_array_equal(vp.forward(model, **whole)[0], unmasked)
    tokens = vp.generate(model, **row, max_new_tokens=4, eos_token_ids=())
    np.testing.assert_array_equal(tokens, expected["tokens"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pixel_attention_mask": np.ones((1, 2, 24, 23))}, r"mask has shape \[1, 2, 24, 23\] and pixel_values \["),
        ({"input_ids": np.full((1, 12), 350)}, "have 12 image positions, but the images have 8 features: write 4 ids"),
        ({"pixel_values": np.zeros((1, 2, 3, 21, 24), np.float32)}, r"expected \[images, 3, 24, 24\]"),
    ],
)
def test_arrays_that_do_not_fit(model, row, change, words):
    refused(words, vp.forward, model, **row | change)


def test_masks_that_have_no_use(goldens, model, row):
    batch = row | {"attention_mask": np.ones_like(row["input_ids"])}
    refused("hides parts of images, but scoring needs whole", vp.score, model, [batch], criterion="block_influence")
    whole = vp.load(goldens / "families/internvl3/ckpt")
    images = {"pixel_values": np.zeros((1, 3, 30, 30), np.float32), "pixel_attention_mask": np.tri(30, dtype=int)[None]}
    ids = np.full((1, 9), whole.cfg.image_token_id)
    refused("this model's vision tower takes only whole images", vp.forward, whole, ids, **images)


def test_shapes_at_full_size():
    sizes = {(384, 384): (4, 4), (1536, 384): (1, 4), (1000, 700): (3, 4), (20_000, 1): (1, 4), (1, 1): (4, 4)}
    for size, (rows, columns) in sizes.items():  # made larger first: the long side always has four
        shape = HUB.plan(*size)
        assert shape == ImageShape(rows, columns, rows * columns + 1)
        assert shape.slots in HUB.usual
    assert HUB.prepare(Image.new("RGB", (1000, 700)), 1).shape == (13, 3, 384, 384)
    assert HUB.most(2) == 34


def test_shapes_equal_transformers():
    from transformers import SmolVLMImageProcessorPil

    draw = np.random.default_rng(0)
    for size, longest in ((24, 48), (24, 60), (24, 24), (20, 75)):
        ours = Splitting(size, longest, True, (0.5,) * 3, (0.5,) * 3, 1)
        own = SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": size})
        for width, height in draw.integers(1, 90, (12, 2)).tolist():
            image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
            made = own([[image]], return_row_col_info=True, return_tensors="np")
            shape = ours.plan(width, height)
            grid = (made["rows"][0][0], made["cols"][0][0])
            assert grid == ((0, 0) if shape.slots == 1 else (shape.rows, shape.columns)), (width, height, size, longest)
            np.testing.assert_allclose(ours.prepare(image, 1), made["pixel_values"][0], atol=1e-5, rtol=0)


def test_without_splitting(goldens, folder, tmp_path):
    family = goldens / "families/smolvlm"
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["do_image_splitting"] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    shutil.copy(folder / "config.json", tmp_path)
    images = load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0))
    (shape,) = images.shapes([family / "images/1.png"], "r")
    assert shape == ImageShape()
    assert images.preparation.usual == (1,)
    pixels = images.load(family / "images/1.png", "r")
    stored = np.load(family / "golden.npz")["image1_pixel_values_without_splitting"]
    assert np.abs(pixels - stored).max() < 0.02  # of the torchvision backend: a level of 255
    fake = "<fake_token_around_image>"
    assert templates()["smolvlm"].image_text(shape) == f"{fake}<global-img><image>{fake}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_rescale": False}, "do_rescale false is not supported for split images"),
        ({"size": {"height": 48, "width": 48}}, "has no longest_edge"),
        ({"max_image_size": {"longest_edge": 1}}, "give up to 2305 tiles per image, more than the maximum of 1000"),
        ({"max_image_size": {"longest_edge": 12}}, "returns 12 x 12 pixels, but the vision tower takes 24 x 24"),
    ],
)
def test_bad_processors(folder, tmp_path, change, words):
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
    shutil.copy(folder / "config.json", tmp_path)
    data = DataSpec(aspect_ratio="pad", cache_megabytes=0)
    refused(words, load_image_processor, tmp_path, data, image_size=24)


def test_a_pruned_tower_loads_in_transformers(folder, model, row, torch_outputs, tmp_path):
    """Its last layer is still followed by the norm behind the tower."""
    kept = [kept_units(i, (0, 1, 2), (0, 1, 2), tuple(range(40))) for i in (0, 3)]
    pruned, _ = prune(model, kept, "vision")
    assert [layer.sizes for layer in pruned.cfg.vision.layers] == [{"kv_heads": 3, "q_heads": 3, "mlp": 40}] * 2
    vp.save(pruned, tmp_path / "out", source_dir=folder, dtype="float32")
    written = json.loads((tmp_path / "out/config.json").read_text())["vision_config"]
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (2, 40)
    found = torch_outputs(tmp_path / "out", row, class_name="AutoModelForImageTextToText", version="5")
    np.testing.assert_allclose(vp.forward(pruned, **row)[0], found["logits"], atol=1e-4, rtol=0)


def test_rows_and_buckets(goldens, folder, model):
    """What is measured before training is what rows have; a batch has the smallest bucket of sub-images."""
    images = goldens / "families/smolvlm/images"
    turns = (("human", "<image>\nIs it red?"), ("gpt", "Yes."))
    both = (("human", "<image>\n<image>\nWhich?"), ("gpt", "One."), ("human", "Sure?"), ("gpt", "Yes."))
    records = [
        Record("text", (("human", "A colour?"), ("gpt", "Red")), ()),
        Record("wide", turns, (images / "1.png",)),
        Record("one", turns, (images / "0.png",)),
        Record("two", both, (images / "1.png", images / "2.png")),
    ]
    inputs = load_inputs(ModelSpec(hf_dir=str(folder)), DataSpec(max_images=2), model.cfg)
    assert inputs.template.name == "smolvlm"
    encoder = inputs.encoder(model.cfg, 100)
    assert encoder.tile_buckets == (1, 3, 5, 10)
    sizes = measure(records, encoder, on_error="stop", threads=1)
    assert sizes[:, 1].tolist() == [0, 3, 5, 8]
    for record, (tokens, slots) in zip(records, sizes[:, :2].tolist(), strict=True):
        row = row_of(encoder, record)
        assert row["attention_mask"].sum() == tokens
        assert len(row["pixel_values"]) == encoder.shape_of([record]).slots >= slots
        assert (row["input_ids"] == model.cfg.image_token_id).sum() == slots * model.cfg.tokens_per_image
        assert np.abs(row["pixel_values"][slots:]).max(initial=0) == 0
        prompt = encoder.prompt_ids(record)
        assert row["input_ids"][: len(prompt)].tolist() == prompt.tolist()

    small = dataclasses.replace(encoder, tile_buckets=(1, 5))
    refused("record two: needs 8 image tiles, more than the largest bucket", small.shape_of, records)
    fewer = dataclasses.replace(records[3], images=records[3].images[:1])
    refused("record two: its text contains <image>, the placeholder token of images", encoder.training_row, fewer)
