"""Exact match: an answer is right if it equals a reference, ignoring case and a final full stop."""

from __future__ import annotations

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric


def normalise(answer: str) -> str:
    """Return the answer stripped, in lower case and without one final full stop.

    Other differences remain: "a circle" is not "circle".
    """
    return answer.strip().lower().removesuffix(".").rstrip()


def is_exact_match(prediction: str, reference: str) -> bool:
    """Return True if two answers are equal after normalisation."""
    return normalise(prediction) == normalise(reference)


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del record
    return {"accuracy": float(any(is_exact_match(prediction, reference) for reference in references))}


EXACT_MATCH = Metric("accuracy", _score, groups=("answer", lambda record: normalise(record.references[0])))
