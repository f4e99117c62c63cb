"""Recovery from cached features of the frozen tower: the numbers of a run with the tower, without it."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recover_cases as cases
from experiment_cases import record
from hf_cases import copy_golden, copy_llava, edit_weights
from refusal import refused
from rich.console import Console
from vlm_cases import row_of

from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.prune import score
from vlmprune_jax.core.recovery import loop
from vlmprune_jax.core.recovery.metrics import Recorder
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.cached_arrays import FeatureLoader
from vlmprune_jax.io.data.inputs import load_inputs, training_rows
from vlmprune_jax.io.data.record_cache import check_frozen
from vlmprune_jax.io.data.records import read_records
from vlmprune_jax.io.data.tfds import read_tfds, write_tfds
from vlmprune_jax.io.exports.pruning import make_plan, prune_folder
from vlmprune_jax.run.experiment.arguments import recover_config
from vlmprune_jax.run.experiment.spec import Experiment
from vlmprune_jax.run.stages.recover import Recovery
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.ledger import run_task

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


def make_experiment(root: Path, goldens: Path, **sections: Any) -> Experiment:
    """A pruned model in root/pruned, and how to recover it; `root/teacher` is there.

    Twelve records of five images, one of which no decoder reads, and of texts of several lengths.
    """
    shutil.copytree(goldens / "data/images", root / "images")
    (root / "images/broken.png").write_bytes(b"no image")
    images = ("img0.png", "img1.png", None, "img2.png", "img3.png", "broken.png")
    records = [record(f"r{n}", images[n % 6], "Is it a dog? " * (1 + n % 4), "yes") for n in range(12)]
    (root / "records.json").write_text(json.dumps(records))
    teacher = load(root / "teacher")
    plan = make_plan(score(teacher, None, criterion="random"), teacher.cfg, method="depth", layers_removed=1)
    prune_folder(root / "teacher", plan, root / "pruned", dtype="float32")
    (root / "plan.json").write_text(plan.to_json())
    data = {"train": str(root / "records.json"), "images": str(root / "images"), "on_error": "skip", "system": ""}
    changes = {"model": {"hf_dir": str(root / "teacher")}, "data": data, "recover": RECOVER}
    return override(Experiment(), {name: {**changes.get(name, {}), **sections.get(name, {})} for name in changes})


def quiet(root: Path, experiment: Experiment, **place: Any) -> Work:
    """Nothing is printed."""
    return Work.at(root, experiment, Reporter(Console(file=io.StringIO())), **place)


def recovered(experiment: Experiment, root: Path, name: str, cache: Path | None = None) -> Path:
    """The folder of one recovery."""
    changed = override(experiment, {"data": {"feature_cache": None if cache is None else str(cache)}})
    work = quiet(root, changed, stage="recover", folder=name, start=root / "pruned")
    run_task(work.task, overwrite=False, say=work.say)
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


# --- the model without its tower --------------------------------------------------------------------------------------


def test_inputs_of_a_model_without_its_tower():
    cfg = dataclasses.replace(cases.config(), tower=False)
    ids = np.full((2, 4), cases.IMAGE)
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole = {"media": {"vision": Packed(np.zeros((2, 1, *cfg.feature_shape)))}}
    check_batch(cfg, rows | whole)
    for features in (np.zeros((2, 1, 3, 6, 6)), np.zeros((2, 1, 3, 8)), np.zeros((3, 1, *cfg.feature_shape))):
        with pytest.raises(UserError, match=r"images have shape .*, features \(the model is without its vision tower"):
            check_batch(cfg, rows | {"media": {"vision": Packed(features)}})
    with pytest.raises(UserError, match=r"images have shape .* that divide the 2 rows: \[packs, tiles, 3, 6, 6\]"):
        check_batch(cases.config(), rows | whole)


# --- the stage --------------------------------------------------------------------------------------------------------


def prepared(experiment: Experiment, root: Path, cache: Path, **sections: Any) -> FeatureLoader | None:
    """The stage's part before training."""
    data = {"feature_cache": str(cache), **sections.pop("data", {})}
    changed = override(experiment, {"data": data, **sections})
    recovery = Recovery(quiet(root, changed, start=root / "pruned"), changed.data, changed.recover)
    rows = training_rows(changed.data, recovery.encoder, recovery.records, recovery.work.reporter.bar)
    return recovery.cached_features(rows)


