"""Mean effects over seeds, questions and settings, with tests of difference, equivalence and heterogeneity.

Seeds and questions are crossed: every seed answers the same questions, and settings share their seeds. An effect's
variance is that of its means over seeds plus that of its means over questions, so that it generalises to other seeds
and other questions (Owen 2007, "The pigeonhole bootstrap", of which this is the expectation without draws).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtr, stdtrit

LEVEL = 0.95
LEAST_ERROR = 1e-6  # standard error assumed for an effect that is equal for all seeds


@dataclass(frozen=True)
class Value:
    """Effect for one seed; `questions`: its contributions by question, float[questions] with the effect as mean."""

    seed: int | None
    value: float
    questions: np.ndarray | None = None


Cells = Mapping[str, Sequence[Value]]  # values by setting


@dataclass(frozen=True)
class Effect:
    """Mean effect with its standard error and degrees of freedom; `error` is None for one seed alone."""

    mean: float
    error: float | None
    freedom: float
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval by Student's t; None for one seed alone."""
        if self.error is None:
            return None
        half = float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * self.error
        return self.mean - half, self.mean + half

    def p_above(self, threshold: float) -> float:
        """Return the p-value of the test that the effect is above a threshold."""
        if self.error is None:
            return 1.0
        if self.error == 0:
            return float(self.mean <= threshold)
        return float(stdtr(self.freedom, (threshold - self.mean) / self.error))

    def p_differs(self, threshold: float) -> float:
        """Return the two-sided p-value of the test that the effect differs from a threshold."""
        above = self.p_above(threshold)
        return 1.0 if self.error is None else min(1.0, 2 * min(above, 1 - above))

    def p_equivalent(self, margin: float) -> float:
        """Return the p-value of the test that the effect is within ± margin (two one-sided tests, Schuirmann 1987)."""
        return 1.0 if self.error is None else max(self.p_above(-margin), 1 - self.p_above(margin))


def pooled(cells: Cells) -> Effect:
    """Return the mean effect over settings of equal weight; seeds that settings share are not counted twice."""
    deviations: dict[int | None, float] = {}
    means = {setting: float(np.mean([value.value for value in values])) for setting, values in cells.items()}
    for setting, values in cells.items():
        for value in values:
            part = (value.value - means[setting]) / (len(cells) * len(values))
            deviations[value.seed] = deviations.get(value.seed, 0.0) + part
    seeds = len(deviations)
    if seeds < 2:
        return Effect(float(np.mean(list(means.values()))), None, 0.0, seeds)
    of_seeds = sum(part**2 for part in deviations.values()) * seeds / (seeds - 1)
    of_questions, count = _question_variance(cells)
    total = of_seeds + of_questions
    # Satterthwaite's degrees of freedom of a sum of variances
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + of_questions**2 / (count - 1)) if total else seeds - 1
    return Effect(float(np.mean(list(means.values()))), math.sqrt(total), freedom, seeds)


def _question_variance(cells: Cells) -> tuple[float, int]:
    """Return the variance of the mean over questions, and their number; (0, 2) if effects by question are unknown."""
    columns = [[value.questions for value in values] for values in cells.values()]
    known = [array for column in columns for array in column if array is not None]
    if len(known) < sum(map(len, columns)) or len({len(array) for array in known}) != 1:
        return 0.0, 2
    mean = np.mean([np.mean(np.stack(column), axis=0) for column in columns], axis=0)  # type: ignore[arg-type]
    return float(np.var(mean, ddof=1)) / len(mean), len(mean)


@dataclass(frozen=True)
class Heterogeneity:
    """Result of testing whether all settings have the same effect: Cochran's Q and its p-value."""

    q: float
    freedom: int
    p_value: float

    @property
    def i_squared(self) -> float:
        """Share of the spread between settings that is not noise (%), I^2 of Higgins and Thompson (2002)."""
        return 100 * max(0.0, 1 - self.freedom / self.q) if self.q else 0.0


def heterogeneity(effects: Sequence[Effect]) -> Heterogeneity | None:
    """Test whether the effects of settings differ; None if fewer than two have an error.

    The p-value is Welch's (1951), as Q has no chi-squared distribution if errors are estimated from a few seeds. Seeds
    that settings share make it too large rather than too small.
    """
    known = [effect for effect in effects if effect.error is not None]
    count = len(known)
    if count < 2:
        return None
    means = np.array([effect.mean for effect in known])
    weights = np.array([1 / max(effect.error or 0.0, LEAST_ERROR) ** 2 for effect in known])
    shares = weights / weights.sum()
    q = float(weights @ (means - shares @ means) ** 2)
    unsure = float(sum((1 - share) ** 2 / effect.freedom for share, effect in zip(shares, known, strict=True)))
    ratio = q / (count - 1) / (1 + 2 * (count - 2) / (count**2 - 1) * unsure)
    return Heterogeneity(q, count - 1, float(fdtrc(count - 1, (count**2 - 1) / (3 * unsure), ratio)))
