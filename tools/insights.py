"""Tests of the paper's insights on the runs of a sweep.

The insights are those of arXiv 2604.24380, and a sixth about reconstruction. Each is tested on pairs of runs that
differ in nothing else: same ratio, seed and share of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.evaluation.statistics import interval_of_mean
from vlmprune_jax.planning.guide import METHODS, SOLVED, read_guide
from vlmprune_jax.workdir.sweep import SweepResult

Values = dict[str, list[float]]  # where it was compared -> a number of each pair
HOLDS, FAILS, OPEN, MEASURED = "holds", "does not hold", "undecided", "measured"
AS_GOOD = 1.0  # points of retained % by which a cheaper way may be behind and counts as as good
LEAST_LOSS = 1.0  # points that training must win back for its replacement to be a share of it
BEST, SMALL = "sft_l2", 0.05


@dataclass(frozen=True)
class Point:
    """One evaluated model of a sweep; `level` and `reached` are the requested and the removed share of the decoder.

    `of_control`: retention (%) relative to the unpruned model after the same recovery, if there is one.
    """

    model: str
    parameters: int
    method: str
    recovery: str
    level: float
    reached: float
    data: float
    seed: int | None
    retained: float
    interval: tuple[float, float] | None
    of_control: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Pairs of one setting; `interval` is the 95 % interval of their mean by Student's t, None for a single pair."""

    where: str
    pairs: int
    effect: float
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Conclusion:
    """An insight with its verdict and comparisons."""

    claim: str
    effect: str
    verdict: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Insight:
    """A claim that all values are at least `threshold`; None: an open question, answered by the values."""

    claim: str
    effect: str
    threshold: float | None
    values: Callable[[Sequence[Point]], Values]


def points_of(sweep: SweepResult) -> list[Point]:
    """Return the evaluated models of a `sweep.json` that were pruned with the paper's criteria and have an average."""
    settings, found = read_guide().settings, []
    criteria = tuple(settings[method]["score"][method] for method in METHODS)  # others are another question
    for entry in sweep.models:
        row = entry.found
        if row is None or not row.criterion.startswith(criteria):
            continue
        retained = row.evaluation.mean_of_ratios
        if retained is None or not row.ratio_reached:
            continue
        intervals = list(row.evaluation.retained_interval.values())
        solved = row.reconstruct != "none"
        how = row.recovery if not solved else SOLVED if row.recovery == "none" else f"{SOLVED}+{row.recovery}"
        reached, asked = row.decoder_ratio, row.ratio_asked
        level = reached if asked is None else asked * reached / row.ratio_reached  # from shares of the whole model
        interval = intervals[0] if len(intervals) == 1 else None
        point = Point(
            _name(row.model, sweep.unpruned[row.model].parameters),
            sweep.unpruned[row.model].parameters,
            row.method,
            how,
            round(level, 2),
            reached,
            row.data_fraction,
            entry.seed,
            retained,
            interval,
            None if row.evaluation.control is None else row.evaluation.control.mean_of_ratios,
        )
        found.append(point)
    return found


def _name(folder: str, parameters: int) -> str:
    """Return the folder name and size of a model, as many folders are named `teacher`."""
    millions = parameters / 1e6
    return f"{Path(folder).name}, {millions:,.{2 if millions < 10 else 0}f} M"


def conclude(points: Sequence[Point]) -> list[Conclusion]:
    """Return every insight with its verdict, comparisons, differences and intervals."""
    return [_concluded(insight, insight.values(points)) for insight in INSIGHTS]


def _concluded(insight: Insight, values: Values) -> Conclusion:
    compared = tuple(_compared(where, numbers, insight.threshold) for where, numbers in values.items())
    verdicts = {one.verdict for one in compared}
    # One place that speaks against a claim is enough; all must speak for it.
    verdict = FAILS if FAILS in verdicts else verdicts.pop() if len(verdicts) == 1 else OPEN
    return Conclusion(insight.claim, insight.effect, verdict, compared)


def _compared(where: str, numbers: Sequence[float], threshold: float | None) -> Comparison:
    mean, *ends = interval_of_mean(numbers)
    interval = (ends[0], ends[1]) if len(numbers) > 1 else None
    if interval is None:
        verdict = OPEN
    elif threshold is None:
        verdict = MEASURED
    else:
        verdict = HOLDS if interval[0] >= threshold else FAILS if interval[1] < threshold else OPEN
    return Comparison(where, len(numbers), mean, interval, verdict)


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(
    points: Sequence[Point], ours: tuple[str, str], theirs: tuple[str, str], low: float = 0.0, high: float = 1.0
) -> list[tuple[Point, Point]]:
    """Return pairs of models with two (method, recovery) that differ in nothing else, at levels in (low, high].

    A model without recovery has no share of the data and perhaps no seed, and is a partner for any.
    """

    def key(point: Point, seed: int | None, data: float) -> tuple[Any, ...]:
        return point.model, point.level, seed, data

    others = {key(one, one.seed, one.data): one for one in points if (one.method, one.recovery) == theirs}
    found = []
    for point in points:
        if (point.method, point.recovery) == ours and low < point.level <= high:
            keys = (key(point, point.seed, point.data), key(point, point.seed, 0.0), key(point, None, 0.0))
            partner = next((others[one] for one in keys if one in others), None)
            if partner is not None:
                found.append((point, partner))
    return found


