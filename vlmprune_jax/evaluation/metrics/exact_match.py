"""Exact match: an answer is right if it is one of the references, apart from case and a final full stop."""

from __future__ import annotations

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric


def normalise(answer: str) -> str:
    """The answer without white space around it, in lower case, without one final full stop.

    Nothing else is forgiven: "a circle" is not "circle".
    """
    return answer.strip().lower().removesuffix(".").rstrip()


def is_exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same once normalised."""
    return normalise(prediction) == normalise(reference)


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del record
    return {"accuracy": float(any(is_exact_match(prediction, reference) for reference in references))}


EXACT_MATCH = Metric("accuracy", _score, groups=("answer", lambda record: normalise(record.references[0])))
