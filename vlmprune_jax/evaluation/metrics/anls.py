"""ANLS of DocVQA: one minus the normalised edit distance to the nearest reference, 0 below 0.5 (arXiv 1907.00490)."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric


def _similarity(prediction: str, reference: str) -> float:
    """Return the similarity, from 0 to 1.

    As in lmms-eval 0.7.3, the distance compares lower-case texts with single spaces, but is divided by the length of
    the longer unprocessed text in upper case (in which ß has two letters).
    """
    ours, theirs = (" ".join(text.lower().split()) for text in (prediction, reference))
    longest = max(len(prediction.upper()), len(reference.upper()))
    return 1.0 - Levenshtein.distance(ours, theirs) / longest if prediction else 0.0


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del record
    nearest = max(_similarity(prediction, reference) for reference in references)
    return {"anls": nearest if nearest >= 0.5 else 0.0}


ANLS = Metric("anls", _score)
