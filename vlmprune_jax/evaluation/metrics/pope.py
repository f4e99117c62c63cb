"""POPE: object hallucination, by yes-or-no questions in three splits (arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import name_field, right_yes_or_no
from vlmprune_jax.evaluation.metrics.metric import Metric, Scores, once

_SCORES = ("accuracy", "said_yes", "true_positive", "false_positive", "false_negative")


def _split(record: Record) -> str:
    return name_field(record, "category")


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Score one answer: only `yes` and `no`, in any case, are answers; `Yes.` is neither, as in lmms-eval 0.7.3.

    Other texts do not change recall: a false negative is a question with the right answer yes and the prediction `no`.
    """
    del references
    _split(record)
    yes, said = right_yes_or_no(record), prediction.lower().strip()
    found, invented, missed = yes and said == "yes", not yes and said == "yes", yes and said == "no"
    right = said == ("yes" if yes else "no")
    return dict(zip(_SCORES, (right, said == "yes", found, invented, missed), strict=True))


def _rates(scores: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return float[draws] values from scores, float[answers, scores], of answers drawn `times`; 0 if none were."""
    accuracy, said_yes, found, invented, missed = scores.T @ times
    precision, recall = found / np.maximum(found + invented, 1), found / np.maximum(found + missed, 1)
    f1 = 2 * precision * recall / np.where(found > 0, precision + recall, 1)
    number = np.maximum(times.sum(axis=0), 1)
    return {
        "f1": f1,
        "precision": precision,
        "recall": recall,
        "accuracy": accuracy / number,
        "said_yes": said_yes / number,
    }


def _drawn(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
    """Return `f1`, the mean over splits (paper), and all other values over all questions (`pope` of lmms-eval)."""
    values = np.array([[score[name] for name in _SCORES] for score in scores])
    splits = np.array([_split(record) for record in records])
    pooled = _rates(values, times)
    each = [_rates(values[splits == name], times[splits == name])["f1"] for name in np.unique(splits)]
    return {**pooled, "f1": np.mean(each, axis=0), "f1_pooled": pooled["f1"]}


POPE = Metric("f1", _score, once(_drawn), groups=("split", _split), drawn=_drawn)
