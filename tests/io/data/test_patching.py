"""Images of any size, as tiles or patches: those of reference and stock processors; rows and batches; refusals."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from golden_cases import Golden
from PIL import Image
from prune_cases import EQUAL, config, expanded
from refusal import refused
from stack_cases import decoder_layer
from vlm_cases import images_of

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, Shape, measure
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor
from vlmprune_jax.io.data.patching import Patching, patching_from_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tiling import Tiling, closest_grid
from vlmprune_jax.io.families.templates import QWEN2_5_VL, QWEN3_VL
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.io.families.towers import PIXELS

TEMPLATES = {"qwen3_vl": QWEN3_VL, "qwen2_5_vl": QWEN2_5_VL}
CASES = ("single", "two", "text", "tiny")
TRAIN = {"batch_size": 2, "threads": 1}


class Family(Golden):
    """One family's images and chats, and what the processor of transformers makes of them."""

    def __init__(self, folder):
        super().__init__(folder)
        saved = json.loads((folder / "ckpt/processor_config.json").read_text())
        self.patching = patching_from_processor(saved["image_processor"], "processor_config.json")
        self.encoder = Encoder(
            tokenizer=load_tokenizer(folder / "ckpt"),
            template=TEMPLATES[folder.name],
            max_length=0,
            image_loader=ImageLoader(self.patching, max_pixels=10**6, cache_bytes=10**7),
            image_token_id=self.model.cfg.image_token_id,
            tokens_per_image=0,
            max_images=2,
            truncate=False,
            image_buckets=(5, 15, 20, 40),
        )

    def record(self, case, behind="\n"):
        """The chat with LLaVA's placeholders, and white space behind them that the processor's chat has not."""
        facts, turns = self.facts["cases"][case], []
        for message in facts["messages"]:
            parts = [f"<image>{behind}" if part["type"] == "image" else part["text"] for part in message["content"]]
            turns.append(("human" if message["role"] == "user" else "gpt", "".join(parts)))
        images = tuple(self.folder / self.facts["images"][k]["file"] for k in facts["images"])
        return Record(case, (*turns, ("gpt", facts["answer"])), images)


@pytest.fixture(scope="module", params=TEMPLATES)
def golden(goldens, request):
    return Family(goldens / "families" / request.param)


def test_patches_equal_the_processors(golden):
    hub = json.loads((golden.folder / "preprocessor_config_hub_style.json").read_text())
    assert patching_from_processor(hub, "x") == golden.patching
    per_value = golden.patching.temporal * golden.patching.patch**2
    mean, std = (np.repeat(np.float32(v), per_value) for v in (golden.patching.mean, golden.patching.std))
    for k, facts in enumerate(golden.facts["images"]):
        with Image.open(golden.folder / facts["file"]) as image:
            shape = golden.patching.plan(*image.size)
            found = golden.patching.prepare(image, 1)
        levels = golden.arrays[f"image{k}_levels_pil"].astype(np.float32)
        assert np.array_equal(found, (levels / 255 - mean) / std)
        assert list(shape.grids[0]) == facts["grid_thw"] == golden.arrays[f"image{k}_grid_thw"].tolist()
        assert (shape.slots, shape.tokens) == (1, facts["image_tokens"])


@pytest.mark.parametrize("behind", ["\n", ""])
def test_ids_labels_and_positions_equal_the_processors(golden, behind):
    for case in CASES:
        record, stored = golden.record(case, behind), golden.arrays[f"{case}_input_ids"]
        row = dataclasses.replace(golden.encoder, max_length=len(stored)).training_row(record)
        answer = golden.arrays[f"{case}_labels"]
        last = np.arange(len(stored)) >= np.flatnonzero(answer != IGNORED)[0]  # stored is the last answer's alone
        assert row["input_ids"].tolist() == stored.tolist(), case
        assert row["labels"][last].tolist() == answer[last].tolist(), case
        assert (row["labels"][stored == golden.encoder.image_token_id] == IGNORED).all()
        assert np.array_equal(row["position_ids"], golden.arrays[f"{case}_position_ids"]), case
        prompt = golden.encoder.prompt_ids(record)
        assert prompt.tolist() == stored[: golden.facts["cases"][case]["prompt_len"]].tolist()


