"""GQA: exact match apart from case and punctuation (lmms-eval 0.7.3: `exact_match` that ignores both)."""

from __future__ import annotations

import string

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def is_same_text(prediction: str, reference: str) -> bool:
    """Whether two texts are the same in lower case without ASCII punctuation.

    Inner white space and articles count, and what stood beside punctuation stays: "T-shirt" is "tshirt", "a cat" is not
    "cat". Nothing is the same as no answer.
    """
    ours, theirs = (text.lower().translate(_WITHOUT_PUNCTUATION) for text in (prediction, reference))
    return bool(prediction) and ours == theirs


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del record
    return {"accuracy": float(any(is_same_text(prediction, reference) for reference in references))}


GQA = Metric("accuracy", _score)
