"""Metrics that compare answers with references as texts: exact match, GQA, VQA accuracy, ANLS; and perplexity."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics.metric import Metric, Scores, accuracy

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


# Exact match: equal to a reference, ignoring case and a final full stop


def normalise(answer: str) -> str:
    """Return the answer stripped, in lower case and without one final full stop.

    Other differences remain: "a circle" is not "circle".
    """
    return answer.strip().lower().removesuffix(".").rstrip()


def is_exact_match(prediction: str, reference: str) -> bool:
    """Return True if two answers are equal after normalisation."""
    return normalise(prediction) == normalise(reference)


EXACT_MATCH = accuracy(
    lambda prediction, record: any(is_exact_match(prediction, reference) for reference in record.references),
    groups=("answer", lambda record: normalise(record.references[0])),
)


# GQA: exact match, ignoring case and punctuation (`exact_match` of lmms-eval 0.7.3 with both options)


def is_same_text(prediction: str, reference: str) -> bool:
    """Return True if two texts are equal in lower case without ASCII punctuation.

    Inner white space and articles are compared: "T-shirt" equals "tshirt", "a cat" does not equal "cat". An empty
    prediction equals no reference.
    """
    ours, theirs = (text.lower().translate(_WITHOUT_PUNCTUATION) for text in (prediction, reference))
    return bool(prediction) and ours == theirs


GQA = accuracy(lambda prediction, record: any(is_same_text(prediction, reference) for reference in record.references))


# ANLS of DocVQA: one minus the normalised edit distance to the nearest reference, 0 below 0.5 (arXiv 1907.00490)


def _similarity(prediction: str, reference: str) -> float:
    """Return the edit-distance similarity of two texts, from 0 to 1 (ANLS).

    As in lmms-eval 0.7.3, the distance compares lower-case texts with single spaces, but is divided by the length of
    the longer unprocessed text in upper case (in which ß has two letters).
    """
    ours, theirs = (" ".join(text.lower().split()) for text in (prediction, reference))
    longest = max(len(prediction.upper()), len(reference.upper()))
    return 1.0 - Levenshtein.distance(ours, theirs) / longest if prediction else 0.0


def _anls(prediction: str, references: tuple[str, ...], _: Record) -> dict[str, float]:
    nearest = max(_similarity(prediction, reference) for reference in references)
    return {"anls": nearest if nearest >= 0.5 else 0.0}


ANLS = Metric("anls", _anls)


# Soft accuracy of VQA: min(1, people who gave the answer / 3) (arXiv 1505.00468, VQAv2)

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
    """Normalise an answer as in VQA: lower case, numbers as digits, no articles or punctuation."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    in_number, cleaned = _COMMA_IN_NUMBER.search(text), text
    for mark in _PUNCTUATION:
        aside = in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if aside else " ")
    words = (_WORDS.get(word, word) for word in _FULL_STOP.sub("", cleaned, count=_MOST_STOPS).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _soft_accuracy(prediction: str, references: tuple[str, ...], record: Record) -> dict[str, float]:
    """Return VQA accuracy: the mean over annotators left out of min(1, other annotators who agree / 3)."""
    if len(references) < 4:
        raise UserError(
            f"record {record.id}: has {len(references)} reference answer(s), but vqa_accuracy needs at least 4: list "
            "them in the field 'answers', or use exact_match"
        )
    answer, people = processed(prediction), [processed(reference) for reference in references]
    same = [person == answer for person in people]
    worth = [min(1.0, (sum(same) - mine) / 3) for mine in same]
    return {"accuracy": sum(worth) / len(worth) if prediction else 0.0}


VQA_ACCURACY = Metric("accuracy", _soft_accuracy)


# Perplexity of running text: exp of the mean negative log-likelihood per predicted token


BITS = "bits_per_byte"  # comparable between vocabularies, unlike a perplexity per token


def _perplexity(scores: Sequence[Scores], _: Sequence[Record]) -> dict[str, float]:
    nats, tokens, size = 0.0, 0.0, 0.0
    for score in scores:
        nats, tokens, size = nats + score["nll"], tokens + score["tokens"], size + score.get("bytes", 0.0)
    values = {"perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf}
    return {**values, BITS: nats / math.log(2) / size} if size else values


PERPLEXITY = Metric("perplexity", None, _perplexity, full=None, unit="", higher_is_better=False)
