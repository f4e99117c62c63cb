"""The pass that fills a cache of features: each record once, kept, continued, refused; and what the cache is of."""

import dataclasses
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from block_cases import packed
from hf_cases import copy_llava
from PIL import Image
from refusal import refused
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
from vlmprune_jax.io.data.cached_arrays import FeatureLoader
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.inputs import TrainingRows
from vlmprune_jax.io.data.media import image_key
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.record_cache import (
    check_room,
    compute_records,
    feature_identity,
    feature_program,
    records_to_compute,
)
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates
from vlmprune_jax.io.families.templates import QWEN3_VL


@pytest.fixture(scope="module")
def tiled(goldens):
    """The golden InternVL, and records of images that give 7, 4, 1 and 5 tiles, alone or two together."""
    records = read_records(goldens / "data/samples.json", goldens / "data/images")
    paths = (goldens / "data/images/img0.png", goldens / "data/images/img3.png")
    both = Record("both", (("human", "<image><image>"), ("gpt", "a")), paths)
    return load(goldens / "ckpt/internvl"), [*records, both]


def make_loader(goldens, folder, model):
    data = DataSpec(aspect_ratio="pad", cache_megabytes=10, max_tiles=6)
    images, cache = load_image_processor(goldens / "ckpt/internvl", data), ArrayCache(folder, {"weights": "x"})
    return FeatureLoader(images, cache, model.cfg.feature_shape, np.dtype(np.float32))


def encoder(goldens, images, **changes):
    """Of the golden InternVL, for rows that hold every record."""
    options = {
        "tokenizer": load_tokenizer(goldens / "tokenizers/internvl"), "template": templates()["phi3-chat"],
        "max_length": 2000, "image_loader": images, "image_token_id": 393, "tokens_per_image": 4, "max_images": 2,
        "truncate": False, "tile_buckets": (1, 2, 4, 7, 14),
    }  # fmt: skip
    return Encoder(**{**options, **changes})


def fill(of, loader, tiled, **changes):
    """Compute what is missing; returns how many records that were."""
    model, records = tiled
    rows = of if isinstance(of, Encoder) else encoder(of, loader.images)
    options = {"size": 2, "on_error": "stop", "threads": 2, "mesh": None, "progress": lambda done: None, **changes}
    sizes = measure(records, rows, on_error=options["on_error"], threads=1)
    training = TrainingRows(tuple(records), rows, sizes)
    todo = records_to_compute(training, loader, options["size"])
    if todo:
        check_room(loader, training, todo)
        program = feature_program(model.params["vision"], model.cfg, loader, options["mesh"])
        compute_records(loader, training, todo, program, **options)
    return len(todo)


def test_tiles_become_what_the_model_computes_of_them(goldens, tiled, tmp_path):
    """On one device and on a mesh; a second pass finds nothing to do."""
    model, records = tiled
    seen: list[int] = []
    loader = make_loader(goldens, tmp_path / "one", model)
    assert fill(goldens, loader, tiled, progress=seen.append) == len({r.images for r in records if r.images})
    assert seen == sorted(seen)
    meshed = load(goldens / "ckpt/internvl", mesh=make_mesh(2, 2, 2))
    split = make_loader(goldens, tmp_path / "eight", model)
    fill(goldens, split, (meshed, records), mesh=make_mesh(2, 2, 2), size=8)
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
    assert fill(goldens, make_loader(goldens, tmp_path / "one", model), tiled) == 0


