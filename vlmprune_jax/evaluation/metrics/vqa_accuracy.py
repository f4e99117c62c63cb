"""Soft accuracy of VQA: min(1, people who gave the answer / 3) (arXiv 1505.00468, VQAv2)."""

from __future__ import annotations

import re

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.records import Record
from vlmprune_jax.evaluation.metrics.metric import Metric

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_STOPS = 32  # VQA's own code passes a flag, which is 32, where `re.sub` takes a count
_WHOLE = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're "
    "you've"
)
# Each contraction with one apostrophe left out. As in the table of VQA, `im`, `ive` and `lets` are missing and the
# entry of `somebody'd` is reversed.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WHOLE.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def processed(answer: str) -> str:
    """Return the answer as VQA compares it: lower case, digits, no articles or punctuation, apostrophes restored."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    in_number, found = _COMMA_IN_NUMBER.search(text), text
    for mark in _PUNCTUATION:
        aside = in_number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if aside else " ")
    words = (_WORDS.get(word, word) for word in _FULL_STOP.sub("", found, count=_MOST_STOPS).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _score(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Score one answer: the mean of min(1, others who say the same / 3), leaving out each person in turn."""
    if len(references) < 4:
        raise UserError(
            f"record {record.id}: {len(references)} answer(s), the soft accuracy needs at least 4: list them in "
            "the field 'answers', or use exact_match"
        )
    said, people = processed(prediction), [processed(reference) for reference in references]
    same = [person == said for person in people]
    worth = [min(1.0, (sum(same) - mine) / 3) for mine in same]
    return {"accuracy": sum(worth) / len(worth) if prediction else 0.0}


VQA_ACCURACY = Metric("accuracy", _score)
