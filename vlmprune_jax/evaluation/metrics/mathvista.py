"""MathVista without a judge: the normalisation of the benchmark, applied to the answer itself (arXiv 2310.02255).

The benchmark uses a language model to extract answers from long replies. This metric extracts them by rule or not at
all, so its value is called `accuracy_without_judge`: it is not the published number, and it is fair only to models that
give short answers.
"""

from __future__ import annotations

import re

from rapidfuzz.distance import Levenshtein

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import choices_field, field, letters, name_field
from vlmprune_jax.evaluation.metrics.metric import Metric

_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")


def _chosen(said: str, choices: list[str]) -> str:
    """Return the choice with this text, with the letter in the first `(x)` or alone, else the nearest one."""
    if said in choices:
        return said
    bracketed = _IN_BRACKETS.search(said)
    said = bracketed[1].upper() if bracketed else said
    known = letters(choices)
    if len(said) == 1 and said in known:
        return choices[known.index(said)]
    return min(choices, key=lambda choice: Levenshtein.distance(said, choice))


def _decimals(record: Record) -> int:
    """Return the decimals of the right answer; 1.0 means 1 (lmms-eval 0.7.3 then scores every answer as wrong)."""
    places = field(record, "precision")
    if isinstance(places, bool) or not isinstance(places, int | float) or places not in range(20):
        raise UserError(f"record {record.id}: field 'precision' must be a whole number of decimals, got {places!r}")
    return int(places)


def _number(said: str, decimals: int | None) -> str | None:
    """Return the number in the format of the right answers (integer if `decimals` is None); None for other text."""
    try:
        return str(int(float(said)) if decimals is None else round(float(said), decimals))
    except (ValueError, OverflowError):
        return None


def _read(prediction: str, record: Record) -> str | None:
    said, kind = prediction.strip(), name_field(record, "answer_type")
    if name_field(record, "question_type") == "multi_choice":
        choices = choices_field(record, "choices")
        if not {*record.references} <= {*choices}:
            raise UserError(
                f"record {record.id}: answer {record.references[0]!r} is none of its choices: write the text of one"
            )
        return _chosen(said, choices)
    if kind in ("integer", "float"):
        return _number(said, _decimals(record) if kind == "float" else None)
    if kind in ("list", "text"):
        return said
    raise UserError(f"record {record.id}: field 'answer_type' {kind!r} must be integer, float, list or text")


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    read = _read(prediction, record)
    right = bool(prediction) and read is not None and read.strip() in {reference.strip() for reference in references}
    return {"accuracy_without_judge": float(right)}


MATHVISTA = Metric("accuracy_without_judge", _score)
