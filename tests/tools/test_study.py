"""What a sweep says of the paper's insights: verdicts, pairs and intervals of sweeps made by hand."""

import dataclasses
import math
import re

import PIL.Image
import pytest
import study as study_script
from expert_study import summary
from insights import conclude
from msgspec.structs import replace
from repository import ROOT
from study_cases import changed, row, rows, sweep, write_sweep
from study_guide import evidence_of
from study_page import BEGIN, END, as_markdown
from sweep_points import points_of

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.planning.guide import FILE, read_guide
from vlmprune_jax.run.workdir.result import ModelEvaluation


def concluded(models):
    """Number of an insight ("2a") -> what is concluded of it."""
    return {one.claim.split(".")[0]: one for one in conclude(points_of(sweep(models)))}


def verdicts(conclusion):
    return [one.verdict for one in conclusion.comparisons]


def test_some_insights_hold_and_some_do_not():
    found = concluded(rows())
    assert {name: one.verdict for name, one in found.items()} == {
        "1": "by setting",
        "2a": "holds",
        "2b": "does not hold",
        "3": "holds",
        "4a": "by setting",
        "4b": "undecided",  # SFT is ahead of it with two seeds of three
        "4c": "undecided",  # no runs
        "5a": "by setting",
        "5b": "holds",
        "6a": "equal within 1 point",
        "6b": "equal within 1 point",
        "7": "undecided",
    }
    assert verdicts(found["5a"]) == ["holds", "holds", "does not hold", "does not hold"]
    assert verdicts(found["1"]) == ["does not hold", "holds"]
    assert [round(one.effect.mean, 6) for one in found["1"].comparisons] == [-10.0, 20.0]
    assert {one.pairs for one in found["1"].comparisons} == {3}
    assert (found["1"].effect.mean, found["1"].effect.seeds) == (pytest.approx(5.0), 3)
    replaced = {one.setting: round(one.effect.mean, 6) for one in found["6a"].comparisons}
    assert replaced["width 45 %, 5 % of the data"] == 0.0  # half-way exactly
    assert replaced["width 45 %, 100 % of the data"] == -0.5
    assert [round(one.effect.mean, 6) for one in found["6b"].comparisons] == [0.5] * 4
    assert found["3"].comparisons[0].setting == "depth 15 %, 5 % of the data"


def test_retention_of_the_control_is_a_claim_of_its_own():
    models = [row("depth", 0.15, "sft_l2", 99.0, data=0.05, seed=seed) for seed in range(4)]
    for seed, model in enumerate(models):
        control = ModelEvaluation(scores={}, mean_of_ratios=97.0 + 0.1 * seed)
        models[seed] = changed(model, evaluation=replace(model.found.evaluation, control=control))
    found = concluded(models)["7"]
    assert (found.verdict, found.effect.mean) == ("does not hold", pytest.approx(97.15))
    (one, *_) = evidence_of("mine", points_of(sweep(models)))
    assert (one.retained, one.of_control) == (99.0, 97.15)


def test_rows_for_the_guide():
    found = evidence_of("mine", points_of(sweep(rows())))
    (one,) = [
        r for r in found if (r.method, r.recovery, r.decoder_ratio, r.data_fraction) == ("width", "none", 0.16, 0)
    ]
    assert (one.source, one.model, one.retained, one.seeds) == ("mine", "teacher, 1.06 M", 80.1, 3)
    assert one.parameters == 1_060_000
    assert one.interval == pytest.approx((80.1 - math.hypot(0.248, 2), 80.1 + math.hypot(0.248, 2)), abs=0.005)
    (alone,) = evidence_of("mine", points_of(sweep([row("depth", 0.15, "none", 50.0)])))
    assert (alone.interval, alone.seeds) == ((48.0, 52.0), 1)
    (other,) = evidence_of("mine", points_of(sweep([row("depth", 0.15, "none", 50.0, model="runs/2/teacher")])))
    assert other.model == "teacher, 135 M"


