"""Images that anybody may have made: one line that names file and record, or pixels; no program, no stray line."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from repository import HANG

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
"""
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


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


def pixels(goldens, path, max_pixels=10**6):
    folder = goldens / "ckpt/clip_tower"
    return load_image_processor(
        folder, DataSpec(aspect_ratio="pad", max_image_pixels=max_pixels, cache_megabytes=0)
    ).load(path, "r7")


def refusal(goldens, path, content):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        pixels(goldens, path)
    message = str(caught.value)
    assert message.startswith(f"{path} (record r7): ")
    assert "\n" not in message
    return message


BOMB = zlib.compress(bytes(100_000_000), 9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "none of JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (b"%PDF-1.7\n", "none of"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "none of"),
        (b"\xd7\xcd\xc6\x9a" + bytes(64), "none of"),  # WMF
        (b"icns" + bytes(64), "none of"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "none of"),  # OLE: FPX, MIC
        (saved(RGB, "PPM"), "none of"),
        (saved(RGB, "ICO"), "none of"),
        (saved(RGB, "JPEG")[:300], "not a readable image"),
        (saved(RGB, "WEBP")[:60], "not a readable image"),
        (png(8, 8, extra=chunk(b"zTXt", b"k\0\0" + BOMB)), "not a readable image"),
        (png(8, 8, extra=chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)), "not a readable image"),
        (png(8, 8, extra=chunk(b"iCCP", b"k\0\0" + BOMB)), "not a readable image"),
        (png(0, 8), "not a readable image"),
        (png(2**31 - 1, 2**31 - 1), "far too large"),
        (png(2_000, 2_000), "2000x2000 pixels exceeds the limit of 1000000"),
        (png(15_000, 10_000), "15000x10000 pixels exceeds the limit of 1000000"),
        (tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31)), "not a readable image"),
        (tiff((256, 4, 2**30, 8), (257, 3, 1, 8)), "not a readable image"),
        (tiff((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 77), (259, 3, 1, 999)), "not a readable image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(goldens, tmp_path, content, words):
    assert words in refusal(goldens, tmp_path / "a.jpg", content)


def test_no_program_is_started(goldens, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "wmf2svg", "convert", "inkscape"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["gs"], check=True)
    (tmp_path / "started").unlink()
    assert "none of JPEG" in refusal(goldens, tmp_path / "a.jpg", EPS)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (os.mkfifo, "is a FIFO, expected a file"),
        (os.mkdir, "is a folder, expected a file"),
        (lambda path: os.symlink("/dev/zero", path), "is a device, expected a file"),
        (lambda path: os.symlink("nowhere", path), "is a link to nowhere, which does not exist"),
        (lambda path: os.symlink(path.name, path), "is a link to itself"),
    ],
)
def test_what_is_no_file(goldens, tmp_path, make, words):
    make(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        pixels(goldens, tmp_path / "a.png")
    assert str(caught.value) == f"{tmp_path / 'a.png'} (record r7): {words}"


def test_unusual_images_are_read(goldens, tmp_path):
    frames = [RGB.quantize(16), RGB.rotate(180).quantize(16)]
    notes = PngInfo()
    notes.add_text("comment", "x" * 1000)
    files = {
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.png": saved(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)], pnginfo=notes),
        "animated.webp": saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)], lossless=True),
        "pages.tiff": saved(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(180)]),
        "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        "deep.png": saved(Image.new("I;16", (40, 30), 700), "PNG"),
        "palette.png": saved(frames[0], "PNG", transparency=3),
        "bits.bmp": saved(RGB.convert("1"), "BMP"),
    }
    expected = {}
    (tmp_path / "first.png").write_bytes(saved(RGB, "PNG"))
    expected = pixels(goldens, tmp_path / "first.png")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = pixels(goldens, tmp_path / name)
        assert found.shape == (1, 3, 28, 28)
        assert np.isfinite(found).all()
        if name in ("animated.png", "animated.webp", "pages.tiff"):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_large_images_and_damage_leave_no_line(goldens, tmp_path):
    """Pillow warns of 90 to 179 megapixels and of broken metadata, logs errors, and libtiff prints them."""
    (tmp_path / "large.png").write_bytes(png(12_000, 8_000))
    (tmp_path / "exif.jpg").write_bytes(saved(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x0f"))
    whole = saved(RGB, "TIFF", dpi=(72, 72))
    (tmp_path / "tags.tiff").write_bytes(
        whole.replace(struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 5, 900))
    )
    packed = bytearray(saved(RGB, "TIFF", compression="tiff_deflate"))
    packed[20] ^= 255
    (tmp_path / "damaged.tiff").write_bytes(packed)
    many = whole.replace(struct.pack("<HHIHH", 277, 3, 1, 3, 0), struct.pack("<HHIHH", 277, 3, 1, 2048, 0))
    assert many != whole
    (tmp_path / "samples.tiff").write_bytes(many)
    code = f"""
from pathlib import Path
from vlmprune_jax.base.files import open_image
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.base.errors import UserError
load = load_image_processor(Path({str(goldens / "ckpt/clip_tower")!r}), DataSpec(cache_megabytes=0)).load
with open_image(Path({str(tmp_path)!r}) / "large.png") as image:  # decoding takes seconds and says nothing
    assert image.size == (12_000, 8_000)
for name in ("exif.jpg", "tags.tiff"):
    assert load(Path({str(tmp_path)!r}) / name, "r").shape == (1, 3, 28, 28)
for name in ("damaged.tiff", "samples.tiff"):
    try:
        load(Path({str(tmp_path)!r}) / name, "r")
    except UserError:
        continue
    raise AssertionError(name)
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-2000:]
