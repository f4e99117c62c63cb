"""Retained percentage of a pruned model's scores, per benchmark and on average; plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vlmprune_jax.core.errors import UserError


def retained(score: float, original: float) -> float:
    """Return `score` as a percentage of the unpruned model's score `original`; NaN if `original` is 0."""
    return 100.0 * score / original if original else math.nan


def retained_per_benchmark(scores: Mapping[str, float], original: Mapping[str, float]) -> dict[str, float]:
    """Return {benchmark: retained percentage}, in the order of `original`."""
    odd = sorted(set(scores) ^ set(original))
    if odd or not original:
        raise UserError(
            f"retained percentages: {', '.join(odd) or 'no benchmark'} scored for one model only: score both models on "
            "the same benchmarks"
        )
    for name, value in original.items():
        if value == 0:
            raise UserError(
                f"benchmark {name}: the unpruned model scores 0, so no percentage exists: leave this benchmark out"
            )
    return {name: retained(scores[name], value) for name, value in original.items()}


def mean_of_ratios(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """Return the mean retained percentage over benchmarks, all with equal weight."""
    ratios = retained_per_benchmark(scores, original)
    return sum(ratios.values()) / len(ratios)


def paper_average(scores: Mapping[str, float], original: Mapping[str, float], full: Mapping[str, float]) -> float:
    """Return the paper's AVG-% (arXiv 2604.24380): 100 x sum of normalised scores / sum of those of the unpruned model.

    A score is normalised by the full score (800 for MME cognition, 2000 for MME perception), so benchmarks with high
    scores have more weight than in `mean_of_ratios`.
    """
    retained_per_benchmark(scores, original)
    ours, theirs = (sum(value / full[name] for name, value in side.items()) for side in (scores, original))
    if theirs == 0:
        raise UserError("paper average: the unpruned model's scores sum to 0, so no percentage exists: leave some out")
    return 100.0 * ours / theirs
