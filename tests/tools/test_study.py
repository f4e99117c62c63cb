"""The study: what a sweep says of the paper's insights, and the check that finds a changed number of its pages."""

import dataclasses
import math
import re
import shutil
import tarfile

import check_study
import crossed_effects
import numpy as np
import PIL.Image
import pytest
import study as study_script
from expert_study import summary
from insights import conclude
from msgspec.structs import replace
from pooling import Value, heterogeneity, pooled
from repository import ROOT
from study_cases import changed, row, rows, sweep, write_sweep
from study_guide import evidence_of
from study_page import BEGIN, END, as_markdown, read_studies, update_page
from sweep_points import points_of

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.planning.guide import FILE, read_guide
from vlmprune_jax.run.workdir.result import ModelEvaluation

DATA = ROOT / "docs/explanation/data"


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
    page, guide = tmp_path / "page.md", tmp_path / "guide.json"
    page.write_text("# Study\n")
    guide.write_text("{}")
    for argv, fact in (
        ([], "no sweep given"),
        ([study], "must be NAME=SWEEP_DIR"),
        ([f"paper={study}"], "'paper' is taken"),
        ([f"a={study}", f"a={study}"], "'a' is taken"),
        ([f"a={tmp_path / 'nowhere'}"], "sweep.json"),
        ([f"a={study}", f"--page={page}"], "has no lines <!-- vlmprune study: begin -->"),
        ([f"a={study}", f"--guide={guide}"], "guide.json: does not have the expected content"),
    ):
        assert main([*map(str, argv)], study_script) == 2
        assert fact in capsys.readouterr().err
    assert guide.read_text() == "{}"


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


# --- the check of the pages: it agrees with the script that wrote them, and finds a changed number --------------------


def test_the_pages_and_the_check_agree_and_changed_numbers_are_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "study-tables.md").write_text(f"{BEGIN}\n{END}\n")
    for archive in sorted(DATA.glob("study_*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
    studies = read_studies([f"{name}={tmp_path / name}" for name in ("study_easyvqa", "study_vlm_3")])
    update_page(tmp_path / "study-tables.md", studies)
    for name in ("study.md", "results.md"):
        shutil.copy(DATA.parent / name, tmp_path)
    monkeypatch.setattr("sys.argv", ["check_study.py", f"--pages={tmp_path}"])
    assert check_study.main() == 0
    assert "without recovery: 98.1±0.8 (12/3)" in capsys.readouterr().out
    for name, old, new in (
        ("study-tables.md", "|83.5±4.9 (12/12)|", "|83.5±4.8 (12/12)|"),
        ("study-tables.md", "0.12 (-0.25 to", "0.13 (-0.25 to"),
        ("results.md", "|57.3, 4.83|", "|57.3, 4.84|"),
    ):
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
    assert check_study.main() == 1
    differences = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    facts = ("width 45.2 % | without recovery: the page has 83.5±4.8 (12/12), the rows give 83.5±4.9", "claim | 2a",
             "50 % of attention groups | pruned")  # fmt: skip
    assert [fact in line for fact, line in zip(facts, differences, strict=True)] == [True] * 3


def test_holm_equal_effects_and_ratios_of_errors():
    """Holm multiplies by the tests that remain; what all seeds and questions agree on is certain; a geometric mean."""
    assert crossed_effects.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert crossed_effects.holm({}) == {}
    effect = crossed_effects.mean_effect([{seed: (1.0, np.ones(5)) for seed in range(3)}])
    assert (effect.mean, effect.p_differs(1.0)) == (1.0, 1.0)
    assert effect.p_differs(0.0) < 1e-6
    assert crossed_effects.mean_effect([{1: (1.0, None)}]) is None
    ratio, low, high, p = crossed_effects.error_ratio([1, 4], [4, 1])
    assert (ratio, p) == pytest.approx((1.0, 1.0))
    assert low < 1 < high
    assert crossed_effects.error_ratio([1, 1], [4, 4])[0] == pytest.approx(1.5 / 4.5)


def test_sign_flips_by_hand():
    """Six seeds above zero are one of 64 patterns, and as sure below; question noise that explains them decides."""

    def effect(values, questions=None):
        return crossed_effects.mean_effect([{seed: (value, questions) for seed, value in enumerate(values)}])

    above = effect([1.5, 4.8, 1.85, 17.35, 0.2, 7.65])
    assert above.p_signs(0.0) == 2 / 64
    assert above.p_differs(0.0) > 0.05
    assert above.p_signs(above.mean) > 0.9
    assert effect([1.0, 2.0, 4.0, -0.5]).p_signs(0.0) == 4 / 16  # no less: -0.5 alone is flipped
    noisy = np.random.default_rng(0).normal(size=50)
    noisy += 0.1 - noisy.mean()  # error over questions 0.14
    assert effect([0.1] * 5 + [0.11], noisy).p_signs(0.0) > 0.4


def cell(values, questions=None):
    return [Value(seed, value, questions) for seed, value in enumerate(values)]


def test_one_setting_is_students_t_over_seeds():
    found = pooled({"a": cell([1.0, 2.0, 4.0])})
    assert (found.mean, *found.interval) == pytest.approx(interval_of_mean([1.0, 2.0, 4.0]))
    assert found.seeds == 3
    assert pooled({"a": cell([1.0])}).interval is None
    assert pooled({"a": cell([1.0])}).p_differs(0) == 1.0


def test_the_interval_covers_other_seeds_and_other_questions():
    """True effect 1; each draw has its own seeds and questions. Seeds alone would cover too little."""
    draw, inside, too_small = np.random.default_rng(0), 0, 0
    for _ in range(400):
        of_questions, of_seeds = draw.normal(size=50), draw.normal(scale=0.2, size=4)
        rows = [1 + seed + of_questions + draw.normal(scale=0.1, size=50) for seed in of_seeds]
        values = [Value(seed, float(row.mean()), row) for seed, row in enumerate(rows)]
        low, high = pooled({"a": values}).interval
        inside += low < 1 < high
        low, high = pooled({"a": [Value(one.seed, one.value) for one in values]}).interval
        too_small += low < 1 < high
    assert 0.93 < inside / 400 < 0.99
    assert too_small / 400 < 0.92


def test_heterogeneity_is_found_where_it_is():
    """Under one effect and ten times the noise in one setting, Welch's test is right in 95 % of draws."""
    draw, wrong, right = np.random.default_rng(0), 0, 0
    for _ in range(400):
        cells = [cell(draw.normal(scale=10.0 if place == 7 else 1.0, size=6)) for place in range(8)]
        wrong += heterogeneity([pooled({"a": values}) for values in cells]).p_value < 0.05
        cells[0] = [Value(one.seed, one.value + 3.0) for one in cells[0]]
        right += heterogeneity([pooled({"a": values}) for values in cells]).p_value < 0.05
    assert 0.01 < wrong / 400 < 0.08
    assert right / 400 > 0.9
    found = heterogeneity([pooled({"a": cell(values)}) for values in ([1.0, 3.0], [4.0, 6.0])])
    assert (found.q, found.freedom, found.i_squared) == (pytest.approx(4.5), 1, pytest.approx(100 * 3.5 / 4.5))
    assert heterogeneity([pooled({"a": cell([1.0])})] * 2) is None
