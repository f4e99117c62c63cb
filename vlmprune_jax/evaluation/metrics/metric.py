"""What a metric is: from answers to numbers, and how these are shown; strings, numbers and records, no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record

Scores = Mapping[str, float]  # of one answer, by name
Values = dict[str, float]  # of all answers, by name


def mean(scores: Sequence[Scores], records: Sequence[Record]) -> Values:
    """The mean of every score, over the answers that have it."""
    del records
    names = dict.fromkeys(name for one in scores for name in one)
    having = {name: [one[name] for one in scores if name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in having.items()}


Drawn = Callable[[Sequence[Scores], Sequence[Record], np.ndarray], Mapping[str, np.ndarray]]


def once(drawn: Drawn) -> Callable[[Sequence[Scores], Sequence[Record]], Values]:
    """The `aggregate` of a metric that has `drawn`: every answer counts once."""

    def aggregate(scores: Sequence[Scores], records: Sequence[Record]) -> Values:
        found = drawn(scores, records, np.ones((len(scores), 1)))
        return {name: float(value[0]) for name, value in found.items()}

    return aggregate


@dataclass(frozen=True)
class Metric:
    """How the answers to an evaluation set become numbers, and how these are shown.

    `main`: name of the value that tables and plots show and that counts for what was retained.
    `score`: (prediction, references, record) -> {name: value} of one answer; the prediction has no white space around
    it, there is at least one reference, and `record.fields` has what else the data file says (choices, category, ...).
    None for a metric of running text: each batch of the windows that it is cut into scores {"nll", "tokens"}, the sum
    of negative log-likelihoods in nats and the number of tokens predicted.
    `aggregate`: (scores of all answers, their records) -> {name: value}, `main` among them; the default takes means.
    `full`: what a perfect model reaches, None where there is no such number (perplexity); paper_average divides by it.
    `unit`: "%" shows values as a share of `full`, anything else stands behind the value as it is.
    `higher_is_better`: a metric with a full score is better when higher.
    `groups`: (title, record -> name of its group), for values of every group of questions beside those of all.
    `drawn_by`: record -> what it belongs to, where several questions only count together (MME's pairs) and a bootstrap
    must draw them together; None: every question by itself.
    `drawn`: (scores, records, times float[answers, draws]) -> {name: float[draws]}, the values where each answer counts
    so many times. A bootstrap needs it only to be fast where `aggregate` is no mean; `once` makes `aggregate` of it.

    A UserError that `score` or `aggregate` raises is told as it is; it should name the record.
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
                f"metric of {self.main}: a share in % needs the full score; give another unit (it may be '')"
            )
        if self.full is not None and (self.full <= 0 or not self.higher_is_better):
            raise UserError(f"metric of {self.main}: full={self.full} must be positive, and None where lower is better")

    def describe(self) -> dict[str, Any]:
        """What tables and plots need to show a value, as JSON values: `scale` times it, then the unit."""
        scale = 100.0 / self.full if self.unit == "%" and self.full else 1.0
        named = {name: getattr(self, name) for name in ("main", "unit", "full", "higher_is_better")}
        return {**named, "scale": scale, "grouped_by": self.groups and self.groups[0]}

    def score_all(self, predictions: Sequence[str], records: Sequence[Record]) -> list[Scores]:
        """The scores of every answer.

        Raises:
          UserError: this is a metric of text, or `score` fails, with the record.
        """
        if self.score is None:
            raise UserError(f"metric of {self.main}: is of running text, not of answers; name another for questions")
        scores: list[Scores] = []
        for prediction, record in zip(predictions, records, strict=True):
            try:
                one = self.score(prediction, record.references, record)
                scores.append({name: float(value) for name, value in one.items()})
            except UserError as error:
                raise UserError(f"metric of {self.main}: {error}") from error
            except Exception as error:  # whatever a user's function may raise
                raise UserError(f"metric of {self.main}: score of record {record.id} fails with {error!r}") from error
        return scores

    def values(self, scores: Sequence[Scores], records: Sequence[Record]) -> Values:
        """`aggregate`, checked.

        Raises:
          UserError: it fails, `main` is not among the values, or one of them is no number.
        """
        try:
            found = {name: float(value) for name, value in self.aggregate(scores, records).items()}
        except UserError as error:
            raise UserError(f"metric of {self.main}: {error}") from error
        except Exception as error:
            raise UserError(f"metric of {self.main}: aggregate fails with {error!r}") from error
        if self.main not in found:
            raise UserError(f"metric of {self.main}: aggregate gives {', '.join(found) or 'nothing'}, not {self.main}")
        for name, value in found.items():
            if math.isnan(value):
                raise UserError(f"metric of {self.main}: {name} is not a number; say what it is where nothing counts")
        return found

    def values_of_groups(self, scores: Sequence[Scores], records: Sequence[Record]) -> dict[str, dict[str, float]]:
        """{group: {questions, **values}}, the largest group first."""
        if self.groups is None:
            return {}
        places: dict[str, list[int]] = {}
        for place, record in enumerate(records):
            places.setdefault(self.groups[1](record), []).append(place)
        ordered = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
        return {
            name: {"questions": len(mine), **self.values([scores[i] for i in mine], [records[i] for i in mine])}
            for name, mine in ordered
        }
