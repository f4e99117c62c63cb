"""Figures of a report: accuracy against size, importance per layer, losses over steps."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from vlmprune_jax.core.errors import printable
from vlmprune_jax.core.files import replacing
from vlmprune_jax.workdir.evaluation import UNPRUNED
from vlmprune_jax.workdir.result import WITHOUT, Result, Run

# Text and axes are drawn in this colour, which an inline SVG then trades for the page's own (light or dark).
INK = "#3a3b3c"
LARGEST = 1e100  # of the numbers that are drawn: axes need room around them
MOST_ROWS, MOST_LINES, MOST_NAMED, MOST_PANELS, MOST_POINTS, MOST_CELLS = 60, 200, 24, 6, 20_000, 64
LONGEST, LONGEST_TITLE = 40, 80  # letters of a name
_FONT = "DejaVu Sans"  # which comes with matplotlib
# Okabe-Ito: told apart with any kind of colour vision, and on light and dark grounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
UNRECOVERED, MUTED = "#8c8c8c", "#8c8c8c"
MARKERS = {"depth": "o", "width": "s", "hybrid": "D"}
# Retained percentages with a place on an axis, where there is room; differences below FINEST points are not spread.
RETENTION_TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 100, 100.2, 100.5, 101, 102, 105, 110, 150, 200, 1000)
FINEST = 0.1
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
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
class Measured:
    """One number per model (None if unknown), unpruned model first, and its labels in a figure.

    `intervals`: their 95 % intervals, None where unknown. `retention`: percentages of the unpruned model's score.
    """

    name: str
    title: str
    label: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    retention: bool = False


def score_figure(result: Result, measured: Measured) -> Figure:
    """Plot a number of every model against decoding speed (or size), and as rows sorted from the best model.

    The shape is the method, the colour the recovery.
    """
    runs, colours = result.runs, recovery_colours(result.runs)
    values = [np.nan if v is None or not abs(v) < LARGEST else float(v) for v in measured.values]
    speedups = [run.speed.decode_speedup for run in runs if run.speed is not None]
    places = [speedup[0] for speedup in speedups if speedup is not None]
    x_label = "decoding speed, as a multiple of the unpruned model's"
    if len(places) < len(runs):
        places = [100 * run.parameters / result.teacher.parameters for run in runs]
        x_label = "parameters, % of the unpruned model's"
    names = [name for run in runs for name in (run.label, run.method, run.after_pruning)]
    with styled(measured.label, measured.title, *names):
        figure = Figure(figsize=(9.2, max(3.9, 0.9 + 0.24 * min(len(values), MOST_ROWS))), layout="constrained")
        axes, rows = figure.subplots(1, 2, width_ratios=(5, 4))
        axes.axhline(values[0], color=MUTED, linestyle="--", linewidth=1)
        for run, x, value in itertools.islice(zip(runs, places, values[1:], strict=True), MOST_LINES):
            axes.plot(x, value, **{**marker(run.method, colours[run.after_pruning]), "linestyle": "none"})
        axes.set_xlabel(x_label)
        axes.set_ylabel(legible(measured.label, LONGEST_TITLE))
        axes.set_title(legible(measured.title, LONGEST_TITLE))
        axes.margins(x=0.15, y=0.08)
        axes.legend(handles=legend_entries((run.method for run in runs), colours), loc="best", fontsize=8)
        _score_rows(rows, result, values, measured, colours)
        if measured.retention:
            retention_axis(axes, "y", values)
            retention_axis(rows, "x", values)
        return figure


def _score_rows(
    axes: Axes, result: Result, values: Sequence[float], measured: Measured, colours: Mapping[str, str]
) -> None:
    """Draw one row per model: its value as text, and as a point with its interval."""
    runs, labels = result.runs, result.labels
    order = sorted(range(len(runs)), key=lambda i: -(runs[i].evaluation.mean_of_ratios or -np.inf))[: MOST_ROWS - 1]
    axes.axvline(values[0], color=MUTED, linestyle="--", linewidth=1)
    for row, i in enumerate(order):
        colour, value, told = colours[runs[i].after_pruning], values[i + 1], measured.values[i + 1]
        ends = measured.intervals[i + 1] if measured.intervals else None
        if ends is not None:
            axes.plot(ends, [row, row], color=colour, linewidth=1.2, alpha=0.7)
        axes.plot(value, row, **marker(runs[i].method, colour))
        text = "" if told is None else f"{told:.2f}" if abs(told) < 1e9 else f"{told:.3g}"
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_yticks(range(len(order)), [legible(labels[runs[i].name]) for i in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(legible(measured.label, LONGEST_TITLE))


def retention_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Scale an axis of retention logarithmically in the distance from 100 %, so that 99.0 and 99.9 differ visibly."""
    getattr(axes, f"set_{which}scale")("function", functions=(_spread, _narrowed))
    known = _spread(np.array([100.0, *(value for value in values if np.isfinite(value))]))
    low, high = float(known.min()), float(known.max())
    room = 0.06 * max(high - low, 0.3)
    low, high = low - room, high + room
    apart = room * (2.2 if which == "x" else 1.3)
    ticks = list[float]()
    for tick in sorted(RETENTION_TICKS, key=lambda tick: abs(tick - 100)):
        place = float(_spread(np.array(tick)))
        if low <= place <= high and all(abs(place - _spread(np.array(other))) > apart for other in ticks):
            ticks.append(tick)
    getattr(axes, f"set_{which}lim")(*_narrowed(np.array([low, high])))
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axes, f"{which}axis").set_minor_locator(NullLocator())


