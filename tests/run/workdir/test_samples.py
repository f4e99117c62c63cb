"""Which questions are samples, and their images."""

import base64
import io

import pytest
from msgspec.structs import replace
from PIL import Image
from refusal import refused
from sample_cases import RUNS, answered, write_records

from vlmprune_jax.run.workdir import samples
from vlmprune_jax.run.workdir.artefact import read_artefact, write_artefact
from vlmprune_jax.run.workdir.samples import SAMPLES, Samples, make_samples


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
    ids = {kind: [s.id for s in found.samples if s.kind == kind] for kind in samples.KINDS}
    # repaired in both ways of pruning first, then one of each answer and image, then what is left
    assert ids["repaired"] == ["r26", "r24", "r28", "r27"]
    assert len(ids["broken"]) == 3
    assert ids["broken"][0] == "r20"  # broken in both
    assert len(ids["other"]) == 3
    assert [s.kind for s in found.samples] == [
        *["repaired"] * 4, *["broken"] * 3, *["other"] * 3
    ]  # fmt: skip
    first = found.samples[0]
    assert first.references == ["yes"]
    assert [(a.model, a.said, a.score) for a in first.answers[:3]] == [
        ("unpruned", "yes", 1.0), ("depth", "", 0.0), ("depth-sft", "yes", 1.0)
    ]  # fmt: skip


def test_images_of_samples_are_small_and_damaged_ones_told(records):
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


def test_images_of_samples_are_bounded(records, monkeypatch):
    monkeypatch.setattr(samples, "MOST_IMAGE_BYTES", 10)
    found = make_samples(records, RUNS[:1], *answered({"unpruned": range(40), "depth": ()}), max_pixels=10**6)
    assert [sample.images[0].uri is not None for sample in found.samples] == [True, False, False]


def test_pictures_from_elsewhere_are_refused(tmp_path, records):
    found = make_samples(records, RUNS[:1], *answered({"unpruned": range(40), "depth": ()}), max_pixels=10**6)
    for uri in ("https://example.org/x.png", "data:image/svg+xml;base64,aGFsbG8=", 'data:image/png;base64,a"b'):
        sample = found.samples[0]
        sample = replace(sample, images=[replace(sample.images[0], uri=uri)])
        file = Samples(sets={"questions": replace(found, samples=[sample])})
        write_artefact(tmp_path / "eval/samples.json", file)
        refused(r"samples\.json: .*run `vlmprune evaluate` again", read_artefact, tmp_path / SAMPLES, Samples)
