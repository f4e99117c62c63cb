"""Batches have one shape, follow their seed, split over processes without overlap and resume exactly."""

import dataclasses

import jax
import numpy as np
import pytest
from batch_cases import ORDERED, golden_encoder, golden_records

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.encoding import measure

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