def _spread(values: np.ndarray) -> np.ndarray:
    return np.sign(values - 100) * np.log10(1 + np.abs(values - 100) / FINEST)


def _narrowed(places: np.ndarray) -> np.ndarray:
    return 100 + np.sign(places) * FINEST * (10 ** np.minimum(np.abs(places), 300) - 1)


def marker(method: str, colour: str) -> dict[str, Any]:
    """Return the plot marker of a method; filled for depth and hollow for others, so that overlaps stay visible."""
    return {
        "marker": MARKERS.get(method, "^"), "markersize": 7, "markerfacecolor": colour if method == "depth" else "none",
        "markeredgecolor": colour, "markeredgewidth": 1.8, "color": colour, "linewidth": 1,
    }  # fmt: skip


def legend_entries(methods: Iterable[str], colours: Mapping[str, str]) -> list[Line2D]:
    """Return legend entries for the unpruned model, each method (shape) and each recovery (colour)."""
    plain: Any = {"linestyle": "none"}
    bar: Any = {"marker": "_", "markersize": 12, "markeredgewidth": 4}
    entries = [Line2D([], [], color=MUTED, linestyle="--", linewidth=1, label=UNPRUNED)]
    for method in list(dict.fromkeys(methods))[:MOST_NAMED]:
        entries.append(Line2D([], [], label=legible(method), **{**marker(method, INK), **plain}))
    for recovery, colour in itertools.islice(colours.items(), MOST_NAMED):
        entries.append(Line2D([], [], color=colour, label=legible(recovery), **bar, **plain))
    return entries


def recovery_colours(runs: Sequence[Run]) -> dict[str, str]:
    """Return {recovery: colour}, grey for models without recovery."""
    names = list(dict.fromkeys(run.after_pruning for run in runs))
    trained = [name for name in names if name != WITHOUT]
    return {name: UNRECOVERED if name == WITHOUT else COLOURS[trained.index(name) % len(COLOURS)] for name in names}


