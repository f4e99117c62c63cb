"""Statistical tests of the paper's insights on the results of a sweep.

The insights are those of arXiv 2604.24380, two about reconstruction and one about the control. Each compares
runs with equal ratio, seed and share of the data. If the effect does not differ between settings, the verdict is about
its mean. Otherwise, each setting has its own verdict. Holm's method keeps the chance of any wrong verdict below 5 %
among the claims of a sweep, and among the settings of all its claims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from crossed_effects import holm
from pooling import Effect, Heterogeneity, Value, heterogeneity, pooled
from sweep_points import METHODS, Point

from vlmprune_jax.run.planning.guide import SOLVED

HOLDS, FAILS, EQUAL, OPEN = "holds", "does not hold", "equal within 1 point", "undecided"
BY_SETTING = "by setting"
AS_GOOD = 1.0  # points of retention by which a cheaper method may be behind and still counts as equally good
LEAST_GAIN = 1.0  # minimum gain of training (points of retention) with which reconstruction is compared
WRONG = 0.05  # maximum chance of any wrong verdict in a sweep
DIFFER = 0.1  # p-value below which settings differ (Cochrane's convention, because the test is weak with few seeds)
BEST, SMALL = "sft_l2", 0.05
Contrast = Sequence[tuple[float, Point]]  # weighted sum of retained percentages
Contrasts = Mapping[str, Sequence[Contrast]]  # setting -> one contrast per seed


@dataclass(frozen=True)
class Comparison:
    """Effect of an insight in one setting (method, level, data).

    `p_differs`, `p_equal`: p-values of the tests that the effect differs from the insight's threshold, and that it lies
    within its margin (1 without one), adjusted by Holm's method over the settings of all insights.
    """

    setting: str
    pairs: int
    effect: Effect
    verdict: str
    p_differs: float = 1.0
    p_equal: float = 1.0


@dataclass(frozen=True)
class Conclusion:
    """An insight with its verdict, the mean effect over settings, Holm's adjusted p-value, and the settings.

    If effects differ between settings (`pooled` is False), the mean and its p-value do not test the claim.
    """

    claim: str
    measure: str
    threshold: float
    verdict: str
    effect: Effect | None
    p_value: float
    comparisons: tuple[Comparison, ...]
    heterogeneity: Heterogeneity | None = None

    @property
    def pooled(self) -> bool:
        """True if effects do not differ between settings: Welch's test of Q is not significant, and verdicts agree."""
        differ = self.heterogeneity is not None and self.heterogeneity.p_value < DIFFER
        return not differ and len({comparison.verdict for comparison in self.comparisons} - {OPEN}) < 2


@dataclass(frozen=True)
class Insight:
    """A claim that an effect is at least `threshold`; with `margin`, that effects within ± margin are equal."""

    claim: str
    measure: str
    threshold: float
    margin: float | None
    contrasts: Callable[[Sequence[Point]], Contrasts]


def conclude(points: Sequence[Point]) -> list[Conclusion]:
    """Return every insight with its verdict, mean effect, and effects by setting."""
    cells = [
        {cell: [_value(contrast) for contrast in contrasts] for cell, contrasts in insight.contrasts(points).items()}
        for insight in INSIGHTS
    ]
    effects = [pooled(by_setting) if by_setting else None for by_setting in cells]
    in_settings = {
        (place, cell): pooled({cell: values})
        for place, by_setting in enumerate(cells)
        for cell, values in by_setting.items()
    }
    p_of_settings = _adjusted([(INSIGHTS[place], effect) for (place, _), effect in in_settings.items()])
    rows = list[list[Comparison]]([] for _ in INSIGHTS)
    for ((place, cell), effect), p_values in zip(in_settings.items(), p_of_settings, strict=True):
        verdict = _verdict(effect, INSIGHTS[place], *p_values)
        rows[place].append(Comparison(cell, len(cells[place][cell]), effect, verdict, *p_values))
    return [
        _conclusion(*parts)
        for parts in zip(INSIGHTS, effects, rows, _adjusted([*zip(INSIGHTS, effects, strict=True)]), strict=True)
    ]


def _adjusted(tests: Sequence[tuple[Insight, Effect | None]]) -> list[tuple[float, float]]:
    """Return (p of difference, p of equality) of all effects, by Holm's method; 1 for those without an error."""
    p_values = {}
    for place, (insight, effect) in enumerate(tests):
        if effect is not None and effect.error is not None:
            p_values[place, False] = effect.p_differs(insight.threshold)
            if insight.margin is not None:
                p_values[place, True] = effect.p_equivalent(insight.margin)
    adjusted = holm(p_values)
    return [(adjusted.get((place, False), 1.0), adjusted.get((place, True), 1.0)) for place in range(len(tests))]


