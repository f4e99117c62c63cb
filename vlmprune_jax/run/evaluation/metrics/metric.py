"""The class of metrics, from answers to values and their display, and the fields of records that metrics read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import blaming
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record, is_name

Scores = Mapping[str, float]  # scores of one answer, by name
Values = dict[str, float]  # values over all answers, by name


def mean(scores: Sequence[Scores], records: Sequence[Record]) -> Values:
    """Return the mean of each score over the answers that have this score."""
    del records
    names = dict.fromkeys(name for answer in scores for name in answer)
    columns = {name: [answer[name] for answer in scores if name in answer] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


Drawn = Callable[[Sequence[Scores], Sequence[Record], np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Metric:
    """Metric of an evaluation set: scores answers, aggregates the scores to values, and says how to display them.

    `main`: name of the value in tables and plots; retention is computed from this value. `score`: (prediction,
    references, record) -> {name: value} for one answer. The prediction is stripped of white space, there is at least
    one reference, and `record.fields` has the other fields of the data file (choices, category, ...). None for a metric
    of running text, which is scored per batch of windows as {"nll", "tokens"}: the sum of negative log-likelihoods in
    nats and the number of predicted tokens. `aggregate`: (scores of all answers, their records) -> {name: value},
    including `main`; the default returns means. `full`: score of a perfect model, None if there is no such score
    (perplexity); `paper_average` divides by `full`. `unit`: "%" displays values as a share of `full`; any other text is
    appended to the value. `higher_is_better`: must be True for a metric with a full score. `groups`: (title, record ->
    group name), to report values for each group of questions as well. `drawn_by`: record -> unit of the bootstrap, if
    several questions can only be scored together (pairs of MME); None = each question is a unit. `drawn`: (scores,
    records, times float[answers, draws]) -> {name: float[draws]}, the values if each answer occurs `times` times. This
    function replaces `aggregate`, and makes the bootstrap fast if the values are not means.

    A UserError raised by `score` or `aggregate` is shown unchanged, so its message should name the record.
    """

    main: str
    score: Callable[[str, tuple[str, ...], Record], Scores] | None
    aggregate: Callable[[Sequence[Scores], Sequence[Record]], Mapping[str, float]] = mean
    full: float | None = 1.0
    unit: str = "%"
    higher_is_better: bool = True
    groups: tuple[str, Callable[[Record], str]] | None = None
    drawn_by: Callable[[Record], Hashable] | None = None
    drawn: Drawn | None = None

    def __post_init__(self) -> None:
        if self.full is None and self.unit == "%":
            raise UserError(
                f'metric "{self.main}": unit "%" needs the score of a perfect model: set full, or use another unit'
            )
        if self.full is not None and (self.full <= 0 or not self.higher_is_better):
            raise UserError(f'metric "{self.main}": full={self.full} must be positive, or None if lower is better')

    def describe(self) -> dict[str, Any]:
        """Return the metric's display settings for tables and plots (number format, unit, factor) as JSON values."""
        scale = 100.0 / self.full if self.unit == "%" and self.full else 1.0
        named = {name: getattr(self, name) for name in ("main", "unit", "full", "higher_is_better")}
        return {**named, "scale": scale, "grouped_by": self.groups and self.groups[0]}

    def score_all(self, predictions: Sequence[str], records: Sequence[Record]) -> list[Scores]:
        """Return the scores of every answer, as {name: value}.

        Raises UserError if this is a metric of running text, or `score` fails; the message names the record.
        """
        if self.score is None:
            raise UserError(f'metric "{self.main}": scores a text, not answers to questions: choose another metric')
        scores: list[Scores] = []
        for prediction, record in zip(predictions, records, strict=True):
            try:
                answer = self.score(prediction, record.references, record)
                scores.append({name: float(value) for name, value in answer.items()})
            except UserError as error:
                raise UserError(f'metric "{self.main}": {error}') from error
            except Exception as error:  # whatever a user's function may raise
                raise UserError(f'metric "{self.main}": score() of record {record.id} failed with {error!r}') from error
        return scores

    def values(self, scores: Sequence[Scores], records: Sequence[Record]) -> Values:
        """Return the metric's values over all answers, after checking them.

        Raises UserError if `aggregate` fails, does not return `main`, or returns NaN.
        """
        try:
            if self.drawn is None:
                values = {name: float(value) for name, value in self.aggregate(scores, records).items()}
            else:
                drawn = self.drawn(scores, records, np.ones((len(scores), 1)))
                values = {name: float(value) for name, (value,) in drawn.items()}
        except UserError as error:
            raise UserError(f'metric "{self.main}": {error}') from error
        except Exception as error:
            raise UserError(f'metric "{self.main}": aggregate() failed with {error!r}') from error
        if self.main not in values:
            names = ", ".join(values) or "none"
            raise UserError(f'metric "{self.main}": aggregate() returned no value named "{self.main}" (found: {names})')
        for name, value in values.items():
            if math.isnan(value):
                raise UserError(
                    f'metric "{self.main}": {name} is NaN: define the value to return when no answer is scored'
                )
        return values

    def values_of_groups(self, scores: Sequence[Scores], records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """Return metric values by group of questions, {group: {"questions": number, **values}}, largest group first."""
        if self.groups is None:
            return {}
        places: dict[str, list[int]] = {}
        with blaming(f'metric "{self.main}": groups', self.groups[1]):
            for place, record in enumerate(records):
                places.setdefault(str(self.groups[1](record)), []).append(place)
        ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
        return {
            name: {"questions": len(mine), **self.values([scores[i] for i in mine], [records[i] for i in mine])}
            for name, mine in ordered
        }


def accuracy(is_right: Callable[[str, Record], bool], **settings: Any) -> Metric:
    """Return a metric whose score "accuracy" is 1 if `is_right(prediction, record)` is true, and 0 otherwise."""
    return Metric("accuracy", lambda answer, _, record: {"accuracy": float(is_right(answer, record))}, **settings)


def field(record: Record, name: str) -> Any:
    """Return a field of a record; raise UserError if the record lacks it."""
    value = record.fields.get(name)
    if value is None:
        raise UserError(
            f"record {record.id}: has no field {name!r}, which the metric needs: add it, or choose another metric"
        )
    return value


def name_field(record: Record, name: str) -> str:
    """Return a record's field as text; raise UserError unless the field is a string or a whole number."""
    value = field(record, name)
    if not is_name(value):
        raise UserError(f"record {record.id}: field {name!r} must be a string or an integer, got {value!r}")
    return str(value)
