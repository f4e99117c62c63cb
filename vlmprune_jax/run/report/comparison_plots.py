"""Figures that compare the models of a run or a sweep: retention by cost, speed, ratio and data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from vlmprune_jax.run.report.style import (
    COLOURS,
    INK,
    LARGEST,
    LONGEST_TITLE,
    MOST_NAMED,
    MUTED,
    UNRECOVERED,
    legend_entries,
    legible,
    marker,
    retention_axis,
    styled,
)
from vlmprune_jax.run.workdir.groups import ModelGroup
from vlmprune_jax.run.workdir.result import WITHOUT, Run, Unpruned

LABEL = "retained (%)"
MOST_PANELS = 9
LINE_LETTERS = 110  # characters per row of a legend
FEW_SEEDS = 2  # number of seeds whose interval is too uncertain to draw (with one seed, it is over questions)
BANDS = "Bands: 95 % intervals over questions, and over seeds if there are three or more."
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # dashes and markers of lines that share a colour


@dataclass(frozen=True)
class Cost:
    """One cost of models (`rising`: True if larger is better), with its figure labels.

    `range_of`: function that returns the lowest and highest measured value; None if the cost is exact.
    """

    title: str
    label: str
    value_of: Callable[[Any], float]
    rising: bool = False
    range_of: Callable[[Any], tuple[float, float]] | None = None

    def of_group(self, group: ModelGroup) -> tuple[float, float, float]:
        """Return a group's (mean, low, high) cost over its seeds."""
        values = [self.value_of(model) for model in group.models]
        mean = float(np.mean(values))
        if self.range_of is None:
            return mean, mean, mean
        lows, highs = zip(*map(self.range_of, group.models), strict=True)
        return mean, min(lows), max(highs)


REMOVED = Cost("", "parameters removed (% of the model)", lambda model: 100 * model.actual_ratio)
DATA = Cost("", "data trained on (%)", lambda model: 100 * model.data_fraction)
PARAMETERS = Cost("Parameters", "parameters (millions)", lambda model: model.parameters / 1e6)
COSTS = (
    PARAMETERS,
    Cost("Bytes of the weights", "MiB", lambda model: model.costs.file_bytes / 2**20),
    Cost("FLOPs of a prompt", "GFLOPs", lambda model: model.costs.forward_flops / 1e9),
)


def _speed(title: str, part: str) -> Cost:
    def ends(model: Run) -> tuple[float, float]:
        speedup = getattr(model.speed, part)
        return speedup.low, speedup.high

    label = "times the unpruned model's tokens/s"
    return Cost(title, label, lambda model: getattr(model.speed, part).ratio, True, ends)


SPEEDS = {part: _speed(title, part) for part, title in (("prefill_speedup", "Prefill"), ("decode_speedup", "Decoding"))}


def way_of(group: ModelGroup) -> str:
    """Return a group's recovery in words, such as "reconstructed + SFT"."""
    return group.first.after_pruning


def series_of(groups: Sequence[ModelGroup]) -> dict[str, str]:
    """Return {group: name of its line in plots}, usually the pruning method."""
    criteria = {(group.first.method, group.first.criterion) for group in groups}
    several = {method for method, _ in criteria if sum(method == other for other, _ in criteria) > 1}
    models, limits = {group.first.model for group in groups}, {group.first.image_tokens for group in groups}
    series, places = dict[str, str](), dict[tuple[Any, ...], list[ModelGroup]]()
    for group in groups:
        first = group.first
        name = f"{first.method}, {first.criterion}" if first.method in several else first.method
        name = f"{name} of {first.model.rstrip('/').rpartition('/')[2]}" if len(models) > 1 else name
        if len(limits) > 1:
            name = f"{name}, {first.image_tokens or 'all'} image tokens"
        series[group.name] = name
        asked = first.target_ratio  # None if the target was a number of layers
        share = round(group.mean("decoder_ratio"), 3) if asked is None else asked
        places.setdefault((name, way_of(group), first.data_fraction, share, first.image_tokens), []).append(group)
    extra = dict.fromkeys(label for at in places.values() for label in _differing(at))
    for group in groups:
        values = (group.labels[label] for label in extra if label in group.labels)
        series[group.name] = ", ".join((series[group.name], *values))
    return series


def _differing(groups: Sequence[ModelGroup]) -> list[str]:
    labels = dict.fromkeys(label for group in groups for label in group.labels)
    return [label for label in labels if len({group.labels.get(label) for group in groups}) > 1]


