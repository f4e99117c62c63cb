"""Metrics of questions with choices: ScienceQA, AI2D, MMMU and MathVista, some of whose questions are open."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.forms import parse_choices
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics.metric import Metric, accuracy, field, name_field
from vlmprune_jax.run.evaluation.metrics.texts import is_same_text

_LETTERS = string.ascii_uppercase
_LETTER_FIRST, _IN_BRACKETS = re.compile(r"\s*([A-Z])\."), re.compile(r"\(([a-zA-Z])\)")
SEED = 0  # seed of the random letters for answers without a letter
_STRIPPED = ",.!?;:'"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def choices_field(record: Record, name: str) -> list[str]:
    """Return a record's field as a list of up to 26 answer choices; the field may be a list written as text (MMMU)."""
    value = parse_choices(field(record, name))
    if value is None or not 0 < len(value) <= len(_LETTERS):
        raise UserError(
            f"record {record.id}: field {name!r} must list 1 to {len(_LETTERS)} texts, got {record.fields[name]!r}"
        )
    return value


def right_letters(record: Record, name: str) -> set[str]:
    """Return the letters of the correct choices listed in a record's field `name`."""
    known = _LETTERS[: len(choices_field(record, name))]
    right = {reference.strip().upper() for reference in record.references}
    odd = sorted(letter for letter in right if len(letter) != 1 or letter not in known)
    if odd:
        raise UserError(
            f"record {record.id}: answer {odd[0]!r} must be one of the letters A to {known[-1]} of its {len(known)} "
            f"{name}"
        )
    return right


# ScienceQA: the letter of the right choice, alone or before a full stop (lmms-eval 0.7.3, which follows LLaVA)


def _scienceqa(prediction: str, record: Record) -> bool:
    """Return True if the answer names the correct letter as `B`, `b` or `B. any text`."""
    answer = prediction.strip()
    letter = answer[0] if answer[1:2] == "." and answer[0].isupper() else answer
    return letter.lower() in {right.lower() for right in right_letters(record, "choices")}


SCIENCEQA = accuracy(_scienceqa)


# AI2D: the letter of the right option (lmms-eval 0.7.3: filter `flexible-extract`, then `exact_match`)


def _ai2d(prediction: str, record: Record) -> bool:
    """Return True if the answer names the correct letter as `B`, `b`, `(B)` or `B. any text`."""
    first = _LETTER_FIRST.match(prediction)
    answer = first[1] if first else prediction
    return any(is_same_text(answer, letter) for letter in right_letters(record, "options"))


AI2D = accuracy(_ai2d)


# MMMU: multiple-choice and open questions of 30 subjects, parsed with its authors' rules (arXiv 2311.16502)


def parse_letter(prediction: str, choices: Sequence[str], record_id: str) -> str:
    """Return the choice letter that an answer names, or a random letter if it names none (MMMU's rule).

    Patterns in order of preference: `(X)`, `X `, `X.`, and in answers of more than five words the text of an option. Of
    several matches, the last is used. An answer without a match gets a random letter, as in MMMU; here, the letter
    depends on `SEED` and the record's id, and is therefore equal in every run and for every model.
    """
    for character in _STRIPPED:
        prediction = prediction.strip(character)
    text, known = f" {prediction} ", _LETTERS[: len(choices)]
    for named, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        matches = [letter for letter in known if named.format(letter) in text]
        if matches:
            return max(matches, key=lambda letter: text.rfind(place.format(letter)))  # the first of equals
    if len(text.split()) > 5:
        places = [text.lower().rfind(choice.lower()) for choice in choices]
        if max(places) >= 0:
            return known[places.index(max(places))]
    return random.Random(f"{SEED} {record_id}").choice(known)


def parse_open(prediction: str) -> set[str | float]:
    """Return possible values of a free-form answer (MMMU): texts after words like "answer:", and all numbers."""
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    ends = [_end(line, (*_KEYS, "=") if number == len(lines) else _KEYS) for number, line in enumerate(lines, 1)]
    texts = [end for end in ends if end and end not in _TRIVIAL] or [text]
    numbers = [number for part in texts for pattern in _NUMBERS for number in pattern.findall(part)]
    return {meaning for part in (*texts, *numbers) for meaning in _normalised(part)}


