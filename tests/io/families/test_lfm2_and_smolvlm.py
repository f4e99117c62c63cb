"""LFM2-VL and SmolVLM, beside what all families show: short convolutions, states, masks, tiles, prompts, exports."""

import dataclasses
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
from vlm_cases import row_of

import vlmprune_jax as vp
from vlmprune_jax.core.limits import why_not
from vlmprune_jax.core.models.generate import SharedPrefix, generate
from vlmprune_jax.core.models.inputs import in_cells
from vlmprune_jax.core.prune import KeptLayer
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tiling import Splitting
from vlmprune_jax.io.families import FAMILIES, templates
from vlmprune_jax.io.families.tiles import ImageShape

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


def test_padding_reaches_no_state(model):
    """Rows padded on either side give the logits of the rows alone, and their tokens behind a shared prefix."""
    ids = np.random.default_rng(1).integers(8, 180, (2, 9))
    logits, alone = vp.forward(model, ids)[0], generate(model, ids, max_new_tokens=5, eos_token_ids=())
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded, mask = (np.pad(x, ((0, 0), (left, right))) for x in (ids, np.ones_like(ids)))
        found = vp.forward(model, padded, attention_mask=mask)[0]
        np.testing.assert_allclose(found[:, left : left + 9], logits, **CLOSE)
    shared = SharedPrefix(ids[:, :6], np.ones((2, 6), int), np.array([0, 1]))
    rest, mask = (np.stack([np.pad(x[0, 6:], (2, 0)), np.pad(x[1, 6:], (0, 2))]) for x in (ids, np.ones_like(ids)))
    tokens = generate(model, rest, attention_mask=mask, prefix=shared, max_new_tokens=5, eos_token_ids=())
    np.testing.assert_array_equal(tokens, alone)


CUTS = {
    "narrow": {"layers": [0, 1, 3], "neurons": range(3, 50)},
    "all": {"layers": [1, 2, 3], "neurons": range(3, 50), "groups": [1]},
}


@pytest.mark.parametrize("cut", ["all", "tower"])
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
    stock, template = Lfm2VlImageProcessor(), FAMILIES["lfm2_vl"].templates[0]
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


@pytest.mark.parametrize("cut", ["", "narrow"])
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


# --- SmolVLM: masks of patches, positions spread over the table, sub-images, their prompt, bad input ------------------

HUB = Splitting(384, 1536, True, (0.5,) * 3, (0.5,) * 3, 1)


@pytest.fixture(scope="module")
def smolvlm(goldens):
    return goldens / "families/smolvlm/ckpt"


@pytest.fixture(scope="module")
def smol(smolvlm):
    return vp.load(smolvlm)


@pytest.fixture
def masked(smol):
    """A row of two slots, the second of them padding, and masks of their pixels: rows of 24, columns of 24."""
    cfg, draw = smol.cfg, np.random.default_rng(0)
    ids = np.concatenate([[9, 8], [cfg.image_token_id] * cfg.tokens_per_image, [7, 6]])[None]
    pixels, mask = np.zeros((1, 2, 3, 24, 24), np.float32), np.zeros((1, 2, 24, 24), np.int64)
    mask[0, 0, :16, :22] = 1
    pixels[0, 0, :, :16, :22] = draw.standard_normal((3, 16, 22), np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "pixel_attention_mask": mask}


def test_a_masked_image_equals_transformers(smolvlm, smol, masked, torch_outputs):
    found = np.asarray(vp.forward(smol, **masked)[0])
    expected = torch_outputs(smolvlm, masked, **STOCK, max_new_tokens=4)
    np.testing.assert_allclose(found, expected["logits"], **CLOSE)
    unmasked = np.asarray(vp.forward(smol, masked["input_ids"], pixel_values=masked["pixel_values"])[0])
    assert np.abs(unmasked - found).max() > 0.01  # both what padding shows and where patches are depend on the mask
    whole = masked | {"pixel_attention_mask": masked["pixel_attention_mask"] | [[[[1]], [[0]]]]}
    np.testing.assert_array_equal(vp.forward(smol, **whole)[0], unmasked)
    tokens = vp.generate(smol, **masked, max_new_tokens=4, eos_token_ids=())
    np.testing.assert_array_equal(tokens, expected["tokens"])


