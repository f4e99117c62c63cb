"""Intervals and McNemar's test: known values, agreement of the ways to draw, and refusals."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal import refused

from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.metrics.metric import Metric, mean
from vlmprune_jax.run.evaluation.statistics import interval_of_mean, retained_interval

ACCURACY = METRICS["exact_match"]


def rights(values):
    return [{"accuracy": float(value)} for value in values]


def questions(number, **fields):
    return [Record(str(i), (), (), None, ("yes",), {k: of(i) for k, of in fields.items()}) for i in range(number)]


def test_what_is_equal_for_both_widens_little():
    """60 of 60 right is no certainty; questions that both get wrong do not matter."""
    low, high = retained_interval(ACCURACY, rights([1] * 60), rights([1] * 60), questions(60))
    assert (low, high) == (pytest.approx(96.85, abs=0.01), pytest.approx(103.25, abs=0.01))
    padded = rights([1] * 60 + [0] * 40)
    assert retained_interval(ACCURACY, padded, padded, questions(100)) == (low, high)
    alike = [{"accuracy": 0.5}] * 60  # of no proportion: every sample of a bootstrap is equal
    assert retained_interval(ACCURACY, alike, alike, questions(60)) == (low, high)
    ours, theirs = ([{"accuracy": (i % 7 + extra) / 9} for i in range(50)] for extra in (1, 3))
    first, again, other = (retained_interval(ACCURACY, ours, theirs, questions(50), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    inner = retained_interval(ACCURACY, ours, theirs, questions(50), level=0.5)
    assert first[0] < inner[0] < inner[1] < first[1]


def test_a_ratio_of_proportions_is_bonett_and_prices():
    """The numbers by hand, from the formulas of the paper; by symmetry the inverse ratio has the inverse ends."""
    ours, theirs = [1] * 70 + [0] * 10 + [1] * 5 + [0] * 15, [1] * 80 + [0] * 20
    low, high = retained_interval(ACCURACY, rights(ours), rights(theirs), questions(100))
    z = 1.959964 * math.sqrt(17 / (76 * 81)) / (math.sqrt((1 - 76 / 87) / 76) + math.sqrt((1 - 81 / 87) / 81))
    ends = {}
    for right in (75, 80):
        root = z * math.sqrt(z**2 + 4 * right * (1 - right / 85))
        ends[right] = [(2 * right + z**2 + sign * root) / (2 * (85 + z**2)) for sign in (-1, 1)]
    assert (low, high) == pytest.approx((100 * ends[75][0] / ends[80][1], 100 * ends[75][1] / ends[80][0]))
    inverse = retained_interval(ACCURACY, rights(theirs), rights(ours), questions(100))
    assert inverse == pytest.approx((1e4 / high, 1e4 / low))


@pytest.mark.parametrize(("right", "keeps"), [(1.0, 0.995), (0.98, 0.97), (0.8, 0.995)])
def test_an_interval_at_the_edge_covers_the_truth(right, keeps):
    """A bootstrap covers it in 25 to 83 % of such samples of 60 questions."""
    draw, inside = np.random.default_rng(0), 0
    for _ in range(300):
        theirs = draw.random(60) < right
        ours = theirs & (draw.random(60) < keeps)
        low, high = retained_interval(ACCURACY, rights(ours), rights(theirs), questions(60))
        inside += low <= 100 * keeps <= high
    assert inside >= 0.93 * 300


def test_a_metric_that_is_better_when_lower_is_turned_around():
    perplexity = METRICS["perplexity"]
    ours, theirs = ([{"nll": nll + i / 10, "tokens": 8.0} for i in range(9)] for nll in (16.0, 8.0))
    low, high = retained_interval(perplexity, ours, theirs, (), draws=50)
    assert low == pytest.approx(100 * math.exp(-1))
    assert high == pytest.approx(100 * math.exp(-1))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=6, max_size=20), st.integers(0, 99))
def test_pope_by_counts_is_pope_by_repetition(rows, seed):
    records = [
        Record("q", (), (), None, ("yes" if yes else "no",), {"category": "abc"[i % 3]})
        for i, (yes, *_) in enumerate(rows)
    ]
    metric = METRICS["pope"]
    ours, theirs = (metric.score_all(["yes" if row[model] else "no" for row in rows], records) for model in (1, 2))
    fast = retained_interval(metric, ours, theirs, records, draws=20, seed=seed)
    repeated = dataclasses.replace(metric, drawn=None, aggregate=all_splits(metric))  # one by one, as a user's is
    slow = retained_interval(repeated, ours, theirs, records, draws=20, seed=seed)
    assert fast == (slow if slow is None else pytest.approx(slow))


def all_splits(metric):
    """POPE's mean over three splits, of which a small sample may lack one (worth 0 then)."""

    def aggregate(scores, records):
        present = {record.fields["category"] for record in records}
        return {"f1": metric.values(scores, records)["f1"] * len(present) / 3}

    return aggregate


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
    assert retained_interval(ACCURACY, rights([1, 0]), rights([0, 0]), questions(2)) is None
    half = [{"accuracy": value} for value in (0.5, 0.0)]
    assert retained_interval(ACCURACY, half, half, questions(2)) is None
    refused("1 and 2 answers: both must", retained_interval, ACCURACY, rights([1]), rights([1, 0]), questions(2))
    refused("0 and 0 answers", retained_interval, ACCURACY, [], [], [])


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
