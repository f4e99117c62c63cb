"""Metrics and their intervals: cases by hand, most of which lmms-eval 0.7.3 was seen to score the same; refusals."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS, Metric, metric_named
from vlmprune_jax.run.evaluation.metrics.choices import parse_letter, parse_open
from vlmprune_jax.run.evaluation.metrics.metric import mean
from vlmprune_jax.run.evaluation.metrics.texts import EXACT_MATCH, PERPLEXITY, processed
from vlmprune_jax.run.evaluation.statistics import interval_of_mean, retained_interval

ANIMALS = {"choices": ["cat", "dog", "mouse"], "options": ["cat", "dog", "mouse"], "question_type": "multiple-choice"}


def maths(kind, question="free_form", **fields):
    return {"question_type": question, "answer_type": kind, **fields}


CHOICE = ANIMALS | maths("text", "multi_choice")
OPEN = {"question_type": "open"}
PEOPLE = ("yes", "yes", "no", "no", "no", "no", "no", "no", "no", "maybe")


def asked(*references, name="q", **fields):
    return Record(name, (("human", "What?"),), (), None, references, fields)


def measured(name, *answers):
    """(values, groups) of answers, each (prediction, record)."""
    records = [record for _, record in answers]
    scores = METRICS[name].score_all([prediction for prediction, _ in answers], records)
    return METRICS[name].values(scores, records), METRICS[name].values_of_groups(scores, records)


def value(name, prediction, record):
    return measured(name, (prediction, record))[0][METRICS[name].main]


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
    ("name", "prediction", "reference", "fields", "expected"),
    [
        *((("scienceqa", said, "B", ANIMALS, 1)) for said in ("B", "b", "B.", "B. y")),
        *((("scienceqa", said, "B", ANIMALS, 0)) for said in ("(B)", "B y", "b. y", "B,", "The answer is B", "A", "")),
        *((("ai2d", said, "B", ANIMALS, 1)) for said in ("B", "b", "B.", "B. text", " B. text", "(B)")),
        *((("ai2d", said, "B", ANIMALS, 0)) for said in ("B) x", " b. x", "b. x", "The answer is B.", "C. text", "")),
        *((("exact_match", said, right, {}, 1)) for said, right in ((" Yes. ", "yes"), ("yes .", "yes"))),
        *((("exact_match", said, "yes", {}, 0)) for said in ("no", "a yes", "yes..", "")),
        ("exact_match", "  Two  Words. ", "two words", {}, 0),
        *((("gqa", said, right, {}, 1)) for said, right in (("T-shirt", "tshirt"), ("(B)", "B"))),
        *((("gqa", said, right, {}, 0)) for said, right in (("a cat", "cat"), ("cat  dog", "cat dog"), ("", "..."))),
        ("anls", "abcx", "abcd", {}, 0.75),
        *((("anls", said, right, {}, 0)) for said, right in (("xyz", "abc"), ("", " "))),
        ("anls", "1 / 2", "1/2", {}, 0.6),
        ("anls", "hello world", "  Hello   World ", {}, 1),
        ("anls", "maße", "masse", {}, 0.6),  # two edits; the upper case of both has five letters
        ("anls", "ßß", "ß", {}, 0.75),
        # Two of ten said yes: without one of these a third, without another two thirds.
        ("vqa_accuracy", "Yes.", PEOPLE, {}, 0.2 * 1 / 3 + 0.8 * 2 / 3),
        ("vqa_accuracy", "maybe", PEOPLE, {}, 0.9 / 3),
        *((("vqa_accuracy", said, PEOPLE, {}, said == "no")) for said in ("no", "other", "")),
        *(("mathvista", said, "dog", CHOICE, 1) for said in ("dog", "B", "it is (b), not (a)")),
        ("mathvista", "b", "dog", CHOICE, 0),  # nearest in three edits: cat is the first
        ("mathvista", "mouses", "mouse", CHOICE, 1),
        ("mathvista", "", "cat", CHOICE, 0),
        ("mathvista", "14.7", "14", maths("integer"), 1),
        ("mathvista", "The number is 14", "14", maths("integer"), 0),
        ("mathvista", "inf", "14", maths("integer"), 0),
        ("mathvista", "1.449", "1.45", maths("float", precision=2), 1),
        ("mathvista", "2", "2.0", maths("float", precision=1.0), 1),
        ("mathvista", "[1, 2]", "[1, 2]", maths("list"), 1),
        ("mathvista", "[1,2]", "[1, 2]", maths("list"), 0),
        ("mmmu", "the answer is B", "B", ANIMALS, 1),
        ("mmmu", "", "A", ANIMALS, 0),
        ("mmmu", "x = 1,234 m", "1234", OPEN, 1),
        ("mmmu", "x = 1,234.5 m", "1234.5", OPEN, 0),  # read as 1,234 and as 234.5
        ("mmmu", "It is red.\nSo the final answer is dark blue.", "Blue", OPEN, 1),
        ("mmmu", "blue", "dark blue", OPEN, 0),
        ("mmmu", "about 3.14159", "3.1416", OPEN, 1),
        ("mmmu", "because", "b", OPEN, 0),  # a lone letter needs a blank beside it
        ("mmmu", "", "b", OPEN, 0),
    ],
)
def test_one_answer(name, prediction, reference, fields, expected):
    references = (reference,) if isinstance(reference, str) else reference
    assert value(name, prediction, asked(*references, **fields)) == pytest.approx(float(expected), abs=1e-12)


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
    ("said", "letter"),
    [
        ("the answer is B", "B"),
        ("(A) or (C)", "C"),
        ("A cat B", "B"),
        ("B and not DNA now", "B"),
        ("DNA is it", "A"),
        ("C.", "C"),
        ("see A.1 or B.2 there", "A"),  # both by `X.`, neither stands alone: the first
        ("(B), and then C was said", "B"),
        ("so I say it is dog", "B"),  # six words; five are not read
        ("it looks like cat and then dog", "B"),
    ],
)
def test_letters_of_mmmu(said, letter):
    assert {parse_letter(said, ANIMALS["options"], str(name)) for name in range(9)} == {letter}  # nothing is drawn


def test_an_answer_without_letter_is_drawn_by_question():
    choices = ["cat", "dog", "mouse", "fish"]
    drawn = {name: parse_letter("dog", choices, name) for name in map(str, range(400))}
    assert drawn == {name: parse_letter("I say it is dog", choices, name) for name in drawn}
    counts = [list(drawn.values()).count(letter) for letter in "ABCD"]
    assert min(counts) > 70  # of 100 expected, with a standard deviation of 9
    assert [drawn[str(name)] for name in range(8)] == list("CBBADDBA")  # in every run, on every machine


def test_open_answers_of_mmmu():
    assert parse_open("The result is 1,000 or 2e3") == {"1,000 or 2e3", 1000.0, 2000.0, 0.0, 3.0}  # also 000, and 3
    assert parse_open("x = 5") == {5.0}
    assert parse_open("a = 1\nb = 2") == {2.0}  # an equation counts in the last line alone
    assert parse_open("It is .") == {"it is"}
    assert parse_open("Nothing to see") == {"nothing to see"}
    assert parse_open("y") == {" y", "y "}


def test_subjects_of_mmmu():
    names = ("validation_Art_Theory_1", "validation_Art_Theory_2", "validation_Music_1", "17")
    answers = [(said, asked("5", name=name, **OPEN)) for said, name in zip("5675", names, strict=True)]
    values, groups = measured("mmmu", *answers)
    assert values == {"accuracy": 0.5}
    assert {name: of["accuracy"] for name, of in groups.items()} == {"Art_Theory": 0.5, "Music": 0.0, "other": 1.0}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("scienceqa", asked("B"), "record q: has no field 'choices', which the metric needs"),
        ("ai2d", asked("B", options="cat, dog"), "record q: field 'options' must list 1 to 26 texts, got 'cat, dog'"),
        ("ai2d", asked("D", **ANIMALS), "record q: answer 'D' must be one of the letters A to C of its 3 options"),
        ("mmmu", asked("B", question_type="multiple-choice"), "record q: has no field 'options'"),
        ("mmmu", asked("B", question_type="closed"), "field 'question_type' 'closed' must be multiple-choice or open"),
        ("mathvista", asked("1", **maths("float")), "record q: has no field 'precision'"),
        ("mathvista", asked("1", **maths("float", precision=0.5)), "'precision' must be an integer number of decimals"),
        ("mathvista", asked("1", **maths("bool")), "'answer_type' 'bool' must be integer, float, list or text"),
        ("mathvista", asked("x", **CHOICE), "answer 'x' is not one of the record's"),
        ("pope", asked("yes"), "record q: has no field 'category'"),
        ("pope", asked("two", category="random"), "record q: answer 'two' must be yes or no"),
        ("mme", asked("yes", question_id=1), "record q: has no field 'category'"),
        ("mme", asked("yes", category="OCR", question_id=[1]), "field 'question_id' must be a string or an integer"),
        ("mme", asked("yes", category="\ud800", question_id=7), "field 'category' must be a string or an integer"),
        ("mme", asked("yes", category="OCR", question_id=7), "category OCR, question_id 7 has 1"),
        (
            "vqa_accuracy",
            asked("a", "b", "c"),
            "record q: has 3 reference answer(s), but vqa_accuracy needs at least 4",
        ),
    ],
)
def test_records_that_a_metric_cannot_use(name, record, message):
    said = refused(re.escape(message), measured, name, ("yes", record))
    assert said.startswith(f'metric "{METRICS[name].main}": ')


def test_choices_as_the_text_of_a_list():
    assert value("mmmu", "B", asked("B", question_type="multiple-choice", options="['cat', \"dog's\"]")) == 1
    deep = asked("B", question_type="multiple-choice", options="[" * 100_000)
    refused("field 'options' must list", value, "mmmu", "B", deep)


# --- POPE and MME ----------------------------------------------------------------------------------------------------


def test_pope():
    pairs = [("Yes", "yes"), ("Yes.", "yes"), ("no", "yes"), ("maybe", "yes"), ("yes", "no"), ("No", "no")]
    answers = [(said, asked(true, category=("random", "popular")[i % 2])) for i, (said, true) in enumerate(pairs)]
    values, groups = measured("pope", *answers)
    pooled = {"accuracy": 1 / 3, "precision": 0.5, "recall": 0.5, "f1_pooled": 0.5, "said_yes": 1 / 3}
    assert values == pytest.approx({**pooled, "f1": 0.25})
    # random: TP, a no where yes is right, a yes where no is right; popular: `Yes.`, `maybe`, and a right no
    halves = dict.fromkeys(("precision", "recall", "f1", "f1_pooled"), 0.5)
    assert groups["random"] == pytest.approx({"questions": 3, "accuracy": 1 / 3, **halves, "said_yes": 2 / 3})
    assert groups["popular"]["f1"] == 0
    assert groups["popular"]["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("said", "right"),
    [("Not", "no"), ("None", "no"), ("Nope", "no"), ("eyes", "yes"), ("y", "yes"), ("N.", "no"), ("Y.e.s", "yes")]
    + [(said, None) for said in ("I know", "unknown", "well yes", "x", "")],
)
def test_words_of_mme(said, right):
    for reference in ("Yes", "no."):
        record = asked(reference, category="count", question_id=1)
        assert METRICS["mme"].score_all([said], [record]) == [{"right": float(right == reference.lower().strip("."))}]


def test_mme_sums_categories_of_pairs():
    said = [("count", 1, "yes"), ("count", 1, "no"), ("count", 2, "yes"), ("OCR", 1, "yes"), ("count", 2, "Yes.")]
    said += [("OCR", 1, "y"), ("code_reasoning", 1, "no"), ("code_reasoning", 1, "yes")]
    answers = [(text, asked("yes", category=category, question_id=pair)) for category, pair, text in said]
    values, groups = measured("mme", *answers)
    assert (values["perception"], values["cognition"], values["score"]) == (325.0, 50.0, 375.0)
    assert (values["accuracy"], values["accuracy_plus"]) == (75.0, 50.0)
    assert {name: of["score"] for name, of in groups.items()} == {"count": 125.0, "OCR": 200.0, "code_reasoning": 50.0}
    for name, main, full in (("mme_perception", 325.0, 2000.0), ("mme_cognition", 50.0, 800.0), ("mme", 375.0, 2800.0)):
        found, _ = measured(name, *answers)
        assert (found[METRICS[name].main], METRICS[name].full) == (main, full)


# --- intervals -------------------------------------------------------------------------------------------------------


def rights(values):
    return [{"accuracy": float(value)} for value in values]


def questions(number, **fields):
    return [asked("yes", name=str(i), **{k: of(i) for k, of in fields.items()}) for i in range(number)]


def test_what_is_equal_for_both_widens_little():
    """60 of 60 right is no certainty; questions that both get wrong do not matter."""
    low, high = retained_interval(EXACT_MATCH, rights([1] * 60), rights([1] * 60), questions(60))
    assert (low, high) == (pytest.approx(96.85, abs=0.01), pytest.approx(103.25, abs=0.01))
    padded = rights([1] * 60 + [0] * 40)
    assert retained_interval(EXACT_MATCH, padded, padded, questions(100)) == (low, high)
    alike = [{"accuracy": 0.5}] * 60  # of no proportion: every sample of a bootstrap is equal
    assert retained_interval(EXACT_MATCH, alike, alike, questions(60)) == (low, high)
    ours, theirs = ([{"accuracy": (i % 7 + extra) / 9} for i in range(50)] for extra in (1, 3))
    first, again, other = (retained_interval(EXACT_MATCH, ours, theirs, questions(50), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    inner = retained_interval(EXACT_MATCH, ours, theirs, questions(50), level=0.5)
    assert first[0] < inner[0] < inner[1] < first[1]


def test_a_ratio_of_proportions_is_bonett_and_prices():
    """The numbers by hand, from the formulas of the paper; by symmetry the inverse ratio has the inverse ends."""
    ours, theirs = [1] * 70 + [0] * 10 + [1] * 5 + [0] * 15, [1] * 80 + [0] * 20
    low, high = retained_interval(EXACT_MATCH, rights(ours), rights(theirs), questions(100))
    z = 1.959964 * math.sqrt(17 / (76 * 81)) / (math.sqrt((1 - 76 / 87) / 76) + math.sqrt((1 - 81 / 87) / 81))
    ends = {}
    for right in (75, 80):
        root = z * math.sqrt(z**2 + 4 * right * (1 - right / 85))
        ends[right] = [(2 * right + z**2 + sign * root) / (2 * (85 + z**2)) for sign in (-1, 1)]
    assert (low, high) == pytest.approx((100 * ends[75][0] / ends[80][1], 100 * ends[75][1] / ends[80][0]))
    inverse = retained_interval(EXACT_MATCH, rights(theirs), rights(ours), questions(100))
    assert inverse == pytest.approx((1e4 / high, 1e4 / low))


@pytest.mark.parametrize(("right", "keeps"), [(1.0, 0.995), (0.98, 0.97), (0.8, 0.995)])
def test_an_interval_at_the_edge_covers_the_truth(right, keeps):
    """A bootstrap covers it in 25 to 83 % of such samples of 60 questions."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(300):
        theirs = draw.random(60) < right
        ours = theirs & (draw.random(60) < keeps)
        low, high = retained_interval(EXACT_MATCH, rights(ours), rights(theirs), questions(60))
        inside += low <= 100 * keeps <= high
    assert inside >= 0.93 * 300


