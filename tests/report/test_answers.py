"""What models answered question by question: tests between them, samples with images, and what a page shows of both."""

import base64
import html
import io
import json
import re

import pytest
from msgspec.structs import replace
from PIL import Image
from report_cases import FACTS, evaluated, write_answers, write_several, write_workdir

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.report.answers import comparison_section
from vlmprune_jax.report.build import build_report
from vlmprune_jax.report.samples import shown_samples
from vlmprune_jax.workdir import samples
from vlmprune_jax.workdir.artefact import write_artefact
from vlmprune_jax.workdir.result import Run, compare, read_result
from vlmprune_jax.workdir.samples import Samples, make_samples

SCORES = {"questions": evaluated(0.8)}
RUNS = [
    Run(**{**FACTS, "name": name, "plan": plan, "recovery": recovery}, evaluation=compare(SCORES, SCORES))
    for name, plan, recovery in (
        ("depth", "d", "none"),
        ("depth-sft", "d", "sft"),
        ("width", "w", "none"),
        ("width-reconstructed", "w", "reconstructed"),
    )
]


@pytest.fixture
def workdir(tmp_path):
    write_workdir(tmp_path)
    write_answers(tmp_path)
    return tmp_path


# --- is one really better? -------------------------------------------------------------------------------------------


def test_tables_of_comparisons(workdir):
    (section,) = comparison_section(workdir, read_result(workdir))
    unpruned, best = section.tables
    assert unpruned.header[:2] == ("model", "only unpruned right")
    assert unpruned.rows == (
        ("depth 30 %", "22", "0", "< 0.001", "worse", ""),
        ("depth 30 %, SFT", "2", "0", "1.000", "could be chance", "90.9 % of 22"),  # 0.5, raised for three tests
        ("width 30 %", "1", "0", "1.000", "could be chance", ""),
    )
    assert [row[0] for row in best.rows] == ["depth 30 %", "width 30 %"]
    assert best.rows[1] == ("width 30 %", "0", "1", "1.000", "could be chance")


def test_no_test_without_right_and_wrong(workdir):
    """Scores between 0 and 1, a set without answers, one of a text, and answers of other questions."""
    path = workdir / "eval/teacher.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "scores": {"accuracy": [0.5] * 40}}))
    assert list(comparison_section(workdir, read_result(workdir))) == []
    path.write_text(json.dumps(old))
    short = workdir / "width/eval/pruned.json"
    short.write_text(json.dumps({**old, "scores": {"accuracy": [1.0] * 39}}))
    (section,) = comparison_section(workdir, read_result(workdir))
    assert [row[0] for row in section.tables[0].rows] == ["depth 30 %", "depth 30 %, SFT"]
    write_several(workdir)
    assert list(comparison_section(workdir, read_result(workdir))) == []


def test_evaluations_outside_the_workdir_are_not_read(workdir, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "teacher.json").write_text("{")
    (workdir / "eval/teacher.json").unlink()
    (workdir / "eval/teacher.json").symlink_to(outside / "teacher.json")
    assert list(comparison_section(workdir, read_result(workdir))) == []
    result = read_result(workdir)
    result = replace(result, sets={"../../outside/x": result.sets["questions"]})
    assert list(comparison_section(workdir, result)) == []


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path):
    """40 questions about 20 images, of which the last is none; the answers are yes and no."""
    for number in range(19):
        Image.new("RGB", (400, 100), (number * 10, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "19.png").write_text("no image")
    return [
        Record(
            f"r{place}",
            (("human", f"<image>\nIs <b>{place} red?"), ("gpt", "yes" if place % 4 else "no")),
            (tmp_path / f"{place // 2}.png",),
        )
        for place in range(40)
    ]


def answered(right):
    """(said, scores) of models that are right on these questions."""
    scores = {name: [float(place in mine) for place in range(40)] for name, mine in right.items()}
    return {name: ["yes" if one else "" for one in of] for name, of in scores.items()}, scores


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


def test_samples_on_the_page(workdir, records):
    said, scores = answered({"unpruned": range(30), "depth": range(20), "depth-sft": range(25)})
    said["depth"][20] = "\x1b[31m<script>alert(1)</script>"
    found = make_samples(records, RUNS[:2], said, scores, max_pixels=10**6)
    write_artefact(workdir / "eval/samples.json", Samples(sets={"questions": found}))
    page = build_report(workdir).read_text()
    headings = re.findall(r"<h3>(.*?)</h3>", page)
    assert headings[:3] == [
        "Broken by pruning, repaired by recovery (5 of 40)",
        "Broken by pruning, and still wrong (5 of 40)",
        "Other questions (30 of 40)",
    ]
    assert "<script>alert" not in page
    assert html.escape("\\x1b[31m<script>alert(1)</script>") in page
    assert page.count("<img ") == 11
    assert all(re.search(r' alt="[^"]+"', tag) for tag in re.findall(r"<img [^>]*>", page))
    (workdir / "eval/samples.json").unlink()
    assert f"No questions were kept for this page: <code>vlmprune evaluate --config=FILE.py --workdir={workdir}" in (
        build_report(workdir).read_text()
    )


def test_pictures_from_elsewhere_are_refused(workdir, records):
    found = make_samples(records, RUNS[:1], *answered({"unpruned": range(40), "depth": ()}), max_pixels=10**6)
    for uri in ("https://example.org/x.png", "data:image/svg+xml;base64,aGFsbG8=", 'data:image/png;base64,a"b'):
        sample = found.samples[0]
        sample = replace(sample, images=[replace(sample.images[0], uri=uri)])
        file = Samples(sets={"questions": replace(found, samples=[sample])})
        write_artefact(workdir / "eval/samples.json", file)
        with pytest.raises(UserError, match=r"samples\.json: .*run `vlmprune evaluate` again"):
            build_report(workdir)


def test_scores_between_right_and_wrong(records):
    scores = {"unpruned": [0.9] * 40, "depth": [0.3] * 20 + [None] * 20, "depth-sft": [0.6] * 40}
    found = make_samples(records, RUNS[:2], {name: ["x"] * 40 for name in scores}, scores, max_pixels=10**6)
    assert found.counts == {"repaired": 40, "broken": 0, "other": 0}
    verdicts = [answer.verdict for answer in next(shown_samples(found, {}))[1][0].answers]
    assert verdicts == ["right", "wrong", "right"]
