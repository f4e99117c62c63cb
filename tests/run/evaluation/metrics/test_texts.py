"""Metrics of texts against cases computed by hand, most of which lmms-eval 0.7.3 was seen to score the same."""

import math

import pytest
from metric_cases import asked, measured, value
from refusal import refused

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.metrics.texts import PERPLEXITY, is_exact_match, normalise, processed

PEOPLE = ("yes", "yes", "no", "no", "no", "no", "no", "no", "no", "maybe")


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        (" Yes. ", "yes", True),
        ("RED", "red", True),
        ("yes .", "yes", True),
        ("3.5", "3.5", True),
        ("no", "yes", False),
        ("a circle", "circle", False),
        ("yes..", "yes", False),
        ("", "yes", False),
    ],
)
def test_exact_match(prediction, reference, same):
    assert is_exact_match(prediction, reference) is same


def test_normalise_keeps_inner_text():
    assert normalise("  Two  Words. ") == "two  words"


def test_accuracy_by_answer():
    answers = [("Yes", asked("yes")), ("no", asked("yes")), ("yes", asked("yes.")), ("blue", asked("blue", "azure"))]
    values, groups = measured("exact_match", *answers)
    assert values == {"accuracy": 0.75}
    assert list(groups) == ["yes", "blue"]
    assert groups["yes"] == {"questions": 3, "accuracy": pytest.approx(2 / 3)}
    assert measured("exact_match", ("azure.", asked("blue", "azure")))[0] == {"accuracy": 1.0}


def test_perplexity_is_of_running_text():
    lines = [{"nll": 3.0, "tokens": 2}, {"nll": 1.0, "tokens": 2}]
    assert PERPLEXITY.values(lines, ()) == {"perplexity": pytest.approx(math.e)}
    with_bytes = [{**line, "bytes": 2.0 * line["tokens"]} for line in lines]
    assert PERPLEXITY.values(with_bytes, ())["bits_per_byte"] == pytest.approx(1 / math.log(2) / 2)
    assert PERPLEXITY.values([{"nll": 1e9, "tokens": 1}], ()) == {"perplexity": math.inf}
    refused("scores a text, not answers to questions", PERPLEXITY.score_all, ["a"], [asked("a")])


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("gqa", "Yes.", "yes", 1),
        ("gqa", "T-shirt", "tshirt", 1),
        ("gqa", "(B)", "B", 1),
        ("gqa", "a cat", "cat", 0),
        ("gqa", "cat  dog", "cat dog", 0),
        ("gqa", "", "...", 0),
        ("anls", "abcx", "abcd", 0.75),
        ("anls", "ax", "ab", 0.5),
        ("anls", "xyz", "abc", 0),
        ("anls", "1 / 2", "1/2", 0.6),
        ("anls", "hello world", "  Hello   World ", 1),
        ("anls", "maße", "masse", 0.6),  # two edits; the upper case of both has five letters
        ("anls", "ßß", "ß", 0.75),
        ("anls", "", " ", 0),
    ],
)
def test_one_answer(name, prediction, reference, expected):
    assert value(name, prediction, asked(reference)) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "as_compared"),
    [
        ("The T-shirt!", "t shirt"),
        ("T -shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 x/y", "1000 xy"),
        ("3.5 a.m.", "3.5 am"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont\n", "don't"),
        ("couldnt've, youd", "couldn't've you'd"),
        ("lets go", "lets go"),
        ("an apple", "apple"),
        ("." * 40, "." * 8),
    ],
)
def test_answers_as_vqa_compares_them(answer, as_compared):
    assert processed(answer) == as_compared


@pytest.mark.parametrize(
    ("prediction", "accuracy"),
    # Two of ten said yes: without one of these a third, without another two thirds.
    [("Yes.", 0.2 * 1 / 3 + 0.8 * 2 / 3), ("no", 1.0), ("maybe", 0.9 / 3), ("other", 0.0), ("", 0.0)],
)
def test_soft_accuracy(prediction, accuracy):
    assert value("vqa_accuracy", prediction, asked(*PEOPLE)) == pytest.approx(accuracy, abs=1e-12)


def test_soft_accuracy_needs_four_answers():
    with pytest.raises(UserError, match=r"record q: has 3 reference answer\(s\), but vqa_accuracy needs at least 4"):
        measured("vqa_accuracy", ("yes", asked("a", "b", "c")))