def test_images_stay_where_they_are(golden):
    """As Qwen's own fine-tuning has it: each image a part of the chat, and so is the stripped text between two."""
    images = golden.record("two").images
    turns = (("human", "See <image>\n and\n<image> now"), ("gpt", "Yes."))
    text = golden.encoder.tokenizer.decode(golden.encoder.prompt_ids(Record("r", turns, images)))
    pads = ["<|image_pad|>" * golden.facts["images"][k]["image_tokens"] for k in (1, 2)]
    marked = [f"<|vision_start|>{pad}<|vision_end|>" for pad in pads]
    assert f"<|im_start|>user\nSee{marked[0]}and{marked[1]}now<|im_end|>\n" in text
    first = {"qwen2_5_vl": "<|im_start|>system\nYou are a helpful", "qwen3_vl": "<|im_start|>user"}
    assert text.startswith(first[golden.folder.name])


def test_a_batch_of_several_sizes(golden):
    """Rows have the smallest bucket that holds their images; two processes agree on it from headers."""
    records = [golden.record(case) for case in ("tiny", "two", "tiny", "text", "single")]
    encoder = dataclasses.replace(golden.encoder, max_length=80, tile_buckets=(1, 2))
    batches = list(train_batches(records, encoder, **TRAIN))
    merge, values = golden.patching.merge**2, golden.patching.shape[0]
    shapes = [(2, 40 * merge, values), (2, 5 * merge, values), (2, 15 * merge, values)]
    assert [batch.arrays["media"]["vision"].values.shape for batch in batches] == shapes
    packed, facts = list(train_batches(records, encoder, **TRAIN, packs=1)), golden.facts["images"]
    assert -(-sum(facts[k]["image_tokens"] for k in (3, 1, 2)) // 2) > 15
    assert packed[0].arrays["media"]["vision"].values.shape == (1, 2 * 20 * merge, values)  # 20 on average
    for batch, other in zip(batches, packed, strict=True):
        images, (front, own) = batch.arrays["media"]["vision"], other.arrays["media"]["vision"][:2]
        (front,) = front
        for pixels, row in zip(images.values, images.grid, strict=True):
            size = row.prod(axis=1).sum()
            assert np.array_equal(front[:size], pixels[:size])
            front = front[size:]
        assert not front.any()
        grids = [grid for grid in images.grid.reshape(-1, 3) if grid.any()]
        assert np.array_equal(own[0, : len(grids)], np.reshape(grids, (-1, 3)))
    parts = [list(train_batches(records, encoder, **TRAIN, mine=np.array([row]))) for row in range(TRAIN["batch_size"])]
    sized = train_batches(records, encoder, **TRAIN, sizes=measure(records, encoder, on_error="stop", threads=1))
    for number, batch in enumerate(batches):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part[number].arrays for part in parts))
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, batch.arrays))
    for batch, other in zip(batches, sized, strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, batch.arrays, other.arrays))
    two = jax.tree.map(lambda array: array[1], batches[0].arrays)
    grids = np.stack([golden.arrays[f"image{k}_grid_thw"] for k in (1, 2)])
    assert np.array_equal(two["media"]["vision"].grid, grids)
    pixels = two["media"]["vision"].values
    np.testing.assert_array_equal(pixels.any(axis=1), np.arange(40 * merge) < grids.prod(axis=1).sum())
    assert np.array_equal(two["position_ids"][:, two["attention_mask"] == 1], golden.arrays["two_position_ids"])
    padding = batches[2].arrays  # its second row
    assert not any(array[1].any() for array in (*jax.tree.leaves(padding["media"]), padding["position_ids"]))


# --- sizes of one's own -----------------------------------------------------------------------------------------------


