"""What a metric may be."""

import math

from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS, Metric, metric_named
from vlmprune_jax.run.evaluation.metrics.texts import EXACT_MATCH, PERPLEXITY


def asked(*references, **fields):
    return Record("q", (("human", "What?"),), (), None, references, fields)


def measured(metric, *answers):
    """(values, groups) of answers, each (prediction, record)."""
    records = [record for _, record in answers]
    scores = metric.score_all([prediction for prediction, _ in answers], records)
    return metric.values(scores, records), metric.values_of_groups(scores, records)


def test_names_and_descriptions():
    assert vp.metrics is METRICS
    assert vp.Metric is Metric
    assert metric_named("exact_match") is EXACT_MATCH
    refused(r"metric 'exact_macth' is not one of .* did you mean 'exact_match'", metric_named, "exact_macth")
    described = dict(main="accuracy", unit="%", full=1.0, higher_is_better=True, scale=100.0, grouped_by="answer")
    assert EXACT_MATCH.describe() == described
    perception = Metric("score", lambda *_: {}, full=2000.0, unit="")
    assert (perception.describe()["scale"], PERPLEXITY.describe()["scale"]) == (1.0, 1.0)


def test_what_a_metric_may_not_be():
    refused('unit "%" needs the score of a perfect model', Metric, "x", lambda *_: {}, full=None)
    refused(r'metric "x": full=1\.0 must be positive', Metric, "x", lambda *_: {}, higher_is_better=False)
    for metric, fact in (
        (Metric("x", lambda *of: of[2].fields["choices"]), r"score\(\) of record q failed with KeyError\('choices'\)"),
        (Metric("x", lambda *_: {"x": 1}, lambda *_: {"x": 1 / 0}), r"aggregate\(\) failed with ZeroDivisionError"),
        (Metric("x", lambda *_: {"y": 1.0}), r'aggregate\(\) returned no value named "x" \(found: y\)'),
        (Metric("x", lambda *_: {"x": math.nan}), "x is NaN"),
    ):
        refused(f'metric "x": {fact}', measured, metric, ("a", asked("a")))
