"""Samples as the page shows them."""

import html
import re

import pytest
from answer_cases import RUNS, answered, write_records
from report_cases import write_answers, write_workdir

from vlmprune_jax.run.report.build import build_report, shown_samples
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.samples import Samples, make_samples


@pytest.fixture
def workdir(tmp_path):
    write_workdir(tmp_path)
    write_answers(tmp_path)
    return tmp_path


@pytest.fixture
def records(tmp_path):
    return write_records(tmp_path)


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


def test_scores_between_right_and_wrong(records):
    scores = {"unpruned": [0.9] * 40, "depth": [0.3] * 20 + [None] * 20, "depth-sft": [0.6] * 40}
    found = make_samples(records, RUNS[:2], {name: ["x"] * 40 for name in scores}, scores, max_pixels=10**6)
    assert found.counts == {"repaired": 40, "broken": 0, "other": 0}
    labels = {"unpruned": "unpruned", "depth": "depth 30 %", "depth-sft": "depth 30 %, SFT"}
    _, answers = next(shown_samples(found, labels))[1][0]
    assert answers == [
        ("x", "right", "unpruned; depth 30 %, SFT"),
        ("x", "wrong", "depth 30 %"),
    ]
    del labels["depth"]  # a model that another one equals
    assert [verdict for _, verdict, _ in next(shown_samples(found, labels))[1][0][1]] == ["right"]
