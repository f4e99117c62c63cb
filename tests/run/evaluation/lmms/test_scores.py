"""What counts of lmms-eval's tasks, from values and samples as it gives them; without lmms-eval."""

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.lmms.scores import sets_of
from vlmprune_jax.run.evaluation.statistics import retained_interval


def mme(key, answers):
    """Samples of pairs: {metric: entry} with two questions for each (category, first right, second right)."""
    return [
        {key: {"category": category, "question_id": f"{number}.png", "score": right}}
        for number, (category, *both) in enumerate(answers)
        for right in both
    ]


def test_mme_is_two_sets_each_of_its_own_questions():
    """The example of the reference: count pairs (1, 0) and (1, 1), OCR (1, 1) give (50 + 200) / 2 + 200."""
    samples = mme("mme_perception_score", [("count", 1, 0), ("count", 1, 1), ("OCR", 1, 1)])
    samples += mme("mme_cognition_score", [("code_reasoning", 0, 1)])
    values = {"mme_cognition_score": 50.0, "mme_perception_score": 325.0}
    perception, cognition = sets_of("mme", values, samples, {})
    assert (perception.key, len(perception.scores)) == ("mme_perception_score", 6)
    assert perception.makes(325.0)
    assert not perception.makes(324.0)
    assert cognition.makes(50.0)
    described = {
        of.key: (of.describe()["full"], of.describe()["unit"], of.describe()["scale"]) for of in (perception, cognition)
    }
    assert described == {"mme_perception_score": (2000.0, "", 1.0), "mme_cognition_score": (800.0, "", 1.0)}
    assert perception.describe()["main"] == "mme_perception_score"


def test_pope_counts_by_f1():
    said = [("yes", "yes"), ("yes.", "yes"), ("no", "yes"), ("maybe", "yes"), ("yes", "no"), ("no", "no")]
    entries = [{"prediction": p, "ground_truth": g, "score": float(p == g)} for p, g in said]
    samples = [dict.fromkeys(("pope_accuracy", "pope_f1_score"), entry) for entry in entries]
    samples *= 20  # in fewer some samples hold no yes, and nothing is retained of 0
    (of,) = sets_of("pope", {"pope_accuracy": 1 / 3, "pope_f1_score": 0.5}, samples, {})
    assert {type(value) for one in of.scores for value in one.values()} == {float}  # as eval/*.json is read again
    assert of.key == "pope_f1_score"
    assert of.makes(0.5)
    low, high = retained_interval(of.metric, of.scores, of.scores, of.records)
    assert (low, high) == pytest.approx((98.41, 101.61), abs=0.01)  # as 120 of 120 right answers


def test_values_that_are_means():
    (of,) = sets_of("ai2d", {"exact_match": 0.5, "other": 0.1}, [{"exact_match": 1.0}, {"exact_match": 0.0}], {})
    assert (of.key, of.describe()["unit"], of.describe()["full"]) == ("exact_match", "%", 1.0)
    assert of.makes(0.5)
    judged = [{"llm_as_judge_eval": {"true_false": right}} for right in (True, False, False)]
    (of,) = sets_of("mathvista", {"llm_as_judge_eval": 33.33}, judged, {})
    assert (of.makes(33.33), of.describe()["scale"]) == (True, 1.0)
    (of,) = sets_of("mmmu", {"mmmu_acc": 0.66667}, [{"mmmu_acc": {"right": right}} for right in (1.0, 1.0, 0.0)], {})
    assert of.makes(0.66667)
    right = [{"pred_answer": said, "answer": "A", "score": float(said == "A")} for said in ("A", "B", "")]
    (of,) = sets_of(
        "videomme", {"videomme_perception_score": 33.33333}, [{"videomme_perception_score": r} for r in right], {}
    )
    assert (of.makes(33.33333), of.describe()["scale"]) == (True, 1.0)
    (of,) = sets_of("mvbench_x", {"mvbench_accuracy": 50.0}, [{"mvbench_accuracy": r} for r in right], {})
    assert of.makes(50.0)  # the empty answer is left out
    (of,) = sets_of("tempcompass", {"avg_accuracy": 50.0}, [{"avg_accuracy": {"rating": r}} for r in (1, 0)], {})
    assert of.makes(50.0)
    (of,) = sets_of("lvb", {"lvb_acc": 0.5}, [{"lvb_acc": {"answer": "A", "parsed_pred": p}} for p in "AB"], {})
    assert of.makes(0.5)


def test_values_of_which_nothing_is_known():
    """No full score, so no share of it in averages; and no interval where the questions do not make up the value."""
    (of,) = sets_of("caption", {"cider": 1.2}, [{"cider": {"pred": "a"}}], {})
    assert (of.describe()["full"], of.scores, of.makes(1.2)) == (None, (), False)
    (of,) = sets_of("wer", {"wer": 0.5}, [{"wer": 0.5}], {"wer": False})
    assert (of.describe()["full"], of.describe()["higher_is_better"]) == (None, False)


@pytest.mark.parametrize(
    ("values", "samples", "message"),
    [
        ({"a": 1.0}, [], "task t: lmms-eval returned no answers"),
        ({}, [{"a": 1.0}], "task t: lmms-eval returned no metric value"),
        ({"a": float("nan")}, [{"a": 1.0}], "task t: lmms-eval returned no metric value"),
    ],
)
def test_a_task_that_failed_is_refused(values, samples, message):
    with pytest.raises(UserError, match=message):
        sets_of("t", values, samples, {})
