"""Files of a workdir: their base, sweeps, samples and speeds; written whole, read back equal, refused in one line."""

import base64
import io
import json
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from refusal import refused
from report_cases import BENCH, NOISY, RUNS, SPEED, answered, write_records
from sweep_cases import some_runs, write_sweep

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.workdir import samples
from vlmprune_jax.run.workdir.artefact import Artefact, read_artefact, write_artefact
from vlmprune_jax.run.workdir.groups import groups_of
from vlmprune_jax.run.workdir.samples import make_samples
from vlmprune_jax.run.workdir.speed import MedianSpeed, SpeedUp, speedup
from vlmprune_jax.run.workdir.sweep import read_sweep


class Numbers(Artefact, frozen=True, kw_only=True, tag=2):
    """A file for these tests."""

    HINT: ClassVar[str] = "count again"
    COMPACT: ClassVar[bool] = True
    name: str
    values: list[float | None]
    note: str | None = None

    def problems(self, folder):
        """Return what is wrong."""
        return f"{folder.name} has no name" if not self.name else None


def test_it_is_read_back_as_written(tmp_path):
    path, numbers = tmp_path / "n.json", Numbers(name="\udcff", values=[1.0, None, float("inf")])
    write_artefact(path, numbers)
    assert read_artefact(path, Numbers) == numbers
    text = path.read_text()
    assert json.loads(text) == {"format": 2, "name": "\udcff", "values": [1.0, None, float("inf")]}
    assert len(text.splitlines()) == 5  # a line for each field
    path.write_text('{"format": 2, "name": "a", "values": [], "more": 1}')
    assert read_artefact(path, Numbers) == Numbers(name="a", values=[])  # unknown fields are ignored
    refused(r"m\.json: run it first", read_artefact, tmp_path / "m.json", Numbers, missing="run it first")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"format": 1, "name": "a"}, "has no format that this version reads (format 2): count again"),
        ({"format": True, "name": "a"}, "has no format that this version reads (format 2): count again"),
        ({"format": 3, "name": "a"}, "(format 3, this version reads 2): upgrade vlmprune-jax"),
        ({"format": 2}, "does not have the expected content (Object missing required field `name`): count again"),
        ({"format": 2, "name": "", "values": []}, "has no name: count again"),
        ([], "count again"),
    ],
)
def test_what_is_refused(tmp_path, value, told):
    path = tmp_path / "n.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        read_artefact(path, Numbers)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(told)


# --- `sweep.json` ----------------------------------------------------------------------------------------------------


def test_groups_differ_in_more_than_seeds(tmp_path):
    write_sweep(tmp_path)
    groups = groups_of(read_sweep(tmp_path))
    assert len(groups) == 12
    assert [len(group.models) for group in groups[:3]] == [1, 2, 2]
    assert groups[1].labels == {"method": "depth", "ratio": "0.1", "recovery": "sft", "fraction": "0.05"}
    kept = [one.evaluation.mean_of_ratios for one in groups[2].models]
    assert groups[2].retained == interval_of_mean(kept)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda sweep: sweep["models"][0]["found"].update(model="other"), "there are no results of 'other'"),
        (lambda sweep: sweep["models"][0]["found"]["evaluation"]["scores"].clear(), "there are no results of 'docs'"),
        (lambda sweep: sweep["models"].clear(), "models"),
    ],
)
def test_damage_is_one_line(tmp_path, edit, told):
    write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:2])
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    edit(sweep)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    refused(f"sweep.json.*{told}", read_sweep, tmp_path)
    (tmp_path / "sweep.json").unlink()
    refused(r"sweep.json: no such file: run `vlmprune sweep` first", read_sweep, tmp_path)


# --- `eval/samples.json`: which questions are samples, and their images ----------------------------------------------


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path)


def test_samples_are_the_telling_questions_in_order(records):
    right = {
        "unpruned": range(30),
        "depth": range(20),  # breaks 20 to 29
        "depth-sft": (*range(20), 24, 26, 28),
        "width": range(10),  # breaks 10 to 29
        "width-reconstructed": (*range(10), 26, 27),
    }
    found = make_samples(records, RUNS, *answered(right), max_pixels=10**6)
    assert found.counts == {"repaired": 4, "broken": 16, "other": 20}
    assert [s.kind for s in found.samples] == ["repaired"] * 4 + ["broken"] * 3 + ["other"] * 3
    # repaired in both ways of pruning first, then one of each answer and image, then what is left; broken in both
    assert [s.id for s in found.samples[:5]] == ["r26", "r24", "r28", "r27", "r20"]
    first = found.samples[0]
    assert first.references == ["yes"]
    answers = [("unpruned", "yes", 1.0), ("depth", "", 0.0), ("depth-sft", "yes", 1.0)]
    assert [(a.model, a.said, a.score) for a in first.answers[:3]] == answers