def test_a_metric_that_is_better_when_lower_is_turned_around():
    ours, theirs = ([{"nll": nll + i / 10, "tokens": 8.0} for i in range(9)] for nll in (16.0, 8.0))
    ends = retained_interval(PERPLEXITY, ours, theirs, (), draws=50)
    assert ends == pytest.approx(2 * (100 * math.exp(-1),))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=6, max_size=20), st.integers(0, 99))
def test_pope_by_counts_is_pope_by_repetition(rows, seed):
    records = [asked("yes" if yes else "no", category="abc"[i % 3]) for i, (yes, *_) in enumerate(rows)]
    metric = METRICS["pope"]

    def all_splits(scores, records):
        """POPE's mean over three splits, of which a small sample may lack one (worth 0 then)."""
        present = {record.fields["category"] for record in records}
        return {"f1": metric.values(scores, records)["f1"] * len(present) / 3}

    ours, theirs = (metric.score_all(["yes" if row[model] else "no" for row in rows], records) for model in (1, 2))
    fast = retained_interval(metric, ours, theirs, records, draws=20, seed=seed)
    repeated = dataclasses.replace(metric, drawn=None, aggregate=all_splits)  # one by one, as a user's is
    slow = retained_interval(repeated, ours, theirs, records, draws=20, seed=seed)
    assert fast == (slow if slow is None else pytest.approx(slow))


