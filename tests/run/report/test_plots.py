"""Figures: lines, colours and Pareto fronts, models apart from each other, what goes marked, losses, names."""

import dataclasses

import numpy as np
import pytest
from matplotlib import font_manager
from msgspec.structs import replace
from sweep_cases import some_runs, with_models, write_sweep

from vlmprune_jax.core.prune import Scores
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.figures import PARAMETERS, series_of
from vlmprune_jax.run.workdir.groups import comparison_of_run, groups_of
from vlmprune_jax.run.workdir.result import read_result


def test_figures_separate_models(several):
    """99.0, 99.8 and 99.9 % are apart on an axis that has 26 % as well."""
    result = read_result(several)
    runs = [
        replace(run, evaluation=replace(run.evaluation, mean_of_ratios=kept))
        for run, kept in zip(result.runs, (99.8, 99.9, 26.0), strict=True)
    ]
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


def test_lines_are_of_what_differs(tmp_path):
    """A learning rate that some share a place with makes lines of its own; criteria too."""
    sweep = write_sweep(tmp_path, ("docs",))
    groups = groups_of(sweep)
    assert set(series_of(groups).values()) == {"depth", "width"}
    rates = {"0.05": "1e-3"}
    labelled = [
        replace(one, labels={**one.labels, "rate": rates.get(one.labels.get("fraction"), "1e-4")})
        for one in sweep.models
    ]
    sweep = with_models(
        replace(sweep, models=labelled), data_fraction=lambda one: 0.05 if one.found.data_fraction else 0.0
    )
    assert set(series_of(groups_of(sweep)).values()) >= {"depth, 0.05, 1e-3", "width, 0.2, 1e-4"}
    sweep = with_models(sweep, criterion=lambda one: "l1" if one.labels["ratio"] == "0.1" else "l2")
    assert any(name.startswith("width, l2") for name in series_of(groups_of(sweep)).values())


def test_ways(tmp_path):
    sweep = write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:2])
    none, sft = groups_of(sweep)
    assert (none.recovery, sft.recovery) == ("without recovery", "SFT")
    recovery = {"none": "reconstructed", "sft": "sft"}
    sweep = with_models(sweep, reconstruct="least_squares", recovery=lambda one: recovery[one.found.recovery])
    none, sft = groups_of(sweep)
    assert (none.recovery, sft.recovery) == ("reconstructed", "reconstructed + SFT")


def test_the_front_is_what_nothing_beats(tmp_path):
    groups = groups_of(write_sweep(tmp_path, ("docs",)))
    places = [group.mean("parameters") for group in groups]
    front = plots._front([(place, place, place) for place in places], groups, rising=False)
    assert front == sorted(front)
    worth = {(x, group.retained[0]) for x, group in zip(places, groups, strict=True)}
    for x, value in worth:
        beaten = any(one <= x and kept >= value and (one, kept) != (x, value) for one, kept in worth)
        assert ((x, value) in front) is not beaten
    assert len(front) == 2


def test_the_front_ignores_differences_inside_the_range_of_speeds(tmp_path):
    """1.81 times is not faster than 1.54 where rounds range from 1.4 to 1.9; it is where they range by 0.1."""
    groups = groups_of(write_sweep(tmp_path, ("docs",), runs=some_runs(seeds=(1,))[:3]))
    groups = [
        dataclasses.replace(group, retained=(kept, kept, kept))
        for group, kept in zip(groups, (90.0, 99.0, 95.0), strict=True)
    ]
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
