"""The comparison of a sweep: what its page and table say, what is drawn together, how figures look, and damage."""

import dataclasses
import functools
import html
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager
from msgspec.structs import replace
from sweep_cases import METRICS, image_runs, with_models, write_sweep

from vlmprune_jax.core.prune import Scores
from vlmprune_jax.run.report import figures, plots
from vlmprune_jax.run.report.build import build_sweep_page
from vlmprune_jax.run.report.figures import PARAMETERS, series_of
from vlmprune_jax.run.report.tables import tables_of
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.groups import comparison_of_run, comparison_of_sweep, groups_of
from vlmprune_jax.run.workdir.result import read_result
from vlmprune_jax.run.workdir.speed import SpeedUp
from vlmprune_jax.run.workdir.sweep import as_csv


@functools.cache
def swept(*sets, seeds=(1,)):
    """A sweep of depth and width at two ratios, without training and with two shares of the data, on these sets."""
    with tempfile.TemporaryDirectory() as folder:
        return write_sweep(Path(folder), sets or tuple(METRICS), seeds=seeds)


def page_of(folder, sweep):
    write_artefact(folder / "sweep.json", sweep)
    return build_sweep_page(folder).read_text()


def plain(page):
    return html.unescape(page).replace("\u00a0", " ")


def tables_of_sweep(sweep):
    return tables_of(comparison_of_sweep(sweep), runs=True)


@pytest.mark.parametrize("sets", [("docs",), ()])
def test_page(tmp_path, sets):
    page = page_of(tmp_path, swept(*sets, seeds=(1, 2)))
    # costs, speeds; over the ratio of 0, 5 and 20 % of the data; over the data of depth and of width
    assert page.count("<svg") == page.count('role="img" aria-label="') == 7
    outside = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!#)(\w+:[^"\')]+)', page)
    assert [link for link in outside if not link.startswith("data:") and "www.w3.org" not in link] == []
    lead = plain(page)
    assert "Best of 12 models: depth 10 %, SFT, 5 % of the data; retained" in lead
    assert "method=depth,ratio=0.1,recovery=sft,fraction=0.05" in page
    assert "<dt>decoding speed-up</dt><dd>1.33 (1.28 to 1.39)</dd>" in lead
    assert "20 of 20 runs are done: 20 models." in page
    assert list(tmp_path.glob(".*")) == []


def test_speeds_of_a_busy_machine_are_not_shown(tmp_path):
    """Of rounds that differ by 146 % no ratio is in table, sentences, figures and CSV."""
    busy = SpeedUp(5.1, 4.77, 5.43, 1.46)
    sweep = with_models(swept(), speed=lambda one: replace(one.found.speed, decode_speedup=busy))
    page = page_of(tmp_path, sweep).replace("\u00a0", " ")
    reason = "not measurable on this busy machine (repeats differ by 146 %)"
    assert f"; decoding speed-up {reason}; " in page
    table, *_ = tables_of_sweep(sweep)
    assert {row[table.header.index("decoding, x")] for row in table.rows} == {"1.00", "not measurable"}
    assert not re.search(r"\b(5\.10?|4\.77|5\.43)\b", f"{table.rows}{as_csv(sweep)}")
    assert page.count("<svg") == page_of(tmp_path, swept()).count("<svg") - 1


def test_the_table_of_terminal_and_page():
    """Groups of seeds have one row with their spread; what a person looks for comes first."""
    table, *_ = tables_of_sweep(swept(seeds=(1, 2)))
    first = ("model", "retained, %", "of control, %", "size, %", "paper avg, %", "decoding, x")
    assert table.header[:6] == first
    seeds = table.header.index("seeds")
    assert len(table.rows) == 13
    assert table.rows[0][:4] == ("unpruned", "100.00", "", "100.0")
    assert (table.rows[1][0], table.rows[1][2], table.rows[1][seeds]) == ("depth 10 %", "", "1")
    assert (table.rows[2][0], table.rows[2][seeds]) == ("depth 10 %, SFT, 5 % of the data", "2")
    retained, low, high = map(float, re.fullmatch(r"(.*) \((.*) to (.*)\)", table.rows[2][1]).groups())
    assert low < retained < high
    assert 0 < float(table.rows[2][2].split()[0]) < retained  # the control is better than the unpruned model
    assert "(95 % intervals in brackets)" in table.title


def test_the_best_is_told_as_in_the_report_of_one_run(tmp_path):
    """Intervals are over questions where there is one seed."""
    sweep = swept("docs")
    kept = {entry.name: 100 - 0.42 * number for number, entry in enumerate(sweep.models)}

    def measured(entry):
        share = kept[entry.name]
        changes = {"retained": {"docs": share}, "mean_of_ratios": share, "control": None}
        return replace(entry.found.evaluation, **changes, retained_interval={"docs": (share - 1, share + 0.5)})

    sweep = with_models(sweep, evaluation=measured)
    page = plain(page_of(tmp_path, sweep))
    assert "<dt>retained</dt><dd>100.00 % (99.0 to 100.5)</dd>" in page
    assert re.search(r'<tr class="best">\s*<th scope="row">depth', page)
    (table,) = tables_of_sweep(sweep)
    assert table.rows[2][table.header.index("retained, %")] == "99.58 (98.6 to 100.1)"


