"""A model that takes tiled images: rows with slots to spare, and shared beginnings, give what single forwards give."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from vlm_cases import images_of

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.models.vlm import Model, forward
from vlmprune_jax.io.checkpoints.read import load
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.encoding import Encoder, Shape
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.tiling import Tiling
from vlmprune_jax.io.families import templates
from vlmprune_jax.io.families.towers import PIXELS
from vlmprune_jax.run.evaluation.questions import arrange_questions
from vlmprune_jax.run.evaluation.runner import evaluate

STEPS = 3


@pytest.fixture(scope="module")
def llava(goldens: Path) -> Model:
    """The golden LLaVA: its tower takes 28 x 28 pixels, so every tile is one of its images (16 positions)."""
    return load(goldens / "ckpt/llava_hf")


@pytest.fixture(scope="module")
def encoder(goldens: Path, llava: Model) -> Encoder:
    tiling = Tiling(28, 1, 6, True, False, *PIXELS["internvit"], 3, shares=True)
    assert llava.cfg.image_token_id is not None
    return Encoder(
        tokenizer=load_tokenizer(goldens / "tokenizers/llava"),
        template=dataclasses.replace(templates()["llava_v1"], system=""),
        max_length=160,
        image_loader=ImageLoader(tiling, max_pixels=10**6, cache_bytes=10**6),
        image_token_id=llava.cfg.image_token_id,
        tokens_per_image=llava.cfg.tokens_per_image,
        max_images=1,
        truncate=False,
        tile_buckets=(4, 7),
    )


@pytest.fixture(scope="module")
def asked(goldens: Path) -> list[Record]:
    """Questions about images of seven, four and five tiles, mixed, and two without an image."""
    texts = ("Is one here?", "Hello", "Is two here?", "A dog?", "One?", "Hello there", "Is it a cat?")
    images = (0, None, 1, 0, 3, None, 1)
    return [
        Record(
            f"q{i}",
            (("human", text if image is None else f"<image>\n{text}"), ("gpt", "yes")),
            () if image is None else (goldens / f"data/images/img{image}.png",),
        )
        for i, (text, image) in enumerate(zip(texts, images, strict=True))
    ]


def alone(llava: Model, encoder: Encoder, record: Record, ids: np.ndarray) -> np.ndarray:
    """Logits of one row without padding and with its own tiles only."""
    pixels = None
    if record.images:
        assert encoder.image_loader is not None
        pixels = encoder.image_loader.load(record.images[0], record.id)
    return np.asarray(forward(llava, ids[None], pixel_values=pixels)[0][0])


def test_rows_with_spare_slots_equal_rows_alone(llava: Model, encoder: Encoder, asked: list[Record]) -> None:
    batch = next(iter(train_batches(asked[:4], encoder, batch_size=4, threads=1)))
    assert batch.arrays["media"]["vision"].values.shape[:2] == (4, 7)
    inputs = {name: batch.arrays[name] for name in ("media", "attention_mask")}
    logits = np.asarray(forward(llava, batch.arrays["input_ids"], **inputs)[0])
    for row, record in enumerate(asked[:4]):
        real = batch.arrays["attention_mask"][row] == 1
        expected = alone(llava, encoder, record, batch.arrays["input_ids"][row][real])
        np.testing.assert_allclose(logits[row][real], expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def expected(llava: Model, encoder: Encoder, asked: list[Record]) -> list[str]:
    """Greedy answers by repeated forwards of the growing row."""
    texts = []
    for record in (asked[0], asked[1], asked[2]):
        ids = encoder.prompt_ids(record)
        start, pixels = len(ids), images_of(encoder, record, Shape(0, 7))["pixel_values"][None]
        for _ in range(STEPS):
            padded, mask = np.zeros((2, 1, encoder.max_length), np.int32)
            padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
            logits = np.asarray(forward(llava, padded, pixel_values=pixels, attention_mask=mask)[0])
            ids = np.append(ids, logits[0, len(ids) - 1].argmax())
            if ids[-1] in llava.cfg.eos_token_ids:
                break
        texts.append(encoder.tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    return texts


def test_shared_beginnings_of_tiles(llava: Model, encoder: Encoder, asked: list[Record], expected: list[str]) -> None:
    asking = arrange_questions(asked, encoder, batch_size=2)
    batches = list(asking.batches(threads=1, prefetch=1))
    slots = [batch.arrays["media"]["vision"].values.shape[1] for batch in batches]
    assert slots == sorted(slots)  # one program after the other
    assert set(slots) == {4, 7}
    for bucket in (4, 7):
        same = [batch for batch, number in zip(batches, slots, strict=True) if number == bucket]
        shapes = {tuple(a.shape for a in [*batch.arrays.values(), batch.prefix.input_ids]) for batch in same}
        assert len(shapes) == 1
    assert len({batch.prefix.input_ids.shape for batch in batches}) == 2  # few tiles do not wait for many
    options = {"tokenizer": encoder.tokenizer, "max_new_tokens": STEPS}
    shared = evaluate(llava, batches, **options)
    assert [answer.id for answer in shared.answers] == [f"q{i}" for i in range(7)]
    assert [answer.prediction for answer in shared.answers[:3]] == expected


def test_questions_that_do_not_fit(encoder: Encoder, asked: list[Record]) -> None:
    with pytest.raises(UserError, match="record q0: needs 7 image tiles, more than the largest bucket"):
        arrange_questions(asked, dataclasses.replace(encoder, tile_buckets=(1, 5)), batch_size=2)
    with pytest.raises(UserError, match=r"q0: has 136 tokens .* length 100: raise evaluate\.max_length"):
        arrange_questions(asked, dataclasses.replace(encoder, max_length=100), batch_size=2)