def layer_importance_figure(title: str, importance: np.ndarray, removed: Sequence[int]) -> Figure:
    """Plot the importance of every layer (original numbers); removed layers have another colour."""
    with styled(title):
        figure = Figure(figsize=(7.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        numbers = np.arange(len(importance))
        values = np.where(np.abs(importance) < LARGEST, importance, np.nan)
        gone = np.isin(numbers, removed)
        axes.bar(numbers[~gone], values[~gone], color=COLOURS[0], label="kept")
        axes.bar(numbers[gone], values[gone], color=COLOURS[5], label="removed", hatch="//", edgecolor="white")
        _layer_axis(axes, len(importance))
        axes.set_ylabel("importance")
        axes.set_title(legible(title, LONGEST_TITLE))
        axes.legend(ncols=2, loc="upper left", bbox_to_anchor=(0.62, 1.16))
        return figure


def width_importance_figure(
    title: str, heads: Sequence[np.ndarray], kept: Mapping[int, tuple[set[int], int, int]]
) -> Figure:
    """Plot head importance relative to the layer's maximum, and the share of neurons kept.

    Removed heads are crossed. `kept`: original layer number -> (kept heads, kept neurons, neurons before); layers that
    are not in it are removed.
    """
    n_layers, shares = len(heads), _by_layer(heads)
    with styled(title):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        image = top.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
        figure.colorbar(image, ax=top, label="importance /\nlargest of layer")
        top.grid(visible=False)
        for layer, values in enumerate(heads):
            units = kept.get(layer, (set(), 0, 1))[0]
            gone = [unit for unit in range(len(values)) if unit not in units]
            top.plot([layer] * len(gone), gone, "x", color="white", markersize=7, markeredgewidth=2.2)
        top.set_ylabel("attention head")
        top.yaxis.set_major_locator(MaxNLocator(integer=True))
        top.set_title(f"{legible(title, LONGEST_TITLE)} (crossed: removed)")
        parts = [100 * kept[i][1] / kept[i][2] if i in kept else 0.0 for i in range(n_layers)]
        bottom.bar(range(n_layers), parts, color=COLOURS[0])
        bottom.set_ylim(0, 100)
        bottom.set_ylabel("neurons\nkept (%)")
        _layer_axis(bottom, n_layers)
        return figure


def removed_figure(
    title: str, widths: Sequence[tuple[int, int]], kept: Mapping[int, tuple[Sequence[int], Sequence[int]]]
) -> Figure:
    """Plot which layers, attention heads and MLP neurons are removed; each cell shows a share kept.

    `widths`: heads and neurons of every layer before. `kept`: original layer number -> indices of kept heads and
    neurons; layers that are not in it are removed.
    """
    with styled(title):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        colours = LinearSegmentedColormap.from_list("kept", [(*to_rgb(COLOURS[0]), opaque) for opaque in (0.08, 1.0)])
        for place, (axes, what) in enumerate(((top, "attention head"), (bottom, "MLP neuron"))):
            before = [width[place] for width in widths]
            rows = min(max(before), MOST_CELLS)
            shares = np.full((rows, len(widths)), np.nan)
            for layer, width in enumerate(before):
                cells = max(1, rows * width // max(before))
                edges = np.arange(cells + 1) * width // cells
                there = np.searchsorted(kept[layer][place] if layer in kept else (), edges)
                shares[:cells, layer] = np.diff(there) / np.diff(edges)
            high = max(before) - 0.5
            axes.imshow(
                shares, aspect="auto", cmap=colours, vmin=0, vmax=1, origin="lower", interpolation="nearest",
                extent=(-0.5, len(widths) - 0.5, -0.5, high),
            )  # fmt: skip
            axes.grid(visible=False)
            axes.set_ylabel(what)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        top.set_title(legible(title, LONGEST_TITLE))
        handles = [Patch(color=colours(share), label=label) for share, label in ((1.0, "kept"), (0.0, "removed"))]
        figure.legend(handles=handles, loc="outside right upper")
        _layer_axis(bottom, len(widths))
        return figure


def kinds_figure(title: str, kinds: Mapping[str, tuple[Sequence[np.ndarray] | None, np.ndarray]]) -> Figure:
    """Plot importance by token type, one column per type: heads relative to the layer's maximum, and layers.

    `kinds`: token type -> (importance of heads per layer, or None; float[n_layers] shares of layers in the sum).
    """
    drawn = {name: heads for name, (heads, _) in kinds.items() if heads is not None}
    top = max(float(layers.max()) for _, layers in kinds.values()) or 1.0
    with styled(title, *kinds):
        figure = Figure(figsize=(9.2, 4.2 if drawn else 2.4), layout="constrained")
        panels = figure.subplots(1 + bool(drawn), len(kinds), sharex=True, sharey="row", squeeze=False)
        image = None
        for column, (name, (heads, layers)) in zip(panels.T, kinds.items(), strict=True):
            if heads is not None:
                shares = _by_layer(heads)
                image = column[0].imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
                column[0].grid(visible=False)
                column[0].yaxis.set_major_locator(MaxNLocator(integer=True))
            column[0].set_title(f"{name} tokens")
            column[-1].bar(range(len(layers)), 100 * layers, color=COLOURS[0])
            column[-1].set_ylim(0, 108 * top)
            _layer_axis(column[-1], len(layers), most=8)
        panels[-1, 0].set_ylabel("layer's share\nof the sum (%)")
        if image is not None:
            panels[0, 0].set_ylabel("attention head")
            figure.colorbar(image, ax=panels[0], label="importance /\nlargest of layer")
        figure.suptitle(legible(title, LONGEST_TITLE), x=0.01, ha="left", fontsize=10.5)
        return figure


def _by_layer(heads: Sequence[np.ndarray]) -> np.ndarray:
    """Return importance relative to the layer's maximum, float[widest, n_layers]; NaN for heads that do not exist."""
    shares = np.full((max(len(h) for h in heads), len(heads)), np.nan)
    for layer, values in enumerate(heads):
        finite = np.where(np.abs(values) < LARGEST, values, np.nan)
        shares[: len(values), layer] = finite / max([1e-30, *finite[np.isfinite(finite)]])
    return shares


def _layer_axis(axes: Axes, n_layers: int, most: int = 32) -> None:
    axes.set_xlabel("decoder layer (original number)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(n_layers, most) + 1))
    axes.set_xlim(-0.6, n_layers - 0.4)
    axes.grid(visible=False, axis="x")


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> Figure | None:
    """Plot loss terms over steps, one panel per term and one line per run; None if no run reported any.

    `curves`: run -> rows of its metrics file. `titles`: term -> title of its panel.
    """
    named = set()
    shown = {term: {name: _curve(rows, term) for name, rows in curves.items()} for term in titles}
    terms = [term for term, found in shown.items() if any(found.values())][:MOST_PANELS]
    if not terms:
        return None
    with styled(*titles.values(), *curves):
        figure = Figure(figsize=(7.6, 2.8), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(terms), sharex=True))
        for axes, term in zip(panels, terms, strict=True):
            for i, (name, points) in enumerate(shown[term].items()):
                if points:
                    style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4}
                    axes.plot(*np.transpose(points), label=None if name in named else legible(name), **style)
                    named.add(name)
            axes.set_yscale("log")
            axes.set_title(f"{legible(titles[term], LONGEST_TITLE)}, training batches")
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panels[0].set_ylabel("loss per token")
        figure.legend(loc="outside right center")
        return figure


def _curve(rows: Sequence[Mapping[str, Any]], term: str) -> list[tuple[float, float]]:
    """Return (step, value) of up to `MOST_POINTS` rows, without values that a logarithmic axis cannot show."""
    points = [(row["step"], float(row[term])) for row in rows if 1 / LARGEST < row.get(term, 0.0) < LARGEST]
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def legible(text: str, longest: int = LONGEST) -> str:
    """Return a name from users as safe plot text: not parsed as a formula, and no wider than the figure.

    Characters that no font has are spelled out.
    """
    line = "".join(c if c.isascii() or _font_of(c) else c.encode("unicode_escape").decode() for c in printable(text))
    if len(line) > longest:
        line = f"{line[: longest - 10]}...{line[-7:]}"
    return line.replace("$", r"\$")


@contextlib.contextmanager
def styled(*names: str) -> Iterator[None]:
    """Set the figure style, with fonts that contain all characters of these names.

    It starts from matplotlib's defaults, not from a `matplotlibrc`, which may start programs (`text.usetex`).
    """
    fonts = {_font_of(c): None for c in sorted(set("".join(map(printable, names)))) if not c.isascii()}
    others = [family for family in fonts if family not in (None, _FONT)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "font.family": ["sans-serif", *others]} if others else STYLE)
        yield


@functools.cache
def _font_of(character: str) -> str | None:
    """Return a font family that has this character: the figures' default, else an installed one, or None."""
    own = font_manager.findfont(_FONT)
    for path, family in [(own, _FONT), *((font.fname, font.name) for font in font_manager.fontManager.ttflist)]:
        if ord(character) in _characters(path) and "last resort" not in family.lower():
            return family
    return None


@functools.cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # of bitmaps, or damaged
        return frozenset()


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Suppress matplotlib's warning that long names leave no room for the axes."""
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


def to_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element that uses the page's text colour."""
    text = io.StringIO()
    with _drawing():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :].replace(INK, "currentColor"))
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]  # ids are of the page, not of a figure
    return re.sub(r'\bid="|href="#|url\(#', lambda found: f"{found[0]}f{own}-", svg)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, twice as large as on the page."""
    with replacing(path) as file, _drawing():
        figure.savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
