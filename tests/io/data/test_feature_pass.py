"""The pass that fills a cache of features: each image once, in tiles, kept, continued, refused; and what it is of."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from hf_cases import copy_llava
from media_cases import packed
from PIL import Image
from stack_cases import with_facts
from vlm_cases import row_of

import vlmprune_jax as vp
from vlmprune_jax.base.atomic import SPARE_BYTES
from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import Stopped, UserError
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.vlm import Model, features_of, to_nnx, tower_features
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data import feature_pass
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.feature_loader import FeatureLoader, Picture
from vlmprune_jax.io.data.feature_pass import compute_features, feature_identity
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families.templates import QWEN3_VL


@pytest.fixture(scope="module")
def tiled(goldens: Path) -> tuple[Model, list[Record]]:
    """The golden InternVL, and records of images that give 7, 4, 1 and 5 tiles, alone or two together."""
    records = read_records(goldens / "data/samples.json", goldens / "data/images")
    both = (goldens / "data/images/img0.png", goldens / "data/images/img3.png")
    return load(goldens / "ckpt/internvl"), [
        *records,
        Record("both", (("human", "<image><image>"), ("gpt", "a")), both),
    ]


def make_loader(goldens: Path, folder: Path, model: Model) -> FeatureLoader:
    images = load_image_processor(
        goldens / "ckpt/internvl", aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**7, tiling={"max_tiles": 6}
    )
    cache = ArrayCache(folder, {"weights": "x"})
    return FeatureLoader(images, cache, model.cfg.feature_shape, np.dtype(np.float32))


def fill(loader: FeatureLoader, tiled: tuple[Model, list[Record]], **changes: Any) -> int:
    """Compute what is missing; returns how many pictures that were."""
    model, records = tiled
    missing = loader.missing(records)
    options = {"batch_size": 8, "on_error": "stop", "threads": 2, "mesh": None, "progress": lambda done: None}
    compute_features(model.params["vision"], model.cfg, loader, missing, **{**options, **changes})
    return len(missing)


def test_tiles_become_what_the_model_computes_of_them(goldens, tiled, tmp_path):
    """On one device and on a mesh, in batches that no picture fills; a second pass finds nothing to do."""
    model, records = tiled
    seen: list[int] = []
    loader = make_loader(goldens, tmp_path / "one", model)
    assert fill(loader, tiled, progress=seen.append) == 6  # two of them have fewer tiles in the last record
    assert seen == sorted(seen)
    meshed = load(goldens / "ckpt/internvl", mesh=make_mesh(2, 2, 2))
    split = make_loader(goldens, tmp_path / "eight", model)
    fill(split, (meshed, records), mesh=make_mesh(2, 2, 2))
    direct = jax.jit(lambda pixels: features_of(to_nnx(model).vision, model.cfg, packed(pixels)))
    numbers = set()
    for record in records:
        for path in record.images:
            pixels = loader.images.load(path, record.id, len(record.images))
            numbers.add(len(pixels))
            for one in (loader, split):
                features = one.load(path, record.id, len(record.images))
                assert features.shape == (len(pixels), *model.cfg.feature_shape)
                np.testing.assert_allclose(features, direct(pixels), atol=1e-5, rtol=0)
    assert len(numbers) > 3
    assert fill(make_loader(goldens, tmp_path / "one", model), tiled) == 0


@pytest.mark.slow
def test_images_of_any_size(goldens, tmp_path):
    """What batches of several sizes gave is what each alone gives, and rows of it train like rows of pixels."""
    folder = goldens / "families/qwen3_vl"
    paths = [folder / f"images/{number}.png" for number in range(4)]
    turns = (("human", "<image><image>Which?"), ("gpt", "That."))
    records = [Record("a", turns, (paths[0], paths[3])), Record("b", turns, (paths[1], paths[2]))]
    images = load_image_processor(folder / "ckpt", aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**7)
    model, mesh = load(folder / "ckpt"), make_mesh(2, 1, 1, devices=jax.devices()[:2])
    direct = jax.jit(lambda pixels, grid: tower_features(model.params["vision"], model.cfg, packed(pixels, grid)))
    loaders = []
    for name, devices in (("one", None), ("two", mesh)):
        cache = ArrayCache(tmp_path / name, {"weights": "x"})
        loader = FeatureLoader(images, cache, model.cfg.feature_shape[1:], np.dtype(np.float32))
        options = {"mesh": devices, "batch_size": 2}
        assert fill(loader, (load(folder / "ckpt", mesh=devices), records), **options) == 4
        loaders.append(loader)
    for record in records:
        for path, shape in zip(record.images, images.shapes(record.images, "r"), strict=True):
            pixels = np.zeros((1, 80, *images.shape), np.float32)
            pixels[0, : shape.tokens * 4] = images.load(path, "r")
            alone = direct(pixels, np.array([shape.grids], np.int32))[0, : shape.tokens]
            for loader in loaders:
                np.testing.assert_allclose(loader.load(path, "r", 2), alone, atol=1e-5, rtol=0)
    encoder = Encoder(
        tokenizer=load_tokenizer(folder / "ckpt"),
        template=QWEN3_VL,
        max_length=80,
        image_loader=images,
        image_token_id=model.cfg.image_token_id,
        tokens_per_image=0,
        max_images=2,
        truncate=False,
        image_buckets=(40,),
    )
    losses = []
    for loader, cfg, params in (
        (images, model.cfg, model.params),
        (
            loaders[0],
            dataclasses.replace(model.cfg, tower=False),
            {k: v for k, v in model.params.items() if k != "vision"},
        ),
    ):
        rows = [row_of(dataclasses.replace(encoder, image_loader=loader), record) for record in records]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        images = Packed(arrays.pop("pixel_values"), arrays.pop("image_grid_thw"))
        arrays["media"] = {"vision": images}
        losses.append(vp.losses(Model(params, cfg), arrays, vp.LossConfig(ce=1.0))["total"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_processes_share_pictures_by_size(goldens, tmp_path, monkeypatch):
    """Those of any size are dealt out from the largest on, whoever counted them: batches of a step hold like ones."""
    folder = goldens / "families/qwen3_vl"
    images = load_image_processor(folder / "ckpt", aspect_ratio="pad", max_pixels=10**6, cache_bytes=0)
    loader = FeatureLoader(images, ArrayCache(tmp_path, {"weights": "x"}), (4,), np.dtype(np.float32))
    turns = (("human", "<image>"), ("gpt", "a"))
    records = [Record(f"{n}", turns, (folder / f"images/{n}.png",)) for n in range(4)]
    pictures = {record.id: Picture(record, 0) for record in records}
    counts = {key: loader.count(picture) for key, picture in pictures.items()}
    names = list(pictures)
    monkeypatch.setattr(feature_pass, "process_count", lambda: 3)
    monkeypatch.setattr(feature_pass, "from_all", lambda _: [[counts[k] for k in names[i::3]] for i in range(3)])
    shares = feature_pass._shares(loader, pictures, "stop")
    dealt = [list(shares[turn % 3])[turn // 3] for turn in range(4)]
    assert dealt == sorted(names, key=lambda key: -counts[key])
    assert len(set(counts.values())) == 4


def test_a_stopped_pass_continues(goldens, tiled, tmp_path):
    """SIGTERM between two batches: what is whole is there, and the rest is computed by the next pass."""
    model, records = tiled

    def stop(done: int) -> None:
        if done:
            raise Stopped("stopped on SIGTERM")

    loader = make_loader(goldens, tmp_path, model)
    with pytest.raises(Stopped):
        fill(loader, tiled, progress=stop)
    left = make_loader(goldens, tmp_path, model).missing(records)
    assert 0 < len(left) < len(make_loader(goldens, tmp_path / "empty", model).missing(records))
    assert fill(make_loader(goldens, tmp_path, model), tiled) == len(left)
    assert not make_loader(goldens, tmp_path, model).missing(records)


def test_images_that_cannot_be_read(goldens, tiled, tmp_path):
    """Stop names the record; skip keeps the reason for the row that it is wanted in. Another file is another image."""
    model, _ = tiled
    image = tmp_path / "one.png"
    image.write_bytes(b"no image")
    records = [Record("first", (("human", "<image>"), ("gpt", "a")), (image,))]
    loader = make_loader(goldens, tmp_path / "cache", model)
    with pytest.raises(UserError, match=r"one.png \(record first\): not a readable image"):
        fill(loader, (model, records))
    assert fill(loader, (model, records), on_error="skip") == 1
    assert not make_loader(goldens, tmp_path / "cache", model).missing(records)
    with pytest.raises(UserError, match=r"one.png \(record other\): not a readable image"):
        loader.load(image, "other")
    Image.new("RGB", (60, 40)).save(image)
    assert fill(loader, (model, records)) == 1
    assert len(loader.load(image, "other")) == loader.count(Picture(records[0], 0))


def test_headers_are_read_before_anything_is_computed(goldens, tiled, tmp_path):
    """A pass over a million images does not end at the last one."""
    model, records = tiled
    image, seen = tmp_path / "one.png", []
    image.write_bytes(b"no image")
    last = Record("last", (("human", "<image>"), ("gpt", "a")), (image,))
    with pytest.raises(UserError, match=r"one.png \(record last\): not a readable image"):
        fill(make_loader(goldens, tmp_path / "cache", model), (model, [*records, last]), progress=seen.append)
    assert seen == []


def test_an_image_that_can_be_read_again_is_not_taken_for_one_without_tiles(goldens, tiled, tmp_path):
    """A disk that was away, say."""
    model, _ = tiled
    image = tmp_path / "one.png"
    Image.new("RGB", (60, 40)).save(image)
    good = image.read_bytes()
    image.write_bytes(bytes(len(good)))
    loader = make_loader(goldens, tmp_path / "cache", model)
    records = [Record("first", (("human", "<image>"), ("gpt", "a")), (image,))]
    fill(loader, (model, records), on_error="skip")
    image.write_bytes(good)
    with pytest.raises(
        UserError, match=r"one.png \(record other\): could not be read when .* readable now: remove .*cache"
    ):
        loader.load(image, "other")


def test_an_image_without_tiles_is_one_however_many_share_a_record(goldens, tmp_path):
    """And it is named after the first record that shows it."""
    copy_llava(goldens, tmp_path / "teacher")
    images = load_image_processor(tmp_path / "teacher", aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**6)
    loader = FeatureLoader(images, ArrayCache(tmp_path / "cache", {}), (4, 8), np.dtype(np.float32))
    paths = [goldens / f"data/images/img{number}.png" for number in range(2)]
    shown = {"first": paths[:1], "both": paths, "again": paths[:1]}
    found = loader.missing(Record(name, (), tuple(images)) for name, images in shown.items())
    assert [(picture.record.id, picture.place) for picture in found.values()] == [("first", 0), ("both", 1)]


def test_features_are_computed_and_kept_in_the_given_precision(goldens, tiled, tmp_path):
    model, records = tiled
    loader, exact = (make_loader(goldens, tmp_path / name, model) for name in ("half", "exact"))
    loader.dtype = np.dtype(jnp.bfloat16)
    for each in (loader, exact):
        fill(each, (model, records[:2]))
    (path, *_), number = records[0].images, len(records[0].images)
    features, expected = (each.load(path, "", number) for each in (loader, exact))
    assert features.dtype == loader.dtype
    error = np.abs(features.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_a_disk_that_is_too_small_is_noticed_first(goldens, tiled, tmp_path, monkeypatch):
    """To the byte; the records of two images have other tiles than these alone."""
    loader = make_loader(goldens, tmp_path, tiled[0])
    tiles = sum(len(loader.pixels(picture)) for picture in loader.missing(tiled[1]).values())
    free = 4 * tiles * math.prod(tiled[0].cfg.feature_shape) + SPARE_BYTES

    def begun(done: int) -> None:
        raise Stopped("begun")

    for short, error, told in ((1, UserError, "safetensors: needs .* MiB but only .* free"), (0, Stopped, "begun")):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free - short)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with pytest.raises(error, match=told):
            fill(loader, tiled, progress=begun)


def test_whatever_changes_features_is_in_the_identity():
    """Of the tower, of its weights, and of how images become arrays and are computed."""
    cfg = cases.config()
    given = {"cfg": cfg, "weights": {"digest": "a"}, "preparation": {"size": 6}, "dtype": "float32"}
    changes = [
        {"cfg": dataclasses.replace(cfg, vision=with_facts(cfg.vision, activation="gelu_new"))},
        {"cfg": dataclasses.replace(cfg, feature_select="full")},
        {"cfg": dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, shuffle_version="v1"))},
        {"weights": {"digest": "b"}},
        {"preparation": {"size": 7}},
        {"dtype": "bfloat16"},
    ]
    first = feature_identity(**given)
    for change in changes:
        assert feature_identity(**{**given, **change}) != first, change
    other = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, hidden_size=32))
    assert feature_identity(**{**given, "cfg": other}) == first  # models of any size share a cache