@pytest.mark.slow
def test_images_of_any_size(goldens, tmp_path):
    """What batches of several sizes gave is what each alone gives, and rows of it train like rows of pixels."""
    folder = goldens / "families/qwen3_vl"
    paths = [folder / f"images/{number}.png" for number in range(4)]
    turns = (("human", "<image><image>Which?"), ("gpt", "That."))
    records = [Record("a", turns, (paths[0], paths[3])), Record("b", turns, (paths[1], paths[2]))]
    images = load_image_processor(folder / "ckpt", DataSpec(aspect_ratio="pad", cache_megabytes=10))
    model, mesh = load(folder / "ckpt"), make_mesh(2, 1, 1, devices=jax.devices()[:2])
    direct = jax.jit(lambda pixels, grid: tower_features(model.params["vision"], model.cfg, packed(pixels, grid)))
    rows = encoder(
        goldens, images, tokenizer=load_tokenizer(folder / "ckpt"), template=QWEN3_VL, max_length=80,
        image_token_id=model.cfg.image_token_id, tokens_per_image=0, tile_buckets=None, image_buckets=(40,),
    )  # fmt: skip
    loaders = []
    for name, devices in (("one", None), ("two", mesh)):
        cache = ArrayCache(tmp_path / name, {"weights": "x"})
        loader = FeatureLoader(images, cache, model.cfg.feature_shape[1:], np.dtype(np.float32))
        assert fill(rows, loader, (load(folder / "ckpt", mesh=devices), records), mesh=devices) == 2
        loaders.append(loader)
    for record in records:
        for path, shape in zip(record.images, images.shapes(record.images, "r"), strict=True):
            pixels = np.zeros((1, 80, *images.shape), np.float32)
            pixels[0, : shape.tokens * 4] = images.load(path, "r")
            alone = direct(pixels, np.array([shape.grids], np.int32))[0, : shape.tokens]
            for loader in loaders:
                np.testing.assert_allclose(loader.load(path, "r", 2), alone, atol=1e-5, rtol=0)
    losses, without = [], {k: v for k, v in model.params.items() if k != "vision"}
    cached = (loaders[0], dataclasses.replace(model.cfg, tower=False), without)
    for loader, cfg, params in ((images, model.cfg, model.params), cached):
        encoded = [row_of(dataclasses.replace(rows, image_loader=loader), record) for record in records]
        arrays = {name: np.stack([row[name] for row in encoded]) for name in encoded[0]}
        arrays["media"] = {"vision": Packed(arrays.pop("pixel_values"), arrays.pop("image_grid_thw"))}
        losses.append(vp.losses(Model(params, cfg), arrays, vp.LossConfig(ce=1.0))["total"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_largest_come_first(goldens, tiled, tmp_path):
    """A lack of memory shows at once; text alone and images that an earlier record shows need nothing."""
    model, records = tiled
    loader = make_loader(goldens, tmp_path, model)
    rows = encoder(goldens, loader.images)
    sizes = measure(records, rows, on_error="stop", threads=1)
    todo = records_to_compute(TrainingRows(tuple(records), rows, sizes), loader, 2)
    shown = {r.images: sizes[n, 1] for n, r in enumerate(records) if r.images}
    assert sizes[todo, 1].tolist() == sorted(shown.values())[::-1]


def test_a_stopped_pass_continues(goldens, tiled, tmp_path):
    """SIGTERM between two batches: what is whole is there, and the rest is computed by the next pass."""
    model, records = tiled

    def stop(done):
        if done:
            raise Stopped("stopped on SIGTERM")

    loader = make_loader(goldens, tmp_path, model)
    with pytest.raises(Stopped):
        fill(goldens, loader, tiled, progress=stop)
    begun = make_loader(goldens, tmp_path, model)
    left = [record for record in records if not begun.has(begun.keys(record))]
    assert 0 < len(left) < len([record for record in records if record.images])
    assert fill(goldens, make_loader(goldens, tmp_path, model), tiled) > 0
    assert all(map(make_loader(goldens, tmp_path, model).has, map(loader.keys, records)))


@pytest.fixture
def truncated(goldens, tmp_path):
    """A record whose image has a header and nothing else, and the whole image."""
    image = tmp_path / "one.png"
    good = (goldens / "data/images/img0.png").read_bytes()
    image.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))
    return Record("first", (("human", "<image>"), ("gpt", "a")), (image,)), good


