"""Images of any size: what stock transformers makes of them, rows and batches of several sizes, and refusals."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image
from prune_cases import EQUAL, config, expanded
from refusal import refused
from stack_cases import decoder_layer
from vlm_cases import images_of

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.encoding import Encoder, Shape, measure
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.patching import Patching, patching_from_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families.templates import QWEN2_5_VL, QWEN3_VL

TEMPLATES = {"qwen3_vl": QWEN3_VL, "qwen2_5_vl": QWEN2_5_VL}
CASES = ("single", "two", "text", "tiny")
TRAIN = {"batch_size": 2, "threads": 1}


class Golden:
    """One family's images and chats, and what the processor of transformers makes of them."""

    def __init__(self, folder):
        self.folder, self.name = folder, folder.name
        with np.load(folder / "golden.npz") as stored:
            self.arrays = dict(stored)
        self.facts = json.loads((folder / "golden.json").read_text())
        self.config = json.loads((folder / "ckpt/config.json").read_text())
        saved = json.loads((folder / "ckpt/processor_config.json").read_text())
        self.patching = patching_from_processor(saved["image_processor"], "processor_config.json")
        self.encoder = Encoder(
            tokenizer=load_tokenizer(folder / "ckpt"),
            template=TEMPLATES[folder.name],
            max_length=0,
            image_loader=ImageLoader(self.patching, max_pixels=10**6, cache_bytes=10**7),
            image_token_id=self.config["image_token_id"],
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
    return Golden(goldens / "families" / request.param)


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
    assert text.startswith(first[golden.name])


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


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_images_of_any_size_are_counted_by_their_grids(goldens, family):
    with np.load(goldens / f"families/{family}/golden.npz") as stored:
        two, grids = stored["two_input_ids"], stored["two_image_grid_thw"]
    _, cfg = read_config(goldens / f"families/{family}/ckpt", None)
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
