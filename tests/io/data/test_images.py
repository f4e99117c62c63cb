"""Pixels equal the reference's; images and processor files that anybody may have made are read or refused in a line."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from refusal import refused
from repository import HANG, load_arrays

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import ImageLoader, WholeImage, load_image_processor

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
NAMES = ("preprocessor_config.json", "processor_config.json")


def loader(goldens, aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**6):
    images = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio=aspect_ratio))
    return ImageLoader(images.preparation, max_pixels=max_pixels, cache_bytes=cache_bytes)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_pixels_equal_the_reference(goldens, aspect_ratio):
    data, stored = DataSpec(aspect_ratio=aspect_ratio, cache_megabytes=0), load_arrays(goldens / "data/images.npz")
    paths = [goldens / f"data/images/img{n}.png" for n in range(4)]
    # The hub's Bunny folder has no processor file: its code holds the numbers, and the tower's size is in the model.
    for name, expected, shape, size in (
        ("clip_tower", "clip", (3, 28, 28), None),
        ("siglip_tower", "siglip", (3, 45, 45), None),
        ("bunny", "siglip", (3, 45, 45), 45),
    ):
        images = load_image_processor(goldens / "ckpt" / name, data, image_size=size)
        assert images.shape == shape
        pixels = np.concatenate([images.load(path, "r") for path in paths])
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, stored[f"{expected}_{aspect_ratio}"], atol=1e-5, rtol=0)
    refused(f"has neither {NAMES[0]} nor {NAMES[1]}", load_image_processor, goldens / "ckpt/bunny", data)


def test_processor_files_of_other_releases(goldens, tmp_path):
    """Saved by transformers 5, with fields that are not used; and one that pads by itself, which pads once."""
    config = json.loads((goldens / "ckpt/clip_tower/preprocessor_config.json").read_text())
    unused = {"return_tensors": "pt", "data_format": "channels_last", "auto_map": {"AutoProcessor": "x.Y"}}
    pads = {"do_pad": True, "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    fast = {**config, "image_processor_type": "CLIPImageProcessorFast"}
    llava = {**config, "image_processor_type": "LlavaImageProcessor"} | pads
    del llava["feature_extractor_type"]
    for name, content in ((NAMES[1], {"image_processor": fast | unused, "patch_size": 7}), (NAMES[0], llava)):
        (tmp_path / name).write_text(json.dumps(content))
        for aspect_ratio in ("pad", "square"):
            images = load_image_processor(tmp_path, DataSpec(aspect_ratio=aspect_ratio, cache_megabytes=0))
            path = goldens / "data/images/img3.png"
            assert np.array_equal(images.load(path, "r"), loader(goldens, aspect_ratio).load(path, "r"))


def test_cache_is_bounded_and_keeps_the_latest(goldens, tmp_path):
    images = loader(goldens, cache_bytes=2 * 3 * 28 * 28 * 4)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (28, 28), (number * 80, 0, 0)).save(path)
    first, second = images.load(paths[0], "r"), images.load(paths[1], "r")
    assert images.load(paths[0], "r") is first  # now the second is the oldest
    images.load(paths[2], "r")
    assert images.load(paths[0], "r") is first
    assert images.load(paths[1], "r") is not second
    assert np.array_equal(images.load(paths[1], "r"), second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0] = 1.0


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
SPLITS = {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 48}, "do_image_splitting": True}
SPLITS |= {"max_image_size": {"longest_edge": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not have the expected content"),
        ({"image_processor_type": "ViltImageProcessor"}, "'ViltImageProcessor' is not supported (supported: CLIP"),
        (CLIP | {"image_processor_type": ["CLIPImageProcessor"]}, "$.image_processor_type"),
        (CLIP | {"size": -1, "crop_size": -1}, "$.size"),
        (CLIP | {"size": 30_000, "crop_size": 30_000}, "`int` <= 4096 - at `$.size`"),
        (CLIP | {"size": {"shortest_edge": 30_000}}, "$.size.shortest_edge"),
        (CLIP | {"crop_size": {"height": 28, "width": 30_000}}, "$.crop_size.width"),
        (CLIP | {"size": [28, 28, 28]}, "$.size"),
        (CLIP | {"crop_size": {"height": 28}}, "size must have one of"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "$.image_mean"),
        (CLIP | {"image_mean": [0.5, 0.5, float("nan")]}, "$.image_mean["),
        (CLIP | {"image_mean": [0.5, 0.5, 1e20]}, "$.image_mean["),
        (CLIP | {"image_std": [1e-40] * 3}, "$.image_std["),
        (CLIP | {"rescale_factor": float("inf")}, "$.rescale_factor"),
        (CLIP | {"resample": 99}, "$.resample"),
        (CLIP | {"do_resize": "yes"}, "$.do_resize"),
        (CLIP | {"do_resize": False, "do_center_crop": False}, "do_resize and do_center_crop are off"),
        (TILES | {"size": {"height": 28, "width": 14}}, "must be square"),
        (TILES | {"rescale_factor": 0.1}, "rescale_factor 0.1 is not supported"),
        (TILES | {"do_normalize": False}, "do_normalize false is not supported"),
        (TILES | {"max_patches": 10**30}, "max_tiles"),
        (TILES | {"min_patches": -1}, "$.min_patches"),
        (PATCHES | {"size": {"shortest_edge": 0, "longest_edge": 9}}, "$.size.shortest_edge"),
        (PATCHES | {"max_pixels": 10**30}, "$.max_pixels"),
        (PATCHES | {"min_pixels": 7841}, "min_pixels 7841 is above max_pixels 7840"),
        (PATCHES | {"patch_size": 10**6}, "$.patch_size"),
        (PATCHES | {"temporal_patch_size": 0}, "$.temporal_patch_size"),
        (PATCHES | {"merge_size": None, "image_mean": None}, "merge_size, image_mean"),
        ({name: value for name, value in PATCHES.items() if name != "size"}, "has no min_pixels, max_pixels"),
        (PATCHES | {"do_resize": False}, "do_resize false"),
        (SPLITS | {"do_rescale": False}, "do_rescale false is not supported for split images"),
        (SPLITS | {"size": {"height": 48, "width": 48}}, "has no longest_edge"),
        (SPLITS | {"max_image_size": {"longest_edge": 1}}, "give up to 2305 tiles per image, more than the maximum of"),
    ],
)
def test_settings_that_no_processor_has(tmp_path, settings, words, monkeypatch):
    monkeypatch.setattr(WholeImage, "prepare", None)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    data = DataSpec(aspect_ratio="square", max_image_pixels=1000, cache_megabytes=0)
    said = refused(re.escape(words), load_image_processor, tmp_path, data)
    assert str(path) in said or words == "max_tiles"


@pytest.mark.parametrize(
    ("settings", "data", "sizes", "words"),
    [
        (CLIP | {"crop_size": [28, 27]}, {}, {"image_size": 56}, f"{NAMES[0]}: the image .* returns .* takes 56 x 56"),
        (TILES, {}, {"image_size": 56}, "the image processor returns 28 x 28 pixels, .* tower takes 56 x 56"),
        (PATCHES, {}, {"image_size": 56}, "returns patches of .* tower takes 56 x 56 pixels"),
        (PATCHES, {}, {"patches": (1536, 2)}, "patches of 1176 values, 2 per side of a token, but the .* of 1536"),
        (PATCHES, {}, {"patches": (1176, 3)}, "tower takes patches of 1176 values, 3 per side of a token"),
        (SPLITS, {}, {"image_size": 12}, "returns 24 x 24 pixels, but the vision tower takes 12 x 12"),
        (TILES, {}, {"patches": (1176, 2)}, "returns 28 x 28 pixels, but the vision tower takes patches of 1176"),
        (PATCHES, {"max_tiles": 3}, {}, "does not cut images into tiles by their aspect ratio: unset data.max_tiles"),
        (
            TILES,
            {"max_image_tokens": 9},
            {"slot_tokens": 10},
            "data.max_image_tokens=9: .* at least 10, because a tile",
        ),
    ],
)
def test_a_tower_of_another_kind(tmp_path, settings, data, sizes, words, monkeypatch):
    monkeypatch.setattr(WholeImage, "prepare", None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    refused(words, load_image_processor, tmp_path, DataSpec(**data), **sizes)


def test_images_that_stay_oblong_name_file_and_record(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | {"do_center_crop": False}))
    RGB.resize((60, 30)).save(tmp_path / "a.png")
    square, padded = (
        load_image_processor(tmp_path, DataSpec(aspect_ratio=ratio, cache_megabytes=0)) for ratio in ("square", "pad")
    )
    assert padded.load(tmp_path / "a.png", "r").shape == (1, *square.shape)
    refused(r"a.png \(record r\): .* is 56x28 pixels, but .* takes 28x28", square.load, tmp_path / "a.png", "r")


# --- images that anybody may have made --------------------------------------------------------------------------------


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + content


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(*tags):
    """Little-endian TIFF of these (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 64


BOMB = zlib.compress(bytes(100_000_000), 9)
DAMAGED = "not a readable image"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "none of"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "none of"),  # OLE: FPX, MIC
        (saved(RGB, "ICO"), "none of"),
        (saved(RGB, "JPEG")[:300], DAMAGED),
        (png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + BOMB)), DAMAGED),
        (png(8, 8, extra=chunk(b"iCCP", b"k\0\0" + BOMB)), DAMAGED),
        (png(0, 8), DAMAGED),
        (png(2**31 - 1, 2**31 - 1), "far too large"),
        (png(15_000, 10_000), "15000x10000 pixels exceeds the limit of 1000000"),
        (saved(Image.new("RGB", (3_000, 1)), "PNG"), "3000x1 pixels exceeds the limit"),  # once padded or resized
        (tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31)), DAMAGED),
        (tiff((256, 4, 2**30, 8), (257, 3, 1, 8)), DAMAGED),
        (tiff((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 77), (259, 3, 1, 999)), DAMAGED),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(goldens, tmp_path, content, words):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for aspect_ratio in ("pad", "square"):
        message = refused(words, loader(goldens, aspect_ratio).load, path, "r7")
        assert message.startswith(f"{path} (record r7): ")


