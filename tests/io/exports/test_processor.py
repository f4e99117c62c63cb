"""Limits of tokens per image in the files of an export: stock image processors make of images what ours make."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.exports.vocabulary import export_files

SIZES = ((90, 31), (40, 170), (64, 64), (300, 260))
# Limits that change what each golden folder's files say, and last one that does not.
LIMITS = {
    "gemma4": (140, 280, 70),
    "qwen3_vl": (4, 9, 10**6),
    "qwen2_5_vl": (4, 9, 10**6),
    "internvl3": (9, 27, 36),
    "smolvlm": (4, 19, 20),
    "gemma3": (16, 32, 48, 64),
}
CROPS = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 3,
         "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
OPTIONS = {"aspect_ratio": "pad", "max_image_pixels": 10**7, "cache_megabytes": 0}


def pictures(folder):
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        yield folder / f"{number}.png"


def stock(folder, path, merge, slot_tokens):
    """Pixels of one image from the class that the folder names, and its number of tokens."""
    import transformers

    name = "preprocessor_config.json" if (folder / "preprocessor_config.json").exists() else "processor_config.json"
    settings = json.loads((folder / name).read_text())
    settings = settings.get("image_processor", settings)
    processor = getattr(transformers, f"{settings['image_processor_type']}Pil").from_dict(settings)
    tiles = {"crop_to_patches": True} if "GotOcr2" in settings["image_processor_type"] else {}  # as InternVLProcessor
    with Image.open(path) as image:
        found = processor(image, return_tensors="np", **tiles)
    pixels = np.asarray(found["pixel_values"])
    if "num_soft_tokens_per_image" in found:
        (tokens,) = found["num_soft_tokens_per_image"]
        return pixels[0][: tokens * merge**2], tokens
    if "image_grid_thw" in found:
        return pixels, int(np.prod(found["image_grid_thw"])) // merge**2
    pixels = pixels[0] if pixels.ndim == 5 else pixels
    return pixels, len(pixels) * slot_tokens


@pytest.mark.parametrize(("name", "most"), [(name, most) for name, limits in LIMITS.items() for most in limits])
def test_stock_processors_see_the_limit(goldens, tmp_path, name, most):
    ckpt = goldens / "families" / name / "ckpt"
    source = tmp_path / "source"
    shutil.copytree(ckpt, source, ignore=shutil.ignore_patterns("*.safetensors"))
    if name == "gemma3":
        settings = json.loads((source / "processor_config.json").read_text())
        settings["image_processor"] |= CROPS
        (source / "processor_config.json").write_text(json.dumps(settings))
    _, cfg = read_config(source, None)
    ours = load_image_processor(source, DataSpec(**OPTIONS, max_image_tokens=most), slot_tokens=cfg.tokens_per_image)
    whole = load_image_processor(source, DataSpec(**OPTIONS))
    merge, others = ours.preparation.merge, 0
    with export_files(source, cfg, most=most) as folder:
        for path in pictures(tmp_path):
            pixels, tokens = stock(folder, path, merge, cfg.tokens_per_image)
            (shape,), (before,) = ours.shapes([path], "r"), whole.shapes([path], "r")
            assert shape.positions(cfg.tokens_per_image) == tokens <= most
            others += tokens != before.positions(cfg.tokens_per_image)
            mine = ours.load(path, "r")
            if name == "gemma4":  # its patches lie row by row, ours by token
                columns = shape.columns // merge
                mine = mine.reshape(-1, columns, merge, merge, mine.shape[-1]).swapaxes(1, 2)
                mine = mine.reshape(1, -1, mine.shape[-1])
            np.testing.assert_allclose(mine.reshape(pixels.shape), pixels, atol=1e-5, rtol=0)
    assert bool(others) == (most != LIMITS[name][-1])


def test_exports_have_the_limit(goldens, tmp_path):
    """InternVL's own folder has it in config.json, from where a conversion takes it."""
    source = shutil.copytree(goldens / "ckpt/internvl", tmp_path / "source")
    shutil.copytree(goldens / "tokenizers/internvl", source, dirs_exist_ok=True)
    model = vp.load(source)
    tokens = model.cfg.tokens_per_image
    options = {"source_dir": source, "max_image_tokens": 5 * tokens}
    vp.save(model, tmp_path / "same", **options)
    assert json.loads((tmp_path / "same/config.json").read_text())["max_dynamic_patch"] == 4  # and a thumbnail
    vp.save(model, tmp_path / "stock", layout="transformers", **options)
    ours = load_image_processor(source, DataSpec(**OPTIONS, max_image_tokens=5 * tokens), slot_tokens=tokens)
    for path in pictures(tmp_path):
        pixels, count = stock(tmp_path / "stock", path, 1, tokens)
        assert count == ours.shapes([path], "r")[0].positions(tokens) <= 5 * tokens
        np.testing.assert_allclose(ours.load(path, "r"), pixels, atol=1e-5, rtol=0)


def test_refusals(goldens):
    source, limit = goldens / "ckpt/llava_hf", r"max_image_tokens=9: every image of this model has \d+ tokens.*: unset"
    _, cfg = read_config(source, None)
    with pytest.raises(vp.UserError, match=f"export.{limit}"), export_files(source, cfg, most=9):
        pass
    _, text = read_config(goldens / "ckpt/llama_gqa", None)
    with pytest.raises(vp.UserError, match="takes no images: unset the limit"), export_files(source, text, most=9):
        pass
    for name, most, fact in (
        ("ckpt/clip_tower", 9, "every image of this model has"),
        ("families/gemma4/ckpt", 100, "tokens per image must be one of 70, 140, 280, 560, 1120, with which the"),
        ("families/internvl3/ckpt", 8, "tokens per image must be at least 9, because a tile has 9"),
        ("families/smolvlm/ckpt", 3, "tokens per image must be at least 4, "),
        ("families/gemma3/ckpt", 15, "tokens per image must be at least 16, "),
    ):
        slot = read_config(source if "clip" in name else goldens / name, None)[1].tokens_per_image
        spec = DataSpec(**OPTIONS, max_image_tokens=most)
        fact = f"data.max_image_tokens={most}: {fact}"
        refused(fact, load_image_processor, goldens / name, spec, slot_tokens=slot)
