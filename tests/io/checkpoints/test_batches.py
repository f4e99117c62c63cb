"""`vp.batches`: records as rows for the model in a folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from repository import ROOT

import vlmprune_jax as vp

TEACHER = ROOT / "vlmprune_jax/demo/teacher"


@pytest.fixture(scope="module")
def entries(goldens: Path) -> list[dict]:
    listed = json.loads((goldens / "data/samples.json").read_text())
    return [entry for entry in listed if isinstance(entry.get("image"), str)][:3]


def test_rows_go_into_scores_and_losses_as_they_are(goldens: Path, entries: list[dict]) -> None:
    made = vp.batches(TEACHER, entries, images=goldens / "data/images", batch_size=2, aspect_ratio="square")
    assert [len(batch.record_ids) for batch in made] == [2, 2]
    assert made[1].record_ids[1] == ""  # a row that only fills the batch
    model = vp.load(TEACHER)
    scores = vp.score(model, made, criterion="block_influence")
    assert (scores.layers > 0).all()
    values = vp.losses(model, made[0], vp.LossConfig())
    assert 0 < float(values["ce"]) < 100


def test_a_file_and_its_entries_are_the_same_rows(goldens: Path, entries: list[dict], tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text(json.dumps(entries))
    settings = {"images": goldens / "data/images", "batch_size": 3, "max_length": 400, "aspect_ratio": "square"}
    (one,), (two,) = vp.batches(TEACHER, file, **settings), vp.batches(TEACHER, entries, **settings)
    assert one.record_ids == two.record_ids
    assert "vision" in one.arrays["media"]
    jax.tree.map(np.testing.assert_array_equal, one.arrays, two.arrays)
    assert one.arrays["input_ids"].shape == (3, 400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_lenght": 3}, "setting 'max_lenght' is not accepted here; did you mean 'max_length'"),
        ({"fraction": 0.5}, "setting 'fraction' is not accepted here"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"images": None}, "there is no image folder"),
        ({"max_length": 3, "truncate": False}, "more than the maximum length 3"),
    ],
)
def test_what_does_not_fit_is_refused(goldens: Path, entries: list[dict], change: dict, message: str) -> None:
    with pytest.raises(vp.UserError, match=message):
        vp.batches(TEACHER, entries, **{"images": goldens / "data/images", "aspect_ratio": "square", **change})


def test_no_records() -> None:
    with pytest.raises(vp.UserError, match="no records"):
        vp.batches(TEACHER, [])
