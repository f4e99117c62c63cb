"""A processor's file is checked before anything of it runs: no field makes an array, or is found wrong by a record."""

import json

import numpy as np
import pytest
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data import images
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor

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

    monkeypatch.setattr(images.WholeImage, "prepare", never)
    path = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    path.write_text(json.dumps({"image_processor": settings} if nested else settings))
    with pytest.raises(UserError) as error:
        load_image_processor(tmp_path, DataSpec(aspect_ratio="square", max_image_pixels=1000, cache_megabytes=0))
    assert words in str(error.value)
    assert str(path) in str(error.value) or words == "max_tiles"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [CLIP | {"crop_size": 4096}, CLIP | {"crop_size": [28, 27]}, TILES])
def test_another_size_than_the_towers_is_refused_before_it_runs(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(images.WholeImage, "prepare", None)
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
