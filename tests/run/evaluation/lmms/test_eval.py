"""Benchmarks' metrics against lmms-eval's own functions, on 200 generated answers each; skipped without it.

`pip install lmms-eval==0.7.3 'filelock<4' Levenshtein`, then `API_TYPE=dummy pytest PATH` of this file
(its MathVista needs a judge named to be imported; none is asked here).
"""

import importlib
import os
import random

import pytest

from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import METRICS

NUMBER = 200
ALIKE = {"ignore_case": True, "ignore_punctuation": True}
OPTIONS = [text.split(",") for text in ("cat,a dog,mouse", "3/11,8/11,6/11,3/5", "Yes,no", "red,Red fox,fox,ox,x")]
SUFFIXES = ("", "", "", ".", "!", ",", " ", "'s", "\n", " because it is so")
MAPPED = "the a an two ten none dont couldnt've youd somebody'd lets ow's'at 'twas 1,000 3.5 T-shirt x/y a.m. [b] c-d"


@pytest.fixture(scope="module")
def lmms():
    """Callable name -> lmms-eval's module of that name."""
    os.environ.setdefault("API_TYPE", "dummy")
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    return lambda name: importlib.import_module(f"lmms_eval.{name}")


pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def draw():
    return random.Random(11)


def of_choices(draw, options, right):
    """An answer to a question with options, as models give them: never empty, no white space around it."""
    other = draw.choice("ABCDE"[: len(options)])
    letter = draw.choice((right, right, other))
    option = options["ABCDE".index(letter)]
    forms = (
        letter, letter, letter.lower(), f"{letter}.", f"{letter}. {option}", f"({letter})", f"{letter}) {option}",
        option, option.upper(), f"{letter}:", f"{letter}, {option}", f"DN{letter} is it",
        f"The answer is {letter}", f"The answer is ({letter}), not ({other})", f"{letter} or {other}",
        f"I would say that it must be {option}", f"({letter.lower()}) {option}", f"See {letter}.1 and {other}.2 there",
        f"either {option} or else {draw.choice(options)}, hard to tell",
    )  # fmt: skip
    return (draw.choice(forms) + draw.choice(SUFFIXES)).strip()


def words(draw, of, most):
    return (draw.choice((" ", "  ", ", ", "; ", "\n")).join(draw.choices(of, k=draw.randint(1, most)))).strip() or "x"


def number(draw):
    value = draw.choice((3, 14, 1234, 0.5, 2.718, -7, 1e5))
    return draw.choice((f"{value}", f"{value:,}", f"{value:.2f}", f"{value:e}", f"${value}", f".{draw.randint(1, 9)}"))


def records_of(cases):
    return [Record(key, (("human", "?"),), (), None, tuple(refs), fields) for _, refs, fields, _, key in cases]


def differences(name, cases):
    """Those of (prediction, references, fields, lmms-eval's score, id) on which the metric scores otherwise."""
    metric = METRICS[name]
    scores = metric.score_all([case[0] for case in cases], records_of(cases))
    ours = [next(iter(one.values())) for one in scores]
    theirs = [case[3] for case in cases]
    assert len(cases) == NUMBER
    assert 0.05 < sum(theirs) / NUMBER < 0.95, "generated answers that are nearly all right or wrong tell little"
    return [(case, one) for case, one in zip(cases, ours, strict=True) if abs(one - case[3]) > 1e-12]


def choices_cases(draw, score):
    for _ in range(NUMBER):
        options = draw.choice(OPTIONS)
        right = draw.randrange(len(options))
        said = of_choices(draw, options, "ABCDE"[right])
        yield said, ["ABCDE"[right]], {"options": options, "choices": options}, score(said, options, right), "q"


def test_scienceqa(lmms, draw):
    theirs = lmms("tasks.scienceqa.utils").sqa_process_results

    def score(said, options, right):
        return theirs({"choices": options, "answer": right}, [said])["exact_match"]

    assert differences("scienceqa", list(choices_cases(draw, score))) == []


