"""How sure a difference is between models: intervals over questions and over seeds, and a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric, Scores, mean

DRAWS, LEVEL = 1000, 0.95
_AT_ONCE = 100  # samples, whose counts are in memory together


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
    """A percentile interval of what is retained in %, by the paired bootstrap (Efron and Tibshirani 1993, chapter 13).

    Questions are drawn with replacement, those that `metric.drawn_by` keeps together as one, and both models are
    measured on what was drawn: what is hard for both does not widen the interval. It speaks of other questions of the
    kind, not of another pruning, calibration or training.

    Args:
      scores, original: of the pruned and of the unpruned model, question by question (window by window of a text).
      records: the questions; none for a text.
      draws: number of bootstrap samples.
      level: share of the samples within the interval.
      seed: of numpy's PCG64; equal arguments give an equal interval.

    Returns:
      (low, high); None where some sample has no percentage, as the unpruned model scores 0 in it.

    Raises:
      UserError: the two did not answer the same number of questions.
    """
    if len(scores) != len(original) or not scores:
        raise UserError(
            f"answers to {len(scores)} and {len(original)} questions: both models must answer the same ones"
        )
    random = np.random.Generator(np.random.PCG64(seed))
    ours, theirs = (_drawn_means if _is_mean(metric, (*scores, *original)) else _drawn_values)(
        metric, scores, original, records, draws, random
    )
    above, below = (ours, theirs) if metric.higher_is_better else (theirs, ours)
    if not (np.isfinite(above).all() and np.isfinite(below).all() and below.all()):
        return None
    low, high = np.quantile(100.0 * above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def is_quick(metric: Metric, scores: Sequence[Scores]) -> bool:
    """Whether an interval takes moments for thousands of questions; else the metric aggregates every sample anew."""
    return metric.drawn is not None or _is_mean(metric, scores)


def _is_mean(metric: Metric, scores: Sequence[Scores]) -> bool:
    return metric.aggregate is mean and metric.drawn_by is None and all(metric.main in one for one in scores)


def _drawn_means(
    metric: Metric,
    scores: Sequence[Scores],
    original: Sequence[Scores],
    records: Sequence[Record],
    draws: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """float[draws] sums of both, by drawing how often each pair of scores comes: four pairs of right and wrong."""
    del records
    pairs = np.array([[one[metric.main] for one in both] for both in zip(scores, original, strict=True)])
    different, counts = np.unique(pairs, axis=0, return_counts=True)
    times = random.multinomial(len(pairs), counts / len(pairs), size=draws)
    sums = times @ different
    return sums[:, 0], sums[:, 1]


def _drawn_values(
    metric: Metric,
    scores: Sequence[Scores],
    original: Sequence[Scores],
    records: Sequence[Record],
    draws: int,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """float[draws] values of both, by aggregating every sample."""
    keys = [metric.drawn_by(record) for record in records] if metric.drawn_by else list(range(len(scores)))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    units = np.array([numbers[key] for key in keys])
    found: list[list[np.ndarray]] = []
    for start in range(0, draws, _AT_ONCE):
        drawn = (random.integers(len(numbers), size=len(numbers)) for _ in range(min(_AT_ONCE, draws - start)))
        times = np.stack([np.bincount(one, minlength=len(numbers)) for one in drawn], axis=1)[units]
        found.append([_values(metric, of, records, times) for of in (scores, original)])
    ours, theirs = np.concatenate(found, axis=1)
    return ours, theirs


def _values(metric: Metric, scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> np.ndarray:
    """float[draws] of the main value, where answers count int[answers, draws] times."""
    if metric.drawn is not None:
        return metric.drawn(scores, records, times.astype(float))[metric.main]
    values = []
    for column in times.T:
        places = np.repeat(np.arange(len(scores)), column).tolist()
        asked = [records[place] for place in places] if records else ()
        values.append(metric.values([scores[place] for place in places], asked)[metric.main])
    return np.array(values)


def interval_of_mean(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, low, high) of what several seeds gave, by Student's t; of one value alone low and high are the mean.

    It speaks of other seeds on the same questions, which `retained_interval` does not.
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, mean, mean
    half = stdtrit(count - 1, (1 + level) / 2) * np.std(values, ddof=1) / np.sqrt(count)
    return mean, mean - float(half), mean + float(half)


@dataclass(frozen=True)
class McNemar:
    """Questions that only the first of two models got right, and only the second; `p_value` as `mcnemar` has it."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test (1947) of whether two models are right equally often on the same questions.

    Only questions count that one of them got right and the other wrong; were the models equally good, each would go
    either way like a coin. The two-sided binomial probability of a split at least as uneven.

    Args:
      first, second: 1 (right) or 0 (wrong) of every question.

    Raises:
      UserError: the two did not answer the same number of questions, or a score is neither 0 nor 1.
    """
    if len(first) != len(second):
        raise UserError(f"answers to {len(first)} and {len(second)} questions: both models must answer the same ones")
    odd = next((score for score in (*first, *second) if score not in (0, 1)), None)
    if odd is not None:
        raise UserError(f"McNemar's test is of right and wrong answers, not of a score {odd}; use the interval instead")
    pairs = list(zip(first, second, strict=True))
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    number, term, tail = lost + gained, 1, 0
    for fewer in range(min(lost, gained) + 1):  # term = math.comb(number, fewer), whose sum no float holds
        tail += term
        term = term * (number - fewer) // (fewer + 1)
    return McNemar(lost, gained, min(1.0, 2 * tail / 2**number))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, each raised so that among all of them one in twenty such tables has any below 0.05 by
    chance (Holm 1979).
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
