"""Metrics of video benchmarks with choices, equal to lmms-eval 0.7.3: Video-MME, MVBench, TempCompass, MLVU, ..."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics.choices import SEED, choices_field, letters, parse_letter, right_letters
from vlmprune_jax.run.evaluation.metrics.metric import Metric, Scores, accuracy, name_field, once

_QUOTES = (",", ".", "!", "?", ";", ":", "'", '"')
_PHRASES = (
    "answer is", "option is", "choice is", "i choose", "i select", "i pick",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
_FORMS = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))  # (priority, form of a letter in an answer)


def _reference_letter(record: Record) -> str:
    """Return the letter with which the reference answer begins, such as B in "B" or "B. left"."""
    letter = record.references[0].strip()[:1]
    if not ("A" <= letter <= "Z"):
        raise UserError(
            f"record {record.id}: answer {record.references[0]!r} must begin with the letter of a choice (A to Z)"
        )
    return letter


# Video-MME and MLVU: the letter by `extract_mcq_answer`, which ranks the forms in which answers name letters


def extract_letter(prediction: str, choices: str = "ABCD") -> str:
    """Return the letter that the highest-priority pattern finds in an answer (its last match); "" if there is none."""
    text = prediction.strip()
    for character in _QUOTES:
        text = text.strip(character)
    stripped, text = text.strip(), f" {text} "
    named: list[tuple[int, int, str]] = []  # (priority, place, letter)
    for priority, form in _FORMS:
        named += [(priority, text.rfind(form.format(c)), c) for c in choices if form.format(c) in text]
    for phrase in _PHRASES:
        after = text.lower().find(phrase)
        if after >= 0:
            named += [(7, text.find(c, after + len(phrase)), c) for c in choices if c in text[after + len(phrase) :]]
    named += [(10, 0, c) for c in choices if stripped.startswith(c) and not stripped[1:2].isalpha()]
    named += [(9, 0, c) for c in choices if stripped.endswith(c) and not stripped[-2:-1].isalpha()]
    named = named or [(0, text.rfind(c), c) for c in choices if c in text]
    return max(named, key=lambda match: match[:2], default=(0, 0, ""))[2]  # the first of equals


def _is_extracted(prediction: str, record: Record) -> bool:
    return extract_letter(prediction) == _reference_letter(record)


VIDEO_MME = accuracy(_is_extracted, groups=("duration", lambda record: name_field(record, "duration")))

_MLVU_DEV = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
_MLVU_TEST = (
    "anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning", "tutorialQA"
)  # fmt: skip


def _mlvu(tasks: Sequence[str]) -> Metric:
    """Return MLVU's metric: the mean of the accuracies of these tasks, 0 for a task without questions."""

    def task_of(record: Record) -> str:
        task = name_field(record, "task_type")
        if task not in tasks:
            raise UserError(f"record {record.id}: field 'task_type' {task!r} must be one of {', '.join(tasks)}")
        return task

    def score(prediction: str, _: tuple[str, ...], record: Record) -> Scores:
        task_of(record)  # refuses a record without one
        return {"accuracy": float(_is_extracted(prediction, record))}

    def drawn(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
        right = np.array([answer["accuracy"] for answer in scores])[:, None] * times
        rows = [np.array([task_of(record) == task for record in records]) for task in tasks]
        each = [right[of_task].sum(axis=0) / np.maximum(times[of_task].sum(axis=0), 1) for of_task in rows]
        return {"accuracy": np.mean(each, axis=0)}

    return Metric("accuracy", score, once(drawn), groups=("task", task_of), drawn=drawn)


MLVU_DEV, MLVU_TEST = _mlvu(_MLVU_DEV), _mlvu(_MLVU_TEST)


# MVBench: a letter A to E that stands alone in the answer; empty answers are not counted

_LETTER_FIRST, _LETTER = re.compile(r"^([A-E])\.\s*(.+)$", re.IGNORECASE), re.compile(r"\b([A-E])\b", re.IGNORECASE)
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP, _COMMA = re.compile(r"(?!<=\d)(\.)(?!\d)"), re.compile(r"(\d)(,)(\d)")
_FULL_STOPS = 32  # number of full stops removed by lmms-eval, which passes re.UNICODE as the count


def _alone(text: str) -> str:
    """Return the first letter A to E that stands alone in a text, in upper case, else the normalised text."""
    first = _LETTER_FIRST.match(text.strip())
    if first:
        return first[1].upper()
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _PUNCTUATION:
        removed = f"{mark} " in before or f" {mark}" in before or _COMMA.search(before) is not None
        text = text.replace(mark, "" if removed else " ")
    text = _FULL_STOP.sub("", text, _FULL_STOPS).strip("'").strip('"').strip(")").strip("(").strip().lower()
    letter = _LETTER.search(text)
    return letter[1].upper() if letter else text


def _mvbench_score(prediction: str, _: tuple[str, ...], record: Record) -> Scores:
    right = _alone(prediction) == _alone(_reference_letter(record))
    return {"accuracy": float(right), "answered": float(bool(prediction))}


def _mvbench(scores: Sequence[Scores], records: Sequence[Record], times: np.ndarray) -> dict[str, np.ndarray]:
    del records
    right, answered = np.array([[answer["accuracy"], answer["answered"]] for answer in scores]).T @ times
    return {"accuracy": right / np.maximum(answered, 1), "answered": answered / np.maximum(times.sum(axis=0), 1)}


MVBENCH = Metric("accuracy", _mvbench_score, once(_mvbench), drawn=_mvbench)


# TempCompass, multiple choice, without the judge to which lmms-eval sends answers that its rules cannot read


def _tempcompass(prediction: str, references: tuple[str, ...], record: Record) -> Scores:
    """Score an answer that equals the reference or begins with its letter, as `B`, `B.` or `B)`; others are wrong."""
    named = re.match(r"([A-D])(?:$|[.)])", prediction)
    right = prediction == references[0] or (named is not None and named[1] == _reference_letter(record))
    return {"accuracy_without_judge": float(right)}


TEMPCOMPASS = Metric(
    "accuracy_without_judge", _tempcompass, groups=("dimension", lambda record: name_field(record, "dim"))
)


# LongVideoBench: the first of the letters A to E in the answer, else a random choice

_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


def _longvideobench(prediction: str, record: Record) -> bool:
    for prefix in _PREFIXES:
        prediction = prediction.replace(prefix, "")
    letter, known = re.search("[ABCDE]", prediction), letters(choices_field(record, "options"))
    chosen = letter[0] if letter else random.Random(f"{SEED} {record.id}").choice(known)
    return chosen in right_letters(record, "options")


LONGVIDEOBENCH = accuracy(_longvideobench, groups=("duration", lambda record: name_field(record, "duration_group")))


# NExT-QA, multiple choice: MMMU's rule, also for empty answers


def _nextqa(prediction: str, record: Record) -> bool:
    return parse_letter(prediction, choices_field(record, "options"), record.id) in right_letters(record, "options")


NEXTQA = accuracy(_nextqa)