def test_ai2d(lmms, draw):
    filtered = lmms("tasks.ai2d.utils").MultiChoiceRegexFilter()
    same = lmms("api.metrics").exact_match_hf_evaluate

    def score(said, _, right):
        return float(
            same(predictions=filtered.apply([[said]], [{}]), references=["ABCDE"[right]], **ALIKE)["exact_match"]
        )

    assert differences("ai2d", list(choices_cases(draw, score))) == []


def test_gqa(lmms, draw):
    same = lmms("api.metrics").exact_match_hf_evaluate
    cases = []
    for _ in range(NUMBER):
        right = draw.choice(("cat", "T-shirt", "yes", "a dog", "on the left"))
        said = draw.choice((right, right.upper(), right.replace("-", ""), f"({right})", f"the {right}", "cat"))
        said = (said + draw.choice(SUFFIXES)).strip()
        found = same(predictions=[said], references=[right], **ALIKE)["exact_match"]
        cases.append((said, [right], {}, float(found), "q"))
    assert differences("gqa", cases) == []


def test_anls(lmms, draw):
    theirs, cases = lmms("api.metrics").anls, []
    for _ in range(NUMBER):
        references = ["".join(draw.choices("abcß  1/", k=draw.randint(1, 9))) + "x" for _ in range(draw.randint(1, 3))]
        said = list(draw.choice(references))
        for _ in range(draw.randint(0, 5)):
            said[draw.randrange(len(said))] = draw.choice(("", "q", "B", " ", "ab"))
        text = "".join(said).strip() or "y"
        cases.append((text, references, {}, float(theirs(references, [text])["anls"]), "q"))
    assert differences("anls", cases) == []


