"""Figures: models apart from each other, what goes marked, and losses."""

import numpy as np
import pytest
from msgspec.structs import replace

from vlmprune_jax.core.prune import Scores
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.comparison_plots import PARAMETERS, pareto_figure
from vlmprune_jax.run.workdir.groups import comparison_of_run
from vlmprune_jax.run.workdir.result import read_result


def test_figures_separate_models(several):
    """99.0, 99.8 and 99.9 % are apart on an axis that has 26 % as well."""
    result = read_result(several)
    runs = [
        replace(run, evaluation=replace(run.evaluation, mean_of_ratios=kept))
        for run, kept in zip(result.runs, (99.8, 99.9, 26.0), strict=True)
    ]
    comparison = comparison_of_run(replace(result, runs=runs))
    (points,) = pareto_figure(comparison.groups, [result.teacher], [PARAMETERS]).axes
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
    figure = plots.width_importance_figure("t", heads, {0: ({1}, 6, 12), 1: ({0, 1}, 12, 12)})
    crosses = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata())]
    assert crosses == [(0, 0)]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [50.0, 100.0]


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
