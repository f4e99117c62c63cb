"""ScienceQA: the letter of the right choice, alone or before a full stop (lmms-eval 0.7.3, which follows LLaVA)."""

from __future__ import annotations

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import right_letters
from vlmprune_jax.evaluation.metrics.metric import Metric


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Accept `B`, `b` and `B. any text` as B; `(B)`, `b.` and `The answer is B` are wrong."""
    del references
    said = prediction.strip()
    letter = said[0] if said[1:2] == "." and said[0].isupper() else said
    return {"accuracy": float(letter.lower() in {right.lower() for right in right_letters(record, "choices")})}


SCIENCEQA = Metric("accuracy", _score)