def test_images_of_samples_are_small_and_damaged_ones_told(records, monkeypatch):
    said, scores = answered({"unpruned": range(40), "depth": range(38)})
    found = make_samples(records, RUNS[:1], said, scores, max_pixels=10**6)
    broken = [sample for sample in found.samples if sample.kind == "broken"]
    assert [sample.id for sample in broken] == ["r38", "r39"]
    assert "not a readable image" in broken[0].images[0].problem
    (shown,) = next(s for s in found.samples if s.kind == "other").images
    assert (shown.width, shown.height) == (224, 56)
    content = base64.b64decode(shown.uri.removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(content)).size == (224, 56)
    found = make_samples(records, RUNS[:1], said, scores, max_pixels=39_999)
    assert all("exceeds the limit of 39999 pixels" in s.images[0].problem for s in found.samples[2:4])
    monkeypatch.setattr(samples, "MOST_IMAGE_BYTES", 10)
    found = make_samples(records, RUNS[:1], *answered({"unpruned": range(40), "depth": ()}), max_pixels=10**6)
    assert [sample.images[0].uri is not None for sample in found.samples] == [True, False, False]


# --- `speed.json` and `bench.json`: medians, and which speed-ups are shown, with which interval ----------------------

STEADY = (100.0, 98.0, 103.0)


def test_medians_over_rounds():
    found, noisy = SPEED.medians(), NOISY.medians()["depth"]
    assert found["depth"] == found["depth-sft"]
    assert found[""] == MedianSpeed(prefill=100.0, decode=20.0, first_token=0.2, peak_bytes=1 << 20)
    assert replace(SPEED, pairs=[]).medians() == {}
    assert (noisy.decode_speedup.ratio, noisy.prefill_speedup.ratio) == pytest.approx((5.1, 7.22))
    assert noisy.decode_speedup.limit == noisy.prefill_speedup.limit == 10 / 6  # those of the pair
    assert BENCH.decode_rates() == {800: 20.0, 1000: 20.0}
    other = replace(BENCH.sides[1], weights="Q4_0")  # rates are of the first engine and type of weights
    assert replace(BENCH, sides=[BENCH.sides[0], other]).decode_rates() == {1000: 20.0}


def test_ratio_of_medians_with_its_interval():
    """In pairs of rounds 1.5, 1.52 and 1.5 times; a machine that slows down for both models widens no interval."""
    found = speedup(STEADY, (150.0, 149.0, 155.0))
    assert found.measurable
    assert (found.ratio, found.spread) == (1.5, pytest.approx(0.05))
    assert 1.49 < found.low <= 1.5 <= found.high < 1.53
    assert (str(found), found.show(interval=False)) == (f"1.50 ({found.low:.2f} to {found.high:.2f})", "1.50")
    slower = np.linspace(1.0, 0.9, 9)
    drifting = speedup(100 * slower, 200 * slower)
    assert (drifting.low, drifting.high) == pytest.approx((2.0, 2.0))
    assert speedup(STEADY, (168.0, 163.0, 172.0), 10 / 6).measurable  # its interval reaches the limit


def test_the_interval_covers_the_ratio():
    random = np.random.default_rng(0)
    rounds = np.exp(0.1 * random.normal(size=(300, 2, 15)))
    found = [speedup(before, 2 * after) for before, after in rounds]
    assert np.mean([one.low <= 2 <= one.high for one in found]) > 0.9


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        # 6 of 10 layers on a busy machine: "decodes 5.10 times as fast".
        (speedup((10.0, 4.0, 18.6), (51.0, 50.0, 51.5), 10 / 6), " on this busy machine (repeats differ by 146 %)"),
        (speedup(STEADY, (120.0, 119.0, 120.5)), " (repeats differ by 5 %)"),
        (speedup(STEADY, (510.0, 509.0, 511.0), 10 / 6), " (repeats differ by 5 %; FLOPs or bytes allow 1.67)"),
        (speedup((100.0,), (150.0,)), " (the spread of repeats is unknown)"),
        (msgspec.json.decode(b"[5.1, 2.0, 9.0]", type=SpeedUp), " (the spread of repeats is unknown)"),  # of old files
    ],
)
def test_what_is_not_measurable(found, reason):
    assert not found.measurable
    assert (str(found), found.show()) == (f"not measurable{reason}", "not measurable")
