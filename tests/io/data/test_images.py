"""Pixels equal the reference's, bad files are refused by name, and none of it needs torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor


def loader(goldens, aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**6):
    images = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio=aspect_ratio))
    return ImageLoader(images.preparation, max_pixels=max_pixels, cache_bytes=cache_bytes)


@pytest.mark.parametrize(("aspect_ratio", "stored"), [("pad", "clip_pad"), ("square", "clip_square")])
def test_pixels_equal_the_reference(goldens, aspect_ratio, stored):
    images = loader(goldens, aspect_ratio)
    assert images.shape == (3, 28, 28)
    pixels = np.concatenate([images.load(goldens / f"data/images/img{n}.png", "r") for n in range(4)])
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, np.load(goldens / "data/images.npz")[stored], atol=1e-5, rtol=0)


def test_processor_saved_by_transformers_5(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/clip_tower/preprocessor_config.json").read_text())
    config["image_processor_type"] = "CLIPImageProcessorFast"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "patch_size": 7}))
    images = load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0))
    path = goldens / "data/images/img0.png"
    assert np.array_equal(images.load(path, "r"), loader(goldens).load(path, "r"))


@pytest.mark.parametrize(("aspect_ratio", "stored"), [("pad", "siglip_pad"), ("square", "siglip_square")])
def test_siglip_pixels_equal_the_reference(goldens, tmp_path, aspect_ratio, stored):
    data = DataSpec(aspect_ratio=aspect_ratio, cache_megabytes=0)
    paths = [goldens / f"data/images/img{n}.png" for n in range(4)]
    expected = np.load(goldens / "data/images.npz")[stored]
    tower = load_image_processor(goldens / "ckpt/siglip_tower", data)
    assert tower.shape == (3, 45, 45)
    # The hub's Bunny folder has no processor file: its code holds the numbers, and the tower's size is in the model.
    bunny = load_image_processor(goldens / "ckpt/bunny", data, image_size=45)
    for images in (tower, bunny):
        pixels = np.concatenate([images.load(path, "r") for path in paths])
        np.testing.assert_allclose(pixels, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"has neither preprocessor_config\.json nor processor_config\.json"):
        load_image_processor(goldens / "ckpt/bunny", data)


def test_processor_that_pads_by_itself_pads_once(goldens, tmp_path):
    config = json.loads((goldens / "ckpt/clip_tower/preprocessor_config.json").read_text())
    del config["feature_extractor_type"]
    config |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": 28}}
    config["crop_size"] = {"height": 28, "width": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    path = goldens / "data/images/img3.png"
    for aspect_ratio in ("pad", "square"):
        images = load_image_processor(tmp_path, DataSpec(aspect_ratio=aspect_ratio, cache_megabytes=0))
        assert np.array_equal(images.load(path, "r"), loader(goldens, aspect_ratio).load(path, "r"))


def test_works_without_torch(goldens):
    script = f"""
import sys
sys.modules["torch"] = sys.modules["torchvision"] = None  # importing either now fails, as where it is not installed
from pathlib import Path
import numpy as np
from vlmprune_jax.io.data import batching, images, prompts, records
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.families import templates
root = Path({str(goldens)!r})
loader = images.load_image_processor(root / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=0))
pixels = loader.load(root / "data/images/img1.png", "r")
assert abs(pixels - np.load(root / "data/images.npz")["clip_pad"][1]).max() <= 1e-5
tokenizer = prompts.load_tokenizer(root / "tokenizers/llava")
record = records.read_records(root / "data/samples.json", root / "data/images")[0]
encoder = batching.Encoder(tokenizer, templates()["llava_v1"], 200, loader, -200, 16, 1, False)
assert encoder.training_row(record)["attention_mask"].sum() == 157
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_colour_modes_become_rgb(goldens, tmp_path):
    images = loader(goldens)
    rgb = Image.open(goldens / "data/images/img2.png").convert("RGB").quantize(16).convert("RGB")
    rgb.save(tmp_path / "rgb.png")
    expected = images.load(tmp_path / "rgb.png", "r")
    rgb.convert("RGBA").save(tmp_path / "rgba.png")
    rgb.quantize(16).save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    for name in ("rgba.png", "palette.png"):
        assert np.array_equal(images.load(tmp_path / name, "r"), expected), name
    rgb.convert("L").save(tmp_path / "grey.png")
    assert images.load(tmp_path / "grey.png", "r").shape == (1, 3, 28, 28)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_thin_image_that_grows_over_the_limit(goldens, tmp_path, aspect_ratio):
    Image.new("RGB", (3_000, 1)).save(tmp_path / "thin.png")  # 3,000 pixels; 9,000,000 padded, 28 x 84,000 resized
    with pytest.raises(UserError, match="3000x1 pixels exceeds the limit"):
        loader(goldens, aspect_ratio).load(tmp_path / "thin.png", "r")


def test_cache_is_bounded_and_keeps_the_latest(goldens, tmp_path):
    one_image = 3 * 28 * 28 * 4
    images = loader(goldens, cache_bytes=2 * one_image)
    paths = []
    for number in range(3):
        Image.new("RGB", (28, 28), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    first, second = images.load(paths[0], "r"), images.load(paths[1], "r")
    assert images.load(paths[0], "r") is first  # now the second is the oldest
    images.load(paths[2], "r")
    assert images.load(paths[0], "r") is first
    assert images.load(paths[1], "r") is not second
    assert np.array_equal(images.load(paths[1], "r"), second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0] = 1.0


def test_bad_processor_folders(tmp_path):
    data = DataSpec(cache_megabytes=0)
    with pytest.raises(UserError, match=r"has neither preprocessor_config\.json nor processor_config\.json"):
        load_image_processor(tmp_path, data)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_image_processor(tmp_path, data)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "ViltImageProcessor"}')
    with pytest.raises(UserError, match=r"'ViltImageProcessor' is not supported .supported: CLIP"):
        load_image_processor(tmp_path, data)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match="does not have the expected content"):
        load_image_processor(tmp_path, data)