def test_vqa_accuracy(lmms, draw):
    theirs, cases = lmms("tasks.vqav2.utils").vqav2_process_results, []
    for _ in range(NUMBER):
        people = [words(draw, MAPPED.split(), 2) for _ in range(3)]
        references = draw.choices(people, weights=(5, 3, 2), k=10)
        said = draw.choice(people) if draw.random() < 0.7 else words(draw, MAPPED.split(), 2)
        doc = {"question_id": 1, "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(references)]}
        cases.append((said, references, {}, theirs(doc, [said])["exact_match"], "q"))
    assert differences("vqa_accuracy", cases) == []


def test_contractions_of_vqa(lmms):
    theirs = lmms("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor.CONTRACTIONS
    ours = importlib.import_module("vlmprune_jax.run.evaluation.metrics.texts")._CONTRACTIONS
    assert {wrong: right for wrong, right in theirs.items() if wrong == wrong.lower() and wrong != right} == ours


def test_mmmu_letters(lmms, draw, monkeypatch):
    utils = lmms("tasks.mmmu.utils")
    drawn = importlib.import_module("vlmprune_jax.run.evaluation.metrics.choices").SEED

    def score(said, options, right):
        doc = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "ABCDE"[right]}
        found = utils.mmmu_process_results({**doc, "options": str(options)}, [said])["mmmu_acc"]
        return float(utils.evaluate_mmmu([found])[1]["acc"])

    shared = lmms("tasks._task_utils.mmmu_mcq_utils")
    monkeypatch.setattr(shared.random, "choice", lambda letters: random.Random(f"{drawn} q").choice(letters))
    asked = [
        (said, refs, {**of, "question_type": "multiple-choice"}, s, key)
        for said, refs, of, s, key in choices_cases(draw, score)
    ]
    assert differences("mmmu", asked) == []


def test_mmmu_open(lmms, draw):
    utils, cases = lmms("tasks.mmmu.utils"), []
    for _ in range(NUMBER):
        right = draw.choice((number(draw), "Dark Blue", "b", "Newton's law"))
        other = draw.choice((number(draw), "blue", "e = mc", right, right))
        forms = (
            right, "so .", f"The answer is {right}.", f"x = {other}\ny = {right}",
            f"So {other}. Therefore {right}",
            f"It could be {right} or {other}", f"{other}, {right}", f"is {other}\nresult",
            f"final answer : {right}", other,
        )  # fmt: skip
        said, kind = (draw.choice(forms) + draw.choice(SUFFIXES)).strip(), {"question_type": "open"}
        found = utils.mmmu_process_results({"id": "validation_Art_1", "answer": right, **kind}, [said])["mmmu_acc"]
        cases.append((said, [right], kind, float(utils.evaluate_mmmu([found])[1]["acc"]), "q"))
    assert differences("mmmu", cases) == []


def yes_or_no(draw):
    odd = ("Nope", "none", "maybe", "eyes", "I know", "well yes", "y", "n", "N.", "?")
    return draw.choice(("yes", "Yes", "no", "No", "Yes.", "No.", *odd)), draw.choice(("yes", "no"))


def test_pope(lmms, draw):
    utils = lmms("tasks.pope.utils")
    cases, theirs = [], []
    for _ in range(NUMBER):
        said, right = yes_or_no(draw)
        theirs.append(utils.pope_process_results({"question_id": 1, "answer": right}, [said])["pope_accuracy"])
        split = draw.choice(("random", "popular", "adversarial"))
        cases.append((said, [right], {"category": split}, theirs[-1]["score"], "q"))
    assert differences("pope", cases) == []
    records, metric = records_of(cases), METRICS["pope"]
    scores = metric.score_all([case[0] for case in cases], records)
    values, groups = metric.values(scores, records), metric.values_of_groups(scores, records)
    for name in ("accuracy", "precision", "recall", "f1_score"):
        aggregate = getattr(utils, f"pope_aggregate_{name}")
        ours = {"f1_score": "f1_pooled"}.get(name, name)
        assert values[ours] == pytest.approx(aggregate(theirs), abs=1e-12)
        for split, of in groups.items():
            mine = [one for one, case in zip(theirs, cases, strict=True) if case[2]["category"] == split]
            assert of[ours] == pytest.approx(aggregate(mine), abs=1e-12)
    assert values["f1"] == pytest.approx(sum(of["f1_pooled"] for of in groups.values()) / 3, abs=1e-12)


def test_mme(lmms, draw):
    utils = lmms("tasks.mme.utils")
    names = [*utils.eval_type_dict["Perception"], *utils.eval_type_dict["Cognition"]]
    cases, results = [], {"mme_perception_score": [], "mme_cognition_score": []}
    for place in range(NUMBER):
        said, right = yes_or_no(draw)
        said = draw.choice((said, right, right))
        fields = {"category": names[place // 2 % len(names)], "question_id": f"{place // 2}.png"}
        ((key, found),) = utils.mme_process_results({**fields, "answer": right.title()}, [said]).items()
        results[key].append(found)
        cases.append((said, [right], fields, found["score"], "q"))
    assert differences("mme", cases) == []
    values = METRICS["mme"].values([{"right": case[3]} for case in cases], records_of(cases))
    for name in ("perception", "cognition"):
        theirs = utils.mme_aggregate_results(results[f"mme_{name}_score"])
        assert values[name] == pytest.approx(theirs, abs=1e-9)


def test_mathvista_with_a_judge_that_repeats_the_answer(lmms, draw, monkeypatch):
    evaluator = lmms("tasks.mathvista.mathvista_evals").MathVistaEvaluator()
    cases = []
    for _ in range(NUMBER):
        kind = draw.choice(("text", "integer", "float", "list"))
        options = draw.choice(OPTIONS)
        fields = {"question_type": "multi_choice" if kind == "text" else "free_form", "answer_type": kind}
        fields |= {"precision": draw.choice((1, 2)), "choices": options, "query": "?"}
        letter = draw.choice("ABCDE"[: len(options)])
        right = {"text": options["ABCDE".index(letter)], "list": "[1, 2]", "integer": "14", "float": "0.5"}[kind]
        forms = (right, right, f" {right}", f"{right}1", f"It is {right}", number(draw), "1e400", "nan")
        said = (of_choices(draw, options, letter) if kind == "text" else draw.choice(forms)).strip()
        monkeypatch.setattr(evaluator, "get_chat_response", lambda *_, said=said, **__: said)
        asked = (options, fields["question_type"], kind, fields["precision"])
        read = evaluator.normalize_extracted_answer(evaluator.extract_answer(said, fields), *asked)
        cases.append((said, [right], fields, float(evaluator.safe_equal(read, right)), "q"))
    assert differences("mathvista", cases) == []