def test_images_that_cannot_be_read(goldens, tiled, truncated, tmp_path):
    """Stop names the record; skip keeps the reason for the row that it is wanted in. Another file is another image."""
    model, records = tiled
    record, good = truncated
    (image,) = record.images
    loader, told = make_loader(goldens, tmp_path / "cache", model), r"one.png \(record {}\): not a readable image"
    refused(told.format("first"), fill, goldens, loader, (model, [record]))
    both = dataclasses.replace(records[-1], images=(image, records[-1].images[0]))
    assert fill(goldens, loader, (model, [record, both]), on_error="skip") == 2
    again = make_loader(goldens, tmp_path / "cache", model)
    assert fill(goldens, again, (model, [record, both]), on_error="skip") == 0
    refused(told.format("other"), loader.load, image, "other")
    status = image.stat()
    image.write_bytes(good)  # a disk that was away, say: not an image without tiles
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    away = r"one.png \(record other\): could not be read when .* readable now: remove .*cache"
    refused(away, loader.load, image, "other")
    image.write_bytes(good + b"more")
    assert fill(goldens, loader, (model, [record])) == 1
    assert len(loader.load(image, "other")) == loader.positions(record)


def test_headers_are_read_before_anything_is_computed(goldens, tiled, tmp_path):
    """A pass over a million images does not end at the last one."""
    model, records = tiled
    image, seen = tmp_path / "one.png", []
    image.write_bytes(b"no image")
    last, loader = Record("last", (("human", "<image>"),), (image,)), make_loader(goldens, tmp_path / "cache", model)
    told = r"one.png \(record last\): not a readable image"
    refused(told, fill, goldens, loader, (model, [*records, last]), progress=seen.append)
    assert seen == []


def test_an_image_without_tiles_has_one_key_however_many_share_a_record(goldens, tmp_path):
    copy_llava(goldens, tmp_path / "teacher")
    images = load_image_processor(tmp_path / "teacher", DataSpec(aspect_ratio="pad", cache_megabytes=1))
    loader = FeatureLoader(images, ArrayCache(tmp_path / "cache", {}), (4, 8), np.dtype(np.float32))
    paths = tuple(goldens / f"data/images/img{number}.png" for number in range(2))
    both, first = loader.keys(Record("both", (), paths)), loader.keys(Record("first", (), paths[:1]))
    assert both[:1] == first


def test_features_are_computed_and_kept_in_the_given_precision(goldens, tiled, tmp_path):
    model, records = tiled
    loader, exact = (make_loader(goldens, tmp_path / name, model) for name in ("half", "exact"))
    loader.dtype = np.dtype(jnp.bfloat16)
    for each in (loader, exact):
        fill(goldens, each, (model, records[:2]))
    (path, *_), number = records[0].images, len(records[0].images)
    features, expected = (each.load(path, "", number) for each in (loader, exact))
    assert features.dtype == loader.dtype
    error = np.abs(features.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_a_disk_that_is_too_small_is_noticed_first(goldens, tiled, tmp_path, monkeypatch):
    """To the byte; the records of two images have other tiles than these alone."""
    loader = make_loader(goldens, tmp_path, tiled[0])
    shown = {record.images: record for record in tiled[1]}
    tiles = sum(len(loader.images.load(path, "", len(images))) for images in shown for path in images)
    free = 4 * tiles * math.prod(tiled[0].cfg.feature_shape) + SPARE_BYTES

    def begun(done):
        raise Stopped("begun")

    for short, error, told in ((1, UserError, "safetensors: needs .* MiB but only .* free"), (0, Stopped, "begun")):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free - short)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with pytest.raises(error, match=told):
            fill(goldens, loader, tiled, progress=begun)


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


@pytest.mark.parametrize("features", [np.zeros((1, 5, 7), np.float32), np.zeros((1, 4, 8), np.int32), np.zeros(())])
def test_features_of_another_shape(goldens, tmp_path, features):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    images = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=0))
    stored = ArrayCache(tmp_path / "cache", {"a": 1})
    stored.add({image_key(tmp_path / "a.png"): features})
    stored.publish()
    loader = FeatureLoader(images, stored, (4, 8), np.dtype(np.float32))
    told = r"a\.png \(record r1\): .* expected float32\[tiles, 4, 8\]: remove that folder"
    refused(told, loader.load, tmp_path / "a.png", "r1")