def _end(line: str, keys: Sequence[str]) -> str | None:
    """Return the shortest text after the last occurrence of any of `keys`; None if none occurs."""
    shortest = None
    for key in keys:
        if key in line:
            end = line.rpartition(key)[2].strip()
            shortest = end if not shortest or len(end) < len(shortest) else shortest
    return shortest


def _normalised(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or text in lower case (single characters padded with spaces)."""
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


def _is_right_in_mmmu(prediction: str, record: Record) -> bool:
    """Return True if an MMMU answer is correct; an empty answer is wrong (no random letter is drawn for it)."""
    kind = name_field(record, "question_type")
    if kind not in ("multiple-choice", "open"):
        raise UserError(f"record {record.id}: field 'question_type' {kind!r} must be multiple-choice or open")
    if kind == "multiple-choice":
        right = parse_letter(prediction, choices_field(record, "options"), record.id) in right_letters(
            record, "options"
        )
    else:
        wanted = [meaning for reference in record.references for meaning in _normalised(reference)]
        right = any(_is_right(meaning, wanted) for meaning in parse_open(prediction))
    return right and bool(prediction)


def _subject(record: Record) -> str:
    """Return the subject from an MMMU question's id: `Art_Theory` in `validation_Art_Theory_12`."""
    named = re.fullmatch(r"[^_]+_(.+)_\d+", record.id)
    return named[1] if named else "other"


MMMU = accuracy(_is_right_in_mmmu, groups=("subject", _subject))


# MathVista without a judge: the normalisation of the benchmark, applied to the answer itself (arXiv 2310.02255). The
# benchmark uses a language model to extract answers from long replies; here rules do, or nothing does. The value is
# therefore called `accuracy_without_judge`: not the published number, and fair only to models that answer shortly.


def _chosen(answer: str, choices: list[str]) -> str:
    """Return the choice whose text equals the answer, else the choice with its letter, else the most similar choice."""
    if answer in choices:
        return answer
    bracketed = _IN_BRACKETS.search(answer)
    answer = bracketed[1].upper() if bracketed else answer
    known = _LETTERS[: len(choices)]
    if len(answer) == 1 and answer in known:
        return choices[known.index(answer)]
    return min(choices, key=lambda choice: Levenshtein.distance(answer, choice))


def _decimals(record: Record) -> int:
    """Return the number of decimals of the correct answer; 1.0 counts as 1 (lmms-eval 0.7.3 marks it always wrong)."""
    places = field(record, "precision")
    if isinstance(places, bool) or not isinstance(places, int | float) or places not in range(20):
        raise UserError(f"record {record.id}: field 'precision' must be an integer number of decimals, got {places!r}")
    return int(places)


def _number(answer: str, decimals: int | None) -> str | None:
    """Return the number in an answer, in the format of the correct answer; None if it contains none."""
    try:
        return str(int(float(answer)) if decimals is None else round(float(answer), decimals))
    except (ValueError, OverflowError):
        return None


def _read(prediction: str, record: Record) -> str | None:
    answer, kind = prediction.strip(), name_field(record, "answer_type")
    if name_field(record, "question_type") == "multi_choice":
        choices = choices_field(record, "choices")
        if not {*record.references} <= {*choices}:
            raise UserError(
                f"record {record.id}: answer {record.references[0]!r} is not one of the record's choices: write the "
                "text of a choice"
            )
        return _chosen(answer, choices)
    if kind in ("integer", "float"):
        return _number(answer, _decimals(record) if kind == "float" else None)
    if kind in ("list", "text"):
        return answer
    raise UserError(f"record {record.id}: field 'answer_type' {kind!r} must be integer, float, list or text")


def _mathvista(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    read = _read(prediction, record)
    right = bool(prediction) and read is not None and read.strip() in {reference.strip() for reference in references}
    return {"accuracy_without_judge": float(right)}


MATHVISTA = Metric("accuracy_without_judge", _mathvista)
