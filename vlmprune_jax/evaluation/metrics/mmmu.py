"""MMMU: multiple-choice and open questions of 30 subjects, parsed with its authors' rules (arXiv 2311.16502)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.fields import choices_field, letters, name_field, right_letters
from vlmprune_jax.evaluation.metrics.metric import Metric

SEED = 0  # for the random letters of answers that name none
_STRIPPED = ",.!?;:'"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_letter(prediction: str, choices: Sequence[str], record_id: str) -> str:
    """Return the letter that an answer names.

    Patterns in order of preference: `(X)`, `X `, `X.`, and in answers of more than five words the text of an option; of
    several matches the last. An answer without a match gets a random letter, as in MMMU; here it depends on `SEED` and
    the record's id, so that it is equal in every run and for every model.
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
    """Return the possible meanings of an answer: line ends after words that announce a result, and their numbers."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    ends = [_end(line, (*_KEYS, "=") if number == len(lines) else _KEYS) for number, line in enumerate(lines, 1)]
    parts = [end for end in ends if end and end not in _TRIVIAL] or [text]
    numbers = [found for part in parts for pattern in _NUMBERS for found in pattern.findall(part)]
    return {meaning for part in (*parts, *numbers) for meaning in _normalised(part)}


def _end(line: str, keys: Sequence[str]) -> str | None:
    """Return the shortest text after the last occurrence of a key, None if no key occurs; empty texts are replaced."""
    shortest = None
    for key in keys:
        if key in line:
            end = line.rpartition(key)[2].strip()
            shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def _normalised(text: str) -> list[str | float]:
    """Return a number with two decimals, or text in lower case (a single character with a space on either side)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _is_right(meaning: str | float, right: Sequence[str | float]) -> bool:
    if isinstance(meaning, str):
        return any(isinstance(text, str) and text in meaning for text in right)
    return meaning in right


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Score one answer; an empty answer is wrong and gets no random letter."""
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
    """Return the subject in the id of an MMMU question: `Art_Theory` in `validation_Art_Theory_12`."""
    named = re.fullmatch(r"[^_]+_(.+)_\d+", record.id)
    return named[1] if named else "other"


MMMU = Metric("accuracy", _score, groups=("subject", _subject))
