"""From data settings to batches: which template, which images and which image slots a model's folder gives."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from refusal import refused

from vlmprune_jax.core.prune.config import ScoreConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Shape
from vlmprune_jax.io.data.inputs import load_inputs
from vlmprune_jax.io.data.preparation import within_row
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.families import detect


@pytest.fixture(scope="module")
def cfg(goldens):
    """Some model with images; only its family, image size and positions matter here."""
    config = json.loads((goldens / "ckpt/llava_hf/config.json").read_text())
    return detect(config, "config.json").from_hf(config, None)


def folder_of(tmp_path, goldens, checkpoint, tokenizer):
    shutil.copytree(goldens / "tokenizers" / tokenizer, tmp_path / checkpoint)
    for file in (goldens / "ckpt" / checkpoint).glob("*config.json"):
        shutil.copy(file, tmp_path / checkpoint)
    return str(tmp_path / checkpoint)


def data(goldens, **changes):
    file = str(goldens / "data/samples.json")
    return DataSpec(train=file, eval=file, images=str(goldens / "data/images"), **changes)


@pytest.fixture
def internvl(goldens, tmp_path, cfg):
    folder = folder_of(tmp_path, goldens, "internvl", "internvl")
    assert cfg.vision is not None
    vision = dataclasses.replace(cfg.vision, image_size=56, patch_size=28)  # 4 positions a tile
    return ModelSpec(hf_dir=folder), dataclasses.replace(cfg, family="internvl", image_token_id=393, vision=vision)


def test_internvl_folder(goldens, internvl):
    model, cfg = internvl
    loaded = load_inputs(model, data(goldens), cfg)
    assert loaded.template.name == "phi3-chat"
    assert isinstance(loaded.image_loader.preparation, Tiling)
    assert loaded.encoder(cfg, 10).tile_buckets == (1, 2, 4, 7, 13)
    other = load_inputs(dataclasses.replace(model, vision_dir=str(goldens / "ckpt/clip_tower")), data(goldens), cfg)
    assert other.image_loader.preparation == loaded.image_loader.preparation
    two = load_inputs(model, data(goldens, max_images=2, max_tiles=6), cfg)
    assert two.encoder(cfg, 10).tile_buckets == (1, 2, 4, 7, 8)  # two images of three tiles and a thumbnail each
    plain = load_inputs(model, data(goldens, max_tiles=1), cfg)
    assert plain.encoder(cfg, 10).tile_buckets == (1,)
    chosen = load_inputs(model, data(goldens, tile_buckets=(3, 5), template="bunny", system="Hi."), cfg)
    assert chosen.encoder(cfg, 10).tile_buckets == (3, 5)
    assert (chosen.template.name, chosen.template.system) == ("bunny", "Hi.")
    for wrong in ((5, 3), (0, 2), (2, 2)):
        told = r"data\.tile_buckets.* must be (positive numbers|at least 1)"
        refused(told, data, goldens, tile_buckets=wrong)
    told = r"data\.template 'phi3_chat' is not one of auto, .*; did you mean 'phi3-chat'"
    refused(told, load_inputs, model, data(goldens, template="phi3_chat"), cfg)


def test_internvl_batches_for_scores(goldens, internvl):
    model, cfg = internvl
    score = ScoreConfig(samples=5, batch_size=2, longest_text=240)
    batches = inputs.calibration_batches(model, data(goldens, max_tiles=6), score, cfg, seed=0)
    assert len(batches) == 3
    assert len({batch.arrays["input_ids"].shape for batch in batches}) == 1
    stored = json.loads((goldens / "data/internvl_tokenized.json").read_text())["internvl"]["samples"]
    names = [record["id"] for record in json.loads((goldens / "data/samples.json").read_text())]
    rows = [(name, batch.arrays, row) for batch in batches for row, name in enumerate(batch.record_ids) if name]
    assert len(rows) == 5
    for name, arrays, row in rows:
        ids = arrays["input_ids"][row][arrays["attention_mask"][row] == 1]
        assert ids.tolist() == stored[names.index(name)]["input_ids"]


def test_images_of_any_size(goldens):
    """Buckets that hold every image, as the folder or the user caps them; nothing like it for other models."""
    model = ModelSpec(hf_dir=str(goldens / "families/qwen3_vl/ckpt"))
    _, qwen = read_config(Path(model.hf_dir), None)
    encoder = load_inputs(model, data(goldens), qwen).encoder(qwen, 10)
    assert encoder.image_loader.preparation.max_pixels == 1300
    assert (encoder.tile_buckets, encoder.image_buckets) == (None, (64,))  # 1300 / 8**2 are 21, thin images make more
    capped = load_inputs(model, data(goldens, max_image_tokens=6, image_buckets=(4, 6)), qwen)
    assert capped.image_loader.preparation.max_pixels == 6 * 8**2
    assert capped.encoder(qwen, 10).shape_of([]) == Shape(10, 1, 4)
    buckets = (64, 128, 256)
    assert [within_row(buckets, length) for length in (10, 64, 65, 999)] == [(64,), (64,), (64, 128), buckets]


def test_budgets_of_tokens(goldens):
    """Every budget of Gemma 4 shapes training and evaluation rows alike."""
    model = ModelSpec(hf_dir=str(goldens / "families/gemma4/ckpt"))
    _, gemma = read_config(Path(model.hf_dir), None)
    for budget in (70, 280, 1120):
        loaded = load_inputs(model, data(goldens, max_image_tokens=budget), gemma)
        for encoder in (loaded.encoder(gemma, 10), loaded.training_encoder(gemma)):
            assert encoder.image_buckets == (budget,)
        (shape,) = loaded.image_loader.shapes([goldens / "data/images/img1.png"], "r")
        assert budget / 2 < shape.tokens <= budget


def test_bunny_folders(goldens, tmp_path, cfg):
    assert cfg.vision is not None
    vision = dataclasses.replace(cfg.vision, image_size=45)
    bunny = dataclasses.replace(cfg, family="bunny", layout="original", image_token_id=-200, vision=vision)
    folder = folder_of(tmp_path, goldens, "bunny", "bunny")
    llava = dataclasses.replace(bunny, family="llava", layout="transformers")
    for vision_dir in (None, str(goldens / "ckpt/siglip_tower")):
        loaded = load_inputs(ModelSpec(hf_dir=folder, vision_dir=vision_dir), data(goldens), bunny)
        assert loaded.template.name == "bunny"
        assert loaded.encoder(bunny, 10).tile_buckets is None
        assert loaded.image_loader.shape == (3, 45, 45)
    assert load_inputs(ModelSpec(hf_dir=folder, vision_dir=vision_dir), data(goldens), llava).template.name == "bunny"


def test_a_model_without_tiles(goldens, tmp_path, cfg):
    folder = folder_of(tmp_path, goldens, "llava_hf", "llava")
    model = ModelSpec(hf_dir=folder, vision_dir=str(goldens / "ckpt/clip_tower"))

    def shape(**changes):
        return load_inputs(model, data(goldens, **changes), cfg).encoder(cfg, 10).shape_of([])

    refused(r"does not cut images into tiles by their aspect ratio: unset data\.thumbnail", shape, thumbnail=True)
    refused(r"data\.max_image_tokens=9: every image of this model has \d+ tokens", shape, max_image_tokens=9)
    told = r"data\.image_buckets=\(9,\) is set, but this model's images have one size"
    refused(told, shape, image_buckets=(9,))
    assert shape(max_images=3) == Shape(10, 3)
    assert shape(max_images=3, tile_buckets=(1, 3)) == Shape(10, 1)  # other models' images are one tile each
    shutil.copy(goldens / "ckpt/siglip_tower/preprocessor_config.json", folder)
    told = "returns 45 x 45 pixels, but the vision tower takes 28 x 28"
    refused(told, load_inputs, ModelSpec(hf_dir=folder), data(goldens), cfg)
