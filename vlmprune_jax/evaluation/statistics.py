"""Confidence intervals over questions and over seeds, and tests of differences between models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtrit

from vlmprune_jax.core.checks import blaming
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric, Scores, mean

DRAWS, LEVEL = 1000, 0.95
_Models = tuple[Sequence[Scores], Sequence[Scores]]  # the pruned and the unpruned one
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
    """Return a confidence interval of retention in %, by the paired percentile bootstrap; None if undefined.

    Questions are drawn with replacement, in units of `metric.drawn_by`, and both models are scored on the same sample,
    so questions that are hard for both do not widen the interval. The interval covers other questions of the same type,
    not another pruning, calibration or training run. Source: Efron and Tibshirani 1993, chapter 13.

    Args:
      scores, original: scores of the pruned and of the unpruned model, per question (per window for a text).
      records: the questions; empty for a text.
      draws: number of bootstrap samples.
      level: share of the samples inside the interval.
      seed: seed of numpy's PCG64; equal arguments give an equal interval.

    Returns:
      (low, high); None if the unpruned model scores 0 in some sample.

    Raises UserError if the models answered different numbers of questions.
    """
    if len(scores) != len(original) or not scores:
        raise UserError(
            f"retained interval: the models have {len(scores)} and {len(original)} answers: both must answer the "
            "same questions"
        )
    random = np.random.Generator(np.random.PCG64(seed))
    with blaming(f'metric "{metric.main}"', *filter(None, [metric.aggregate, metric.drawn_by, metric.drawn])):
        if _is_mean(metric, (*scores, *original)):
            ours, theirs = _drawn_sums(metric, (scores, original), draws, random)
        else:
            ours, theirs = _drawn_values(metric, (scores, original), records, draws, random)
    above, below = (ours, theirs) if metric.higher_is_better else (theirs, ours)
    if not (np.isfinite(above).all() and np.isfinite(below).all() and below.all()):
        return None
    low, high = np.quantile(100.0 * above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def is_quick(metric: Metric, scores: Sequence[Scores]) -> bool:
    """Return True if bootstrap intervals of this metric are fast (no need to aggregate every sample)."""
    return metric.drawn is not None or _is_mean(metric, scores)


def _is_mean(metric: Metric, scores: Sequence[Scores]) -> bool:
    return metric.aggregate is mean and metric.drawn_by is None and all(metric.main in score for score in scores)


def _drawn_sums(metric: Metric, models: _Models, draws: int, random: np.random.Generator) -> np.ndarray:
    """Return each model's sum of scores in every bootstrap sample, float[models, draws]."""
    pairs = np.array([[score[metric.main] for score in pair] for pair in zip(*models, strict=True)])
    different, counts = np.unique(pairs, axis=0, return_counts=True)
    times = random.multinomial(len(pairs), counts / len(pairs), size=draws)
    return (times @ different).T


def _drawn_values(
    metric: Metric, models: _Models, records: Sequence[Record], draws: int, random: np.random.Generator
) -> np.ndarray:
    """Return each model's metric value in every bootstrap sample, float[models, draws]."""
    keys = [metric.drawn_by(record) for record in records] if metric.drawn_by else list(range(len(models[0])))
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


def interval_of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high): the mean over seeds and its 95 % interval by Student's t.

    The interval covers other seeds on the same questions, which `retained_interval` does not.
    """
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return mean, mean, mean
    half = stdtrit(count - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(count)
    return mean, mean - float(half), mean + float(half)


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test: questions that only one of two models answered correctly, and the p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Test whether two models answer equally many of the same questions correctly (McNemar's exact test).

    Only questions that exactly one model got right have weight. If the models are equally good, each such question
    favours either with probability 1/2; the p-value is the two-sided binomial probability of a split at least as
    uneven.

    Args:
      first, second: 1 (right) or 0 (wrong) per question.
    """
    pairs = list(zip(first, second, strict=True))
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    return McNemar(lost, gained, min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that the chance of any false positive stays bounded (Holm 1979)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
