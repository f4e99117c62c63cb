"""`vp.batches`: records as rows for the model in a folder; `vp.prune`: these and the further steps."""

import json

import jax
import numpy as np
import pytest
from refusal import refused
from repository import ROOT

import vlmprune_jax as vp

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


@pytest.fixture(scope="module")
def images(goldens):
    return goldens / "data/images"


@pytest.fixture(scope="module")
def records(goldens):
    listed = json.loads((goldens / "data/samples.json").read_text())
    return [entry for entry in listed if isinstance(entry.get("image"), str)][:4]


def test_rows_go_into_scores_and_losses_as_they_are(images, records):
    made = vp.batches(TEACHER, records[:3], images=images, batch_size=2, aspect_ratio="square")
    assert [len(batch.record_ids) for batch in made] == [2, 2]
    assert made[1].record_ids[1] == ""  # a row that only fills the batch
    model = vp.load(TEACHER)
    assert (vp.score(model, made, criterion="block_influence").layers > 0).all()
    assert 0 < float(vp.losses(model, made[0], vp.LossConfig())["ce"]) < 100


def test_a_file_and_its_entries_are_the_same_rows(images, records, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(records))
    settings = {"images": images, "batch_size": 4, "max_length": 400, "aspect_ratio": "square"}
    (one,), (two,) = (vp.batches(TEACHER, source, **settings) for source in (tmp_path / "records.json", records))
    assert one.record_ids == two.record_ids
    assert "vision" in one.arrays["media"]
    jax.tree.map(np.testing.assert_array_equal, one.arrays, two.arrays)
    assert one.arrays["input_ids"].shape == (4, 400)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"max_lenght": 3}, "'max_lenght' .* did you mean 'max_length'"),
        ({"fraction": 0.5}, "'fraction' is not accepted"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"images": None}, "no image folder"),
        ({"max_length": 3, "truncate": False}, "maximum length 3"),
    ],
)
def test_batches_that_cannot_be(images, records, change, fact):
    refused(fact, vp.batches, TEACHER, records, **{"images": images, "aspect_ratio": "square", **change})
    refused("no records", vp.batches, TEACHER, [])


def test_one_call_is_the_same_as_its_steps(images, records):
    pruned = vp.prune(TEACHER, records, ratio=0.3, images=images, scoring={"samples": 3, "seed": 7})
    model, drawn = vp.load(TEACHER), vp.batches(TEACHER, records, images=images, samples=3, seed=7)
    assert [name for batch in drawn for name in batch.record_ids] != [entry["id"] for entry in records[:3]]
    assert len(drawn) == 3
    plan = vp.make_plan(vp.score(model, drawn, criterion="block_influence"), model, method="depth", ratio=0.3)
    expected = vp.apply_plan(model, plan)
    assert pruned.cfg == expected.cfg
    jax.tree.map(np.testing.assert_array_equal, pruned.params, expected.params)


def test_listed_layers_keep_their_original_numbers(tmp_path):
    vp.prune(TEACHER, layers=(3, 4)).save(tmp_path / "out")
    plan = vp.PrunePlan.from_json(tmp_path / "out/plan.json")
    assert plan.kept_layers == (0, 1, 2, 5, 6, 7, 8, 9)
    assert plan == vp.make_plan(None, vp.load(TEACHER), layers=(3, 4))


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, "exactly one of ratio, layers_removed, layers and budget, got none"),
        ({"ratio": 0.3, "layers": (3,)}, "got ratio and layers"),
        ({"ratio": 0.3}, "'block_influence' needs calibration batches"),
        ({"layers": range(10)}, "at least 1 must remain"),
        ({"layers": (3,), "protect": (3, 5)}, r"layers \[3\] must stay .prune.protect"),
        ({"layers": (3,), "stack": "both"}, "prune.layers lists layers of one stack"),
        ({"layers": (3,), "method": "width"}, "'width' has no such setting, only depth"),
        ({"layers": (3,), "reconstruct": True}, "reconstruct=True needs calibration records"),
        ({"method": "none"}, 'prune.method="none" removes nothing'),
    ],
)
def test_calls_that_cannot_be(options, fact):
    refused(fact, vp.prune, TEACHER, **options)