def test_no_program_is_started(goldens, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "wmf2svg", "convert", "inkscape"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["gs"], check=True)
    (tmp_path / "started").unlink()
    (tmp_path / "a.jpg").write_bytes(EPS)
    refused("none of JPEG", loader(goldens).load, tmp_path / "a.jpg", "r7")
    assert not (tmp_path / "started").exists()


def test_unusual_images_are_read(goldens, tmp_path):
    """Other colours become RGB, of several frames the first is read."""
    few = RGB.quantize(16)
    frames = {"save_all": True, "append_images": [RGB.rotate(180)]}
    same = {
        "animated.png": saved(RGB, "PNG", **frames),
        "animated.webp": saved(RGB, "WEBP", **frames, lossless=True),
        "pages.tiff": saved(RGB, "TIFF", **frames),
    }
    coloured = {
        "rgba.png": saved(few.convert("RGBA"), "PNG"),
        "palette.png": saved(few, "PNG", transparency=bytes([0, 128, 255])),
    }
    others = {
        "animated.gif": saved(few, "GIF", save_all=True, append_images=[few.rotate(180)]),
        "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "grey.png": saved(RGB.convert("L"), "PNG"),
        "deep.png": saved(Image.new("I;16", (40, 30), 700), "PNG"),
        "bits.bmp": saved(RGB.convert("1"), "BMP"),
    }
    for original, files in ((RGB, same), (few.convert("RGB"), coloured), (RGB, others)):
        (tmp_path / "first.png").write_bytes(saved(original, "PNG"))
        expected = loader(goldens).load(tmp_path / "first.png", "r")
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            found = loader(goldens).load(tmp_path / name, "r")
            assert found.shape == expected.shape
            assert np.isfinite(found).all()
            assert files is others or np.array_equal(found, expected), name


