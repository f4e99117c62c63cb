"""What pruning left of a model's scores, per benchmark and on average; plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vlmprune_jax.core.errors import UserError


def retained(score: float, original: float) -> float:
    """100 * score / original: the percentage of the unpruned model's score that is left (NaN where that was 0)."""
    return 100.0 * score / original if original else math.nan


def retained_per_benchmark(scores: Mapping[str, float], original: Mapping[str, float]) -> dict[str, float]:
    """`retained` of every benchmark, in the order of `original`.

    Raises:
      UserError: a benchmark is missing on either side, or the original score is 0.
    """
    odd = sorted(set(scores) ^ set(original))
    if odd or not original:
        raise UserError(
            f"benchmarks of the two models differ in {', '.join(odd) or 'nothing, both are empty'}: score both on all"
        )
    for name, value in original.items():
        if value == 0:
            raise UserError(f"benchmark {name}: the unpruned model scores 0, so nothing can be retained; leave it out")
    return {name: retained(scores[name], value) for name, value in original.items()}


def mean_of_ratios(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """Mean over benchmarks of the retained percentage: every benchmark counts the same."""
    ratios = retained_per_benchmark(scores, original)
    return sum(ratios.values()) / len(ratios)


def paper_average(scores: Mapping[str, float], original: Mapping[str, float], full: Mapping[str, float]) -> float:
    """The paper's AVG-%: 100 * sum of normalised scores / sum of normalised original scores (arXiv 2604.24380, tables).

    Normalised means divided by the full score (MME cognition counts to 800, perception to 2000), so benchmarks with
    high scores weigh more than in `mean_of_ratios`.
    """
    retained_per_benchmark(scores, original)
    ours, theirs = (sum(value / full[name] for name, value in side.items()) for side in (scores, original))
    return 100.0 * ours / theirs
