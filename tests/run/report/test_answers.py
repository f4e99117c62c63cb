"""Significance of differences between models, question by question."""

import json

import pytest
from msgspec.structs import replace
from report_cases import write_answers, write_several, write_workdir

from vlmprune_jax.run.report.answers import comparison_section, length_section
from vlmprune_jax.run.workdir.result import read_result


@pytest.fixture
def workdir(tmp_path):
    write_workdir(tmp_path)
    write_answers(tmp_path)
    return tmp_path


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


def test_length_of_answers(workdir):
    for name, length in (("eval/teacher.json", 2.0), ("width/eval/pruned.json", 3.0)):
        path = workdir / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "mean_generated_tokens": length}))
    (section,) = length_section(workdir, read_result(workdir))
    (table,) = section.tables
    assert table.rows == (("unpruned", "2.00", "1.00"), ("width 30 %", "3.00", "1.50"))


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
