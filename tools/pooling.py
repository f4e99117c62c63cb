"""Effects over seeds and questions, pooled over settings; tests of difference and of equivalence.

Seeds and questions are crossed: every seed answers the same questions, and settings share their seeds. An effect's
variance is that of its means over seeds plus that of its means over questions, so that it generalises to other seeds
and other questions (Owen 2007, "The pigeonhole bootstrap", of which this is the expectation without draws).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Value:
    """Effect of one seed; `questions` are its parts, float[questions] with the effect as mean, if they are known."""

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
    parts: dict[int | None, float] = {}
    means = {where: float(np.mean([one.value for one in values])) for where, values in cells.items()}
    for where, values in cells.items():
        for one in values:
            part = (one.value - means[where]) / (len(cells) * len(values))
            parts[one.seed] = parts.get(one.seed, 0.0) + part
    seeds = len(parts)
    if seeds < 2:
        return Effect(float(np.mean(list(means.values()))), None, 0.0, seeds)
    of_seeds = sum(part**2 for part in parts.values()) * seeds / (seeds - 1)
    of_questions, count = _question_variance(cells)
    total = of_seeds + of_questions
    # Satterthwaite's degrees of freedom of a sum of variances
    freedom = total**2 / (of_seeds**2 / (seeds - 1) + of_questions**2 / (count - 1)) if total else seeds - 1
    return Effect(float(np.mean(list(means.values()))), math.sqrt(total), freedom, seeds)


def _question_variance(cells: Cells) -> tuple[float, int]:
    """Return the variance of the mean over questions, and their number; 0 if some parts are unknown."""
    columns = [[one.questions for one in values] for values in cells.values()]
    known = [array for column in columns for array in column if array is not None]
    if len(known) < sum(map(len, columns)) or len({len(array) for array in known}) != 1:
        return 0.0, 2
    mean = np.mean([np.mean(np.stack(column), axis=0) for column in columns], axis=0)  # type: ignore[arg-type]
    return float(np.var(mean, ddof=1)) / len(mean), len(mean)


def partially_pooled(cells: Cells) -> dict[str, Effect]:
    """Return each setting's effect, drawn towards the mean of all as far as their spread is noise.

    The spread between settings is estimated by DerSimonian and Laird (1986); settings of one seed stay as they are.
    """
    alone = {where: pooled({where: values}) for where, values in cells.items()}
    known = {where: one for where, one in alone.items() if one.error}
    if len(known) < 2:
        return alone
    weights = {where: 1 / (one.error or 1.0) ** 2 for where, one in known.items()}
    total = sum(weights.values())
    mean = sum(weights[where] * one.mean for where, one in known.items()) / total
    excess = sum(weights[where] * (one.mean - mean) ** 2 for where, one in known.items()) - (len(known) - 1)
    between = max(0.0, excess / (total - sum(weight**2 for weight in weights.values()) / total))
    center = sum(one.mean / (between + 1 / weights[where]) for where, one in known.items())
    center /= sum(1 / (between + 1 / weights[where]) for where in known)
    of_center = 1 / sum(1 / (between + 1 / weights[where]) for where in known)
    found = dict(alone)
    for where, one in known.items():
        own = between / (between + 1 / weights[where])  # weight of the setting's own mean
        variance = own / weights[where] + (1 - own) ** 2 * of_center
        found[where] = Effect(own * one.mean + (1 - own) * center, math.sqrt(variance), one.freedom, one.seeds)
    return found
