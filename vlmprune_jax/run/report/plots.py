"""Figures of single models: importance per layer, removed layers, heads and neurons, losses over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from vlmprune_jax.run.report.style import COLOURS, LARGEST, LONGEST_TITLE, legible, styled

MOST_PANELS, MOST_POINTS, MOST_CELLS = 6, 20_000, 64


def layer_importance_figure(title: str, importance: np.ndarray, removed: Sequence[int]) -> Figure:
    """Plot every layer's importance by original number; removed layers have another colour."""
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
    title: str, heads: Sequence[np.ndarray], kept: Mapping[int, tuple[set[int], int, int]], unit: str = "attention head"
) -> Figure:
    """Plot the importance of heads or experts relative to the layer's maximum, and each layer's share of kept neurons.

    Removed heads or experts are crossed out. `kept`: {original layer number: (kept heads or experts, kept neurons,
    neurons before)}; layers without an entry are removed.
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
        top.set_ylabel(unit)
        top.yaxis.set_major_locator(MaxNLocator(integer=True))
        top.set_title(f"{legible(title, LONGEST_TITLE)} (crossed: removed)")
        kept_percent = [100 * kept[i][1] / kept[i][2] if i in kept else 0.0 for i in range(n_layers)]
        bottom.bar(range(n_layers), kept_percent, color=COLOURS[0])
        bottom.set_ylim(0, 100)
        bottom.set_ylabel("neurons\nkept (%)")
        _layer_axis(bottom, n_layers)
        return figure


def removed_figure(
    title: str, widths: Sequence[tuple[int, int]], kept: Mapping[int, tuple[Sequence[int], Sequence[int]]]
) -> Figure:
    """Plot which layers, attention heads and MLP neurons a plan removes.

    `widths`: numbers of heads and neurons of every layer before pruning. `kept`: {original layer number: indices of
    kept heads and neurons}; layers without an entry are removed.
    """
    with styled(title):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        colours = LinearSegmentedColormap.from_list("kept", [(*to_rgb(COLOURS[0]), opaque) for opaque in (0.08, 1.0)])
        for place, (axes, what) in enumerate(((top, "attention head"), (bottom, "MLP neuron"))):
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
            high = widest - 0.5
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


def _by_layer(heads: Sequence[np.ndarray]) -> np.ndarray:
    """Return head importance relative to the layer's maximum, float[widest, n_layers]; NaN pads narrower layers."""
    shares = np.full((max(len(h) for h in heads), len(heads)), np.nan)
    for layer, values in enumerate(heads):
        finite = np.where(np.abs(values) < LARGEST, values, np.nan)
        shares[: len(values), layer] = finite / max([1e-30, *finite[np.isfinite(finite)]])
    return shares


def _layer_axis(axes: Axes, n_layers: int) -> None:
    axes.set_xlabel("decoder layer (original number)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(n_layers, 32) + 1))
    axes.set_xlim(-0.6, n_layers - 0.4)
    axes.grid(visible=False, axis="x")


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]) -> Figure | None:
    """Plot training loss terms over steps, one panel per term and one line per run; None without data.

    `curves`: run -> rows of its metrics file. `titles`: term -> title of its panel.
    """
    named = set()
    shown = {term: {name: _curve(rows, term) for name, rows in curves.items()} for term in titles}
    terms = [term for term, by_run in shown.items() if any(by_run.values())][:MOST_PANELS]
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
    """Return up to `MOST_POINTS` points (step, value) of a loss curve that a logarithmic axis can show."""
    points = [(row["step"], float(row[term])) for row in rows if 1 / LARGEST < row.get(term, 0.0) < LARGEST]
    return points[:: -(-len(points) // MOST_POINTS) or 1]