def test_accuracy_over_the_tokens_per_image(tmp_path):
    """Each limit has its own unpruned model."""
    sweep = write_sweep(tmp_path, runs=image_runs())
    assert [one.image_tokens for one in sweep.done] == [70, 140, 280]
    assert sorted(sweep.unpruned) == sorted(f" at {one} tokens per image" for one in (70, 140, 280))
    unpruned = [row[0] for row in tables_of_sweep(sweep)[0].rows[:3]]
    assert unpruned == [f"unpruned, {tokens} image tokens" for tokens in (280, 140, 70)]
    assert "depth 10 %, 140 image tokens" in plain(build_sweep_page(tmp_path).read_text())
    assert "image_tokens" in as_csv(sweep).splitlines()[0].split(",")
    one = replace(sweep, unpruned={" at 70 tokens per image": sweep.unpruned[" at 70 tokens per image"]})
    assert "there are no results of ' at 140 tokens per image'" in one.problems(tmp_path)


@pytest.mark.parametrize(("seeds", "drawn"), [(2, False), (3, True)])
def test_intervals_are_drawn_from_three_seeds_on(tmp_path, monkeypatch, seeds, drawn):
    found, figure_of = [], figures.figure_of
    monkeypatch.setattr(figures, "figure_of", lambda figure, *of: found.append(figure) or figure_of(figure, *of))
    write_sweep(tmp_path, ("docs",), runs=image_runs((70, 140), range(seeds)))
    build_sweep_page(tmp_path)
    lines = [line.get_xdata() for line in found[0].axes[0].lines]
    bars = [line for line in lines if len(line) == 2 and len({*line}) == 1]
    assert len(bars) == 2 * drawn  # a bar per limit


@pytest.mark.usefixtures("drawn")
def test_names_of_anybody_are_text(tmp_path):
    write_artefact(tmp_path / "sweep.json", swept("docs"))
    found = (tmp_path / "sweep.json").read_text()
    found = found.replace('"sft"', json.dumps("<b>$x^</b>\x1b[2J")).replace("made_up.py", "<img src=http://x>")
    (tmp_path / "sweep.json").write_text(found.replace("method=depth", "<script>alert(1)</script>"))
    page = build_sweep_page(tmp_path).read_text()
    assert not [mark for mark in ("<script>alert", "<img", "<b>", "\x1b") if mark in page]


def test_failed_and_pending_runs_are_told(tmp_path):
    models = [*swept("docs").models]
    for place, error in enumerate(("no <such> thing", None)):
        models[place] = replace(models[place], found=None, error=error)
    sweep = replace(swept("docs"), models=models)
    page = page_of(tmp_path, sweep)
    assert "10 of 12 runs are done (1 failed, 1 pending): 10 models." in page
    assert "no &lt;such&gt; thing" in page
    lines = as_csv(sweep).splitlines()
    assert len(lines) == 13
    assert ",failed,no <such> thing," in lines[1]


@pytest.mark.usefixtures("drawn")
def test_models_of_which_nothing_can_be_said(tmp_path):
    """The unpruned model scores 0 where these have no share of it, or one that no axis has a place for."""
    sweep = swept("docs")
    values = {sweep.models[0].name: None, sweep.models[1].name: 1e200}

    def averaged(one):
        return replace(one.found.evaluation, mean_of_ratios=values.get(one.name, one.found.evaluation.mean_of_ratios))

    page_of(tmp_path, with_models(sweep, evaluation=averaged))
    values = dict.fromkeys(one.name for one in sweep.models)
    page = page_of(tmp_path, with_models(sweep, evaluation=averaged))
    assert "<svg" not in page
    assert "method=width,ratio=0.3" in page


# --- figures of sweeps and of one run ---------------------------------------------------------------------------------


def test_figures_separate_models(several):
    """99.0, 99.8 and 99.9 % are apart on an axis that has 26 % as well."""
    result = read_result(several)
    evaluations = [replace(result.best_run.evaluation, mean_of_ratios=kept) for kept in (99.8, 99.9, 26.0)]
    runs = [replace(run, evaluation=of) for run, of in zip(result.runs, evaluations, strict=True)]
    comparison = comparison_of_run(replace(result, runs=runs))
    (points,) = plots.pareto_figure([*comparison.unpruned.values(), *comparison.groups], [PARAMETERS]).axes
    places = [points.transData.transform((1.0, value))[1] for value in (99.0, 99.8, 99.9, 100.0)]
    height = points.bbox.height
    assert min(np.diff(places)) > 0.04 * height
    assert points.get_ylim()[0] < 26 < 100 < points.get_ylim()[1]


