"""`vp.prune`: one call for load, batches, score, make_plan and apply_plan."""

import json

import jax
import numpy as np
import pytest
from repository import ROOT

import vlmprune_jax as vp

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


@pytest.fixture(scope="module")
def records(goldens):
    listed = json.loads((goldens / "data/samples.json").read_text())
    return [entry for entry in listed if isinstance(entry.get("image"), str)][:4]


def test_one_call_is_the_same_as_its_steps(goldens, records):
    images = goldens / "data/images"
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
    ("options", "message"),
    [
        ({}, "needs exactly one of ratio, layers_removed, layers and budget, got none"),
        ({"ratio": 0.3, "layers": (3,)}, "got ratio and layers"),
        ({"ratio": 0.3}, "criterion 'block_influence' needs calibration batches"),
        ({"layers": range(10)}, "these layers cannot be removed (at least 1 must remain)"),
        ({"layers": (3,), "protect": (3, 5)}, "layers [3] must stay (prune.protect"),
        ({"layers": (3,), "stack": "both"}, "prune.layers lists layers of one stack"),
        ({"layers": (3,), "method": "width"}, "method 'width' has no such setting, only depth"),
        ({"layers": (3,), "reconstruct": True}, "reconstruct=True needs calibration records: pass data"),
        ({"method": "none"}, 'prune.method="none" removes nothing'),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(vp.UserError) as error:
        vp.prune(TEACHER, **options)
    assert message in str(error.value)
