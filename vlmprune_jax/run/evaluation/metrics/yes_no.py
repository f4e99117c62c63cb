"""Metrics of yes-or-no questions: POPE and MME."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics.metric import Metric, Scores, name_field

_SCORES = ("accuracy", "said_yes", "true_positive", "false_positive", "false_negative")
_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip


def right_yes_or_no(record: Record) -> bool:
    """Return True for the reference answer "yes", False for "no", ignoring case; raise UserError for others."""
    right = record.references[0].lower().strip().replace(".", "")
    if right not in ("yes", "no"):
        raise UserError(f"record {record.id}: answer {record.references[0]!r} must be yes or no for this metric")
    return right == "yes"


def _category(record: Record) -> str:
    return name_field(record, "category")


# POPE: object hallucination, by yes-or-no questions in three splits (arXiv 2305.10355)


def _pope_score(prediction: str, _: tuple[str, ...], record: Record) -> dict[str, float]:
    """Score one POPE answer: only "yes" and "no" in any case count as answers, as in lmms-eval 0.7.3.

    Other texts do not change recall: a false negative is a question with the right answer yes and the prediction `no`.
    """
    _category(record)  # refuses a record without one
    yes, answer = right_yes_or_no(record), prediction.lower().strip()
    hit, invented, missed = yes and answer == "yes", not yes and answer == "yes", yes and answer == "no"
    right = answer == ("yes" if yes else "no")
    return dict(zip(_SCORES, (right, answer == "yes", hit, invented, missed), strict=True))


def _rates(scores: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return weighted means of scores, float[draws], one per bootstrap sample; 0 for samples without answers."""
    accuracy, said_yes, hits, invented, missed = scores.T @ times
    precision, recall = hits / np.maximum(hits + invented, 1), hits / np.maximum(hits + missed, 1)
    f1 = 2 * precision * recall / np.where(hits > 0, precision + recall, 1)
    number = np.maximum(times.sum(axis=0), 1)
    return {
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "accuracy": accuracy / number,
        "said_yes": said_yes / number,
    }


def _pope(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
    """Return POPE's values: `f1` is averaged over its three splits (paper), the others pool all questions."""
    values = np.array([[score[name] for name in _SCORES] for score in scores])
    splits = np.array([_category(record) for record in records])
    pooled = _rates(values, times)
    each = [_rates(values[splits == name], times[splits == name])["f1"] for name in np.unique(splits)]
    return {**pooled, "f1": np.mean(each, axis=0), "f1_pooled": pooled["f1"]}


POPE = Metric("f1", _pope_score, groups=("split", _category), drawn=_pope)


# MME: pairs of yes-or-no questions about an image, summed over categories (arXiv 2306.13394)


def _pair(record: Record) -> tuple[str, str]:
    return _category(record), name_field(record, "question_id")


def _said(prediction: str) -> str | None:
    """Return "yes", "no" or None from an answer's first four characters (`Not` is "no", `well yes` is None)."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def _mme_score(prediction: str, _: tuple[str, ...], record: Record) -> dict[str, float]:
    _pair(record)  # refuses a record without one
    return {"right": _said(prediction) == ("yes" if right_yes_or_no(record) else "no")}


def _mme(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
    """Return MME's values for bootstrap samples, given how often each sample contains each answer.

    A pair scores 100 times its mean (accuracy), plus 100 if both answers are right (accuracy+). A category scores the
    mean of its pairs, 0 to 200. `perception` sums ten categories (to 2000), `cognition` the others (four, to 800).
    """
    pairs: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        pairs.setdefault(_pair(record), []).append(place)
    for (category, number), both in pairs.items():
        if len(both) != 2:
            raise UserError(
                f"MME has two questions per image, but category {category}, question_id {number} has {len(both)}: add "
                "the missing records, or drop this question_id"
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
    _mme_score,
    full=2800.0,
    unit="",
    groups=("category", _category),
    drawn_by=_pair,
    drawn=_mme,
)
MME_PERCEPTION = dataclasses.replace(MME, main="perception", full=2000.0)
MME_COGNITION = dataclasses.replace(MME, main="cognition", full=800.0)
