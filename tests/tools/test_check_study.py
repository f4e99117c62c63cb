"""The check of the study: it agrees with the script that wrote the page, and finds a changed number."""

import importlib
import shutil
import sys
import tarfile

import check_study
import crossed_effects
import numpy as np
import pytest
from pooling import Value, heterogeneity, pooled
from repository import ROOT
from study_page import BEGIN, END, read_studies, update_page

from vlmprune_jax.run.evaluation.statistics import interval_of_mean

DATA = ROOT / "docs/explanation/data"


@pytest.fixture
def pages(tmp_path):
    """A folder with study-tables.md as tools/study.py writes it from the rows, and the other two pages."""
    path = tmp_path / "study-tables.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    for archive in sorted(DATA.glob("study_*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
    update_page(path, read_studies([f"{name}={tmp_path / name}" for name in ("study_easyvqa", "study_vlm_3")]))
    for name in ("study.md", "results.md"):
        shutil.copy(DATA.parent / name, tmp_path)
    return tmp_path


def check(monkeypatch, pages):
    monkeypatch.setattr("sys.argv", ["check_study.py", f"--pages={pages}"])
    return check_study.main()


def change(page, old, new):
    text = page.read_text()
    assert old in text
    page.write_text(text.replace(old, new))


def test_the_pages_and_the_check_agree_and_changed_numbers_are_found(pages, monkeypatch, capsys):
    assert check(monkeypatch, pages) == 0
    assert "without recovery: 98.1±0.8 (12/3)" in capsys.readouterr().out
    change(pages / "study-tables.md", "|83.5±4.9 (12/12)|", "|83.5±4.8 (12/12)|")
    change(pages / "study-tables.md", "0.12 (-0.25 to", "0.13 (-0.25 to")
    change(pages / "results.md", "|57.3, 4.83|", "|57.3, 4.84|")
    assert check(monkeypatch, pages) == 1
    differences = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert len(differences) == 3
    assert (
        "width 45.2 % | without recovery: the page has 83.5±4.8 (12/12), the rows give 83.5±4.9 (12/12)"
        in differences[0]
    )
    assert "claim | 2a" in differences[1]
    assert "50 % of attention groups | pruned" in differences[2]


def test_holm_multiplies_by_the_tests_that_remain():
    assert crossed_effects.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert crossed_effects.holm({}) == {}


def test_an_effect_equal_for_all_seeds_and_questions_is_certain():
    effect = crossed_effects.mean_effect([{seed: (1.0, np.ones(5)) for seed in range(3)}])
    assert (effect.mean, effect.p_differs(1.0)) == (1.0, 1.0)
    assert effect.p_differs(0.0) < 1e-6
    assert crossed_effects.mean_effect([{1: (1.0, None)}]) is None


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


def test_a_ratio_of_errors_is_the_geometric_mean_over_seeds():
    ratio, low, high, p = crossed_effects.error_ratio([1, 4], [4, 1])
    assert ratio == pytest.approx(1.0)
    assert low < 1 < high
    assert p == pytest.approx(1.0)
    assert crossed_effects.error_ratio([1, 1], [4, 4])[0] == pytest.approx(1.5 / 4.5)


# --- effects over seeds and questions --------------------------------------------------------------------------------


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


# --- share of the vision tower ---------------------------------------------------------------------------------------


@pytest.fixture
def tower_share(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("tower_share")
    for name in ("tower_share", "models", "plan"):
        sys.modules.pop(name, None)


def test_the_study_has_the_table_that_the_script_prints(tower_share, capsys):
    tower_share.main()
    table = capsys.readouterr().out
    assert table in (ROOT / "docs/explanation/study.md").read_text(encoding="utf-8")
    assert "|LLaVA-1.5-7B|655|4|1.40|1.01|" in table


def test_gains_by_hand(tower_share):
    assert tower_share.gain(1.0, 0.5) == 2.0
    assert tower_share.gain(0.0) == 1.0
    assert tower_share.gain(0.5, 0.4) == pytest.approx(1 / 0.8)
