"""Batches of tiled images: as many slots as a bucket, equal over processes, nothing of an image cut off; collators."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

CONTEXT = 393
TRAIN: dict[str, Any] = {
    "batch_size": 3,
    "epochs": 1,
    "drop_remainder": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def samples(goldens):
    return read_records(goldens / "data/samples.json", goldens / "data/images")


@pytest.fixture(scope="module")
def encoder(goldens):
    """The golden InternVL: 4 positions a tile; its images give 7, 4, 1 and 5 tiles of at most 6 and a thumbnail."""
    images = load_image_processor(
        goldens / "ckpt/internvl", DataSpec(aspect_ratio="pad", cache_megabytes=10, max_tiles=6)
    )
    return Encoder(
        tokenizer=load_tokenizer(goldens / "tokenizers/internvl"),
        template=templates()["phi3-chat"],
        max_length=292,
        image_loader=images,
        image_token_id=CONTEXT,
        tokens_per_image=4,
        max_images=2,
        truncate=False,
        tile_buckets=(1, 2, 4, 7),
    )


def slots_of(encoder, record):
    return encoder.image_sizes(record, encoder.shapes(record))[0]


def pixels_of(encoder, record):
    assert encoder.image_loader is not None
    return np.concatenate([encoder.image_loader.load(path, record.id, len(record.images)) for path in record.images])


def test_slots_are_the_smallest_bucket(samples, encoder):
    chosen = [samples[i] for i in (0, 4, 1, 2, 11, 4, 4, 5, 7, 3)]
    batches = list(train_batches(chosen, encoder, **TRAIN))
    assert [batch.arrays["media"]["vision"].values.shape for batch in batches] == [
        (3, slots, 3, 56, 56) for slots in (7, 1, 1, 7)
    ]
    for batch, records in zip(batches, (chosen[:3], chosen[3:6], chosen[6:9], chosen[9:]), strict=True):
        for row, record in enumerate(records):
            pixels = batch.arrays["media"]["vision"].values[row]
            tiles = slots_of(encoder, record)
            assert (batch.arrays["input_ids"][row] == CONTEXT).sum() == 4 * tiles
            assert not pixels[tiles:].any()
            if record.images:
                assert np.array_equal(pixels[:tiles], pixels_of(encoder, record))
    packed = train_batches(chosen, encoder, **TRAIN, packs=1)
    for batch, other, records in zip(batches, packed, (chosen[:3], chosen[3:6], chosen[6:9], chosen[9:]), strict=True):
        tiles = [slots_of(encoder, record) for record in records]
        real = [pixels[:count] for pixels, count in zip(batch.arrays["media"]["vision"].values, tiles, strict=False)]
        (joined,) = other.arrays["media"]["vision"].values
        assert len(joined) == 3 * min(bucket for bucket in (1, 2, 4, 7) if 3 * bucket >= sum(tiles))
        assert np.array_equal(joined[: sum(tiles)], np.concatenate(real))
        assert not joined[sum(tiles) :].any()
    assert not batches[-1].arrays["attention_mask"][1:].any()  # padding rows
    assert not batches[-1].arrays["media"]["vision"].values[1:].any()


def test_two_images_share_tiles_and_follow_each_other(samples, encoder):
    turns = (("human", "<image> or <image>?"), ("gpt", "The first."))
    two = Record("two", turns, (samples[0].images[0], samples[1].images[0]))
    wide = dataclasses.replace(encoder, tile_buckets=(1, 9))
    batch = next(iter(train_batches([two], wide, **{**TRAIN, "batch_size": 1})))
    counts = [image.slots for image in encoder.shapes(two)]
    assert batch.arrays["media"]["vision"].values.shape[1] == 9
    assert np.array_equal(batch.arrays["media"]["vision"].values[0, : sum(counts)], pixels_of(encoder, two))
    runs = "".join("i" if token == CONTEXT else "." for token in batch.arrays["input_ids"][0]).split(".")
    assert [len(run) for run in runs if run] == [4 * count for count in counts]


def test_other_processes_images_are_not_decoded(samples, encoder, tmp_path):
    whole = samples[0].images[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    broken = dataclasses.replace(samples[0], id="broken", images=(tmp_path / "half.png",))
    options = {**TRAIN, "batch_size": 2}
    first = next(iter(train_batches([samples[2], broken], encoder, **options, mine=np.array([0]))))
    assert first.arrays["media"]["vision"].values.shape[1] == 7  # the header of the other row was enough
    with pytest.raises(UserError, match=r"half\.png \(record broken\): not a readable image"):
        next(iter(train_batches([samples[2], broken], encoder, **options, mine=np.array([1]))))


def test_collator_of_internvl(goldens, samples, encoder):
    stored = np.load(goldens / "data/collators.npz")
    batch = next(iter(train_batches([samples[i] for i in (0, 1, 4)], encoder, **TRAIN)))
    mask = stored["internvl_collator_attention_mask"]
    assert np.array_equal(batch.arrays["attention_mask"].astype(bool), mask)
    assert np.array_equal(batch.arrays["labels"], stored["internvl_collator_labels"])
    assert np.array_equal(batch.arrays["input_ids"][mask], stored["internvl_collator_input_ids"][mask])
    positions = np.maximum(np.cumsum(batch.arrays["attention_mask"], axis=1) - 1, 0)  # as the model counts them
    assert np.array_equal(positions[mask], stored["internvl_collator_position_ids"][mask])
    # The reference adds a white tile with flag 0 for the row of text; ours leaves its slots empty.
    assert int(stored["internvl_collator_image_flags"].sum()) == sum(slots_of(encoder, samples[i]) for i in (0, 1, 4))


@pytest.mark.parametrize(("name", "tower"), [("llava", "clip_tower"), ("bunny", "siglip_tower")])
def test_collators_of_llava_and_bunny(goldens, samples, name, tower):
    stored = {key: np.load(goldens / "data/collators.npz")[f"{name}_collator_{key}"] for key in
              ("input_ids", "attention_mask", "labels")}  # fmt: skip
    images = load_image_processor(goldens / "ckpt" / tower, DataSpec(aspect_ratio="pad", cache_megabytes=1))
    whole = Encoder(
        tokenizer=load_tokenizer(goldens / "tokenizers" / name),
        template=templates()["llava_v1" if name == "llava" else name],
        max_length=stored["input_ids"].shape[1],
        image_loader=images,
        image_token_id=-200,
        tokens_per_image=1,
        max_images=1,
        truncate=True,
    )
    batch = next(iter(train_batches([samples[i] for i in (0, 1, 4)], whole, **TRAIN)))
    for key, expected in stored.items():
        assert np.array_equal(batch.arrays[key], expected), key


def test_truncation_spares_images_and_their_closing_marks(samples, encoder):
    record = samples[1]  # four tiles, then a long conversation
    ids = encoder.training_row(record)["input_ids"]
    close = int(np.flatnonzero(ids == 392)[0])
    cut = dataclasses.replace(encoder, truncate=True)
    row = dataclasses.replace(cut, max_length=close + 30).training_row(record)
    assert np.array_equal(row["input_ids"], ids[: close + 30])
    assert (row["labels"] != IGNORED).any()
    for length in (close - 3, close):  # inside the image, and before the mark that closes it
        with pytest.raises(
            UserError, match=f"record 000001: an image ends at token .*, beyond the maximum length {length}"
        ):
            dataclasses.replace(cut, max_length=length).training_row(record)
    assert dataclasses.replace(cut, max_length=close + 1).training_row(record)["input_ids"][-1] == 392
    with pytest.raises(
        UserError, match=r"record 000001: has \d+ tokens with its images, more than the maximum length 200"
    ):
        dataclasses.replace(encoder, max_length=200).training_row(record)


def test_too_many_tiles_or_images_name_their_record(samples, encoder):
    few = dataclasses.replace(encoder, tile_buckets=(1, 5))
    with pytest.raises(UserError, match="record 000000: needs 7 image tiles, more than the largest bucket"):
        next(iter(train_batches([samples[4], samples[0]], few, **TRAIN)))
    three = dataclasses.replace(
        samples[0], turns=(("human", "<image>" * 3), ("gpt", "x")), images=samples[0].images * 3
    )
    with pytest.raises(UserError, match=r"record 000000: has 3 images, more than data\.max_images=2"):
        next(iter(train_batches([three], encoder, **TRAIN)))
