"""Questions to models, against forwards that share nothing: shared images, tiles, perplexity, one question alone."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_cases import copy_llava
from PIL import Image
from prune_cases import config, model, on_mesh
from refusal import refused
from vlm_cases import images_of

import vlmprune_jax as vp
from vlmprune_jax.core.models.vlm import forward
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, Shape
from vlmprune_jax.io.data.images import ImageLoader, load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.families import templates
from vlmprune_jax.io.families.towers import PIXELS
from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.evaluation import questions
from vlmprune_jax.run.evaluation.questions import arrange_questions
from vlmprune_jax.run.evaluation.runner import _windows, evaluate, perplexity

STEPS = 3


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


def question(goldens, number, image, text, answer):
    """A question about an image of the goldens, or about none."""
    text = text if image is None else f"<image>\n{text}"
    images = () if image is None else (goldens / f"data/images/img{image}.png",)
    return Record(f"q{number}", (("human", text), ("gpt", answer)), images)


def records(goldens, answers):
    """Seven questions about three images, mixed, and one without an image."""
    texts = [f"Is {n} here?" for n in ("one", "two", "a dog", "one", "a cat", "that", "it")]
    asked = zip((0, 1, 0, 2, 1, 0, 2, None), [*texts, "Hello there"], answers, strict=True)
    return [question(goldens, number, *rest) for number, rest in enumerate(asked)]


def greedy(llava, encoder, record, shape=None):
    """Tokens by repeated full forwards of one row, padded at the right."""
    tokens = encoder.prompt_ids(record).tolist()
    pixels = images_of(encoder, record, *filter(None, [shape]))["pixel_values"][None]
    start = len(tokens)
    for _ in range(STEPS):
        ids, mask = np.zeros((2, 1, encoder.max_length + STEPS), np.int32)
        ids[0, : len(tokens)], mask[0, : len(tokens)] = tokens, 1
        logits, _ = forward(llava, ids, attention_mask=mask, pixel_values=pixels)
        tokens.append(int(np.asarray(logits)[0, len(tokens) - 1].argmax()))
        if tokens[-1] in llava.cfg.eos_token_ids:
            break
    return tokens[start:]


@pytest.fixture(scope="module")
def expected(goldens, llava, encoder):
    asked = records(goldens, ["x"] * 8)
    tokens = [greedy(llava, encoder, record) for record in asked]
    return [encoder.tokenizer.decode(t, skip_special_tokens=True) for t in tokens], [len(t) for t in tokens]


def answered(model, encoder, batches, **options):
    return evaluate(model, batches, tokenizer=encoder.tokenizer, max_new_tokens=STEPS, **options)


def test_accuracy_of_known_answers(goldens, llava, encoder, expected):
    texts, lengths = expected
    assert len(set(texts)) > 1  # the model does look at its input
    answers = [text.upper() + "." if i not in (2, 7) else "wrong" for i, text in enumerate(texts)]
    asked = records(goldens, answers)
    asking, seen = arrange_questions(asked, encoder, batch_size=3), []
    result = answered(llava, encoder, asking.batches(threads=1, prefetch=1), progress=seen.append)
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
    result = answered(on_mesh(llava, 2, 2, 2), encoder, asking.batches(threads=1, prefetch=1))
    assert [answer.prediction for answer in result.answers] == [text.strip() for text in expected[0]]


def test_bad_questions(goldens, llava, encoder, tiled, asked):
    one = records(goldens, ["x"] * 8)[:1]
    for of, changed, changes, fact in (
        (one, encoder, {"max_length": 9}, r"record q0: has \d+ tokens with its images, more than the maximum length 9"),
        (one, encoder, {"image_loader": None}, "record q0: has an image but the model has no vision tower"),
        ([], encoder, {}, "0 questions"),
        (asked, tiled, {"tile_buckets": (1, 5)}, "record q0: needs 7 image tiles, more than the largest bucket"),
        (asked, tiled, {"max_length": 100}, r"q0: has 136 tokens .* length 100: raise evaluate\.max_length"),
    ):
        refused(fact, arrange_questions, of, dataclasses.replace(changed, **changes), batch_size=2)
    unanswered = arrange_questions([dataclasses.replace(one[0], turns=one[0].turns[:1])], encoder, batch_size=1)
    refused("q0: has no reference answer", answered, llava, encoder, unanswered.batches(threads=1, prefetch=1))
    refused("no question", answered, llava, encoder, [])


# --- tiled images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(goldens, llava, encoder):
    """The tower of the golden LLaVA takes 28 x 28 pixels, so every tile is one of its images (16 positions)."""
    tiling = Tiling(28, 1, 6, True, False, *PIXELS["internvit"], 3, shares=True)
    loader = ImageLoader(tiling, max_pixels=10**6, cache_bytes=10**6)
    return dataclasses.replace(encoder, max_length=160, image_loader=loader, tile_buckets=(4, 7))


@pytest.fixture(scope="module")
def asked(goldens):
    """Questions about images of seven, four and five tiles, mixed, and two without an image."""
    texts = ("Is one here?", "Hello", "Is two here?", "A dog?", "One?", "Hello there", "Is it a cat?")
    images = (0, None, 1, 0, 3, None, 1)
    return [question(goldens, i, image, text, "yes") for i, (text, image) in enumerate(zip(texts, images, strict=True))]


def test_rows_with_spare_slots_equal_rows_alone(llava, tiled, asked):
    batch = next(iter(train_batches(asked[:4], tiled, batch_size=4, threads=1)))
    assert batch.arrays["media"]["vision"].values.shape[:2] == (4, 7)
    inputs = {name: batch.arrays[name] for name in ("media", "attention_mask")}
    logits = np.asarray(forward(llava, batch.arrays["input_ids"], **inputs)[0])
    for row, record in enumerate(asked[:4]):
        real = batch.arrays["attention_mask"][row] == 1
        pixels = tiled.image_loader.load(record.images[0], record.id) if record.images else None
        alone = forward(llava, batch.arrays["input_ids"][row][real][None], pixel_values=pixels)[0][0]
        np.testing.assert_allclose(logits[row][real], alone, atol=2e-5, rtol=0)


def test_shared_beginnings_of_tiles(llava, tiled, asked):
    batches = list(arrange_questions(asked, tiled, batch_size=2).batches(threads=1, prefetch=1))
    slots = [batch.arrays["media"]["vision"].values.shape[1] for batch in batches]
    assert slots == sorted(slots)  # one program after the other
    assert set(slots) == {4, 7}
    for bucket in (4, 7):
        same = [batch for batch, number in zip(batches, slots, strict=True) if number == bucket]
        shapes = {tuple(a.shape for a in [*jax.tree.leaves(batch.arrays), batch.prefix.input_ids]) for batch in same}
        assert len(shapes) == 1
    assert len({batch.prefix.input_ids.shape for batch in batches}) == 2  # few tiles do not wait for many
    shared = answered(llava, tiled, batches)
    assert [answer.id for answer in shared.answers] == [f"q{i}" for i in range(7)]
    tokens = [greedy(llava, tiled, record, Shape(0, 7)) for record in asked[:3]]
    expected = [tiled.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    assert [answer.prediction for answer in shared.answers[:3]] == expected


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
    refused("perplexity needs at least 2 tokens", perplexity, one, [3], window=4, batch_size=1)
    refused("token ids from 3 to 99 for a vocabulary of", perplexity, one, [3, 99], window=4, batch_size=1)


def test_batches_of_windows_are_no_larger_than_the_text():
    for batch_size, ways, batches in ((256, 1, [(4, 7)]), (3, 1, 2 * [(2, 7)]), (6, 3, [(6, 7)])):
        assert [ids.shape for ids, _ in _windows(np.arange(23), 7, batch_size, ways)] == batches


# --- `vp.answer`, `vp.questions` and `vlmprune chat`: a question without an experiment -------------------------------


QUESTION = "Is a dog here?"
MISSING = ("missing.png", "missing.mp4")


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llava"
    copy_llava(goldens, folder)
    return folder


def test_an_answer_is_that_of_an_evaluation(goldens, folder, capsys):
    image = goldens / "data/images/img1.png"
    entry = {"image": image.name, "question": QUESTION, "answers": ["x"]}
    asked = vp.questions(folder, [entry], images=image.parent, batch_size=1)
    model = vp.load(folder)
    (expected,) = vp.evaluate(model, asked, max_new_tokens=3).answers
    assert expected.prediction
    with Image.open(image) as picture:
        for source in (image, str(image), [image], picture):
            assert vp.answer(model, source, QUESTION, max_new_tokens=3) == expected.prediction
    assert main(["chat", str(folder), str(folder), str(image), QUESTION, "--max_new_tokens=3"]) == 0
    size = f"{folder} ({vp.count_params(model):,} parameters)"
    assert capsys.readouterr().out.split("\n") == [*[size, f"  {expected.prediction}"] * 2, ""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *((argv, "chat takes models, images or videos and a question") for argv in ([], ["{image}", QUESTION])),
        (["{folder}", "{folder}/config.json", QUESTION], "config.json (record question): not a readable image"),
        *((["{folder}", name, QUESTION], f"{name}: no such file: name an image or a video") for name in MISSING),
        (["{folder}", "{folder}-missing", "{image}", QUESTION], "llava-missing: no such folder"),
        (["{folder}", "{image}"], 'img1.png, not a question: add one (vlmprune chat MODEL image.png "What is'),
    ],
)
def test_wrong_arguments(goldens, folder, capsys, argv, message):
    image = goldens / "data/images/img1.png"
    assert main(["chat", *[arg.format(folder=folder, image=image) for arg in argv]]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_what_has_no_tokenizer_or_no_such_setting(folder):
    """A model that no folder made has no tokenizer, and one with a trimmed vocabulary another."""
    model, trimmed = vp.load(folder), SimpleNamespace(vocabulary=())
    for changes in ({"source": None}, {"plan": trimmed}):
        refused("in memory has no tokenizer: pass source_dir=", vp.answer, model.replace(**changes), None, QUESTION)
    refused(f"source_dir=other .* {folder} has its own", vp.answer, folder, None, QUESTION, source_dir="other")
    refused("setting 'max_length' is not accepted here", vp.questions, folder, [], max_length=9)
