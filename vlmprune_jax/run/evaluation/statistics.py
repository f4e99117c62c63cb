"""Confidence intervals over questions and over seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import ndtri, stdtrit

from vlmprune_jax.base.checks import blaming
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics.metric import Metric, Scores, mean

DRAWS, LEVEL = 1000, 0.95
_Models = tuple[Sequence[Scores], Sequence[Scores]]  # question scores of the pruned and of the unpruned model
_AT_ONCE = 100  # bootstrap samples whose counts are in memory together


def retained_interval(
    metric: Metric,
    scores: Sequence[Scores],
    original: Sequence[Scores],
    records: Sequence[Record],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return a confidence interval of retention in % over questions; None if the unpruned model may score 0.

    For right and wrong answers, retention is a ratio of paired proportions, and the interval is that of Bonett and
    Price (2006), which combines Wilson intervals: it has a width even if every answer is right. For other metrics, it
    is a paired percentile bootstrap (Efron and Tibshirani 1993, chapter 13): units of `metric.drawn_by` are drawn with
    replacement, and both models are scored on the same sample. If the models score the same in every unit, all samples
    are equal; the interval is then that of as many right answers as there are units. All intervals describe the
    variation over other questions of the same type, not over another pruning, calibration or training run. Questions
    that are hard for both models do not widen them.

    Args:
      scores, original: scores of the pruned and of the unpruned model, per question (per window for a text).
      records: the questions; empty for a text.
      draws: number of bootstrap samples.
      level: confidence level.
      seed: seed of numpy's PCG64; equal arguments give an equal interval.

    Raises UserError if the models answered different numbers of questions.
    """
    if len(scores) != len(original) or not scores:
        raise UserError(
            f"retained interval: the models have {len(scores)} and {len(original)} answers: both must answer the "
            "same questions"
        )
    random, mean_of_scores = np.random.Generator(np.random.PCG64(seed)), _is_mean(metric, (*scores, *original))
    if mean_of_scores:
        pairs = np.array([[score[metric.main] for score in pair] for pair in zip(scores, original, strict=True)])
        if np.isin(pairs, (0, 1)).all():
            return _interval_of_ratio(pairs if metric.higher_is_better else pairs[:, ::-1], level)
    with blaming(f'metric "{metric.main}"', *filter(None, [metric.aggregate, metric.drawn_by, metric.drawn])):
        if mean_of_scores:
            different, counts = np.unique(pairs, axis=0, return_counts=True)
            ours, theirs = (random.multinomial(len(pairs), counts / len(pairs), size=draws) @ different).T
        else:
            ours, theirs = _drawn_values(metric, (scores, original), records, draws, random)
    above, below = (ours, theirs) if metric.higher_is_better else (theirs, ours)
    if not (np.isfinite(above).all() and np.isfinite(below).all() and below.all()):
        return None
    if list(scores) == list(original):
        return _interval_of_ratio(np.ones((len(set(_units(metric, records, len(scores)))), 2)), level)
    low, high = np.quantile(100.0 * above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _interval_of_ratio(pairs: np.ndarray, level: float) -> tuple[float, float] | None:
    """Return the interval (%) of the ratio of two accuracies, given 0/1 scores [questions, 2] (Bonett and Price)."""
    first, second = map(float, pairs.sum(axis=0))
    count, different = int(pairs.any(axis=1).sum()), int((pairs[:, 0] != pairs[:, 1]).sum())
    if not second:
        return None
    spread = [math.sqrt((1 - (right + 1) / (count + 2)) / (right + 1)) for right in (first, second)]
    paired = math.sqrt((different + 2) / ((first + 1) * (second + 1)))
    z = float(ndtri((1 + level) / 2)) * paired / sum(spread)

    def wilson(right: float) -> tuple[float, float]:
        """Return Wilson's interval of a proportion (Wilson 1927)."""
        center, half = 2 * right + z**2, z * math.sqrt(z**2 + 4 * right * (1 - right / count))
        return max(0.0, center - half) / (2 * (count + z**2)), (center + half) / (2 * (count + z**2))

    (low, high), (least, most) = wilson(first), wilson(second)
    return 100 * low / most, 100 * high / least


def is_quick(metric: Metric, scores: Sequence[Scores]) -> bool:
    """Return True if bootstrap intervals of this metric are fast (no need to aggregate every sample)."""
    return metric.drawn is not None or _is_mean(metric, scores)


def _is_mean(metric: Metric, scores: Sequence[Scores]) -> bool:
    plain = metric.aggregate is mean and metric.drawn is None and metric.drawn_by is None
    return plain and all(metric.main in score for score in scores)


def _units(metric: Metric, records: Sequence[Record], count: int) -> list[Hashable]:
    """Return the unit (image, group or question) that the bootstrap draws for each question."""
    return [metric.drawn_by(record) for record in records] if metric.drawn_by else list(range(count))


def _drawn_values(
    metric: Metric, models: _Models, records: Sequence[Record], draws: int, random: np.random.Generator
) -> np.ndarray:
    """Return each model's metric value in every bootstrap sample, float[models, draws]."""
    keys = _units(metric, records, len(models[0]))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    units = np.array([numbers[key] for key in keys])
    values: list[list[np.ndarray]] = []
    for start in range(0, draws, _AT_ONCE):
        samples = (random.integers(len(numbers), size=len(numbers)) for _ in range(min(_AT_ONCE, draws - start)))
        times = np.stack([np.bincount(sample, minlength=len(numbers)) for sample in samples], axis=1)[units]
        values.append([_values(metric, model, records, times) for model in models])
    return np.concatenate(values, axis=1)


def _values(metric: Metric, scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> np.ndarray:
    """Return the main value of each bootstrap sample, float[draws], given how often it contains each answer."""
    if metric.drawn is not None:
        return metric.drawn(scores, records, times.astype(float))[metric.main]
    values = []
    for column in times.T:
        places = np.repeat(np.arange(len(scores)), column).tolist()
        asked = [records[place] for place in places] if records else ()
        values.append(metric.values([scores[place] for place in places], asked)[metric.main])
    return np.array(values)


def interval_of_mean(
    values: Sequence[float], intervals: Sequence[tuple[float, float] | None] = ()
) -> tuple[float, float, float]:
    """Return (mean, low, high): a mean over seeds and its 95 % interval over seeds and questions.

    The part over seeds is Student's t interval. `intervals` has each seed's interval over questions. All seeds answer
    the same questions, so the part over questions is the mean distance of their ends from the mean. The squares of
    both parts are added, as for independent errors. If an interval is unknown, or `intervals` is empty, the result only
    covers seeds. If nothing is known, low = high = mean.
    """
    mean, count = float(np.mean(values)), len(values)
    half = 0.0 if count == 1 else stdtrit(count - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(count)
    known = [ends for ends in intervals if ends is not None]
    low, high = np.mean(known, axis=0) - mean if known and len(known) == count else (0.0, 0.0)
    return mean, mean - math.hypot(half, low), mean + math.hypot(half, high)