def _conclusion(
    insight: Insight, effect: Effect | None, rows: Sequence[Comparison], p_values: tuple[float, float]
) -> Conclusion:
    """Return an insight's conclusion, of which the p-values are about the mean effect over settings."""
    spread = heterogeneity([row.effect for row in rows])
    result = Conclusion(insight.claim, insight.measure, insight.threshold, OPEN, effect, 1.0, tuple(rows), spread)
    if effect is None:
        return result
    if not result.pooled:
        verdicts = {row.verdict for row in rows}
        return dataclasses.replace(result, verdict=BY_SETTING if len(verdicts) > 1 else verdicts.pop())
    verdict = _verdict(effect, insight, *p_values)
    return dataclasses.replace(result, verdict=verdict, p_value=p_values[verdict == EQUAL])


def _verdict(effect: Effect, insight: Insight, p_differs: float, p_equal: float) -> str:
    """Return the verdict from p-values; a significant difference within the margin counts as equal."""
    if p_equal < WRONG:
        return EQUAL
    if p_differs < WRONG:
        return HOLDS if effect.mean > insight.threshold else FAILS
    return OPEN


def _value(contrast: Contrast) -> Value:
    """Return the weighted sum of a contrast's retentions, also by question if these are known."""
    seed = next((point.seed for _, point in contrast if point.seed is not None), None)
    value = sum(weight * point.retained for weight, point in contrast)
    columns = [weight * point.questions for weight, point in contrast if point.questions is not None]
    return Value(seed, value, np.sum(columns, axis=0) if len(columns) == len(contrast) else None)


# --- contrasts --------------------------------------------------------------------------------------------------------


class _Partners:
    """Lookup of the model that differs from another only in method and recovery (and, if given, share of the data).

    A model without recovery has no share of the data and perhaps no seed, and is a partner for any.
    """

    def __init__(self, points: Sequence[Point]):
        self._by_key = {(p.model, p.level, p.method, p.recovery, p.data, p.seed): p for p in points}

    def of(self, point: Point, method: str, recovery: str, data: float | None = None) -> Point | None:
        """Return the model like `point` with this method, recovery and share of the data; None if it was not run."""
        for share in (point.data, 0.0) if data is None else (data,):
            for seed in (point.seed, None):
                partner = self._by_key.get((point.model, point.level, method, recovery, share, seed))
                if partner is not None:
                    return partner
        return None


def _of_data(share: float) -> str:
    return f", {100 * share:g} % of the data" if share else ""


def _of_methods(
    recovery: str, first: str, second: str, low: float, high: float
) -> Callable[[Sequence[Point]], Contrasts]:
    """Return a function that pairs two pruning methods after the same recovery, at levels in (low, high]."""

    def contrasts(points: Sequence[Point]) -> Contrasts:
        by_place: dict[tuple[float, float], list[tuple[Point, Point]]] = {}
        partners = _Partners(points)
        for point in points:
            if (point.method, point.recovery) == (first, recovery) and low < point.level <= high:
                other = partners.of(point, second, recovery)
                if other is not None:
                    by_place.setdefault((point.level, point.data), []).append((point, other))
        return {
            f"{100 * level:.0f} %{_of_data(data)}": [((1.0, point), (-1.0, other)) for point, other in pairs]
            for (level, data), pairs in sorted(by_place.items())
        }

    return contrasts


def _within(
    ours: str,
    others: Sequence[tuple[float, str, float | None]],
    high: float = 1.0,
    methods: Sequence[str] = METHODS,
    data: float | None = None,
) -> Callable[[Sequence[Point]], Contrasts]:
    """Return a function that contrasts recoveries of the same pruned model, by method, level and share of the data.

    Args:
      ours: name of the recovery with weight 1.
      others: (weight, name, share of the data or None for the same share) of the other recoveries.
      high: highest level.
      data: share of the data of `ours`; None for all.
    """

    def found(points: Sequence[Point]) -> Iterator[Contrast]:
        partners, weights = _Partners(points), [weight for weight, *_ in others]
        for point in points:
            if point.recovery != ours or point.method not in methods or point.level > high:
                continue
            known = [partner for _, name, share in others if (partner := partners.of(point, point.method, name, share))]
            if data in (None, point.data) and len(known) == len(others):
                yield [(1.0, point), *zip(weights, known, strict=True)]

    return lambda points: _by_setting(found(points))