# --- the command -----------------------------------------------------------------------------------------------------


ROW = "|1|15 %|3|-10.00 (-10.00 to -10.00)|<0.001|1.000|does not hold|\n"


@pytest.fixture
def study(tmp_path):
    return write_sweep(tmp_path / "sweep", rows())


def failing(capsys, *argv):
    assert main(argv, study_script) == 2
    return capsys.readouterr().err


def test_a_page_and_a_guide_take_rows(tmp_path, study, capsys):
    page, guide = tmp_path / "study.md", tmp_path / "guide.json"
    page.write_text(f"# Study\n\n{BEGIN}\noutdated\n\n### other\n\nstays\n\n{END}\n\nafter\n")
    for _ in range(2):  # again: in place of what was there
        assert main([f"mine={study}", f"--page={page}", f"--guide={guide}"], study_script) == 0
    text = page.read_text()
    assert "![Plot of retained score (%) against removed decoder parameters (%), mine](mine.png)" in text
    with PIL.Image.open(tmp_path / "mine.png") as image:
        assert image.size[0] > 800
    assert text.startswith(f"# Study\n\n{BEGIN}\n\n### other\n\nstays\n\n### mine\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "outdated" not in text
    assert text.count("### mine") == 1
    assert (ROW in text, "|2a|15" in text) == (True, False)  # settings of claims that they decide
    ours, theirs = read_guide(guide), read_guide(FILE)
    added = [one for one in ours.evidence if one.source == "mine"]
    assert len(added) == len(evidence_of("mine", points_of(sweep(rows()))))
    assert [one for one in ours.evidence if one.source != "mine"] == list(theirs.evidence)
    assert ours.sources["mine"].vision
    assert dataclasses.replace(ours, sources={}, evidence=()) == dataclasses.replace(theirs, sources={}, evidence=())


def test_what_a_study_cannot_be(capsys, tmp_path, study):
    assert "no sweep given" in failing(capsys)
    assert "must be NAME=SWEEP_DIR" in failing(capsys, str(study))
    assert "'paper' is taken" in failing(capsys, f"paper={study}")
    assert "'a' is taken" in failing(capsys, f"a={study}", f"a={study}")
    assert "sweep.json" in failing(capsys, f"a={tmp_path / 'nowhere'}")
    (tmp_path / "page.md").write_text("# Study\n")
    assert "has no lines <!-- vlmprune study: begin -->" in failing(
        capsys, f"a={study}", f"--page={tmp_path / 'page.md'}"
    )
    (tmp_path / "guide.json").write_text("{}")
    assert "guide.json: does not have the expected content" in failing(
        capsys, f"a={study}", f"--guide={tmp_path / 'guide.json'}"
    )
    assert (tmp_path / "guide.json").read_text() == "{}"


def test_names_are_text_and_no_markup():
    evil = "a|b\n# c <img src=x> [d](http://e)"
    rows = [row("depth", 0.15, "none", 90.0, model=evil), row("depth", 0.15, evil, 90.0), row("width", 0.45, "none", 9)]
    found = sweep(rows)
    found.unpruned[evil] = found.unpruned["models/teacher"]
    found = replace(found, sets={evil: replace(found.sets["questions"], name=evil, main="perplexity", full=None)})
    for model in (*found.done, *found.unpruned.values()):
        model.evaluation.scores[evil] = {"perplexity": 3.0}
    text = as_markdown("study", found)
    assert "perplexity on a" in text
    assert not re.search(r"(?<!\\)[<\[]|^# |[^\\|\n-]\|b", text, re.M)


def test_results_of_experts_are_printed_from_their_data(capsys):
    summary(ROOT / "docs/explanation/data/study_experts.jsonl.xz")
    assert capsys.readouterr().out in (ROOT / "docs/explanation/results.md").read_text(encoding="utf-8")
