"""Scorers against the paper's tables, and the runner against forwards that share nothing with it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import config, model, on_mesh

from vlmprune_jax.data.batching import generation_batches
from vlmprune_jax.data.encoding import Encoder
from vlmprune_jax.data.images import load_image_processor
from vlmprune_jax.data.prompts import load_tokenizer
from vlmprune_jax.data.records import Record
from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluation.questions import plan_questions
from vlmprune_jax.evaluation.runner import evaluate, perplexity
from vlmprune_jax.evaluation.scorers import (
    accuracy_by_answer,
    is_exact_match,
    mean_of_ratios,
    normalise,
    paper_average,
    retained,
)
from vlmprune_jax.families import templates
from vlmprune_jax.hf.read import load
from vlmprune_jax.models.vlm import forward

BENCHMARKS = ("MMMU", "SQA", "MathV", "AI2D", "MME-C", "MME-P", "POPE", "DocVQA", "GQA")
# The project page's tables of arXiv 2604.24380: the unpruned row, then rows of nine scores and the AVG-% beside them.
TABLES = {
    "llava": (
        (35.10, 68.67, 26.70, 54.80, 363.21, 1511.33, 86.99, 28.10, 61.98),
        [
            ((32.40, 63.21, 23.10, 45.40, 268.93, 1432.47, 86.57, 23.90, 59.34), 90.87),
            ((31.00, 54.29, 15.80, 37.80, 253.21, 1174.93, 86.29, 17.90, 52.59), 79.88),
            ((32.70, 59.64, 14.80, 32.10, 210.71, 921.88, 78.69, 16.50, 42.18), 72.22),
            ((31.80, 55.23, 13.50, 29.70, 202.14, 701.83, 86.38, 14.60, 42.77), 69.18),
            ((36.40, 68.42, 25.50, 53.70, 337.86, 1442.35, 86.94, 27.60, 61.20), 98.10),
            ((36.00, 68.82, 23.40, 50.50, 318.57, 1496.60, 85.98, 26.10, 60.34), 96.38),
            ((30.80, 52.92, 20.20, 48.40, 215.00, 1191.17, 85.74, 23.70, 57.74), 83.99),
            ((27.70, 46.26, 18.00, 46.30, 211.79, 1085.97, 84.06, 22.20, 52.32), 78.13),
        ],
    ),
    "internvl": (
        (43.20, 93.30, 53.70, 76.90, 547.50, 1596.71, 88.00, 87.70, 62.57),
        [
            ((42.70, 92.96, 38.80, 72.40, 527.86, 1594.37, 88.09, 80.20, 58.43), 94.74),
            ((33.30, 68.82, 28.80, 44.50, 397.14, 1300.60, 85.20, 64.20, 42.39), 73.72),
            ((43.60, 93.12, 22.50, 70.20, 510.10, 1588.30, 88.15, 78.30, 52.35), 90.48),
            ((28.30, 62.82, 18.40, 24.50, 220.90, 1200.60, 73.20, 53.10, 27.39), 57.42),
        ],
    ),
    "internvl, second table": (
        (43.20, 93.30, 53.70, 76.90, 547.50, 1596.71, 88.00, 87.70, 62.50),
        [
            ((42.80, 92.47, 53.22, 76.21, 542.61, 1582.42, 87.21, 86.92, 62.01), 99.12),
            ((41.45, 89.53, 51.53, 73.79, 525.36, 1532.14, 84.44, 84.15, 60.04), 95.96),
            ((37.24, 80.43, 46.29, 66.30, 472.00, 1376.53, 75.87, 75.61, 53.94), 86.22),
            ((34.29, 74.06, 42.63, 61.05, 434.62, 1267.52, 69.86, 69.62, 49.67), 79.39),
        ],
    ),
    "bunny": (
        (34.10, 70.70, 25.80, 60.49, 289.30, 1487.71, 87.82, 22.80, 54.72),
        [
            ((30.90, 65.64, 23.40, 55.73, 242.50, 1207.85, 87.94, 18.20, 51.83), 90.87),
            ((28.40, 55.73, 14.20, 43.97, 199.64, 807.95, 87.13, 12.50, 45.65), 75.58),
            ((33.80, 69.66, 18.80, 52.73, 271.43, 1456.41, 87.91, 15.80, 29.42), 88.84),
            ((29.00, 28.76, 10.10, 34.97, 272.86, 1273.34, 86.50, 10.50, 24.77), 69.03),
        ],
    ),
    "bunny, second table": (
        (34.10, 70.72, 25.80, 60.49, 289.31, 1487.71, 87.82, 22.80, 54.72),
        [
            ((33.00, 70.00, 24.20, 59.80, 304.29, 1457.06, 87.97, 21.80, 54.56), 98.98),
            ((32.35, 68.12, 22.60, 57.20, 252.51, 1349.91, 87.53, 20.80, 53.08), 94.37),
            ((29.15, 63.06, 21.00, 55.50, 244.64, 1281.66, 87.09, 19.80, 52.31), 90.48),
            ((28.10, 53.20, 19.40, 53.90, 216.07, 1115.33, 86.73, 18.80, 48.72), 83.86),
        ],
    ),
}


def scores(row):
    return dict(zip(BENCHMARKS, row, strict=True))


@pytest.mark.parametrize("table", TABLES)
def test_paper_average_gives_the_published_rows(table):
    original, rows = TABLES[table]
    for row, published in rows:
        assert paper_average(scores(row), scores(original)) == pytest.approx(published, abs=0.015)


def test_the_two_averages_differ():
    original, rows = TABLES["llava"]
    assert mean_of_ratios(scores(rows[0][0]), scores(original)) == pytest.approx(89.21, abs=0.01)
    ratios = [100 * a / b for a, b in zip(rows[0][0], original, strict=True)]
    assert mean_of_ratios(scores(rows[0][0]), scores(original)) == pytest.approx(np.mean(ratios), rel=1e-12)


def test_averages_need_the_same_benchmarks():
    with pytest.raises(UserError, match="differ in GQA"):
        paper_average({"MMMU": 1.0}, {"MMMU": 1.0, "GQA": 2.0})
    with pytest.raises(UserError, match="MMMU: the unpruned model scores 0"):
        mean_of_ratios({"MMMU": 1.0}, {"MMMU": 0.0})
    assert retained(0.5, 0.8) == pytest.approx(62.5)
    assert math.isnan(retained(0.5, 0.0))


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
    found = accuracy_by_answer(["Yes", "no", "yes", "blue"], ["yes", "yes", "yes.", "blue"])
    assert list(found) == ["yes", "blue"]
    assert found["yes"] == {"questions": 3, "accuracy": pytest.approx(2 / 3)}


# --- the runner, on the golden LLaVA and its tokenizer ---------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(goldens):
    return load(goldens / "ckpt/llava_hf")


@pytest.fixture(scope="module")
def encoder(goldens, llava):
    loader = load_image_processor(goldens / "ckpt/clip_tower", aspect_ratio="pad", max_pixels=10**7, cache_bytes=2**20)
    return Encoder(
        tokenizer=load_tokenizer(goldens / "tokenizers/llava"),
        template=dataclasses.replace(templates()["llava_v1"], system=""),
        max_length=72,
        image_loader=loader,
        image_token_id=llava.cfg.image_token_id,
        tokens_per_image=llava.cfg.tokens_per_image,
        max_images=1,
        truncate=False,
    )


def records(goldens, answers):
    """Seven questions about three images, mixed, and one without an image."""
    images = [goldens / f"data/images/img{i}.png" for i in (0, 1, 0, 2, 1, 0, 2)]
    asked = [f"<image>\nIs {n} here?" for n in ("one", "two", "a dog", "one", "a cat", "that", "it")]
    made = [
        Record(f"q{i}", (("human", text), ("gpt", answers[i])), (image,))
        for i, (text, image) in enumerate(zip(asked, images, strict=True))
    ]
    return [*made, Record("q7", (("human", "Hello there"), ("gpt", answers[7])), ())]


def greedy(llava, encoder, record, steps):
    """Tokens by repeated full forwards of one row, padded at the right."""
    row = encoder.generation_row(record)
    tokens = row["input_ids"][row["attention_mask"] == 1].tolist()
    start = len(tokens)
    for _ in range(steps):
        ids, mask = np.zeros((2, 1, 80), np.int32)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        logits, _ = forward(llava, ids, attention_mask=mask, pixel_values=row["pixel_values"][None])
        tokens.append(int(np.asarray(logits)[0, len(tokens) - 1].argmax()))
        if tokens[-1] in llava.cfg.eos_token_ids:
            break
    return tokens[start:]


STEPS = 3


@pytest.fixture(scope="module")
def expected(goldens, llava, encoder):
    asked = records(goldens, ["x"] * 8)
    tokens = [greedy(llava, encoder, record, STEPS) for record in asked]
    return [encoder.tokenizer.decode(t, skip_special_tokens=True) for t in tokens], [len(t) for t in tokens]


def test_accuracy_of_known_answers(goldens, llava, encoder, expected):
    texts, lengths = expected
    assert len(set(texts)) > 1  # the model does look at its input
    answers = [text.upper() + "." if i not in (2, 7) else "wrong" for i, text in enumerate(texts)]
    asked = records(goldens, answers)
    plan = plan_questions(asked, encoder, batch_size=3)
    seen = []
    result = evaluate(
        llava,
        plan.batches(threads=1, prefetch=1),
        tokenizer=encoder.tokenizer,
        max_new_tokens=STEPS,
        progress=seen.append,
    )
    assert (result.questions, result.correct, result.accuracy) == (8, 6, 0.75)
    assert [answer.id for answer in result.answers] == [f"q{i}" for i in range(8)]  # in file order, however batched
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in texts]
    assert [answer.correct for answer in result.answers] == [i not in (2, 7) for i in range(8)]
    assert [answer.tokens for answer in result.answers] == lengths
    assert result.mean_generated_tokens == pytest.approx(np.mean(lengths))
    assert result.by_answer["wrong"] == {"questions": 2, "accuracy": 0.0}
    assert seen == list(range(1, len(plan) + 1))


def test_batches_of_whole_prompts_give_the_same(goldens, llava, encoder, expected):
    asked = records(goldens, ["yes"] * 8)
    batches = generation_batches(asked, encoder, batch_size=3, process_index=0, process_count=1, threads=1, prefetch=1)
    result = evaluate(llava, batches, tokenizer=encoder.tokenizer, max_new_tokens=STEPS)
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in expected[0]]
    assert result.questions == 8  # the filled-up ninth row does not count


def test_shared_images_are_computed_once(goldens, encoder):
    plan = plan_questions(records(goldens, ["x"] * 8), encoder, batch_size=4)
    assert len(plan.beginnings) == 4  # three images, and the text
    batches = list(plan.batches(threads=1, prefetch=1))
    assert {len(batch.arrays["pixel_values"]) for batch in batches} == {plan.groups[0].beginnings}
    assert plan.groups[0].beginnings < 4
    assert sorted(place for batch in batches for place in batch.places[batch.valid]) == list(range(8))
    shapes = {tuple(a.shape for a in [*batch.arrays.values(), batch.prefix.input_ids]) for batch in batches}
    assert len(shapes) == 1  # one program


def test_sharded_evaluation_gives_the_same(goldens, llava, encoder, expected):
    plan = plan_questions(records(goldens, ["yes"] * 8), encoder, batch_size=8, multiple=4)
    assert plan.groups[0].beginnings % 4 == 0
    split = on_mesh(llava, 2, 2, 2)
    result = evaluate(split, plan.batches(threads=1, prefetch=1), tokenizer=encoder.tokenizer, max_new_tokens=STEPS)
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in expected[0]]


def test_bad_questions(goldens, llava, encoder):
    asked = records(goldens, ["x"] * 8)
    with pytest.raises(UserError, match=r"record q0: \d+ tokens with its images, over max_length 9"):
        plan_questions(asked, dataclasses.replace(encoder, max_length=9), batch_size=2)
    with pytest.raises(UserError, match="record q0: has an image but the model has no vision tower"):
        plan_questions(asked, dataclasses.replace(encoder, image_loader=None), batch_size=2)
    with pytest.raises(UserError, match="0 questions"):
        plan_questions([], encoder, batch_size=2)
    unanswered = [dataclasses.replace(asked[0], turns=asked[0].turns[:1])]
    plan = plan_questions(unanswered, encoder, batch_size=1)
    with pytest.raises(UserError, match="record q0: its last turn is no answer"):
        evaluate(llava, plan.batches(threads=1, prefetch=1), tokenizer=encoder.tokenizer, max_new_tokens=1)
    with pytest.raises(UserError, match="no question"):
        evaluate(llava, [], tokenizer=encoder.tokenizer, max_new_tokens=1)


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_perplexity_equals_its_formula():
    one = model(config())
    ids = np.random.default_rng(0).integers(0, 61, 23)
    total, count = 0.0, 0
    for start in range(0, 23, 7):
        window = ids[start : start + 7]
        if len(window) < 2:
            continue
        logits = jnp.asarray(forward(one, window[None])[0][0], jnp.float32)
        logs = jax.nn.log_softmax(logits, axis=-1)
        total -= sum(float(logs[t, window[t + 1]]) for t in range(len(window) - 1))
        count += len(window) - 1
    found = perplexity(one, ids, window=7, batch_size=2)
    assert found.tokens == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    split = perplexity(on_mesh(one, 2, 2, 2), ids, window=7, batch_size=4)
    assert split.perplexity == pytest.approx(found.perplexity, rel=1e-5)


def test_perplexity_of_too_little():
    with pytest.raises(UserError, match="perplexity of 1 tokens"):
        perplexity(model(config()), [3], window=4, batch_size=1)
    with pytest.raises(UserError, match="token id 99"):
        perplexity(model(config()), [3, 99], window=4, batch_size=1)