def test_what_is_refused(llava, goldens, tmp_path):
    experiment, root = llava
    cache = tmp_path / "cache"
    assert prepared(experiment, root, cache) is not None
    identity = json.loads((cache / "cache.json").read_text())
    assert len(identity["tower"]["layers"]) == 3
    assert identity["images"]["aspect_ratio"] == "square"  # as the folder's processor does
    for changes, reason in (
        ({"recover": {"trainable": "tower"}}, "recover.trainable='tower' trains the vision tower"),
        ({"mesh": {"data": 8}}, "a micro-batch of 2 rows .* must be a multiple of mesh.data x mesh.fsdp = 8 devices"),
        ({"recover": {"compute_dtype": "bfloat16"}}, 'computed from other inputs .dtype was "float32", now "bfloat16"'),
        ({"data": {"aspect_ratio": "pad"}}, 'images.aspect_ratio was "square", now "pad"'),
    ):
        with pytest.raises(UserError, match=reason) as error:
            prepared(experiment, root, cache, **changes)
        assert "\n" not in str(error.value)
    shutil.copytree(root / "pruned", tmp_path / "pruned")
    shutil.copy(root / "plan.json", tmp_path)
    for file in (tmp_path / "pruned").glob("*.safetensors"):
        edit_weights(tmp_path / "pruned", _other_tower, file.name)
    refused("have different vision towers: unset it or use", prepared, experiment, tmp_path, cache)
    with pytest.raises(UserError, match=r'weights.digest was "\w+", now "\w+"'):
        prepared(experiment, tmp_path, cache, recover={"losses": {"teacher_inputs": "student"}})
    with pytest.raises(UserError, match="this model has no vision tower"):
        check_frozen(cases.config(vision=False), recover_config(experiment.recover))


def _other_tower(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value * 1.5 if "vision" in key else value for key, value in tensors.items()}


def test_images_of_a_tfds_data_set(llava, tmp_path):
    """Their features are those of the files, under names that a copy of the data set keeps, and fill the same rows."""
    experiment, root = llava
    files = prepared(experiment, root, tmp_path / "files")
    assert files is not None
    records = read_records(root / "records.json", root / "images")
    write_tfds(records, tmp_path / "set", image_root=root / "images")
    stored = prepared(experiment, root, tmp_path / "cache", data={"train": f"tfds:{tmp_path / 'set'}"})
    assert stored is not None
    again = read_tfds(tmp_path / "set")
    inputs = load_inputs(experiment.model, experiment.data, load(root / "teacher").cfg)
    encoder = inputs.training_encoder(load(root / "teacher").cfg)
    ours, theirs = (dataclasses.replace(encoder, image_loader=loader) for loader in (stored, files))
    reasons = [ours.problem(record) for record in again]
    assert [number for number, reason in enumerate(reasons) if reason] == [5, 11]
    assert (
        reasons[5]
        == "broken.png (record r5): not a readable image (none of JPEG, PNG, WEBP, GIF, BMP, TIFF): replace the file"
    )
    for one, other, reason in zip(again, records, reasons, strict=True):
        if not reason:
            row, wanted = row_of(ours, one), row_of(theirs, other)
            assert row.keys() == wanted.keys() >= {"pixel_values"}
            assert all(np.array_equal(row[name], wanted[name]) for name in row)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert all(map(stored.has, map(stored.keys, read_tfds(tmp_path / "copy"))))
    refused("has no array for", stored.load, records[0].images[0], "r0")


FAMILIES = {
    "internvl": {"data": {"max_tiles": 6, "max_length": 256}, "recover": {"trainable": "projector"}},
    "llava": {"data": {"group_by": "modality_length", "length_buckets": (48, 96)}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "llava"])
def test_interrupted_and_the_same_numbers(name, goldens, tmp_path, monkeypatch):
    """Killed while it trains: another tower, tiles and uneven slots, length buckets, adapters.

    The tower is neither on the devices nor in the step.
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
    sections["recover"] = {**RECOVER, **sections.get("recover", {})}
    experiment = make_experiment(tmp_path, goldens, **sections)
    with_tower = recovered(experiment, tmp_path, "with_tower")
    step_of = Recorder.step

    def killed(self, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        step_of(self, step, *args)

    monkeypatch.setattr(Recorder, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        recovered(experiment, tmp_path, "cached", tmp_path / "cache")
    monkeypatch.setattr(Recorder, "step", step_of)
    train, held = loop._train, list[str]()

    def looked(run, *args):
        held.extend(path for path in (*run.frozen, *run.state.params, *flatten(run.teacher_params)))
        return train(run, *args)

    monkeypatch.setattr(loop, "_train", looked)
    cached = recovered(experiment, tmp_path, "cached", tmp_path / "cache")
    assert held
    assert not [path for path in held if path.startswith("vision")]
    assert json.loads((tmp_path / ".stages/cached.recover.json").read_text())["facts"]["resumed_from"] == 2
    assert_same(cached, with_tower, tolerance=1e-5 if name == "internvl" else 0.0)
