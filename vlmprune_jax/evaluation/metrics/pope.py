"""POPE: does the model see objects that are not there? Yes-or-no questions in three splits (arXiv 2305.10355)."""

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
    """Only `yes` and `no` count, in any case: `Yes.` is neither, as in lmms-eval 0.7.3.

    A text that is neither leaves recall alone: a false negative is a right yes to which the model said `no`.
    """
    del references
    _split(record)
    yes, said = right_yes_or_no(record), prediction.lower().strip()
    found, invented, missed = yes and said == "yes", not yes and said == "yes", yes and said == "no"
    right = said == ("yes" if yes else "no")
    return dict(zip(_SCORES, (right, said == "yes", found, invented, missed), strict=True))


def _counted(scores: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Each float[draws], of float[answers, scores] where each answer counts so many times; 0 where nothing counts."""
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
    """`f1`: mean over the splits, the paper's; `f1_pooled` and all others: over all questions, lmms-eval's `pope`."""
    values = np.array([[one[name] for name in _SCORES] for one in scores])
    splits = np.array([_split(record) for record in records])
    pooled = _counted(values, times)
    each = [_counted(values[splits == name], times[splits == name])["f1"] for name in np.unique(splits)]
    return {**pooled, "f1": np.mean(each, axis=0), "f1_pooled": pooled["f1"]}


POPE = Metric("f1", _score, once(_drawn), groups=("split", _split), drawn=_drawn)