def save(folder, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return Record("r7", (("human", "<image>\nWhat?"), ("gpt", "It.")), (folder / "a.png",))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 150), (3000, 17)])
def test_odd_sizes_become_what_the_processor_makes_of_them(golden, tmp_path, size):
    from transformers import Qwen2VLImageProcessorPil

    record, patching = save(tmp_path, *size), golden.patching
    saved = json.loads((golden.folder / "ckpt/processor_config.json").read_text())["image_processor"]
    with Image.open(record.images[0]) as image:
        expected = Qwen2VLImageProcessorPil.from_dict(saved)(image, return_tensors="np")
    row = images_of(golden.encoder, record, Shape(0, 1, 100))
    count = len(expected["pixel_values"])
    assert row["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    np.testing.assert_allclose(row["pixel_values"][:count], expected["pixel_values"], atol=1e-5, rtol=0)
    assert count <= patching.image_buckets[-1] * patching.merge**2


def test_what_no_row_takes_names_its_record(golden, tmp_path):
    def fill(**changes):
        return next(iter(train_batches([record], dataclasses.replace(golden.encoder, **changes), **TRAIN)))

    told = r"a.png \(record r7\): image of 1x20000 pixels: the long side is more than 200 times"
    refused(told, golden.encoder.shape_of, [save(tmp_path, 1, 20_000)])
    record, tokens = golden.record("two"), golden.facts["cases"]["two"]["tokens"]
    told = r"record two: needs \d+ image tokens, more than the largest bucket \(10\): raise"
    refused(told, fill, max_length=80, image_buckets=(4, 10))
    refused(f"record two: has {tokens} tokens with its images, more than the maximum length 30", fill, max_length=30)
    refused("record two: an image ends at token .*, beyond the maximum length 30", fill, max_length=30, truncate=True)
    told = "batches of 2 rows of 80 tokens and 2 images of 10000000000 tokens together: 5 batches"
    refused(told, fill, max_length=80, image_buckets=(10**10,))
    told = "batches of 2 rows .* lower batch_size, data.max_image_tokens"
    refused(told, fill, max_length=80, image_buckets=(1, 10**9))
    moving = dataclasses.replace(record, turns=(("human", "<image><image><|video_pad|>"), ("gpt", "It.")))
    told = r"record two: its text contains <\|video_pad\|>, the placeholder token"
    refused(told, measure, [moving], golden.encoder, on_error="stop", threads=1)


def test_the_users_cap(golden):
    capped = golden.patching.with_most_tokens(9, 0)
    assert capped.plan(300, 200).tokens <= 9 < golden.patching.plan(300, 200).tokens
    assert golden.patching.with_most_tokens(10**6, 0) == golden.patching
    refused("must be at least [34], the number of tokens of the smallest", golden.patching.with_most_tokens, 1, 0)


def test_no_image_has_more_tokens_than_the_last_bucket():
    draw = np.random.default_rng(0)
    for _ in range(2000):
        side, least = int(draw.integers(1, 17)), int(draw.integers(1, 5000))
        zeros, ones = (0.0,) * 3, (1.0,) * 3
        one = Patching(side, 2, 2, least, least + int(draw.integers(0, 50_000)), zeros, ones, 3)
        height, width = np.exp(draw.uniform(0, 8, 2)).astype(int).tolist()
        width = min(max(width, math.ceil(height / 200)), 200 * height)
        assert 1 <= one.plan(width, height).tokens <= one.image_buckets[-1]


# --- `vp.expand_images` -----------------------------------------------------------------------------------------------


def test_golden_batches_come_out_as_the_reference_has_them(goldens):
    arrays = np.load(goldens / "block_influence" / "llava.npz")
    cfg = vp.load(goldens / "ckpt/llava_orig", vision_dir=goldens / "ckpt/clip_tower").cfg
    for n in range(6):
        names = ("input_ids", "attention_mask", "labels", "pixel_values")
        ids, mask, labels, pixels = (arrays[f"s{n}_{name}"] for name in names)
        found = vp.expand_images(ids, cfg, attention_mask=mask, labels=labels)
        for name, array in found.items():
            np.testing.assert_array_equal(array, expanded(ids, mask, labels, pixels)[name], err_msg=name)


def test_padding_on_either_side_and_several_tiles():
    cfg = config(EQUAL, vision=True)
    image, each = cfg.image_token_id, cfg.tokens_per_image
    ids = [[0, 0, 5, image, 6], [image, 7, image, 8, 0]]
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    found = vp.expand_images(ids, cfg, attention_mask=mask, tiles=[1, 2, 1])
    rows = [[5, *[image] * each, 6], [*[image] * (2 * each), 7, *[image] * each, 8]]
    width = len(rows[1])
    np.testing.assert_array_equal(found["input_ids"], [row + [0] * (width - len(row)) for row in rows])
    np.testing.assert_array_equal(found["attention_mask"].sum(axis=1), [len(row) for row in rows])
    assert set(found) == {"input_ids", "attention_mask"}


def test_images_of_any_size_are_counted_by_their_grids(golden):
    two, grids, cfg = golden.arrays["two_input_ids"], golden.arrays["two_image_grid_thw"], golden.model.cfg
    again = np.concatenate([[True], (two[1:] != cfg.image_token_id) | (two[:-1] != cfg.image_token_id)])
    found = vp.expand_images(two[again][None], cfg, image_grid_thw=grids)
    np.testing.assert_array_equal(found["input_ids"][0], two)
    for options in ({}, {"image_grid_thw": grids[:1]}, {"image_grid_thw": grids, "tiles": [1, 1]}):
        refused("image_grid_thw", vp.expand_images, two[again][None], cfg, **options)


def test_what_does_not_fit_is_refused():
    cfg = config(EQUAL, vision=True)
    refused("must have one shape", vp.expand_images, [1, 2], cfg)
    refused("must have one shape", vp.expand_images, [[1, 61]], cfg, attention_mask=[[1]])
    for tiles in ([1, 1], [0]):
        refused("1 positive numbers, one per image", vp.expand_images, [[1, 61]], cfg, tiles=tiles)
    refused("takes tiles, not image_grid_thw", vp.expand_images, [[1, 61]], cfg, image_grid_thw=[[1, 2, 2]])
    refused("takes no images", vp.expand_images, [[1]], config((decoder_layer(2, 2, 4),)))


# --- tiles ------------------------------------------------------------------------------------------------------------

SMALL = Tiling(28, 1, 6, True, False, *PIXELS["internvit"], int(Image.Resampling.BICUBIC), True)
FULL = dataclasses.replace(SMALL, size=448, max_tiles=12)


def folder_with(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def load(folder, **options):
    return load_image_processor(folder, DataSpec(aspect_ratio="pad", cache_megabytes=1, **options))


def test_grids_equal_the_reference(goldens):
    stored = json.loads((goldens / "data/internvl_grids.json").read_text())
    assert len(stored["images"]) == 8
    for name, expected in stored["images"].items():
        image, _, most = name.partition("_max")
        with Image.open(goldens / f"data/images/{image}.png") as opened:
            size = opened.size
        tiling = dataclasses.replace(SMALL, max_tiles=int(most))
        assert tiling.plan(*size) == ImageShape(expected["rows"], expected["cols"], expected["tiles"]), name
    rows = stored["grid_table_448"]["rows"]
    assert len(rows) > 100
    for width, height, most, columns, lines in rows:
        assert closest_grid(width, height, 448, 1, most) == (columns, lines), (width, height, most)
    assert FULL.plan(448, 448) == ImageShape(1, 1, 1)
    assert FULL.plan(800, 600) == ImageShape(3, 4, 13)
    assert FULL.plan(1000, 500) == ImageShape(1, 2, 3)  # a tie of 2x1, 4x2: not more than half the larger's pixels
    assert FULL.plan(2000, 1000) == ImageShape(2, 4, 9)


@pytest.mark.parametrize("number", range(4))
def test_tiles_equal_the_reference(goldens, number):
    stored = np.load(goldens / "data/images.npz")
    with Image.open(goldens / f"data/images/img{number}.png") as opened:
        image = opened.convert("RGB")
    cut = np.stack([np.asarray(tile) for tile in SMALL.cut(image, 1)])
    assert np.array_equal(cut, stored[f"internvl_img{number}_tiles_uint8"])
    pixels = SMALL.prepare(image, 1)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, stored[f"internvl_img{number}_pixel_values"], atol=1e-5, rtol=0)
    whole = dataclasses.replace(SMALL, max_tiles=1, pad=True).prepare(image, 1)
    np.testing.assert_allclose(whole[0], stored[f"internvl_img{number}_pad2square"], atol=1e-5, rtol=0)


def test_chat_folder_says_how_to_cut(goldens, tmp_path):
    chat = load(goldens / "ckpt/internvl").preparation
    assert chat == dataclasses.replace(SMALL, size=56, max_tiles=12)
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    # The hub's folder has a CLIP processor too, which its code does not use for tiles.
    clip = json.loads((goldens / "ckpt/clip_tower/preprocessor_config.json").read_text())
    folder_with(tmp_path, config={**config, "max_dynamic_patch": 5, "use_thumbnail": False}, preprocessor_config=clip)
    assert load(tmp_path).preparation == dataclasses.replace(SMALL, size=56, max_tiles=5, thumbnail=False)
    folder_with(tmp_path, config={**config, "dynamic_image_size": False, "pad2square": True})
    still = load(tmp_path)
    assert still.preparation == dataclasses.replace(SMALL, size=56, max_tiles=1, thumbnail=False, pad=True)
    assert still.load(goldens / "data/images/img3.png", "r").shape == (1, 3, 56, 56)
    changed = load(goldens / "ckpt/internvl", max_tiles=6, min_tiles=2)
    assert changed.preparation == dataclasses.replace(SMALL, size=56, min_tiles=2)


def test_transformers_folder_equals_its_own_processor(goldens, tmp_path):
    from transformers import GotOcr2ImageProcessorPil

    config = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": False,  # as in the hub's InternVL folders: their processor turns it on
        "size": {"height": 28, "width": 28},
        "min_patches": 2,
        "max_patches": 7,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.25],
    }
    own = GotOcr2ImageProcessorPil.from_dict(config)
    loader = load(folder_with(tmp_path, processor_config={"image_processor": config}))
    for number in range(4):
        path = goldens / f"data/images/img{number}.png"
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        expected = own(rgb, crop_to_patches=True, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(loader.load(path, "r"), expected, atol=1e-5, rtol=0)


def test_images_of_one_record_share_the_tiles(goldens):
    def grid(plan):
        return plan.columns, plan.rows

    assert grid(FULL.plan(800, 600, 1)) == (4, 3)
    assert grid(FULL.plan(800, 600, 2)) == (3, 2)  # at most 6 each
    assert grid(FULL.plan(800, 600, 5)) == (1, 1)  # at most 2 each
    assert FULL.plan(3000, 200, 30) == ImageShape()
    assert [FULL.most(images) for images in (1, 2, 3, 12, 30)] == [13, 14, 15, 18, 30]
    assert grid(dataclasses.replace(FULL, min_tiles=4).plan(448, 448, 6)) == (1, 1)  # the share is below the least
    loader = ImageLoader(SMALL, max_pixels=10**6, cache_bytes=10**6)
    paths = [goldens / f"data/images/img{n}.png" for n in (0, 3)]
    counts = [image.slots for image in loader.shapes(paths, "r")]
    assert counts == [len(loader.load(path, "r", 2)) for path in paths]
    assert counts != [len(loader.load(path, "r", 1)) for path in paths]  # and the cache keeps them apart


def test_headers_are_enough_to_count(goldens, tmp_path):
    whole = (goldens / "data/images/img0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.png").write_bytes(b"nothing")
    for name, size in (("large", (1100, 1000)), ("grows", (80, 60)), ("thin", (5000, 1))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    loader = ImageLoader(SMALL, max_pixels=10**6, cache_bytes=0)
    assert loader.shapes([tmp_path / "half.png"], "r")[0].slots == 7
    for name, told in (("half", "not a readable image"), ("no", "none of JPEG"), ("large", "1100x1000 pixels exceeds")):
        refused(rf"{name}\.png \(record r3\): .*{told}", loader.load, tmp_path / f"{name}.png", "r3")
    few = ImageLoader(FULL, max_pixels=448 * 448 * 11, cache_bytes=0)
    told = "image of 80x60 pixels exceeds the limit of 2207744 pixels after preparation"
    refused(told, few.load, tmp_path / "grows.png", "r")
    # A strip becomes twelve tiles, not 5,000 x 5,000 pixels.
    thin = ImageLoader(FULL, max_pixels=448 * 448 * 12, cache_bytes=0).shapes([tmp_path / "thin.png"], "r")
    assert thin == [ImageShape(1, 12, 13)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"force_image_size": None, "vision_config": {}}, "force_image_size is None"),
        ({"force_image_size": "448"}, "force_image_size is '448'"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0, expected a whole number above 0"),
        ({"min_dynamic_patch": 9, "max_dynamic_patch": 4}, "config.json: image tiles: min_tiles 9 and max_tiles 4"),
        ({"max_dynamic_patch": 10**9}, "must be 1 <= min <= max <= 1000"),
    ],
)
def test_bad_chat_configs(goldens, tmp_path, change, words):
    config = json.loads((goldens / "ckpt/internvl/config.json").read_text())
    refused(words, load, folder_with(tmp_path, config={**config, **change}))
