"""The runner against forwards that share nothing with it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prune_cases import config, model, on_mesh
from refusal import refused
from vlm_cases import images_of

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates
from vlmprune_jax.run.evaluation import questions
from vlmprune_jax.run.evaluation.questions import arrange_questions
from vlmprune_jax.run.evaluation.runner import _windows, evaluate, perplexity


@pytest.fixture(scope="module")
def llava(goldens):
    return load(goldens / "ckpt/llava_hf")


@pytest.fixture(scope="module")
def encoder(goldens, llava):
    loader = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=1))
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
    tokens = encoder.prompt_ids(record).tolist()
    pixels = images_of(encoder, record)["pixel_values"][None]
    start = len(tokens)
    for _ in range(steps):
        ids, mask = np.zeros((2, 1, 80), np.int32)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        logits, _ = forward(llava, ids, attention_mask=mask, pixel_values=pixels)
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
    asking = arrange_questions(asked, encoder, batch_size=3)
    seen = []
    result = evaluate(
        llava,
        asking.batches(threads=1, prefetch=1),
        tokenizer=encoder.tokenizer,
        max_new_tokens=STEPS,
        progress=seen.append,
    )
    assert (result.questions, result.values, result.accuracy) == (8, {"accuracy": 0.75}, 0.75)
    assert [answer.id for answer in result.answers] == [f"q{i}" for i in range(8)]  # in file order, however batched
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in texts]
    assert [answer.scores["accuracy"] for answer in result.answers] == [i not in (2, 7) for i in range(8)]
    assert [answer.references for answer in result.answers] == [(answer,) for answer in answers]
    assert [answer.tokens for answer in result.answers] == lengths
    assert result.mean_generated_tokens == pytest.approx(np.mean(lengths))
    assert result.groups["wrong"] == {"questions": 2, "accuracy": 0.0}
    assert seen == list(range(1, len(asking) + 1))


def test_shared_images_are_computed_once(goldens, encoder):
    asking = arrange_questions(records(goldens, ["x"] * 8), encoder, batch_size=4)
    assert len({question.first for group in asking.groups for question in group.questions}) == 4  # 3 images, and text
    batches = list(asking.batches(threads=1, prefetch=1))
    assert {len(batch.arrays["media"]["vision"].values) for batch in batches} == {asking.groups[0].beginnings}
    assert asking.groups[0].beginnings < 4
    assert sorted(place for batch in batches for place, _ in batch.questions) == list(range(8))
    shapes = {tuple(a.shape for a in [*jax.tree.leaves(batch.arrays), batch.prefix.input_ids]) for batch in batches}
    assert len(shapes) == 1  # one program


def test_images_of_other_processes_are_not_opened(goldens, encoder, monkeypatch):
    """Of two processes, each opens what its rows show; between them the pixels are those that one process has."""
    asking = arrange_questions(records(goldens, ["x"] * 8), encoder, batch_size=8, multiple=4)
    whole = [batch.arrays["media"]["vision"].values for batch in asking.batches(threads=1, prefetch=1)]
    parts, opened, load_image = [], [], ImageLoader.load
    monkeypatch.setattr(ImageLoader, "load", lambda *of: opened[-1].add(of[1].name) or load_image(*of))
    for process in (0, 1):
        monkeypatch.setattr(questions, "rows_of_process", lambda _, count, first=process: np.arange(first, count, 2))
        opened.append(set())
        parts.append([batch.arrays["media"]["vision"].values for batch in asking.batches(threads=1, prefetch=1)])
    assert opened == [{"img0.png", "img2.png"}, {"img0.png", "img1.png"}]  # padding shows the first again
    for together, first, second in zip(whole, *parts, strict=True):
        assert not first[1::2].any()
        np.testing.assert_array_equal(first + second, together)


def test_a_suffix_continues_the_last_question(goldens, encoder):
    asked = records(goldens, ["x"] * 8)
    longer = [
        dataclasses.replace(record, turns=((*record.turns[0][:1], record.turns[0][1] + " Say it."), *record.turns[1:]))
        for record in asked
    ]
    suffixed = arrange_questions(asked, encoder, batch_size=4, prompt_suffix=" Say it.")
    written = arrange_questions(longer, encoder, batch_size=4)
    for ours, theirs in zip(*(a.batches(threads=1, prefetch=1) for a in (suffixed, written)), strict=True):
        np.testing.assert_array_equal(ours.arrays["input_ids"], theirs.arrays["input_ids"])
        assert {record for _, record in ours.questions} <= set(asked)  # metrics see the question as the file has it


@pytest.mark.slow
def test_sharded_evaluation_gives_the_same(goldens, llava, encoder, expected):
    asking = arrange_questions(records(goldens, ["yes"] * 8), encoder, batch_size=8, multiple=4)
    assert asking.groups[0].beginnings % 4 == 0
    split = on_mesh(llava, 2, 2, 2)
    result = evaluate(split, asking.batches(threads=1, prefetch=1), tokenizer=encoder.tokenizer, max_new_tokens=STEPS)
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in expected[0]]


def test_bad_questions(goldens, llava, encoder):
    asked = records(goldens, ["x"] * 8)
    with pytest.raises(UserError, match=r"record q0: has \d+ tokens with its images, more than the maximum length 9"):
        arrange_questions(asked, dataclasses.replace(encoder, max_length=9), batch_size=2)
    with pytest.raises(UserError, match="record q0: has an image but the model has no vision tower"):
        arrange_questions(asked, dataclasses.replace(encoder, image_loader=None), batch_size=2)
    refused("0 questions", arrange_questions, [], encoder, batch_size=2)
    unanswered = [dataclasses.replace(asked[0], turns=asked[0].turns[:1])]
    asking = arrange_questions(unanswered, encoder, batch_size=1)
    with pytest.raises(UserError, match="record q0: has no reference answer"):
        evaluate(llava, asking.batches(threads=1, prefetch=1), tokenizer=encoder.tokenizer, max_new_tokens=1)
    refused("no question", evaluate, llava, [], tokenizer=encoder.tokenizer, max_new_tokens=1)


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


@pytest.mark.parametrize(
    ("batch_size", "ways", "batches"), [(256, 1, [(4, 7)]), (3, 1, 2 * [(2, 7)]), (6, 3, [(6, 7)])]
)
def test_batches_of_windows_are_no_larger_than_the_text(batch_size, ways, batches):
    assert [ids.shape for ids, _ in _windows(np.arange(23), 7, batch_size, ways)] == batches


def test_perplexity_of_too_little():
    refused("perplexity needs at least 2 tokens", perplexity, model(config()), [3], window=4, batch_size=1)
    refused("token ids from 3 to 99 for a vocabulary of", perplexity, model(config()), [3, 99], window=4, batch_size=1)
