"""Drawing of the report's figures: panels below each other, in a column that a phone shows in full."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import replacing
from vlmprune_jax.run.workdir.evaluation import UNPRUNED
from vlmprune_jax.run.workdir.groups import ModelGroup
from vlmprune_jax.run.workdir.result import WITHOUT

# Text and axes are drawn in this colour, which an inline SVG then trades for the page's own (light or dark).
INK = "#3a3b3c"
LARGEST = 1e100  # largest number that is drawn: axes need room around it
WIDTH = 4.4  # inches
MOST_PANELS, MOST_NAMED = 9, 24  # maximum panels of a figure, and entries of a legend
MOST_POINTS, MOST_CELLS = 20_000, 64  # maximum points of a loss curve, and rows of a map
LONGEST, LONGEST_TITLE = 40, 60  # maximum characters of a name, and of a title
FEW_SEEDS = 2  # number of seeds whose interval is too uncertain to draw (with one seed, it is over questions)
_FONT = "DejaVu Sans"  # which comes with matplotlib
# Okabe-Ito palette: distinguishable with any colour vision, on light and dark backgrounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
GREY = "#8c8c8c"
_LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # dashes and markers of lines that share a colour
_MARKERS = {"none": "*", "depth": "o", "width": "s", "hybrid": "D"}  # of pruning methods; others: "^"
# Retained percentages with a place on an axis, where there is room; differences below FINEST points are not spread.
RETENTION_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 100, 100.2, 100.5, 101, 102, 105, 110, 150, 200, 1000)
FINEST = 0.1
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
    "svg.hashsalt": "vlmprune",  # the same data gives the same bytes
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


@dataclass(frozen=True)
class Cost:
    """Quantity on the x axis. `place_of`: function that returns a group's (mean, low, high).

    `rising`: True if larger is better.
    """

    label: str
    place_of: Callable[[ModelGroup], tuple[float, float, float]]
    rising: bool = False


def pareto_figure(groups: Sequence[ModelGroup], costs: Sequence[Cost]) -> Figure:
    """Plot retention against each cost in its own panel, with a line through the Pareto-optimal models.

    `groups`: unpruned models (method "none") and pruned models.
    """
    pruned = [group for group in groups if group.first.method != "none"]
    methods = list(dict.fromkeys(group.first.method for group in groups))
    styles = _styles(group.recovery for group in pruned)
    with styled(*methods, *styles):
        figure, panels = _panels(len(costs), 2.5)
        for axes, cost in zip(panels, costs, strict=True):
            _retention_axis(axes, groups)
            places = [cost.place_of(group) for group in groups]
            axes.plot(*np.transpose(_front(places, groups, rising=cost.rising)), color=INK, linewidth=1, alpha=0.5)
            for (x, left, right), group in zip(places, groups, strict=True):
                colour = styles[group.recovery]["color"] if group in pruned else INK
                mean, low, high = group.retained or (np.nan,) * 3
                if _has_interval(group):
                    axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.7)
                if left < right:
                    axes.plot([left, right], [mean, mean], color=colour, linewidth=1, alpha=0.7)
                axes.plot(x, mean, **_marker(group.first.method, colour))
            axes.set_xlabel(cost.label)
            axes.margins(x=0.1)
            axes.locator_params(axis="x", nbins=5)
        names = {method: UNPRUNED if method == "none" else method for method in methods[:MOST_NAMED]}
        handles = [Line2D([], [], label=legible(names[method]), **_marker(method, INK)) for method in names]
        handles += [
            Line2D([], [], color=styles[way]["color"], linewidth=4, label=legible(way))
            for way in list(dict.fromkeys(group.recovery for group in pruned))[:MOST_NAMED]
        ]
        _add_legend(figure, handles)
        return figure


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return {line name: line style}; "without recovery" is grey."""
    others = [name for name in dict.fromkeys(names) if name != WITHOUT]
    styles = {WITHOUT: {"color": GREY, "linestyle": "-", "marker": "o"}}
    for i, name in enumerate(others):
        dashes, marker = _LINES[i // len(COLOURS) % len(_LINES)]
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "marker": marker}
    return styles


def _marker(method: str, colour: str) -> dict[str, Any]:
    """Return the style of a pruning method's points; those of the unpruned model and of depth are filled."""
    face = colour if method in ("none", "depth") else "none"
    return {
        "linestyle": "none", "marker": _MARKERS.get(method, "^"), "markersize": 9 if method == "none" else 5.5,
        "markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 1.3,
    }  # fmt: skip


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels below each other."""
    figure = Figure(figsize=(WIDTH, height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False).flat)


def _add_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Add a legend below the panels, in two columns if the names are short."""
    columns = 1 if max(len(str(handle.get_label())) for handle in handles) > LONGEST // 2 else 2
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


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


