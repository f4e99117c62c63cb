"""What a metric may be; metrics of texts by hand, most of which lmms-eval 0.7.3 was seen to score the same."""

import math

import pytest
from answer_cases import asked, measured, value
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.run.evaluation.metrics import METRICS, Metric, metric_named
from vlmprune_jax.run.evaluation.metrics.texts import EXACT_MATCH, PERPLEXITY, processed

PEOPLE = ("yes", "yes", "no", "no", "no", "no", "no", "no", "no", "maybe")


def test_names_and_descriptions():
    assert vp.metrics is METRICS
    assert vp.Metric is Metric
    assert metric_named("exact_match") is EXACT_MATCH
    refused(r"metric 'exact_macth' is not one of .* did you mean 'exact_match'", metric_named, "exact_macth")
    described = dict(main="accuracy", unit="%", full=1.0, higher_is_better=True, scale=100.0, grouped_by="answer")
    assert EXACT_MATCH.describe() == described
    perception = Metric("score", lambda *_: {}, full=2000.0, unit="")
    assert (perception.describe()["scale"], PERPLEXITY.describe()["scale"]) == (1.0, 1.0)


def test_what_a_metric_may_not_be(monkeypatch):
    refused('unit "%" needs the score of a perfect model', Metric, "x", lambda *_: {}, full=None)
    refused(r'metric "x": full=1\.0 must be positive', Metric, "x", lambda *_: {}, higher_is_better=False)
    for metric, fact in (
        (Metric("x", lambda *of: of[2].fields["choices"]), r"score\(\) of record q failed with KeyError\('choices'\)"),
        (Metric("x", lambda *_: {"x": 1}, lambda *_: {"x": 1 / 0}), r"aggregate\(\) failed with ZeroDivisionError"),
        (Metric("x", lambda *_: {"y": 1.0}), r'aggregate\(\) returned no value named "x" \(found: y\)'),
        (Metric("x", lambda *_: {"x": math.nan}), "x is NaN"),
    ):
        monkeypatch.setitem(METRICS, "x", metric)
        refused(f'metric "x": {fact}', measured, "x", ("a", asked("a")))


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
        *(("exact_match", said, right, 1) for said, right in ((" Yes. ", "yes"), ("RED", "red"), ("yes .", "yes"))),
        *(("exact_match", said, "yes", 0) for said in ("no", "a yes", "yes..", "")),
        ("exact_match", "  Two  Words. ", "two words", 0),
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
    refused(r"record q: has 3 .* vqa_accuracy needs at least 4", value, "vqa_accuracy", "yes", asked("a", "b", "c"))
