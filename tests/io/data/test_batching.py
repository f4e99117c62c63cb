"""Batches have one shape, follow their seed, split over processes without overlap and resume exactly."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from batch_cases import ORDERED, golden_encoder, golden_records

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

TRAIN = ORDERED | {"epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def samples(goldens):
    """Short samples with one image, two images and none."""
    *records, two = golden_records(goldens)
    return [records[index] for index in (0, 2, 4, 7, 8, 11)] + [two]


@pytest.fixture(scope="module")
def encoder(goldens):
    return golden_encoder(goldens, max_length=220)


def ids(batches):
    return [name for batch in batches for name in batch.record_ids]


def test_training_rows(goldens, samples, encoder):
    batches = list(train_batches(samples, encoder, **{**TRAIN, "seed": None, "drop_remainder": False}))
    assert ids(batches) == [*(record.id for record in samples), ""]
    for batch in batches:
        assert jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}", batch.arrays) == {
            "input_ids": "int32[4, 220]",
            "attention_mask": "int32[4, 220]",
            "labels": "int32[4, 220]",
            "media": {"vision": Packed("float32[4, 2, 3, 28, 28]")},
        }
    first, second = batches
    lengths = first.arrays["attention_mask"].sum(1)
    assert lengths.tolist() == [142 + 15, 145 + 15, 141, 134]
    assert all(first.arrays["attention_mask"][row, :length].all() for row, length in enumerate(lengths))
    assert (first.arrays["labels"][first.arrays["attention_mask"] == 0] == IGNORED).all()
    assert (first.arrays["input_ids"] == -200).sum(1).tolist() == [16, 16, 0, 0]
    stored = np.load(goldens / "data/images.npz")["clip_pad"]
    pixels = first.arrays["media"]["vision"].values
    np.testing.assert_allclose(pixels[0, 0], stored[0], atol=1e-5, rtol=0)
    assert not pixels[0, 1].any()  # an image row's free slot
    assert not pixels[2].any()  # a text-only row
    np.testing.assert_allclose(second.arrays["media"]["vision"].values[2], stored[[0, 2]], atol=1e-5, rtol=0)
    assert not second.arrays["attention_mask"][3].any()
    assert not second.arrays["media"]["vision"].values[3].any()
    assert (second.arrays["labels"][3] == IGNORED).all()


def test_shuffle_depends_on_seed_and_epoch(samples, encoder):
    options = {**TRAIN, "batch_size": 7, "epochs": 3}
    epochs = [batch.record_ids for batch in train_batches(samples, encoder, **options)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == sorted(record.id for record in samples) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert epochs == [batch.record_ids for batch in train_batches(samples, encoder, **{**options, "threads": 3})]
    assert epochs != [batch.record_ids for batch in train_batches(samples, encoder, **{**options, "seed": 4})]


def test_batches_cross_epochs_and_the_rest_is_dropped(samples, encoder):
    assert len(list(train_batches(samples, encoder, **{**TRAIN, "epochs": 2}))) == 3
    endless = iter(train_batches(samples, encoder, **{**TRAIN, "epochs": None}))
    assert len([next(endless) for _ in range(20)]) == 20


def test_model_without_a_vision_tower(samples, encoder):
    text_only = dataclasses.replace(encoder, image_loader=None)
    batch = next(iter(train_batches(samples[2:4], text_only, **{**TRAIN, "batch_size": 2})))
    assert set(batch.arrays) == {"input_ids", "attention_mask", "labels", "media"}
    assert not batch.arrays["media"]
    with pytest.raises(UserError, match="record 000000: has an image but the model has no vision tower"):
        next(iter(train_batches(samples[:1], text_only, **{**TRAIN, "batch_size": 1})))


def test_longest_row_chooses_max_length(samples, encoder):
    length = int(measure(samples, encoder, on_error="stop", threads=2)[:, 0].max())
    fitting = dataclasses.replace(encoder, max_length=length)
    assert len(list(train_batches(samples, fitting, **TRAIN))) == 1
    short = dataclasses.replace(encoder, max_length=length - 1)
    with pytest.raises(UserError, match=f"{length} tokens with its images, more than the maximum length {length - 1}"):
        list(train_batches(samples, short, **{**TRAIN, "drop_remainder": False}))


def test_truncation_cuts_at_the_right(samples, encoder):
    full = encoder.training_row(samples[0])
    cut = dataclasses.replace(encoder, max_length=152, truncate=True)
    row = cut.training_row(samples[0])
    for name in ("input_ids", "attention_mask", "labels"):
        assert np.array_equal(row[name], full[name][:152])
    assert (row["labels"] != IGNORED).any()
    inside_image = dataclasses.replace(encoder, max_length=110, truncate=True)
    with pytest.raises(UserError, match=r"record 000000: an image ends at token .*, beyond the maximum length 110"):
        inside_image.training_row(samples[0])


def test_refused_settings(samples, encoder):
    one_slot = dataclasses.replace(encoder, max_images=1)
    with pytest.raises(UserError, match=r"record two: has 2 images, more than data\.max_images=1"):
        next(iter(train_batches(samples[-1:], one_slot, **{**TRAIN, "batch_size": 1})))
    with pytest.raises(UserError, match="do not fill one batch of 8"):
        train_batches(samples, encoder, **{**TRAIN, "batch_size": 8})


# --- batches of tiled images ------------------------------------------------------------------------------------------


CONTEXT = 393
TILED: dict[str, Any] = {
    "batch_size": 3,
    "epochs": 1,
    "drop_remainder": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def pictures(goldens):
    return read_records(goldens / "data/samples.json", goldens / "data/images")


@pytest.fixture(scope="module")
def tiler(goldens):
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


def slots_of(tiler, record):
    return tiler.image_sizes(record, tiler.shapes(record))[0]


def pixels_of(tiler, record):
    assert tiler.image_loader is not None
    return np.concatenate([tiler.image_loader.load(path, record.id, len(record.images)) for path in record.images])


def test_slots_are_the_smallest_bucket(pictures, tiler):
    chosen = [pictures[i] for i in (0, 4, 1, 2, 11, 4, 4, 5, 7, 3)]
    batches = list(train_batches(chosen, tiler, **TILED))
    assert [batch.arrays["media"]["vision"].values.shape for batch in batches] == [
        (3, slots, 3, 56, 56) for slots in (7, 1, 1, 7)
    ]
    for batch, records in zip(batches, (chosen[:3], chosen[3:6], chosen[6:9], chosen[9:]), strict=True):
        for row, record in enumerate(records):
            pixels = batch.arrays["media"]["vision"].values[row]
            tiles = slots_of(tiler, record)
            assert (batch.arrays["input_ids"][row] == CONTEXT).sum() == 4 * tiles
            assert not pixels[tiles:].any()
            if record.images:
                assert np.array_equal(pixels[:tiles], pixels_of(tiler, record))
    packed = train_batches(chosen, tiler, **TILED, packs=1)
    for batch, other, records in zip(batches, packed, (chosen[:3], chosen[3:6], chosen[6:9], chosen[9:]), strict=True):
        tiles = [slots_of(tiler, record) for record in records]
        real = [pixels[:count] for pixels, count in zip(batch.arrays["media"]["vision"].values, tiles, strict=False)]
        (joined,) = other.arrays["media"]["vision"].values
        assert len(joined) == 3 * min(bucket for bucket in (1, 2, 4, 7) if 3 * bucket >= sum(tiles))
        assert np.array_equal(joined[: sum(tiles)], np.concatenate(real))
        assert not joined[sum(tiles) :].any()
    assert not batches[-1].arrays["attention_mask"][1:].any()  # padding rows
    assert not batches[-1].arrays["media"]["vision"].values[1:].any()


def test_two_images_share_tiles_and_follow_each_other(pictures, tiler):
    turns = (("human", "<image> or <image>?"), ("gpt", "The first."))
    two = Record("two", turns, (pictures[0].images[0], pictures[1].images[0]))
    wide = dataclasses.replace(tiler, tile_buckets=(1, 9))
    batch = next(iter(train_batches([two], wide, **{**TILED, "batch_size": 1})))
    counts = [image.slots for image in tiler.shapes(two)]
    assert batch.arrays["media"]["vision"].values.shape[1] == 9
    assert np.array_equal(batch.arrays["media"]["vision"].values[0, : sum(counts)], pixels_of(tiler, two))
    runs = "".join("i" if token == CONTEXT else "." for token in batch.arrays["input_ids"][0]).split(".")
    assert [len(run) for run in runs if run] == [4 * count for count in counts]


def test_other_processes_images_are_not_decoded(pictures, tiler, tmp_path):
    whole = pictures[0].images[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    broken = dataclasses.replace(pictures[0], id="broken", images=(tmp_path / "half.png",))
    options = {**TILED, "batch_size": 2}
    first = next(iter(train_batches([pictures[2], broken], tiler, **options, mine=np.array([0]))))
    assert first.arrays["media"]["vision"].values.shape[1] == 7  # the header of the other row was enough
    with pytest.raises(UserError, match=r"half\.png \(record broken\): not a readable image"):
        next(iter(train_batches([pictures[2], broken], tiler, **options, mine=np.array([1]))))


def test_collator_of_internvl(goldens, pictures, tiler):
    stored = np.load(goldens / "data/collators.npz")
    batch = next(iter(train_batches([pictures[i] for i in (0, 1, 4)], tiler, **TILED)))
    mask = stored["internvl_collator_attention_mask"]
    assert np.array_equal(batch.arrays["attention_mask"].astype(bool), mask)
    assert np.array_equal(batch.arrays["labels"], stored["internvl_collator_labels"])
    assert np.array_equal(batch.arrays["input_ids"][mask], stored["internvl_collator_input_ids"][mask])
    positions = np.maximum(np.cumsum(batch.arrays["attention_mask"], axis=1) - 1, 0)  # as the model counts them
    assert np.array_equal(positions[mask], stored["internvl_collator_position_ids"][mask])
    # The reference adds a white tile with flag 0 for the row of text; ours leaves its slots empty.
    assert int(stored["internvl_collator_image_flags"].sum()) == sum(slots_of(tiler, pictures[i]) for i in (0, 1, 4))


@pytest.mark.parametrize(("name", "tower"), [("llava", "clip_tower"), ("bunny", "siglip_tower")])
def test_collators_of_llava_and_bunny(goldens, pictures, name, tower):
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
    batch = next(iter(train_batches([pictures[i] for i in (0, 1, 4)], whole, **TILED)))
    for key, expected in stored.items():
        assert np.array_equal(batch.arrays[key], expected), key


def test_truncation_spares_images_and_their_closing_marks(pictures, tiler):
    record = pictures[1]  # four tiles, then a long conversation
    ids = tiler.training_row(record)["input_ids"]
    close = int(np.flatnonzero(ids == 392)[0])
    cut = dataclasses.replace(tiler, truncate=True)
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
        dataclasses.replace(tiler, max_length=200).training_row(record)


def test_too_many_tiles_or_images_name_their_record(pictures, tiler):
    few = dataclasses.replace(tiler, tile_buckets=(1, 5))
    with pytest.raises(UserError, match="record 000000: needs 7 image tiles, more than the largest bucket"):
        next(iter(train_batches([pictures[4], pictures[0]], few, **TILED)))
    three = dataclasses.replace(
        pictures[0], turns=(("human", "<image>" * 3), ("gpt", "x")), images=pictures[0].images * 3
    )
    with pytest.raises(UserError, match=r"record 000000: has 3 images, more than data\.max_images=2"):
        next(iter(train_batches([three], tiler, **TILED)))
