"""Batches have one shape, follow their seed, split over processes without overlap and resume exactly."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from batch_cases import ORDERED, golden_encoder, golden_records

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.records import Record

TRAIN = ORDERED | {"epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def samples(goldens: Path) -> list[Record]:
    """Short samples with one image, two images and none."""
    *records, two = golden_records(goldens)
    return [records[index] for index in (0, 2, 4, 7, 8, 11)] + [two]


@pytest.fixture(scope="module")
def encoder(goldens: Path) -> Encoder:
    return golden_encoder(goldens, max_length=220)


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.record_ids]


def equal(first: Batch, second: Batch) -> bool:
    return first.record_ids == second.record_ids and jax.tree.all(
        jax.tree.map(np.array_equal, first.arrays, second.arrays)
    )


def test_training_rows(goldens: Path, samples: list[Record], encoder: Encoder) -> None:
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


def test_shuffle_depends_on_seed_and_epoch(samples: list[Record], encoder: Encoder) -> None:
    options = {**TRAIN, "batch_size": 7, "epochs": 3}
    epochs = [batch.record_ids for batch in train_batches(samples, encoder, **options)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == sorted(record.id for record in samples) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert epochs == [batch.record_ids for batch in train_batches(samples, encoder, **{**options, "threads": 3})]
    assert epochs != [batch.record_ids for batch in train_batches(samples, encoder, **{**options, "seed": 4})]


def test_batches_cross_epochs_and_the_rest_is_dropped(samples: list[Record], encoder: Encoder) -> None:
    assert len(list(train_batches(samples, encoder, **{**TRAIN, "epochs": 2}))) == 3
    endless = iter(train_batches(samples, encoder, **{**TRAIN, "epochs": None}))
    assert len([next(endless) for _ in range(20)]) == 20


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_process_slices_join_to_the_global_batch(samples: list[Record], encoder: Encoder, drop_remainder: bool) -> None:
    options = {**TRAIN, "epochs": 2, "drop_remainder": drop_remainder}
    whole = list(train_batches(samples, encoder, **options))
    parts = [
        list(train_batches(samples, encoder, **options, mine=mine))
        for mine in np.split(np.arange(options["batch_size"]), 2)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for number, batch in enumerate(whole):
        names = tuple(name for part in parts for name in part[number].record_ids)
        arrays = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(part[number].arrays for part in parts))
        assert equal(batch, Batch(arrays, names))


@pytest.mark.parametrize("threads", [0, 2])
def test_state_restores_exactly(samples: list[Record], encoder: Encoder, threads: int) -> None:
    options = {**TRAIN, "epochs": None, "threads": threads}
    running = iter(train_batches(samples, encoder, **options))
    for _ in range(5):
        next(running)
    state = running.get_state()
    expected = [next(running) for _ in range(6)]
    fresh = iter(train_batches(samples, encoder, **options))
    next(fresh)
    fresh.set_state(state)
    assert all(equal(next(fresh), batch) for batch in expected)


def test_model_without_a_vision_tower(samples: list[Record], encoder: Encoder) -> None:
    text_only = dataclasses.replace(encoder, image_loader=None)
    batch = next(iter(train_batches(samples[2:4], text_only, **{**TRAIN, "batch_size": 2})))
    assert set(batch.arrays) == {"input_ids", "attention_mask", "labels", "media"}
    assert not batch.arrays["media"]
    with pytest.raises(UserError, match="record 000000: has an image but the model has no vision tower"):
        next(iter(train_batches(samples[:1], text_only, **{**TRAIN, "batch_size": 1})))


def test_longest_row_chooses_max_length(samples: list[Record], encoder: Encoder) -> None:
    length = int(measure(samples, encoder, on_error="stop", threads=2)[:, 0].max())
    fitting = dataclasses.replace(encoder, max_length=length)
    assert len(list(train_batches(samples, fitting, **TRAIN))) == 1
    short = dataclasses.replace(encoder, max_length=length - 1)
    with pytest.raises(UserError, match=f"{length} tokens with its images, more than the maximum length {length - 1}"):
        list(train_batches(samples, short, **{**TRAIN, "drop_remainder": False}))


def test_long_rows_name_their_record(samples: list[Record], encoder: Encoder) -> None:
    short = dataclasses.replace(encoder, max_length=140)
    with pytest.raises(UserError, match="record 000004: has 141 tokens"):
        next(iter(train_batches(samples[2:3], short, **{**TRAIN, "batch_size": 1})))


def test_truncation_cuts_at_the_right(samples: list[Record], encoder: Encoder) -> None:
    full = encoder.training_row(samples[0])
    cut = dataclasses.replace(encoder, max_length=152, truncate=True)
    row = cut.training_row(samples[0])
    for name in ("input_ids", "attention_mask", "labels"):
        assert np.array_equal(row[name], full[name][:152])
    assert (row["labels"] != IGNORED).any()
    inside_image = dataclasses.replace(encoder, max_length=110, truncate=True)
    with pytest.raises(UserError, match=r"record 000000: an image ends at token .*, beyond the maximum length 110"):
        inside_image.training_row(samples[0])


def test_refused_settings(samples: list[Record], encoder: Encoder) -> None:
    one_slot = dataclasses.replace(encoder, max_images=1)
    with pytest.raises(UserError, match=r"record two: has 2 images, more than data\.max_images=1"):
        next(iter(train_batches(samples[-1:], one_slot, **{**TRAIN, "batch_size": 1})))
    with pytest.raises(UserError, match="do not fill one batch of 8"):
        train_batches(samples, encoder, **{**TRAIN, "batch_size": 8})


def test_broken_image_inside_a_batch(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "bad.png").write_bytes(b"x")
    record = Record("broken", (("human", "<image>\nWhat?"), ("gpt", "It.")), (tmp_path / "bad.png",))
    with pytest.raises(UserError, match=r"bad\.png \(record broken\): not a readable image"):
        next(iter(train_batches([record], encoder, **{**TRAIN, "batch_size": 1})))
