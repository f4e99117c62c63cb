"""Metrics of video benchmarks: answers that lmms-eval 0.7.3 was seen to score like this."""

import pytest
from metric_cases import asked, measured, value

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.metrics.videos import extract_letter

OPTIONS = {"options": ["a red fox", "left", "B team", "up, then down"], "duration": "short", "duration_group": 15}
OPTIONS |= {"dim": "speed"}


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) left", "B"),
        ("The answer is C", "C"),
        ("A cat, so (B)", "A"),  # at the start, which has priority over brackets
        ("not (A) but C", "C"),  # at the end
        ("The best answer is B because A is wrong", "A"),  # the last letter after the phrase
        ("I choose B", "B"),
        ("答案是D", "D"),
        ("DNA is it", "A"),
        ("xBy", "B"),  # anywhere, if nothing else fits
        ("b", ""),
        ("", ""),
        ("E", ""),
    ],
)
def test_letters_of_videomme(said, letter):
    assert extract_letter(said) == letter


@pytest.mark.parametrize(
    ("name", "said", "reference", "expected"),
    [
        *(("mvbench", said, "B", 1) for said in ("B", "b", "(B)", "B. left", "the answer: b", "I say\tB!", "x, B, y")),
        *(("mvbench", said, "B", 0) for said in ("a B", "A-B", "AB", "left", "1,000 A/B", "C")),
        *(("tempcompass", said, "B. left", 1) for said in ("B", "B.", "B) left", "B. left", "B. right")),
        *(("tempcompass", said, "B. left", 0) for said in ("b", "(B)", "left", "The answer is B", "B left", "A", "")),
        *(("longvideobench", said, "B", 1) for said in ("B", "(B)", "The answer is B", "Best option: B", "b or B")),
        *(("longvideobench", said, "B", 0) for said in ("An answer: B", "E", "A or B", "Dog B")),
        *(("nextqa", said, "B", 1) for said in ("B", "B.", "A or B", "so it must be that it is left", "(B) or C")),
        *(("nextqa", said, "B", 0) for said in ("A", "B or (A)", "D.")),
        ("videomme", "B", "B", 1),
        ("videomme", "C", "B", 0),
    ],
)
def test_one_answer(name, said, reference, expected):
    assert value(name, said, asked(reference, **OPTIONS)) == expected


def test_answers_without_letter_are_drawn():
    """Also empty ones, unlike in MMMU."""
    for name in ("longvideobench", "nextqa"):
        drawn = [value(name, "", asked("B", name=str(number), **OPTIONS)) for number in range(200)]
        assert 30 < sum(drawn) < 70


def test_empty_answers_are_not_counted_in_mvbench():
    answers = [("A", asked("A")), ("B", asked("A")), ("", asked("A")), ("", asked("A"))]
    assert measured("mvbench", *answers)[0] == {"accuracy": 0.5, "answered": 0.5}
    assert measured("mvbench", ("", asked("A")))[0] == {"accuracy": 0.0, "answered": 0.0}


def test_mlvu_is_a_mean_over_tasks():
    answers = [("A", asked("A", task_type="count")), ("B", asked("A", task_type="count"))]
    answers += [("A", asked("A", task_type="order"))]
    values, groups = measured("mlvu_dev", *answers)
    assert values == {"accuracy": pytest.approx(1.5 / 7)}
    assert measured("mlvu_test", *answers)[0] == {"accuracy": pytest.approx(1.5 / 9)}
    assert groups["count"]["questions"] == 2
    with pytest.raises(UserError, match="record q: field 'task_type' 'needleQA' must be one of anomaly_reco"):
        measured("mlvu_dev", ("A", asked("A", task_type="needleQA")))


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("videomme", asked("left", **OPTIONS), "answer 'left' must begin with the letter of a choice"),
        ("videomme", asked("B"), "has no field 'duration'"),
        ("tempcompass", asked("B. left"), "has no field 'dim'"),
        ("nextqa", asked("E", **OPTIONS), "answer 'E' must be one of the letters A to D of its 4 options"),
        ("mlvu_dev", asked("B"), "has no field 'task_type'"),
    ],
)
def test_records_that_a_metric_cannot_use(name, record, message):
    with pytest.raises(UserError, match=message):
        measured(name, ("B", record))
