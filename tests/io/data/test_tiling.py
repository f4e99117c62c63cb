"""Tiles equal the reference's byte for byte, grids exactly, and those of a transformers folder its own processor's."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from refusal import refused

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor
from vlmprune_jax.io.data.tiling import Tiling, closest_grid
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.io.families.towers import PIXELS

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