def drawable(groups: Sequence[ModelGroup]) -> list[ModelGroup]:
    """Return the groups whose retention is known and within the plot's axis."""
    return [group for group in groups if group.retained is not None and abs(group.retained[0]) < LARGEST]


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return {line name: line style}; "without recovery" is grey."""
    others = [name for name in dict.fromkeys(names) if name != WITHOUT]
    styles = {WITHOUT: {"color": UNRECOVERED, "linestyle": "-", "marker": "o"}}
    for i, name in enumerate(others):
        dashes, marker = _LINES[i // len(COLOURS) % len(_LINES)]
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "marker": marker}
    return styles


def pareto_figure(groups: Sequence[ModelGroup], unpruned: Sequence[Unpruned] | None, costs: Sequence[Cost]) -> Figure:
    """Plot retention against each cost in its own panel, with a line through the Pareto-optimal models.

    `unpruned`: None if costs are multiples of the unpruned model's.
    """
    groups = drawable(groups)
    ways = [way_of(group) for group in groups]
    styles = _styles(ways)
    with styled(*(group.first.method for group in groups), *ways):
        figure, panels = _panels(len(costs), 3.3)
        for axes, cost in zip(panels, costs, strict=True):
            axes.axhline(100, color=MUTED, linestyle="--", linewidth=1)
            for x in [1.0] if unpruned is None else map(cost.value_of, unpruned):
                axes.plot(x, 100, "*", color=INK, markersize=12, zorder=3)
            places = [cost.of_group(group) for group in groups]
            front = _front(places, groups, rising=cost.rising)
            if front:
                axes.plot(*np.transpose(front), color=INK, linewidth=1, alpha=0.5, zorder=1)
            for place, group, way in zip(places, groups, ways, strict=True):
                _point(axes, place, group, styles[way]["color"])
            axes.set_title(cost.title)
            axes.set_xlabel(cost.label)
            axes.margins(x=0.1)
            retention_axis(axes, "y", [group.retained[0] for group in groups if group.retained])
        colours = {way: styles[way]["color"] for way in dict.fromkeys(ways)}
        _add_legend(figure, legend_entries((group.first.method for group in groups), colours))
        return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels, at most three per row; only the leftmost have a y label."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(9.2, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(LABEL)
    for axes in list(grid.flat)[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat)[:count]


def _point(axes: Axes, place: tuple[float, float, float], group: ModelGroup, colour: str) -> None:
    assert group.retained is not None
    (mean, low, high), (x, left, right) = group.retained, place
    bar: Any = {"color": colour, "linewidth": 1, "alpha": 0.7}
    if _is_drawn(group):
        axes.plot([x, x], [low, high], **bar)
    if left < right:
        axes.plot([left, right], [mean, mean], **bar)
    axes.plot(x, mean, **{**marker(group.first.method, colour), "markersize": 5.5, "markeredgewidth": 1.3})


def _front(
    places: Sequence[tuple[float, float, float]], groups: Sequence[ModelGroup], *, rising: bool
) -> list[tuple[float, float]]:
    """Return the Pareto-optimal points, cheapest first.

    `places`: the mean and the range of each group's cost. A model is not cheaper than one that retains more if their
    ranges overlap: that difference is noise.
    """
    sign = -1 if rising else 1
    points = [
        (sign * x, *sorted((sign * low, sign * high)), group.retained[0])
        for (x, low, high), group in zip(places, groups, strict=True)
        if group.retained
    ]
    best = [
        (sign * x, value)
        for x, _, high, value in points
        if not any((other > value and low <= high) or (other == value and y < x) for y, low, _, other in points)
    ]
    return sorted(set(best), key=lambda point: sign * point[0])


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Add a legend below the panels, in as few rows as fit."""
    rows = -(-sum(len(str(handle.get_label())) + 8 for handle in handles) // LINE_LETTERS)
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // max(rows, 1)))


def curves_figure(
    groups: Sequence[ModelGroup],
    panel_of: Callable[[ModelGroup], str],
    line_of: Callable[[ModelGroup], str],
    x: Cost,
    scale: str,
) -> Figure:
    """Plot retention against `x`, one panel per value of `panel_of` and one line per value of `line_of`.

    Bands are 95 % intervals over seeds and questions, except at points of `FEW_SEEDS`.
    """
    panels: dict[str, dict[str, list[ModelGroup]]] = {}
    for group in drawable(groups):
        panels.setdefault(panel_of(group), {}).setdefault(line_of(group), []).append(group)
    panels = dict(list(panels.items())[:MOST_PANELS])
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))[:MOST_NAMED]
    styles = _styles(names)
    with styled(*panels, *names):
        figure, drawn = _panels(len(panels), 2.7)
        for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
            axes.axhline(100, color=MUTED, linestyle="--", linewidth=1)
            for name in names:
                if name in lines:
                    _curve(axes, lines[name], x, styles[name])
            if scale == "log":
                ticks = sorted({round(x.value_of(group.first), 6) for group in groups})
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(legible(title, LONGEST_TITLE))
            axes.set_xlabel(x.label)
            retention_axis(axes, "y", [group.retained[0] for group in drawable(groups) if group.retained])
        handles = [Line2D([], [], markersize=4, label=legible(name), **styles[name]) for name in names]
        _add_legend(figure, handles)
        return figure


def _curve(axes: Axes, groups: Sequence[ModelGroup], x: Cost, look: Mapping[str, Any]) -> None:
    """Draw a line through mean values, and a band between their interval ends where enough seeds are known."""
    points = []
    for group in groups:
        if group.retained is not None:
            mean, low, high = group.retained
            ends = (low, high) if _is_drawn(group) else (np.nan, np.nan)
            points.append((float(np.mean([x.value_of(model) for model in group.models])), mean, *ends))
    places, means, lows, highs = np.transpose(sorted(points))
    axes.fill_between(places, lows, highs, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(places, means, markersize=4, linewidth=1.4, **look)


def _is_drawn(group: ModelGroup) -> bool:
    """Return True if a group's interval is drawn: over three or more seeds, or over questions for one seed."""
    seeds = len(group.models)
    return seeds > FEW_SEEDS or (
        seeds < FEW_SEEDS and group.retained is not None and group.retained[1] < group.retained[2]
    )
