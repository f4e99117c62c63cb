"""AI2D: the letter of the right option (lmms-eval 0.7.3: filter `flexible-extract`, then `exact_match`)."""

from __future__ import annotations

import re

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import right_letters
from vlmprune_jax.evaluation.metrics.gqa import is_same_text
from vlmprune_jax.evaluation.metrics.metric import Metric

_LETTER_FIRST = re.compile(r"\s*([A-Z])\.")


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Accept `B`, `b`, `(B)` and `B. any text` as B; `B) text` and `The answer is B.` are wrong."""
    del references
    first = _LETTER_FIRST.match(prediction)
    said = first[1] if first else prediction
    return {"accuracy": float(any(is_same_text(said, letter) for letter in right_letters(record, "options")))}


AI2D = Metric("accuracy", _score)