def test_masks_and_arrays_that_do_not_fit(goldens, smol, masked):
    whole = vp.load(goldens / "families/internvl3/ckpt")
    ids, mask = np.full((1, 9), whole.cfg.image_token_id), np.tri(30, dtype=int)[None]
    images = {"input_ids": ids, "pixel_values": np.zeros((1, 3, 30, 30), np.float32), "pixel_attention_mask": mask}
    for used, inputs, fact in (
        (whole, images, "this model's vision tower takes only whole images"),
        (
            smol,
            {"pixel_attention_mask": np.ones((1, 2, 24, 23))},
            r"mask has shape \[1, 2, 24, 23\] and pixel_values \[",
        ),
        (smol, {"input_ids": np.full((1, 12), 350)}, "have 12 image positions, but .* 8 features: write 4 ids"),
        (smol, {"pixel_values": np.zeros((1, 2, 3, 21, 24), np.float32)}, r"expected \[images, 3, 24, 24\]"),
    ):
        refused(fact, vp.forward, used, **(masked if used is smol else {}) | inputs)
    batch = masked | {"attention_mask": np.ones_like(masked["input_ids"])}
    refused("hides parts of images, but scoring needs whole", vp.score, smol, [batch], criterion="block_influence")


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


def test_without_splitting(goldens, smolvlm, tmp_path):
    family = goldens / "families/smolvlm"
    settings = json.loads((smolvlm / "processor_config.json").read_text())
    settings["image_processor"]["do_image_splitting"] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    shutil.copy(smolvlm / "config.json", tmp_path)
    images = load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0))
    (shape,) = images.shapes([family / "images/1.png"], "r")
    assert shape == ImageShape()
    assert images.preparation.usual == (1,)
    pixels = images.load(family / "images/1.png", "r")
    stored = np.load(family / "golden.npz")["image1_pixel_values_without_splitting"]
    assert np.abs(pixels - stored).max() < 0.02  # of the torchvision backend: a level of 255
    fake = "<fake_token_around_image>"
    assert templates()["smolvlm"].image_text(shape) == f"{fake}<global-img><image>{fake}"


def test_a_pruned_tower_loads_in_transformers(smolvlm, smol, masked, torch_outputs, tmp_path):
    """Its last layer is still followed by the norm behind the tower."""
    kept = [kept_units(i, (0, 1, 2), (0, 1, 2), tuple(range(40))) for i in (0, 3)]
    pruned, _ = prune(smol, kept, "vision")
    assert [layer.sizes for layer in pruned.cfg.vision.layers] == [{"kv_heads": 3, "q_heads": 3, "mlp": 40}] * 2
    vp.save(pruned, tmp_path / "out", source_dir=smolvlm, dtype="float32")
    written = json.loads((tmp_path / "out/config.json").read_text())["vision_config"]
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (2, 40)
    logits = torch_outputs(tmp_path / "out", masked, **STOCK)["logits"]
    np.testing.assert_allclose(vp.forward(pruned, **masked)[0], logits, **CLOSE)


def test_rows_and_buckets(goldens, smolvlm, smol):
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
    inputs = load_inputs(ModelSpec(hf_dir=str(smolvlm)), DataSpec(max_images=2), smol.cfg)
    assert inputs.template.name == "smolvlm"
    encoder = inputs.encoder(smol.cfg, 100)
    assert encoder.tile_buckets == (1, 3, 5, 10)
    sizes = measure(records, encoder, on_error="stop", threads=1)
    assert sizes[:, 1].tolist() == [0, 3, 5, 8]
    for record, (tokens, slots) in zip(records, sizes[:, :2].tolist(), strict=True):
        row = row_of(encoder, record)
        assert row["attention_mask"].sum() == tokens
        assert len(row["pixel_values"]) == encoder.shape_of([record]).slots >= slots
        assert (row["input_ids"] == smol.cfg.image_token_id).sum() == slots * smol.cfg.tokens_per_image
        assert np.abs(row["pixel_values"][slots:]).max(initial=0) == 0
        prompt = encoder.prompt_ids(record)
        assert row["input_ids"][: len(prompt)].tolist() == prompt.tolist()

    small = dataclasses.replace(encoder, tile_buckets=(1, 5))
    refused("record two: needs 8 image tiles, more than the largest bucket", small.shape_of, records)
    fewer = dataclasses.replace(records[3], images=records[3].images[:1])
    refused("record two: its text contains <image>, the placeholder token of images", encoder.training_row, fewer)