def test_pairs_of_mme_are_drawn_together():
    records = questions(12, category=lambda i: "count", question_id=lambda i: i // 2)
    metric = METRICS["mme"]
    theirs = metric.score_all(["yes"] * 12, records)
    # Of a pair either both are right or none: a pair is worth 200 or 0, never the 50 of a pair that was torn apart.
    ours = metric.score_all(["yes" if i // 2 < 3 else "no" for i in range(12)], records)
    low, high = retained_interval(metric, ours, theirs, records, draws=4000)
    assert {round(6 * low / 100, 9), round(6 * high / 100, 9)} <= set(map(float, range(7)))
    assert (low, high) == (pytest.approx(100 / 6), pytest.approx(500 / 6))


def test_a_users_aggregate_is_worked_out_for_every_sample():
    best = Metric("best", lambda *_: {}, lambda scores, records: {"best": max(one["x"] for one in scores)})
    ours, theirs = ([{"x": value} for value in of] for of in ((1.0, 2.0, 3.0), (4.0, 4.0, 4.0)))
    assert retained_interval(best, ours, theirs, questions(3), level=1.0) == (25.0, 75.0)
    means = Metric("x", lambda *_: {}, lambda scores, records: mean(scores, records))
    fast = retained_interval(Metric("x", lambda *_: {}), ours, theirs, questions(3), draws=4000)
    slow = retained_interval(means, ours, theirs, questions(3), draws=4000)
    assert fast == pytest.approx(slow, abs=1.0)


def test_no_interval_where_the_unpruned_model_may_score_nothing():
    assert retained_interval(EXACT_MATCH, rights([1, 0]), rights([0, 0]), questions(2)) is None
    half = [{"accuracy": value} for value in (0.5, 0.0)]
    assert retained_interval(EXACT_MATCH, half, half, questions(2)) is None
    refused("1 and 2 answers: both must", retained_interval, EXACT_MATCH, rights([1]), rights([1, 0]), questions(2))
    refused("0 and 0 answers", retained_interval, EXACT_MATCH, [], [], [])


def test_a_mean_over_seeds_has_an_interval_over_questions_too():
    """Over seeds it is Student's t, by hand: 2 degrees of freedom, 4.3027 * sqrt(1) / sqrt(3)."""
    values, intervals = [1.0, 2.0, 3.0], [(0.0, 1.5), (1.0, 2.5), (2.0, 3.5)]
    mean, low, high = interval_of_mean(values)
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert interval_of_mean(values, [*intervals[:2], None]) == (mean, low, high)
    wide = mean - math.hypot(mean - low, 1.0), mean + math.hypot(high - mean, 0.5)
    assert interval_of_mean(values, intervals) == pytest.approx((mean, *wide))
    assert interval_of_mean([99.8] * 3, [(99.0, 100.1)] * 3) == pytest.approx((99.8, 99.0, 100.1))
    assert interval_of_mean([5.0]) == (5.0, 5.0, 5.0)
    assert interval_of_mean([5.0], [(4.0, 5.5)]) == (5.0, 4.0, 5.5)
