"""What a metric may be, and benchmarks as files of a user's own against lmms-eval's numbers."""

import importlib.util
import math

import pytest

import vlmprune_jax as vp
from vlmprune_jax.base.errors import UserError
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
    with pytest.raises(
        UserError, match=r"metric 'exact_macth' is not one of exact_match, .* did you mean 'exact_match'"
    ):
        metric_named("exact_macth")
    assert EXACT_MATCH.describe() == {
        "main": "accuracy",
        "unit": "%",
        "full": 1.0,
        "higher_is_better": True,
        "scale": 100.0,
        "grouped_by": "answer",
    }
    perception = Metric("score", lambda *_: {}, full=2000.0, unit="")
    assert (perception.describe()["scale"], PERPLEXITY.describe()["scale"]) == (1.0, 1.0)


def test_what_a_metric_may_not_be():
    with pytest.raises(UserError, match='unit "%" needs the score of a perfect model'):
        Metric("x", lambda *_: {}, full=None)
    with pytest.raises(UserError, match=r'metric "x": full=1\.0 must be positive, or None if lower is better'):
        Metric("x", lambda *_: {}, higher_is_better=False)
    with pytest.raises(UserError, match=r"metric \"x\": score\(\) of record q failed with KeyError\('choices'\)"):
        measured(Metric("x", lambda said, references, record: record.fields["choices"]), ("a", asked("a")))
    with pytest.raises(UserError, match=r'metric "x": aggregate\(\) failed with ZeroDivisionError'):
        measured(Metric("x", lambda *_: {"x": 1}, lambda *_: {"x": 1 / 0}), ("a", asked("a")))
    with pytest.raises(UserError, match=r'metric "x": aggregate\(\) returned no value named "x" \(found: y\)'):
        measured(Metric("x", lambda *_: {"y": 1.0}), ("a", asked("a")))
    with pytest.raises(UserError, match='metric "x": x is NaN'):
        measured(Metric("x", lambda *_: {"x": math.nan}), ("a", asked("a")))


# --- benchmarks as a user writes them --------------------------------------------------------------------------------

ANLS = """
import vlmprune_jax as vp


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def score(prediction, references, record):
    ours = " ".join(prediction.lower().split())
    near = [distance(ours, " ".join(r.lower().split())) / max(len(r), len(prediction), 1) for r in references]
    return {"anls": 1 - min(near) if min(near) <= 0.5 else 0.0}


vp.metrics["anls"] = vp.Metric("anls", score)
"""
POPE = """
import vlmprune_jax as vp


def score(prediction, references, record):
    said, true = prediction.lower().strip(), references[0].lower().strip()
    right, yes = said == true, said == "yes"
    outcome = {"tp": right and yes, "fp": yes and true == "no", "fn": said == "no" and true == "yes"}
    return {"accuracy": right, "said_yes": yes, **outcome}


def aggregate(scores, records):
    tp, fp, fn = (sum(one[name] for one in scores) for name in ("tp", "fp", "fn"))
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    means = {name: sum(one[name] for one in scores) / len(scores) for name in ("accuracy", "said_yes")}
    return {"f1": f1, "precision": precision, "recall": recall, **means}


vp.metrics["pope"] = vp.Metric("f1", score, aggregate, groups=("category", lambda record: record.fields["category"]))
"""
MME = """
import vlmprune_jax as vp


def aggregate(scores, records):
    pairs, categories = {}, {}
    for one, record in zip(scores, records, strict=True):
        pairs.setdefault((record.fields["category"], record.fields["question_id"]), []).append(one["right"])
    for (category, _), both in pairs.items():
        categories.setdefault(category, []).append(100 * sum(both) / len(both) + 100 * all(both))
    found = {category: sum(points) / len(points) for category, points in categories.items()}
    return {"perception": sum(found.values()), **found}


def score(prediction, references, record):
    return {"right": prediction.lower().startswith(references[0].lower())}


vp.metrics["mme_p"] = vp.Metric("perception", score, aggregate, full=2000.0, unit="")
"""


@pytest.fixture
def users_metric(tmp_path, monkeypatch):
    """Callable (source, name) -> the metric that a file registers under a name; none of them stays."""
    monkeypatch.setattr(vp, "metrics", dict(METRICS))

    def registered(source, name):
        path = tmp_path / f"my_{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return vp.metrics[name]

    return registered


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("abcd", ("abcx",), 0.75),
        ("ab", ("ax",), 0.5),
        ("abc", ("xyz",), 0.0),
        ("1 / 2", ("1/2",), 0.6),
        ("hello world", ("nothing like it", "  Hello   World "), 1.0),
    ],
)
def test_anls_of_several_references(users_metric, prediction, references, value):
    metric = users_metric(ANLS, "anls")
    values, groups = measured(metric, (prediction, asked(*references)))
    assert values == {"anls": pytest.approx(value)}
    assert groups == {}


def test_pope_counts_over_all_answers(users_metric):
    metric = users_metric(POPE, "pope")
    pairs = [("Yes", "yes"), ("Yes.", "yes"), ("no", "yes"), ("maybe", "yes"), ("yes", "no"), ("No", "no")]
    kinds = ("random", "popular")
    answers = [(said, asked(true, category=kinds[i % 2])) for i, (said, true) in enumerate(pairs)]
    values, groups = measured(metric, *answers)
    assert values == pytest.approx({"accuracy": 1 / 3, "precision": 0.5, "recall": 0.5, "f1": 0.5, "said_yes": 1 / 3})
    assert {name: of["questions"] for name, of in groups.items()} == {"popular": 3, "random": 3}
    assert (groups["random"]["f1"], groups["popular"]["f1"]) == (0.5, 0.0)


def test_mme_scores_pairs_of_questions(users_metric):
    metric = users_metric(MME, "mme_p")
    rows = [("count", 1, "Yes"), ("count", 1, "yes"), ("count", 2, "yes"), ("count", 2, "no"), ("OCR", 3, "yes")]
    rows.append(("OCR", 3, "yes."))
    answers = [(said, asked("yes", category=category, question_id=pair)) for category, pair, said in rows]
    assert measured(metric, *answers)[0] == {"perception": 325.0, "count": 125.0, "OCR": 200.0}
