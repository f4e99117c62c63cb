"""MME: pairs of yes-or-no questions about an image, summed over categories (arXiv 2306.13394)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import name_field, right_yes_or_no
from vlmprune_jax.evaluation.metrics.metric import Metric, Scores, once

_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip


def _category(record: Record) -> str:
    return name_field(record, "category")


def _pair(record: Record) -> tuple[str, str]:
    return _category(record), name_field(record, "question_id")


def _said(prediction: str) -> str | None:
    """Return "yes", "no" or None from the first four characters: `Nope` and `Not` are "no", `well yes` is None."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    del references
    _pair(record)
    return {"right": _said(prediction) == ("yes" if right_yes_or_no(record) else "no")}


def _drawn(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values of bootstrap samples.

    A pair scores 100 times its mean (accuracy), plus 100 if both answers are right (accuracy+). A category scores the
    mean of its pairs, 0 to 200. `perception` sums ten categories (to 2000), `cognition` the others (four, to 800).
    """
    pairs: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        pairs.setdefault(_pair(record), []).append(place)
    for (category, number), both in pairs.items():
        if len(both) != 2:
            raise UserError(
                f"category {category}, question_id {number}: {len(both)} record(s), but MME has two questions per "
                "image: add the missing records, or drop this question_id"
            )
    right = np.array([sum(scores[place]["right"] for place in both) for both in pairs.values()])
    points = 50.0 * right + 100.0 * (right == 2)
    counts = times[[both[0] for both in pairs.values()]]
    categories = np.array([category for category, _ in pairs])
    sums = {True: np.zeros(times.shape[1]), False: np.zeros(times.shape[1])}
    for name in np.unique(categories):
        mine = categories == name
        sums[name in _PERCEPTION] += points[mine] @ counts[mine] / np.maximum(counts[mine].sum(axis=0), 1)
    number = counts.sum(axis=0)
    return {
        "score": sums[True] + sums[False],
        "perception": sums[True],
        "cognition": sums[False],
        "accuracy": 50.0 * right @ counts / number,
        "accuracy_plus": 100.0 * (right == 2) @ counts / number,
    }


MME = Metric(
    "score",
    _score,
    once(_drawn),
    full=2800.0,
    unit="",
    groups=("category", _category),
    drawn_by=_pair,
    drawn=_drawn,
)
MME_PERCEPTION = dataclasses.replace(MME, main="perception", full=2000.0)
MME_COGNITION = dataclasses.replace(MME, main="cognition", full=800.0)
