"""GQA: exact match, ignoring case and punctuation (`exact_match` of lmms-eval 0.7.3 with both options)."""

from __future__ import annotations

import string

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_same_text(prediction: str, reference: str) -> bool:
    """Return True if two texts are equal in lower case without ASCII punctuation.

    Inner white space and articles are compared: "T-shirt" equals "tshirt", "a cat" does not equal "cat". An empty
    prediction equals no reference.
    """
    ours, theirs = (text.lower().translate(_WITHOUT_PUNCTUATION) for text in (prediction, reference))
    return bool(prediction) and ours == theirs


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del record
    return {"accuracy": float(any(is_same_text(prediction, reference) for reference in references))}


GQA = Metric("accuracy", _score)
