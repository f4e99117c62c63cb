"""Pixels equal the reference's, bad files are refused by name, and none of it needs torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import ImageLoader, WholeImage, load_image_processor


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


# --- a processor's file is checked before anything of it runs ---------------------------------------------------------


CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28}
PATCHES = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 784, "longest_edge": 7840},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
TILES = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 28, "width": 28}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (CLIP | {"size": "abc"}, "$.size"),
        (CLIP | {"size": -1, "crop_size": -1}, "$.size"),
        (CLIP | {"size": 30_000, "crop_size": 30_000}, "`int` <= 4096 - at `$.size`"),
        (CLIP | {"size": {"shortest_edge": 30_000}}, "$.size.shortest_edge"),
        (CLIP | {"crop_size": {"height": 28, "width": 30_000}}, "$.crop_size.width"),
        (CLIP | {"size": 28.0}, "$.size"),
        (CLIP | {"size": True}, "$.size"),
        (CLIP | {"size": [28, 28, 28]}, "$.size"),
        (CLIP | {"crop_size": {"height": 28}}, "size must have one of"),
        (CLIP | {"size": {}}, "size"),
        (CLIP | {"image_mean": "x"}, "$.image_mean"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "$.image_mean"),
        (CLIP | {"image_mean": [0.5, 0.5, float("nan")]}, "$.image_mean["),
        (CLIP | {"image_mean": [0.5, 0.5, 1e20]}, "$.image_mean["),
        (CLIP | {"image_mean": [10**400] * 3}, "$.image_mean["),
        (CLIP | {"image_std": [0.5, 0, 0.5]}, "$.image_std["),
        (CLIP | {"image_std": [1e-40] * 3}, "$.image_std["),
        (CLIP | {"rescale_factor": float("inf")}, "$.rescale_factor"),
        (CLIP | {"rescale_factor": "x"}, "$.rescale_factor"),
        (CLIP | {"resample": 99}, "$.resample"),
        (CLIP | {"resample": "bicubic"}, "$.resample"),
        (CLIP | {"do_resize": "yes"}, "$.do_resize"),
        (CLIP | {"do_normalize": 1}, "$.do_normalize"),
        (CLIP | {"do_resize": False, "do_center_crop": False}, "do_resize and do_center_crop are off"),
        (CLIP | {"image_processor_type": ["CLIPImageProcessor"]}, "$.image_processor_type"),
        (TILES | {"size": {"height": 28, "width": 28.5}}, "$.size.width"),
        (TILES | {"size": {"height": 28, "width": 14}}, "must be square"),
        (TILES | {"image_mean": [float("nan")] * 3}, "$.image_mean["),
        (TILES | {"rescale_factor": "x"}, "$.rescale_factor"),
        (TILES | {"size": {"shortest_edge": 28}}, "must be square"),
        (TILES | {"rescale_factor": 0.1}, "rescale_factor 0.1 is not supported"),
        (TILES | {"do_normalize": False}, "do_normalize false is not supported"),
        (TILES | {"max_patches": "many"}, "$.max_patches"),
        (TILES | {"max_patches": 10**30}, "max_tiles"),
        (TILES | {"min_patches": -1}, "$.min_patches"),
        (PATCHES | {"size": {"shortest_edge": 0, "longest_edge": 9}}, "$.size.shortest_edge"),
        (PATCHES | {"size": 28}, "$.size"),
        (PATCHES | {"max_pixels": 10**30}, "$.max_pixels"),
        (PATCHES | {"min_pixels": 7841}, "min_pixels 7841 is above max_pixels 7840"),
        (PATCHES | {"patch_size": 10**6}, "$.patch_size"),
        (PATCHES | {"temporal_patch_size": 0}, "$.temporal_patch_size"),
        (PATCHES | {"merge_size": "2"}, "$.merge_size"),
        (PATCHES | {"merge_size": None, "image_mean": None}, "merge_size, image_mean"),
        ({name: value for name, value in PATCHES.items() if name != "size"}, "has no min_pixels, max_pixels"),
        (PATCHES | {"do_resize": False}, "do_resize false"),
        (PATCHES | {"rescale_factor": 0.5}, "rescale_factor 0.5"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_settings_that_no_processor_has(tmp_path, settings, words, nested, monkeypatch):
    def never(*_):
        raise AssertionError("it ran")

    monkeypatch.setattr(WholeImage, "prepare", never)
    path = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    path.write_text(json.dumps({"image_processor": settings} if nested else settings))
    with pytest.raises(UserError) as error:
        load_image_processor(tmp_path, DataSpec(aspect_ratio="square", max_image_pixels=1000, cache_megabytes=0))
    assert words in str(error.value)
    assert str(path) in str(error.value) or words == "max_tiles"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [CLIP | {"crop_size": 4096}, CLIP | {"crop_size": [28, 27]}, TILES])
def test_another_size_than_the_towers_is_refused_before_it_runs(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(WholeImage, "prepare", None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"preprocessor_config.json: the image processor returns .* tower takes 56 x 56"
    ):
        load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0), image_size=56)


@pytest.mark.parametrize(
    ("settings", "sizes", "words"),
    [
        (PATCHES, {"patches": (1536, 2)}, "returns patches of 1176 values, 2 per side of a token, but the .* of 1536"),
        (PATCHES, {"patches": (1176, 3)}, "but the vision tower takes patches of 1176 values, 3 per side of a token"),
        (PATCHES, {"image_size": 56}, "returns patches of .* tower takes 56 x 56 pixels"),
        (TILES, {"patches": (1176, 2)}, "returns 28 x 28 pixels, but the vision tower takes patches of 1176"),
        (TILES, {"patches": (28, 28)}, "returns 28 x 28 pixels, but the vision tower takes patches of 28"),
        (
            PATCHES,
            {"max_tiles": 3},
            "this model does not cut images into tiles by their aspect ratio: unset data.max_tiles",
        ),
        (
            TILES,
            {"max_image_tokens": 9, "slot_tokens": 10},
            r"data.max_image_tokens=9: tokens per image must be at least 10, because a tile has 10",
        ),
    ],
)
def test_a_tower_of_another_kind(tmp_path, settings, sizes, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    data = {name: sizes[name] for name in ("max_tiles", "max_image_tokens") if name in sizes}
    sizes = {name: size for name, size in sizes.items() if name not in data}
    with pytest.raises(UserError, match=words):
        load_image_processor(tmp_path, DataSpec(**data), **sizes)


def test_images_that_stay_oblong_name_file_and_record(tmp_path):
    settings = CLIP | {"do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    square, padded = (
        load_image_processor(tmp_path, DataSpec(aspect_ratio=ratio, cache_megabytes=0)) for ratio in ("square", "pad")
    )
    assert padded.load(tmp_path / "a.png", "r").shape == (1, *square.shape)
    with pytest.raises(UserError, match=r"a.png \(record r\): prepared size is 56x28 pixels, but .* takes 28x28"):
        square.load(tmp_path / "a.png", "r")


def test_a_colour_out_of_range_and_unknown_fields_do_no_harm(tmp_path):
    """Fields of newer releases are not ours to refuse; `return_tensors` and the like are not used."""
    odd = {"image_mean": [127.5, -3.0, 127.5], "return_tensors": "pt", "data_format": "channels_last", "device": "cuda"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | odd | {"auto_map": {"AutoProcessor": "x.Y"}}))
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    loaded = load_image_processor(tmp_path, DataSpec(aspect_ratio="pad", cache_megabytes=0))
    assert loaded.load(tmp_path / "a.png", "r").dtype == np.float32
