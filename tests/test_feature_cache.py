"""Recovery from cached features of the frozen tower: the numbers of a run with the tower, without it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recover_cases as cases
from hf_cases import copy_golden, copy_llava, edit_weights
from PIL import Image
from rich.console import Console

from vlmprune_jax.data import cache as cache_module
from vlmprune_jax.data.batching import train_batches
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.features import FeatureLoader, Picture
from vlmprune_jax.data.images import ImageLoader, load_image_processor
from vlmprune_jax.data.records import Record, read_records
from vlmprune_jax.distributed.mesh import make_mesh
from vlmprune_jax.errors import Stopped, UserError
from vlmprune_jax.hf.atomic import SPARE_BYTES
from vlmprune_jax.hf.files import Checkpoint
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model, check_inputs, to_nnx
from vlmprune_jax.prune import PrunePlan, make_plan, prune_folder, score
from vlmprune_jax.recover import loop
from vlmprune_jax.recover.features import compute_features, feature_identity
from vlmprune_jax.recover.metrics import Recorder
from vlmprune_jax.stages.console import Reporter
from vlmprune_jax.stages.context import Context
from vlmprune_jax.stages.features import cached_features, check_frozen
from vlmprune_jax.stages.inputs import load_inputs
from vlmprune_jax.stages.single import recover_config, recover_stage
from vlmprune_jax.stages.spec import Experiment, override

RECOVER = {
    "trainable": "decoder",
    "steps": 4,
    "batch_size": 4,
    "accumulation": 2,
    "remat": "none",
    "save_every": 1,
    "log_every": 1,
    "learning_rate": 1e-2,
    "losses": {"ce": 0.5, "l2": 0.5, "teacher_inputs": "own"},
}


def make_records(folder: Path, images: Path) -> None:
    """Twelve records of five images, one of which no decoder reads, and of texts of several lengths."""
    shutil.copytree(images, folder / "images")
    (folder / "images/broken.png").write_bytes(b"no image")
    records = []
    for number in range(12):
        image = ("img0.png", "img1.png", None, "img2.png", "img3.png", "broken.png")[number % 6]
        turns = [("human", ("<image>\n" if image else "") + "Is it a dog? " * (1 + number % 4)), ("gpt", "yes")]
        record = {"id": f"r{number}", "conversations": [{"from": who, "value": text} for who, text in turns]}
        records.append({**record, "image": image} if image else record)
    (folder / "records.json").write_text(json.dumps(records))


def make_experiment(root: Path, goldens: Path, **sections: Any) -> Experiment:
    """A pruned model in root/pruned, and how to recover it; `root/teacher` is there."""
    make_records(root, goldens / "data/images")
    tower = sections.get("model", {}).get("vision_dir")
    teacher = load(root / "teacher", vision_dir=tower)
    plan = make_plan(score(teacher, None, criterion="random"), teacher.cfg, method="depth", layers_removed=1)
    prune_folder(root / "teacher", plan, root / "pruned", vision_dir=tower, dtype="float32")
    (root / "plan.json").write_text(plan.to_json())
    data = {"train": str(root / "records.json"), "images": str(root / "images"), "on_error": "skip", "system": ""}
    changes = {"model": {"hf_dir": str(root / "teacher")}, "data": data, "recover": RECOVER}
    for name, values in sections.items():
        changes[name] = {**changes.get(name, {}), **values}
    return override(Experiment(), changes)


def recovered(experiment: Experiment, root: Path, name: str, cache: Path | None = None, **recover: Any) -> Path:
    """The folder of one recovery."""
    data = {"feature_cache": None if cache is None else str(cache)}
    context = Context(root, Reporter(Console(file=io.StringIO())), overwrite=False)
    recover_stage(override(experiment, {"data": data, "recover": recover}), root, root / name, context)
    return root / name


def metrics(folder: Path) -> list[dict[str, float]]:
    """Every step's numbers, without times."""
    lines = [json.loads(line) for line in (folder / "training/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def assert_same(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """The same losses and gradients, and the same folder, bit by bit or within a relative tolerance."""
    for ours, theirs in zip(metrics(first), metrics(second), strict=True):
        assert ours == (theirs if not tolerance else pytest.approx(theirs, rel=tolerance))
    one, two = (Checkpoint(folder / "recovered") for folder in (first, second))
    assert set(one) == set(two)
    for key in one:
        assert one.entries[key].dtype == two.entries[key].dtype
        np.testing.assert_allclose(one[key], two[key], rtol=0, atol=tolerance, err_msg=key)
    files = [sorted(path.name for path in (folder / "recovered").iterdir()) for folder in (first, second)]
    assert files[0] == files[1]
    skipped = [(folder / "training/skipped-0.jsonl").read_text() for folder in (first, second)]
    assert skipped[0] == skipped[1]
    assert "broken.png" in skipped[0]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory, goldens: Path) -> tuple[Experiment, Path]:
    root = tmp_path_factory.mktemp("llava")
    copy_llava(goldens, root / "teacher")
    return make_experiment(root, goldens, data={"max_length": 96}), root


# --- the pass ---------------------------------------------------------------------------------------------------------


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
    direct = jax.jit(to_nnx(model).vision_features)
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
        UserError, match=r"one.png \(record other\): could not be read when .* now it can: remove .*cache"
    ):
        loader.load(image, "other")


def test_an_image_without_tiles_is_one_however_many_share_a_record(llava, goldens, tmp_path):
    """And it is named after the first record that shows it."""
    images = load_image_processor(llava[1] / "teacher", aspect_ratio="pad", max_pixels=10**6, cache_bytes=10**6)
    loader = FeatureLoader(images, ArrayCache(tmp_path, {}), (4, 8), np.dtype(np.float32))
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

    for short, error, told in ((1, UserError, "safetensors: needs .* GiB but only .* free"), (0, Stopped, "begun")):
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free - short)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with pytest.raises(error, match=told):
            fill(loader, tiled, progress=begun)


def test_whatever_changes_features_is_in_the_identity():
    """Of the tower, of its weights, and of how images become arrays and are computed."""
    cfg = cases.config()
    given = {"cfg": cfg, "weights": {"digest": "a"}, "preparation": {"size": 6}, "dtype": "float32"}
    changes = [
        {"cfg": dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, activation="gelu_new"))},
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


# --- the model without its tower --------------------------------------------------------------------------------------


def test_inputs_of_a_model_without_its_tower():
    cfg = dataclasses.replace(cases.config(), tower=False)
    ids = np.full((2, 5), cases.IMAGE)
    check_inputs(cfg, ids, None, np.zeros((2, 1, *cfg.feature_shape)))
    for features in (None, np.zeros((2, 1, 3, 8)), np.zeros((1, 1, *cfg.feature_shape))):
        with pytest.raises(UserError, match=r"vision_features has shape .*: a model without its tower takes \[2, im"):
            check_inputs(cfg, ids, np.zeros((2, 1, 3, 6, 6)), features)
    with pytest.raises(UserError, match="another one pixel_values"):
        check_inputs(cases.config(), ids, None, np.zeros((2, 1, *cfg.feature_shape)))


# --- the stage --------------------------------------------------------------------------------------------------------


def prepared(experiment: Experiment, root: Path, cache: Path, **sections: Any) -> FeatureLoader | None:
    """The stage's part before training."""
    data = {"feature_cache": str(cache), **sections.pop("data", {})}
    changed = override(experiment, {"data": data, **sections})
    context = Context(root, Reporter(Console(file=io.StringIO())), overwrite=False)
    plan = PrunePlan.from_json(root / "plan.json")
    return cached_features(changed, recover_config(changed.recover), plan, root / "pruned", context)


def test_what_is_refused(llava, goldens, tmp_path):
    experiment, root = llava
    cache = tmp_path / "cache"
    assert prepared(experiment, root, cache) is not None
    identity = json.loads((cache / "cache.json").read_text())
    assert identity["tower"]["n_layers"] == 3
    assert identity["images"]["aspect_ratio"] == "pad"
    for changes, reason in (
        ({"recover": {"trainable": "all"}}, "recover.trainable='all' trains the vision tower"),
        ({"mesh": {"data": 8}}, "a micro-batch of 2 rows .* does not divide over data x fsdp = 8 devices"),
        ({"recover": {"compute_dtype": "bfloat16"}}, 'something else gave .dtype was "float32", now "bfloat16"'),
        ({"model": {"dtype": "bfloat16"}}, 'weights.dtype was "float32", now "bfloat16"'),
        ({"data": {"aspect_ratio": "square"}}, 'images.aspect_ratio was "pad", now "square"'),
    ):
        with pytest.raises(UserError, match=reason) as error:
            prepared(experiment, root, cache, **changes)
        assert "\n" not in str(error.value)
    shutil.copytree(root / "pruned", tmp_path / "pruned")
    shutil.copy(root / "plan.json", tmp_path)
    for file in (tmp_path / "pruned").glob("*.safetensors"):
        edit_weights(tmp_path / "pruned", _other_tower, file.name)
    with pytest.raises(UserError, match="have different vision towers: leave feature_cache out"):
        prepared(experiment, tmp_path, cache)
    with pytest.raises(UserError, match=r'weights.digest was "\w+", now "\w+"'):
        prepared(experiment, tmp_path, cache, recover={"losses": {"teacher_inputs": "student"}})
    with pytest.raises(UserError, match="this model has no vision tower"):
        check_frozen(cases.config(vision=False), recover_config(experiment.recover))
    encoder = dataclasses.replace(load_inputs(experiment.model, experiment.data, load(root / "teacher").cfg))
    with pytest.raises(UserError, match="augment 'flip_shift' changes images, and what is cached"):
        augmented(encoder, prepared(experiment, root, cache))


def _other_tower(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value * 1.5 if "vision" in key else value for key, value in tensors.items()}


def augmented(inputs: Any, loader: Any) -> None:
    encoder = dataclasses.replace(inputs.encoder(cases.config(), 96), image_loader=loader)
    options = {"shuffle": False, "epochs": 1, "drop_remainder": True, "process_index": 0, "process_count": 1}
    train_batches([], encoder, batch_size=1, seed=0, augment="flip_shift", threads=1, prefetch=1, **options)


@pytest.mark.slow
def test_same_numbers_without_tower_and_pixels(llava, monkeypatch):
    """The tower is neither on the devices nor in the step, each image is decoded once, and the folder is the same."""
    experiment, root = llava
    with_tower = recovered(experiment, root, "with_tower")
    train, decode, held, decoded = loop._train, ImageLoader.load, list[str](), list[str]()

    def looked(run, *args):
        held.extend(path for path in (*run.frozen, *run.state.params, *flatten(run.teacher_params)))
        return train(run, *args)

    def listed(self, path, *args):
        decoded.append(path.name)
        return decode(self, path, *args)

    monkeypatch.setattr(loop, "_train", looked)
    monkeypatch.setattr(ImageLoader, "load", listed)
    assert_same(recovered(experiment, root, "cached", root / "cache"), with_tower)
    assert held
    assert not [path for path in held if path.startswith("vision")]
    assert sorted(name for name in decoded if name != "broken.png") == [f"img{number}.png" for number in range(4)]


FAMILIES = {
    "bunny": {"model": {"vision_dir": "siglip_tower"}},
    "internvl": {"data": {"max_tiles": 6, "max_length": 256}, "recover": {"trainable": "projector"}},
    "llava": {"data": {"group_by": "modality_length", "length_buckets": (48, 96)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_interrupted_twice_and_the_same_numbers(name, goldens, tmp_path, monkeypatch):
    """Stopped in the pass, killed while it trains: another tower, tiles and uneven slots, length buckets, adapters.

    Bit by bit where the pass takes as many images at a time as a micro-batch. Batches of tiles have several sizes, and
    matrix products of other sizes are rounded in another order.
    """
    sections = {part: dict(values) for part, values in FAMILIES[name].items()}
    if name == "llava":
        copy_llava(goldens, tmp_path / "teacher")
        adapters = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
        sections["recover"] = {"trainable": "lora", "lora": adapters, "save_adapter": True}
    else:
        copy_golden(goldens, name, tmp_path / "teacher")
        shutil.copytree(goldens / "tokenizers" / name, tmp_path / "teacher", dirs_exist_ok=True)
    if name == "bunny":
        sections["model"]["vision_dir"] = str(goldens / "ckpt/siglip_tower")
    sections["recover"] = {**RECOVER, **sections.get("recover", {})}
    experiment = make_experiment(tmp_path, goldens, **sections)
    with_tower = recovered(experiment, tmp_path, "with_tower")
    decode, record, wanted = ImageLoader.load, Recorder.step, iter(range(10))

    def stopped(self, path, *args):
        if next(wanted, 0) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, path, *args)

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        record(self, step, *args)

    monkeypatch.setattr(cache_module, "SHARD_BYTES", 1)
    monkeypatch.setattr(ImageLoader, "load", stopped)
    with pytest.raises(Stopped, match=r"features stopped on SIGTERM after . of 5; the same command continues"):
        recovered(experiment, tmp_path, "cached", tmp_path / "cache")
    monkeypatch.setattr(ImageLoader, "load", decode)
    monkeypatch.setattr(Recorder, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        recovered(experiment, tmp_path, "cached", tmp_path / "cache")
    monkeypatch.setattr(Recorder, "step", record)
    cached = recovered(experiment, tmp_path, "cached", tmp_path / "cache")
    assert json.loads((tmp_path / ".stages/cached.recover.json").read_text())["facts"]["resumed_from"] == 2
    assert_same(cached, with_tower, tolerance=1e-5 if name == "internvl" else 0.0)