def _has_interval(group: ModelGroup) -> bool:
    """Return True if a group's interval is drawn: over three or more seeds, or over questions for one seed."""
    seeds, (_, low, high) = len(group.models), group.retained or (0.0, 0.0, 0.0)
    return seeds > FEW_SEEDS or (seeds < FEW_SEEDS and low < high)


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
    for group in groups:
        panels.setdefault(panel_of(group), {}).setdefault(line_of(group), []).append(group)
    panels = dict(list(panels.items())[:MOST_PANELS])
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))[:MOST_NAMED]
    styles = _styles(names)
    with styled(*panels, *names):
        figure, drawn = _panels(len(panels), 2.3)
        for axes, (title, lines) in zip(drawn, panels.items(), strict=True):
            _retention_axis(axes, groups)
            for name in names:
                if name in lines:
                    _curve(axes, lines[name], x, styles[name])
            if scale == "log":
                ticks = sorted({round(x.place_of(group)[0], 6) for group in groups})
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_title(legible(title, LONGEST_TITLE))
            axes.set_xlabel(x.label)
        _add_legend(figure, [Line2D([], [], markersize=4, label=legible(name), **styles[name]) for name in names])
        return figure


def _curve(axes: Axes, groups: Sequence[ModelGroup], x: Cost, style: Mapping[str, Any]) -> None:
    """Draw a line through mean values, and a band between their interval ends where enough seeds are known."""
    points = []
    for group in groups:
        mean, low, high = group.retained or (np.nan,) * 3
        ends = (low, high) if _has_interval(group) else (np.nan, np.nan)
        points.append((x.place_of(group)[0], mean, *ends))
    places, means, lows, highs = np.transpose(sorted(points))
    axes.fill_between(places, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(places, means, markersize=4, linewidth=1.4, **style)


def _retention_axis(axes: Axes, groups: Sequence[ModelGroup]) -> None:
    """Scale the y axis logarithmically in the distance from 100 %, so that 99.0 and 99.9 are apart."""
    axes.axhline(100, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.set_ylabel("retained (%)")
    axes.set_yscale("function", functions=(_spread, _narrowed))
    known = _spread(np.array([100.0, *(group.retained[0] for group in groups if group.retained)]))
    low, high = float(known.min()), float(known.max())
    room = 0.06 * max(high - low, 0.3)
    low, high = low - room, high + room
    ticks = list[float]()
    for tick in sorted(RETENTION_TICKS, key=lambda tick: abs(tick - 100)):
        place = float(_spread(np.array(tick)))
        if low <= place <= high and all(abs(place - _spread(np.array(other))) > 1.3 * room for other in ticks):
            ticks.append(tick)
    axes.set_ylim(*_narrowed(np.array([low, high])))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _spread(values: np.ndarray) -> np.ndarray:
    return np.sign(values - 100) * np.log10(1 + np.abs(values - 100) / FINEST)


def _narrowed(places: np.ndarray) -> np.ndarray:
    return 100 + np.sign(places) * FINEST * (10 ** np.minimum(np.abs(places), 300) - 1)


def layer_importance_figure(title: str, importance: np.ndarray, removed: Sequence[int]) -> Figure:
    """Plot every layer's importance by original number; removed layers have another colour."""
    with styled(title):
        figure, (axes,) = _panels(1, 2.5)
        numbers = np.arange(len(importance))
        values = np.where(np.abs(importance) < LARGEST, importance, np.nan)
        gone = np.isin(numbers, removed)
        styles: Any = ({"color": COLOURS[0]}, {"facecolor": COLOURS[5], "hatch": "//", "edgecolor": "white"})
        axes.bar(numbers[~gone], values[~gone], **styles[0])
        axes.bar(numbers[gone], values[gone], **styles[1])
        _layer_axis(axes, len(importance))
        axes.set_ylabel("importance")
        axes.set_title(legible(title, LONGEST_TITLE))
        names = ("kept", "removed")
        _add_legend(figure, [Patch(label=name, **style) for name, style in zip(names, styles, strict=True)])
        return figure


def unit_importance_figure(
    title: str, units: Sequence[np.ndarray], kept: Mapping[int, Collection[int]] | None, unit: str
) -> Figure:
    """Plot the importance of heads or experts relative to the layer's maximum, with the removed ones crossed out.

    `kept`: {original layer number: kept units}, without the removed layers; None if nothing is removed.
    """
    with styled(title):
        figure, (axes,) = _panels(1, 2.7)
        shares = np.full((max(map(len, units)), len(units)), np.nan)  # narrower layers are padded
        for layer, values in enumerate(units):
            finite = np.where(np.abs(values) < LARGEST, values, np.nan)
            shares[: len(values), layer] = finite / max([1e-30, *finite[np.isfinite(finite)]])
            gone = [] if kept is None else [place for place in range(len(values)) if place not in kept.get(layer, ())]
            axes.plot([layer] * len(gone), gone, "x", color="white", markersize=6, markeredgewidth=2)
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
        figure.colorbar(image, ax=axes, label="importance /\nlargest of layer")
        axes.set_title(f"{legible(title, LONGEST_TITLE - 20)} (crossed: removed)")
        _layer_axis(axes, len(units), unit)
        return figure


def removed_figure(
    title: str, widths: Sequence[tuple[int, int]], kept: Mapping[int, tuple[Sequence[int], Sequence[int]]]
) -> Figure:
    """Plot which layers, attention heads and MLP neurons a plan removes.

    `widths`: numbers of heads and neurons of every layer before pruning. `kept`: {original layer number: indices of
    kept heads and neurons}; layers without an entry are removed.
    """
    colours = LinearSegmentedColormap.from_list("kept", [(*to_rgb(COLOURS[0]), opaque) for opaque in (0.08, 1.0)])
    with styled(title):
        figure, panels = _panels(2, 1.9)
        for place, (axes, unit) in enumerate(zip(panels, ("attention head", "MLP neuron"), strict=True)):
            before = [width[place] for width in widths]
            widest = max(1, *before)
            rows = min(widest, MOST_CELLS)
            shares = np.full((rows, len(widths)), np.nan)
            for layer, width in enumerate(before):
                if not width:  # such as the heads of a short convolution
                    continue
                cells = max(1, rows * width // widest)
                edges = np.arange(cells + 1) * width // cells
                there = np.searchsorted(kept[layer][place] if layer in kept else (), edges)
                shares[:cells, layer] = np.diff(there) / np.diff(edges)
            extent = (-0.5, len(widths) - 0.5, -0.5, widest - 0.5)
            style: Any = {"cmap": colours, "vmin": 0, "vmax": 1, "origin": "lower", "interpolation": "nearest"}
            axes.imshow(shares, aspect="auto", extent=extent, **style)
            _layer_axis(axes, len(widths), unit)
        panels[0].set_title(legible(title, LONGEST_TITLE))
        _add_legend(
            figure, [Patch(color=colours(share), label=label) for share, label in ((1.0, "kept"), (0.0, "removed"))]
        )
        return figure


def _layer_axis(axes: Axes, n_layers: int, unit: str = "") -> None:
    """Number the layers below a panel, and the units beside a map of these."""
    axes.set_xlabel("layer (original number)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(n_layers, 16) + 1))
    axes.set_xlim(-0.6, n_layers - 0.4)
    axes.grid(visible=False, axis="both" if unit else "x")
    if unit:
        axes.set_ylabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> Figure | None:
    """Plot training loss terms over steps, one panel per term and one line per run; None without data.

    `curves`: run -> rows of its metrics file. `titles`: term -> title of its panel.
    """
    shown = {term: {name: _loss_points(rows, term) for name, rows in curves.items()} for term in titles}
    terms = [term for term, by_run in shown.items() if any(by_run.values())][:MOST_PANELS]
    if not terms:
        return None
    styles = {name: {**style, "marker": ""} for name, style in _styles(curves).items()}
    with styled(*titles.values(), *curves):
        figure, panels = _panels(len(terms), 2.3)
        for axes, term in zip(panels, terms, strict=True):
            for name, points in shown[term].items():
                axes.plot(*np.transpose(points), linewidth=1.4, **styles[name])
            axes.set_yscale("log")
            axes.set_title(f"{legible(titles[term], LONGEST_TITLE - 20)}, training batches")
            axes.set_xlabel("step")
            axes.set_ylabel("loss per token")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _add_legend(figure, [Line2D([], [], label=legible(name), **styles[name]) for name in curves])
        return figure


def _loss_points(rows: Sequence[Mapping[str, Any]], term: str) -> list[tuple[float, float]]:
    """Return up to `MOST_POINTS` points (step, value) of a loss curve that a logarithmic axis can show."""
    points = [(row["step"], float(row[term])) for row in rows if 1 / LARGEST < row.get(term, 0.0) < LARGEST]
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def legible(text: str, longest: int = LONGEST) -> str:
    """Return a user's name as safe plot text: not parsed as a formula, and shortened to the figure's width.

    Characters that no font has are spelled out.
    """
    line = "".join(c if c.isascii() or _font_of(c) else c.encode("unicode_escape").decode() for c in printable(text))
    if len(line) > longest:
        line = f"{line[: longest - 10]}...{line[-7:]}"
    return line.replace("$", r"\$")


@contextlib.contextmanager
def styled(*names: str) -> Iterator[None]:
    """Context that sets the figure style, with fonts that have all characters of `names`.

    The style is based on matplotlib's defaults, not on a `matplotlibrc`, which may start programs (`text.usetex`).
    """
    fonts = {_font_of(c) for c in "".join(map(printable, names)) if not c.isascii()} - {"", _FONT}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # long names without room
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "font.family": ["sans-serif", *sorted(fonts)]})
        yield


@functools.cache
def _font_of(character: str) -> str:
    """Return a font family that has this character; "" if no installed font has it."""
    default = font_manager.findfont(_FONT)
    for path, family in [(default, _FONT), *((font.fname, font.name) for font in font_manager.fontManager.ttflist)]:
        with contextlib.suppress(OSError, RuntimeError):  # of bitmaps, or damaged
            if font_manager.get_font(path).get_char_index(ord(character)) and "last resort" not in family.lower():
                return family
    return ""


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, at twice its page size."""
    with replacing(path) as file, styled():
        figure.savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
