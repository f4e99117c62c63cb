"""MMMU: multiple-choice and open questions of 30 subjects, answers parsed as its authors do (arXiv 2311.16502)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import choices_field, letters, name_field, right_letters
from vlmprune_jax.evaluation.metrics.metric import Metric

SEED = 0  # of the letters that are drawn where an answer names none
_STRIPPED = ",.!?;:'"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_letter(prediction: str, choices: Sequence[str], record_id: str) -> str:
    """The letter that an answer names.

    `(X)` before `X ` before `X.` before the text of an option in an answer of more than five words; of several the one
    named last. An answer that names none gets a letter by lot, as MMMU has it; here drawn from `SEED` and the record's
    id, so that it is the same in every run and for every model.
    """
    for character in _STRIPPED:
        prediction = prediction.strip(character)
    text, known = f" {prediction} ", letters(choices)
    for named, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in known if named.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))  # the first of equals
    if len(text.split()) > 5:
        places = [text.lower().rfind(choice.lower()) for choice in choices]
        if max(places) >= 0:
            return known[places.index(max(places))]
    return random.Random(f"{SEED} {record_id}").choice(known)


def parse_open(prediction: str) -> set[str | float]:
    """What an answer may mean: the ends of its lines after words that announce a result, and all numbers in these."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    ends = [_end(line, (*_KEYS, "=") if number == len(lines) else _KEYS) for number, line in enumerate(lines, 1)]
    parts = [end for end in ends if end and end not in _TRIVIAL] or [text]
    numbers = [found for part in parts for pattern in _NUMBERS for found in pattern.findall(part)]
    return {meaning for part in (*parts, *numbers) for meaning in _normalised(part)}


def _end(line: str, keys: Sequence[str]) -> str | None:
    """The shortest text after the last occurrence of a key, None without one; an empty one gives way to any later."""
    shortest = None
    for key in keys:
        if key in line:
            end = line.rpartition(key)[2].strip()
            shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def _normalised(text: str) -> list[str | float]:
    """A number with two decimals, or the text in lower case; a single character with a blank on either side of it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _is_right(meaning: str | float, right: Sequence[str | float]) -> bool:
    if isinstance(meaning, str):
        return any(isinstance(one, str) and one in meaning for one in right)
    return meaning in right


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """An empty answer is wrong, without a draw."""
    kind = name_field(record, "question_type")
    if kind not in ("multiple-choice", "open"):
        raise UserError(f"record {record.id}: field 'question_type' {kind!r} must be multiple-choice or open")
    if kind == "multiple-choice":
        right = parse_letter(prediction, choices_field(record, "options"), record.id) in right_letters(
            record, "options"
        )
    else:
        wanted = [meaning for reference in references for meaning in _normalised(reference)]
        right = any(_is_right(meaning, wanted) for meaning in parse_open(prediction))
    return {"accuracy": float(right and bool(prediction))}


def _subject(record: Record) -> str:
    """`Art_Theory` of `validation_Art_Theory_12`, as MMMU names its questions."""
    named = re.fullmatch(r"[^_]+_(.+)_\d+", record.id)
    return named[1] if named else "other"


MMMU = Metric("accuracy", _score, groups=("subject", _subject))
