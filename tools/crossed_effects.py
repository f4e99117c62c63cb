"""Intervals and tests over seeds and questions for tools/check_study.py, which shares no code with tools/pooling.py.

Student's t over seeds; Bonett and Price (2006) over questions; crossed seeds and questions (Owen 2007) with
Satterthwaite's degrees of freedom; Welch (1951); Schuirmann (1987); Fisher's sign flips (1935); Holm (1979).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Contrast = dict[int, tuple[float, np.ndarray | None]]  # seed -> effect, and its parts by question if they are known


def question_interval(correct: np.ndarray, unpruned: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval over questions of a retained percentage, from the right answers bool[questions]."""
    counts = [int(correct.sum()), int(unpruned.sum())]
    either, discordant = int((correct | unpruned).sum()), int((correct != unpruned).sum())
    spread = sum(np.sqrt((1 - (count + 1) / (either + 2)) / (count + 1)) for count in counts)
    z = stats.norm.ppf(0.975) * np.sqrt((discordant + 2) / ((counts[0] + 1) * (counts[1] + 1))) / spread
    halves = [z * np.sqrt(z**2 + 4 * count * (1 - count / either)) for count in counts]
    (low, high), (least, most) = (
        ((2 * count + z**2 - half), (2 * count + z**2 + half)) for count, half in zip(counts, halves, strict=True)
    )
    return float(100 * max(low, 0) / most), float(100 * high / least)


@dataclass(frozen=True)
class Effect:
    """Mean effect over seeds and questions, standard error, degrees of freedom; `values`: means over settings."""

    values: np.ndarray
    mean: float
    error: float
    freedom: float
    question_error: float

    def __str__(self) -> str:
        half = stats.t.ppf(0.975, self.freedom) * self.error
        return f"{self.mean:.2f} ({self.mean - half:.2f} to {self.mean + half:.2f})"

    def p_differs(self, threshold: float) -> float:
        """Return the two-sided p-value of a difference from the threshold."""
        return 2 * float(stats.t.sf(abs(self.mean - threshold) / self.error, self.freedom))

    def p_equal(self, margin: float | None) -> float:
        """Return the p-value of equivalence within ± margin, the larger of two one-sided tests; 1 without margin."""
        return 1.0 if margin is None else float(stats.t.sf((margin - abs(self.mean)) / self.error, self.freedom))

    def p_signs(self, threshold: float) -> float:
        """Return the p-value of the exact sign-flip test over seeds, at least that of the mean over questions."""
        shifts, distance = self.values - threshold, abs(self.mean - threshold)
        flips = np.array(list(itertools.product((1, -1), repeat=len(shifts))))
        p = float(np.mean(abs(flips @ shifts) >= abs(shifts.sum()) * (1 - 1e-9)))
        return max(p, 2 * float(stats.norm.sf(distance / self.question_error))) if self.question_error else p


def mean_effect(settings: Sequence[Contrast]) -> Effect | None:
    """Return the mean effect over settings of equal weight, which share seeds and questions; None for one seed."""
    means = [float(np.mean([value for value, _ in setting.values()])) for setting in settings]
    deviations: dict[int, float] = {}
    for setting, mean in zip(settings, means, strict=True):
        for seed, (value, _) in setting.items():
            deviations[seed] = deviations.get(seed, 0) + (value - mean) / len(setting) / len(settings)
    count, of_questions, questions = len(deviations), 0.0, 2
    if count < 2:
        return None
    of_seeds = sum(part**2 for part in deviations.values()) * count / (count - 1)
    parts = [[part for _, part in setting.values() if part is not None] for setting in settings]
    if all(parts):
        by_question = np.mean([np.mean(part, axis=0) for part in parts], axis=0)
        of_questions, questions = float(stats.sem(by_question)) ** 2, len(by_question)
    total = max(of_seeds + of_questions, 1e-12)  # effects may be equal for all seeds
    freedom = total**2 / max(of_seeds**2 / (count - 1) + of_questions**2 / (questions - 1), 1e-24 / (count - 1))
    values = [np.mean([setting[seed][0] for setting in settings if seed in setting]) for seed in deviations]
    return Effect(np.array(values), float(np.mean(means)), np.sqrt(total), freedom, np.sqrt(of_questions))


def error_ratio(first: Sequence[int], second: Sequence[int]) -> tuple[float, float, float, float]:
    """Return the ratio of two models' wrong answers by seed, its 95 % interval, and the p-value of a ratio of 1.

    Student's t on logarithms, with half an error added to each, as a model may have none.
    """
    logarithms = np.log((np.array(first) + 0.5) / (np.array(second) + 0.5))
    mean, error, freedom = float(logarithms.mean()), max(float(stats.sem(logarithms)), 1e-6), len(logarithms) - 1
    half = float(stats.t.ppf(0.975, freedom)) * error
    ratio, low, high = (float(np.exp(value)) for value in (mean, mean - half, mean + half))
    return ratio, low, high, 2 * float(stats.t.sf(abs(mean) / error, freedom))


def heterogeneity(effects: Sequence[Effect]) -> tuple[float, float]:
    """Return (I² in percent, p-value of Welch's test that all settings have the same effect)."""
    weights, count = np.array([1 / effect.error**2 for effect in effects]), len(effects)
    means, shares = np.array([effect.mean for effect in effects]), weights / weights.sum()
    q = float(weights @ (means - shares @ means) ** 2)
    unsure = float(sum((1 - shares) ** 2 / [effect.freedom for effect in effects]))
    ratio = q / (count - 1) / (1 + 2 * (count - 2) / (count**2 - 1) * unsure)
    return 100 * max(0.0, 1 - (count - 1) / q), float(stats.f.sf(ratio, count - 1, (count**2 - 1) / (3 * unsure)))


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Return the adjusted p-values by the same keys."""
    ranked = sorted(p_values, key=lambda key: p_values[key])
    products = [(len(ranked) - rank) * p_values[key] for rank, key in enumerate(ranked)]
    return dict(zip(ranked, map(float, np.minimum(1, np.maximum.accumulate(products or [1.0]))), strict=False))