@pytest.mark.slow
def test_large_images_and_damage_leave_no_line(goldens, tmp_path):
    """Pillow warns of 90 to 179 megapixels and of broken metadata, logs errors, and libtiff prints them."""
    (tmp_path / "large.png").write_bytes(png(12_000, 8_000))
    (tmp_path / "exif.jpg").write_bytes(saved(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x0f"))
    whole, packed = saved(RGB, "TIFF", dpi=(72, 72)), bytearray(saved(RGB, "TIFF", compression="tiff_deflate"))
    packed[20] ^= 255
    (tmp_path / "tags.tiff").write_bytes(
        whole.replace(struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 5, 900))
    )
    (tmp_path / "damaged.tiff").write_bytes(packed)
    code = f"""
from pathlib import Path
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_image
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
folder, tower = Path({str(tmp_path)!r}), Path({str(goldens / "ckpt/clip_tower")!r})
load = load_image_processor(tower, DataSpec(cache_megabytes=0)).load
with open_image(folder / "large.png") as image:  # decoding takes seconds and says nothing
    assert image.size == (12_000, 8_000)
for name in ("exif.jpg", "tags.tiff"):
    assert load(folder / name, "r").shape == (1, 3, 28, 28)
try:
    load(folder / "damaged.tiff", "r")
except UserError:
    pass
else:
    raise AssertionError("damaged.tiff")
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