def _by_setting(contrasts: Iterable[Contrast]) -> Contrasts:
    """Group contrasts by setting: method, level and share of the training data."""
    by_setting: dict[str, list[Contrast]] = {}
    for contrast in contrasts:
        _, point = contrast[0]
        trained = next((trained for _, trained in contrast if trained.data), point)
        by_setting.setdefault(f"{point.method} {100 * point.level:.0f} %{_of_data(trained.data)}", []).append(contrast)
    return by_setting


def _half_of_gain(points: Sequence[Point]) -> Contrasts:
    """Return contrasts of reconstruction alone with half of SFT + L2's gain, in settings that training improves."""
    pairs = _within(BEST, [(-1.0, "none", None)])(points)
    gains = {cell: np.mean([_value(contrast).value for contrast in contrasts]) for cell, contrasts in pairs.items()}
    halves = _within(BEST, [(0.0, SOLVED, None), (0.0, "none", None)])(points)
    return {
        cell: [[(1.0, solved), (-0.5, trained), (-0.5, plain)] for (_, trained), (_, solved), (_, plain) in contrasts]
        for cell, contrasts in halves.items()
        if gains[cell] >= LEAST_GAIN
    }


def _of_control(points: Sequence[Point]) -> Contrasts:
    """Return contrasts with the retention relative to the control, after SFT + L2 on the small share of the data."""
    return _by_setting(
        [(1.0, dataclasses.replace(point, retained=point.of_control, questions=None))]
        for point in points
        if point.recovery == BEST and point.data == SMALL and point.level < 0.5 and point.of_control is not None
    )


_THREE = ("depth", "width", "hybrid")
INSIGHTS = (
    Insight(
        "1. Without recovery, width pruning retains more accuracy than depth pruning",
        "width minus depth",
        0.0,
        AS_GOOD,
        _of_methods("none", "width", "depth", 0.0, 1.0),
    ),
    Insight(
        f"2a. With recovery and up to 30 % removed, depth pruning is at most {AS_GOOD:g} point behind width pruning",
        "depth minus width after SFT + L2",
        -AS_GOOD,
        None,
        _of_methods(BEST, "depth", "width", 0.0, 0.33),
    ),
    Insight(
        "2b. With recovery and 45 % or more removed, width pruning retains more accuracy than depth pruning",
        "width minus depth after SFT + L2",
        0.0,
        AS_GOOD,
        _of_methods(BEST, "width", "depth", 0.42, 1.0),
    ),
    Insight(
        f"3. With up to 15 % removed, training the projector alone is at most {AS_GOOD:g} point behind SFT + L2",
        "projector minus SFT + L2",
        -AS_GOOD,
        None,
        _within("projector", [(-1.0, BEST, None)], high=0.18),
    ),
    *(
        Insight(
            f"4{letter}. SFT + L2 retains more accuracy than {words}",
            f"SFT + L2 minus {words}",
            0.0,
            AS_GOOD,
            _within(BEST, [(-1.0, name, None)]),
        )
        for letter, name, words in (
            ("a", "projector", "training the projector alone"),
            ("b", "sft", "SFT"),
            ("c", "sft_kl", "SFT + KL"),
        )
    ),
    Insight(
        "5a. SFT + L2 on 5 % of the data retains 95 % if less than half of the decoder is removed",
        "retained, %",
        95.0,
        None,
        _within(BEST, [], high=0.5, methods=_THREE, data=SMALL),
    ),
    Insight(
        "5b. With less than half of the decoder removed, 5 % of the data reaches 90 % of the accuracy of all data",
        "accuracy with 5 %, minus 0.9 x accuracy with all data",
        0.0,
        None,
        _within(BEST, [(-0.9, BEST, 1.0)], high=0.5, methods=_THREE, data=SMALL),
    ),
    Insight(
        "6a. Reconstruction without training reaches at least half of the gain of SFT + L2",
        "reconstruction, minus the mean of no recovery and SFT + L2",
        0.0,
        AS_GOOD,
        _half_of_gain,
    ),
    Insight(
        "6b. Reconstruction before SFT + L2 adds accuracy",
        "with minus without reconstruction",
        0.0,
        AS_GOOD,
        _within(f"{SOLVED}+{BEST}", [(-1.0, BEST, None)]),
    ),
    Insight(
        f"7. SFT + L2 on 5 % of the data stays within {AS_GOOD:g} point of the unpruned model after the same training",
        "retained of the control, %",
        100.0 - AS_GOOD,
        None,
        _of_control,
    ),
)
