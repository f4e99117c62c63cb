"""Scores of answers, and averages over benchmarks; plain numbers, no model here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlmprune_jax.errors import UserError

# Divisors that bring a score onto 0..100 in the paper's AVG-%: MME cognition counts to 800, perception to 2000.
PAPER_SCALE: Mapping[str, float] = {"MME-C": 8.0, "MME-P": 20.0}


def normalise(answer: str) -> str:
    """The answer without white space around it, in lower case, without one final full stop.

    Nothing else is forgiven: "a circle" is not "circle".
    """
    return answer.strip().lower().removesuffix(".").rstrip()


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise(prediction) == normalise(reference)


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


def paper_average(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """The paper's AVG-%: 100 * sum of normalised scores / sum of normalised original scores (arXiv 2604.24380, tables).

    Normalised means MME-C / 8, MME-P / 20 and the score itself elsewhere, so benchmarks with high scores weigh more
    than in `mean_of_ratios`.
    """
    retained_per_benchmark(scores, original)
    ours, theirs = (sum(v / PAPER_SCALE.get(b, 1.0) for b, v in side.items()) for side in (scores, original))
    return 100.0 * ours / theirs


def accuracy(correct: Sequence[bool]) -> float:
    """Fraction of correct answers."""
    return sum(correct) / len(correct) if correct else math.nan


def accuracy_by_answer(predictions: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, float]]:
    """{normalised reference: {questions, accuracy}}, the most frequent reference first."""
    groups: dict[str, list[bool]] = {}
    for prediction, reference in zip(predictions, references, strict=True):
        groups.setdefault(normalise(reference), []).append(is_exact_match(prediction, reference))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: {"questions": len(hits), "accuracy": accuracy(hits)} for name, hits in ordered}
