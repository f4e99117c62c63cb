"""Style that the figures share: colours, markers, legends, the axis of retention, fonts, and files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from vlmprune_jax.base.errors import printable
from vlmprune_jax.base.files import replacing
from vlmprune_jax.run.workdir.evaluation import UNPRUNED

# Text and axes are drawn in this colour, which an inline SVG then trades for the page's own (light or dark).
INK = "#3a3b3c"
LARGEST = 1e100  # largest number that is drawn: axes need room around it
MOST_NAMED = 24  # maximum entries of a legend
NARROW = 4.4  # inches, width of a figure on a phone
LONGEST, LONGEST_TITLE = 40, 80  # maximum characters of a name, and of a title
_FONT = "DejaVu Sans"  # which comes with matplotlib
# Okabe-Ito palette: distinguishable with any colour vision, on light and dark backgrounds.
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


def retention_axis(axes: Axes, which: str, values: Iterable[float]) -> None:
    """Scale a retention axis logarithmically in the distance from 100 %, so that 99.0 and 99.9 are apart."""
    getattr(axes, f"set_{which}scale")("function", functions=(_spread, _narrowed))
    known = _spread(np.array([100.0, *(value for value in values if np.isfinite(value))]))
    low, high = float(known.min()), float(known.max())
    room = 0.06 * max(high - low, 0.3)
    low, high = low - room, high + room
    apart = room * (3.2 if which == "x" else 1.3)
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
    """Return the plot marker of a pruning method; depth is filled, others are hollow."""
    return {
        "marker": MARKERS.get(method, "^"), "markersize": 7, "markerfacecolor": colour if method == "depth" else "none",
        "markeredgecolor": colour, "markeredgewidth": 1.8, "color": colour, "linewidth": 1,
    }  # fmt: skip


def legend_entries(methods: Iterable[str], colours: Mapping[str, str]) -> list[Line2D]:
    """Return plot legend entries: unpruned model, pruning methods (shape) and recoveries (colour)."""
    plain: Any = {"linestyle": "none"}
    bar: Any = {"marker": "_", "markersize": 12, "markeredgewidth": 4}
    entries = [Line2D([], [], color=MUTED, linestyle="--", linewidth=1, label=UNPRUNED)]
    for method in list(dict.fromkeys(methods))[:MOST_NAMED]:
        entries.append(Line2D([], [], label=legible(method), **{**marker(method, INK), **plain}))
    for recovery, colour in itertools.islice(colours.items(), MOST_NAMED):
        entries.append(Line2D([], [], color=colour, label=legible(recovery), **bar, **plain))
    return entries


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
    fonts = {_font_of(c): None for c in sorted(set("".join(map(printable, names)))) if not c.isascii()}
    others = [family for family in fonts if family not in (None, _FONT)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "font.family": ["sans-serif", *others]} if others else STYLE)
        yield


@functools.cache
def _font_of(character: str) -> str | None:
    """Return a font family that has this character; None if no installed font has it."""
    default = font_manager.findfont(_FONT)
    for path, family in [(default, _FONT), *((font.fname, font.name) for font in font_manager.fontManager.ttflist)]:
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
    """Context that suppresses matplotlib's warning about long names without room."""
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        yield


def stack_panels(figure: Figure) -> None:
    """Rearrange a figure's panels below each other, in a column as wide as a phone's screen."""
    panels = [axes for axes in figure.axes if axes.axison]
    rows = getattr(panels[0].get_gridspec(), "nrows", 1)
    grid = figure.add_gridspec(len(panels), 1)
    for axes in set(figure.axes) - set(panels):
        axes.remove()
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    legend.remove()
    with styled(*labels):  # texts take the font of the moment in which they are made
        for place, axes in enumerate(panels):
            axes.set_subplotspec(grid[place])
            axes.tick_params(labelleft=True)
            axes.set_ylabel(panels[0].get_ylabel())
            if axes.get_xscale() == "linear":
                axes.locator_params(axis="x", nbins=5)
        columns = 1 if max(map(len, labels)) > LONGEST // 2 else 2
        handles = [handle for handle in legend.legend_handles if handle is not None]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.set_size_inches(NARROW, figure.get_figheight() * len(panels) / rows)


def to_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element in the page's text colour."""
    text = io.StringIO()
    with _drawing():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :].replace(INK, "currentColor"))
    digest = hashlib.sha256(svg.encode()).hexdigest()[:8]  # ids are of the page, not of a figure
    return re.sub(r'\bid="|href="#|url\(#', lambda match: f"{match[0]}f{digest}-", svg)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG on white, at twice its page size."""
    with replacing(path) as file, _drawing():
        figure.savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
