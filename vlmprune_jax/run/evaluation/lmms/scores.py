"""Main values of lmms-eval tasks and the score of each question; plain numbers, without lmms-eval.

Values are computed by lmms-eval. A metric of this package accompanies each value: it defines the unit, the full score,
and how the scores of resampled questions (`retained_interval`) aggregate to the value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import Metric
from vlmprune_jax.run.evaluation.metrics.metric import Scores
from vlmprune_jax.run.evaluation.metrics.videos import MVBENCH
from vlmprune_jax.run.evaluation.metrics.yes_no import MME_COGNITION, MME_PERCEPTION, POPE

Sample = Mapping[str, Any]  # log entry of lmms-eval for one question
_ROUNDED = 1e-4  # of the full score: lmms-eval rounds MMMU to 5 decimals and MathVista to 2 of 100


@dataclass(frozen=True)
class TaskSet:
    """One main metric value of an lmms-eval task, with the score of every question.

    `key`: name of the value in lmms-eval. `metric`: how the value is displayed and resampled. `scores`, `records`: one
    entry per question, in order; both are empty if the samples lack them.
    """

    key: str
    metric: Metric
    scores: tuple[Scores, ...]
    records: tuple[Record, ...]

    def makes(self, value: float) -> bool:
        """Return True if averaging the question scores reproduces `value`, as bootstrap intervals require."""
        ours = self.metric.values(self.scores, self.records)[self.metric.main] if self.scores else math.nan
        return abs(ours - value) <= _ROUNDED * (self.metric.full or max(abs(value), 1.0))

    def describe(self) -> dict[str, Any]:
        """Return the metric's display settings (`Metric.describe`) under lmms-eval's name for the value."""
        return {**self.metric.describe(), "main": self.key}


@dataclass(frozen=True)
class _Known:
    """vlmprune metric for an lmms-eval metric, and functions that convert an lmms-eval sample to scores and fields."""

    metric: Metric
    score: Callable[[Any], Scores]
    fields: Callable[[Any], Mapping[str, Any]] = lambda entry: {}


def _pair(entry: Any) -> dict[str, Any]:
    return {"category": str(entry["category"]), "question_id": str(entry["question_id"])}


def _pope(entry: Any) -> Scores:
    record = Record("", (), (), None, (entry["ground_truth"],), {"category": "all"})
    return POPE.score_all([entry["prediction"]], [record])[0]


_PERCENT = Metric("right", None, full=100.0)
# Main metrics of tasks that report several, in this order; for other tasks the first metric is the main one.
_KNOWN: dict[str, _Known] = {
    "mme_perception_score": _Known(MME_PERCEPTION, lambda entry: {"right": float(entry["score"])}, _pair),
    "mme_cognition_score": _Known(MME_COGNITION, lambda entry: {"right": float(entry["score"])}, _pair),
    "pope_f1_score": _Known(dataclasses.replace(POPE, main="f1_pooled"), _pope, lambda entry: {"category": "all"}),
    "llm_as_judge_eval": _Known(_PERCENT, lambda entry: {"right": 100.0 * bool(entry["true_false"])}),
    "videomme_perception_score": _Known(
        _PERCENT, lambda entry: {"right": 100.0 * (entry["pred_answer"] == entry["answer"])}
    ),
    "avg_accuracy": _Known(_PERCENT, lambda entry: {"right": 100.0 * (entry["rating"] == 1)}),  # TempCompass
    "mvbench_accuracy": _Known(
        dataclasses.replace(MVBENCH, full=100.0),
        lambda entry: {"accuracy": 100.0 * entry["score"], "answered": float(entry["pred_answer"] != "")},
    ),
    "lvb_acc": _Known(Metric("right", None), lambda entry: {"right": float(entry["parsed_pred"] == entry["answer"])}),
    "mmmu_acc": _Known(Metric("right", None), lambda entry: {"right": float(entry["right"])}),
}


def sets_of(
    task: str, values: Mapping[str, float], samples: Sequence[Sample], higher_is_better: Mapping[str, bool]
) -> list[TaskSet]:
    """Return the main metric values of an lmms-eval task, each with the scores of its questions.

    Args:
      task: name of the task, for messages.
      values: {metric: value}, in the task's order.
      samples: {metric: entry}, one per question.
      higher_is_better: {metric: True if larger values are better}; missing metrics count as True.

    Raises UserError if the task has no value (lmms-eval leaves none when a task fails).
    """
    if not samples or not values or not all(math.isfinite(value) for value in values.values()):
        raise UserError(
            f"task {task}: lmms-eval returned no {'metric value' if samples else 'answers'}: run again with --debug"
        )
    keys = [key for key in _KNOWN if key in values] or [next(iter(values))]
    return [_set_of(key, values[key], samples, higher_is_better.get(key, True)) for key in keys]


def _set_of(key: str, value: float, samples: Sequence[Sample], higher: bool) -> TaskSet:
    entries = [sample[key] for sample in samples if key in sample]
    known = _KNOWN.get(key)
    if known is None or not all(isinstance(entry, Mapping) for entry in entries):
        return _mean_of(key, value, entries, higher)
    records = tuple(Record(str(i), (), (), None, (), known.fields(entry)) for i, entry in enumerate(entries))
    scores = tuple(known.score(entry) for entry in entries)
    return TaskSet(key, known.metric, scores, records)


def _mean_of(key: str, value: float, entries: Sequence[Any], higher: bool) -> TaskSet:
    """Return an lmms-eval task's mean over numeric entries, displayed in % if all lie between 0 and 1."""
    values = [entry.get("score") if isinstance(entry, Mapping) else entry for entry in entries]
    numbers = [float(number) for number in values if isinstance(number, int | float)]
    scores = tuple({key: number} for number in numbers) if len(numbers) == len(values) else ()
    share = higher and bool(scores) and all(0 <= number <= 1 for number in (*numbers, value))
    metric = Metric(key, None) if share else Metric(key, None, full=None, unit="", higher_is_better=higher)
    return TaskSet(key, metric, scores, ())
