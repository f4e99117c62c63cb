"""POPE and MME: cases computed by hand, most of which lmms-eval 0.7.3 was seen to score the same."""

import pytest
from metric_cases import asked, measured

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.metrics import METRICS


def test_pope():
    pairs = [("Yes", "yes"), ("Yes.", "yes"), ("no", "yes"), ("maybe", "yes"), ("yes", "no"), ("No", "no")]
    answers = [(said, asked(true, category=("random", "popular")[i % 2])) for i, (said, true) in enumerate(pairs)]
    values, groups = measured("pope", *answers)
    pooled = {"accuracy": 1 / 3, "precision": 0.5, "recall": 0.5, "f1_pooled": 0.5, "said_yes": 1 / 3}
    assert values == pytest.approx({**pooled, "f1": 0.25})
    # random: TP, a no where yes is right, a yes where no is right; popular: `Yes.`, `maybe`, and a right no
    assert groups["random"] == pytest.approx(
        {
            "questions": 3,
            "accuracy": 1 / 3,
            "precision": 0.5,
            "recall": 0.5,
            "f1": 0.5,
            "f1_pooled": 0.5,
            "said_yes": 2 / 3,
        }
    )
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


def mme(category, pair, said):
    return said, asked("yes", category=category, question_id=pair)


def test_mme_sums_categories_of_pairs():
    answers = [mme("count", 1, "yes"), mme("count", 1, "no"), mme("count", 2, "yes"), mme("OCR", 1, "yes")]
    answers += [
        mme("count", 2, "Yes."),
        mme("OCR", 1, "y"),
        mme("code_reasoning", 1, "no"),
        mme("code_reasoning", 1, "yes"),
    ]
    values, groups = measured("mme", *answers)
    assert (values["perception"], values["cognition"], values["score"]) == (325.0, 50.0, 375.0)
    assert (values["accuracy"], values["accuracy_plus"]) == (75.0, 50.0)
    assert {name: of["score"] for name, of in groups.items()} == {"count": 125.0, "OCR": 200.0, "code_reasoning": 50.0}
    for name, main, full in (("mme_perception", 325.0, 2000.0), ("mme_cognition", 50.0, 800.0), ("mme", 375.0, 2800.0)):
        found, _ = measured(name, *answers)
        assert (found[METRICS[name].main], METRICS[name].full) == (main, full)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("pope", asked("yes"), "record q: has no field 'category'"),
        ("pope", asked("two", category="random"), "record q: answer 'two' must be yes or no"),
        ("mme", asked("yes", category="OCR"), "record q: has no field 'question_id'"),
        ("mme", asked("yes", question_id=1), "record q: has no field 'category'"),
        ("mme", asked("yes", category="OCR", question_id=[1]), "field 'question_id' must be a string or an integer"),
        ("mme", asked("yes", category="\ud800", question_id=7), "field 'category' must be a string or an integer"),
        ("mme", asked("yes", category="OCR", question_id=7), "category OCR, question_id 7 has 1"),
    ],
)
def test_records_that_a_metric_cannot_use(name, record, message):
    with pytest.raises(UserError) as error:
        measured(name, ("yes", record))
    assert message in str(error.value)
    assert str(error.value).startswith(f'metric "{METRICS[name].main}": ')