def _of_methods(recovery: str, first: str, second: str, low: float, high: float) -> Callable[[Sequence[Point]], Values]:
    """Return a function for the differences between two methods after one recovery, by level."""

    def values(points: Sequence[Point]) -> Values:
        by_place: dict[tuple[float, float], list[tuple[Point, Point]]] = {}
        for pair in _pairs(points, (first, recovery), (second, recovery), low, high):
            by_place.setdefault((pair[0].level, pair[0].data), []).append(pair)
        found = {}
        for (level, data), pairs in sorted(by_place.items()):
            went = [100 * float(np.mean([pair[side].reached for pair in pairs])) for side in (0, 1)]
            where = f"{100 * level:.0f} % ({first} {went[0]:.1f}, {second} {went[1]:.1f}){_of_data(data)}"
            found[where] = [one.retained - other.retained for one, other in pairs]
        return found

    return values


def _of_data(share: float) -> str:
    return f", {100 * share:g} % of the data" if share else ""


def _of_recoveries(
    ours: str, others: Sequence[str], high: float = 1.0, methods: Sequence[str] = ("depth", "width")
) -> Callable[[Sequence[Point]], Values]:
    """Return a function for the differences between one recovery and others, by method, level and other recovery."""

    def values(points: Sequence[Point]) -> Values:
        found: Values = {}
        for method in methods:
            for other in others:
                for one, partner in _pairs(points, (method, ours), (method, other), 0.0, high):
                    against = f", against {other}" if len(others) > 1 else ""
                    where = f"{method} {100 * one.level:.0f} %{against}{_of_data(one.data)}"
                    found.setdefault(where, []).append(one.retained - partner.retained)
        return found

    return values


def _of_little_data(points: Sequence[Point]) -> Values:
    """Return the retained percentages with the small share of the data, below half of the decoder."""
    found: Values = {}
    for point in points:
        if point.recovery == BEST and point.data == SMALL and point.level < 0.5:
            found.setdefault(f"{point.method} {100 * point.level:.0f} %", []).append(point.retained)
    return found


def _of_all_data(points: Sequence[Point]) -> Values:
    """Return retention with the small share of the data, in % of that with all data, below half of the decoder."""
    whole = {
        (p.model, p.method, p.level, p.seed): p.retained
        for p in points
        if p.recovery == BEST and p.data == 1 and p.retained
    }
    found: Values = {}
    for point in points:
        key = (point.model, point.method, point.level, point.seed)
        if point.recovery == BEST and point.data == SMALL and point.level < 0.5 and key in whole:
            where = f"{point.method} {100 * point.level:.0f} %"
            found.setdefault(where, []).append(100 * point.retained / whole[key])
    return found


def _replaced(points: Sequence[Point]) -> Values:
    """Return the gain of reconstruction, in % of the gain of training for the same pruned model."""
    found: Values = {}
    for method in ("depth", "width"):
        solved = {id(one): other for one, other in _pairs(points, (method, BEST), (method, SOLVED))}
        for trained, plain in _pairs(points, (method, BEST), (method, "none")):
            won = trained.retained - plain.retained
            if id(trained) in solved and won >= LEAST_LOSS:
                where = f"{method} {100 * trained.level:.0f} %{_of_data(trained.data)}"
                found.setdefault(where, []).append(100 * (solved[id(trained)].retained - plain.retained) / won)
    return found


_POINTS, _KEPT = "points of retained %", "retained, %"
INSIGHTS = (
    Insight(
        "1. Without recovery, width pruning retains more accuracy than depth pruning",
        f"width - depth, {_POINTS}",
        0.0,
        _of_methods("none", "width", "depth", 0.0, 1.0),
    ),
    Insight(
        f"2a. With recovery and up to 30 % removed, depth pruning is at most {AS_GOOD:g} point behind width pruning",
        f"depth - width after SFT + L2, {_POINTS}",
        -AS_GOOD,
        _of_methods(BEST, "depth", "width", 0.0, 0.33),
    ),
    Insight(
        "2b. With recovery and 45 % or more removed, width pruning retains more accuracy than depth pruning",
        f"width - depth after SFT + L2, {_POINTS}",
        0.0,
        _of_methods(BEST, "width", "depth", 0.42, 1.0),
    ),
    Insight(
        f"3. With up to 15 % removed, training the projector alone is at most {AS_GOOD:g} point behind SFT + L2",
        f"projector - SFT + L2, {_POINTS}",
        -AS_GOOD,
        _of_recoveries("projector", (BEST,), high=0.18),
    ),
    Insight(
        "4. SFT + L2 retains more accuracy than every other recovery",
        f"SFT + L2 - other recovery, {_POINTS}",
        0.0,
        _of_recoveries(BEST, ("projector", "sft", "sft_kl")),
    ),
    Insight(
        "5a. SFT + L2 on 5 % of the data retains 95 % if less than half of the decoder is removed",
        _KEPT,
        95.0,
        _of_little_data,
    ),
    Insight(
        "5b. Below half of the decoder, 5 % of the data reaches 90 % of the accuracy of training on all data",
        "% of the accuracy with all data",
        90.0,
        _of_all_data,
    ),
    Insight(
        "6a. How much of the gain of SFT + L2 does reconstruction reach without training?",
        "% of the gain of SFT + L2",
        None,
        _replaced,
    ),
    Insight(
        "6b. How much accuracy does reconstruction before SFT + L2 add?",
        f"with - without reconstruction, {_POINTS}",
        None,
        _of_recoveries(f"{SOLVED}+{BEST}", (BEST,)),
    ),
)