def test_importance_figures_mark_what_goes(workdir):
    scores = Scores.load(workdir / "depth" / "scores.npz")
    figure = plots.layer_importance_figure("t", scores.layers, [4, 3])
    kept, removed = figure.axes[0].containers
    assert [round(bar.get_center()[0]) for bar in removed] == [3, 4]
    assert [bar.get_height() for bar in removed] == pytest.approx([0.2, 0.1])
    assert len(kept) == 3
    heads = [np.array([1.0, 2.0]), np.array([4.0, 1.0])]
    figure = plots.unit_importance_figure("t", heads, {0: {1}, 1: {0, 1}}, "attention head")
    crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata())]
    assert crosses == [(0, 0)]


def test_loss_figure():
    titles = {"ce": "cross-entropy", "l2": "hidden states", "mine": "of my own"}
    assert plots.loss_figure({"a": [{"step": 1, "grad_norm": 2.0}]}, titles) is None
    one, two = [{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}], [{"step": 1, "mine": 1.0}]
    figure = plots.loss_figure({"a": one, "b": two}, titles)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "cross-entropy, training batches",
        "of my own, training batches",
    ]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [2.0, 1.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_lines_are_of_what_differs():
    """A learning rate that some share a place with makes lines of its own; criteria too."""
    sweep = swept("docs")
    assert set(series_of(groups_of(sweep)).values()) == {"depth", "width"}
    rates = {"0.05": "1e-3"}
    labels = [{**one.labels, "rate": rates.get(one.labels.get("fraction"), "1e-4")} for one in sweep.models]
    labelled = [replace(one, labels=of) for one, of in zip(sweep.models, labels, strict=True)]
    sweep = with_models(replace(sweep, models=labelled), data_fraction=lambda one: 0.05 * (one.found.data_fraction > 0))
    assert set(series_of(groups_of(sweep)).values()) >= {"depth, 0.05, 1e-3", "width, 0.2, 1e-4"}
    sweep = with_models(sweep, criterion=lambda one: "l1" if one.labels["ratio"] == "0.1" else "l2")
    assert any(name.startswith("width, l2") for name in series_of(groups_of(sweep)).values())
    sweep = replace(swept("docs"), models=swept("docs").models[:2])
    assert [group.recovery for group in groups_of(sweep)] == ["without recovery", "SFT"]
    recovery = {"none": "reconstructed", "sft": "sft"}
    sweep = with_models(sweep, reconstruct="least_squares", recovery=lambda one: recovery[one.found.recovery])
    assert [group.recovery for group in groups_of(sweep)] == ["reconstructed", "reconstructed + SFT"]


def test_the_front_is_what_nothing_beats():
    groups = groups_of(swept("docs", seeds=(1, 2)))
    places = [group.mean("parameters") for group in groups]
    front = plots._front([(place, place, place) for place in places], groups, rising=False)
    assert front == sorted(front)
    worth = {(x, group.retained[0]) for x, group in zip(places, groups, strict=True)}
    for x, value in worth:
        beaten = any(one <= x and kept >= value and (one, kept) != (x, value) for one, kept in worth)
        assert ((x, value) in front) is not beaten
    assert len(front) == 2


def test_the_front_ignores_differences_inside_the_range_of_speeds():
    """1.81 times is not faster than 1.54 where rounds range from 1.4 to 1.9; it is where they range by 0.1."""
    groups = groups_of(replace(swept("docs"), models=swept("docs").models[:3]))
    kept = [(value, value, value) for value in (90.0, 99.0, 95.0)]
    groups = [dataclasses.replace(group, retained=of) for group, of in zip(groups, kept, strict=True)]
    noisy = [(1.81, 1.4, 1.9), (1.54, 1.5, 1.6), (1.48, 1.4, 1.5)]
    assert plots._front(noisy, groups, rising=True) == [(1.54, 99.0)]
    sure = [(1.81, 1.8, 1.9), (1.54, 1.5, 1.6), (1.48, 1.4, 1.5)]
    assert plots._front(sure, groups, rising=True) == [(1.81, 90.0), (1.54, 99.0)]


def test_colours_repeat_with_other_dashes_and_markers():
    styles = plots._styles(["without recovery", *"abcdefgh"])
    assert styles["a"]["color"] == styles["g"]["color"] == plots.COLOURS[0]
    assert len({tuple(style.values()) for style in styles.values()}) == 9
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 9  # a single point has no dashes


def test_letters_that_no_font_has(monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if font.name == plots._FONT]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    plots._font_of.cache_clear()
    assert plots.legible("é中") == "é\\u4e2d"
    assert plots.legible("$a$" + "b" * 100) == r"\$a\$" + "b" * 27 + "..." + "b" * 7
    plots._font_of.cache_clear()
