"""Records to fixed-shape batches: shuffled and resumable ones for training, in order and left-padded for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from vlmprune_jax.data.images import ImageLoader, augment_flip_shift
from vlmprune_jax.data.prompts import IGNORE, Template, tokenize_prompt, tokenize_training
from vlmprune_jax.data.records import Record
from vlmprune_jax.errors import UserError

AUGMENTATIONS = ("none", "flip_shift")
_PADDING_ROW = -1


@dataclass(frozen=True)
class Batch:
    """Rows of equal shape for training and scoring.

    `arrays`: input_ids, attention_mask, labels int32[batch, tokens] (labels are not shifted) and, with a vision tower,
    pixel_values float32[batch, images, 3, height, width]; rows with fewer images carry zero images in the other slots.
    A padding row has mask 0 everywhere and the id "".
    """

    arrays: dict[str, np.ndarray]
    record_ids: tuple[str, ...]


@dataclass(frozen=True)
class GenerationBatch(Batch):
    """Left-padded prompts (no labels) and what should follow; rows with `valid` False only fill the batch."""

    references: tuple[str, ...]
    valid: np.ndarray  # bool[batch]


@dataclass(frozen=True)
class Encoder:
    """How one record becomes one row of `max_length` tokens and `max_images` image slots.

    Every image takes `tokens_per_image` positions that hold `image_token_id`. `image_loader` is None for a model
    without a vision tower. `truncate` cuts longer training rows at the right, as the reference does; without it they
    are refused.
    """

    tokenizer: Any
    template: Template
    max_length: int
    image_loader: ImageLoader | None
    image_token_id: int
    tokens_per_image: int
    max_images: int
    truncate: bool

    def training_row(self, record: Record, augment_seed: tuple[int, ...] | None) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a Batch, padded at the right. Raises UserError naming the record."""
        ids, labels = self._training_tokens(record)
        if len(ids) > self.max_length and self.truncate:
            if np.any(ids[self.max_length :] == self.image_token_id) and record.images:
                raise UserError(f"record {record.id}: an image lies beyond max_length {self.max_length}; raise it")
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        self._check_length(len(ids), record)
        row = self._empty_row()
        row["input_ids"][: len(ids)] = ids
        row["attention_mask"][: len(ids)] = 1
        row["labels"][: len(ids)] = labels
        self._fill_images(row, record, augment_seed)
        return row

    def generation_row(self, record: Record) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a GenerationBatch, padded at the left. Raises UserError naming the record."""
        ids = self._prompt_tokens(record)
        self._check_length(len(ids), record)
        row = self._empty_row()
        del row["labels"]
        row["input_ids"][self.max_length - len(ids) :] = ids
        row["attention_mask"][self.max_length - len(ids) :] = 1
        self._fill_images(row, record, None)
        return row

    def padding_row(self) -> dict[str, np.ndarray]:
        """Return a row that counts nowhere."""
        return self._empty_row()

    def longest(self, records: Sequence[Record], *, generation: bool) -> int:
        """Return the largest number of tokens of any record, to choose `max_length` by (tokenises all of them)."""
        if generation:
            return max(len(self._prompt_tokens(record)) for record in records)
        return max(len(self._training_tokens(record)[0]) for record in records)

    def _training_tokens(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        return tokenize_training(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            cut_text_at=self.max_length if self.truncate else None,
        )

    def _prompt_tokens(self, record: Record) -> np.ndarray:
        return tokenize_prompt(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
        )

    def _check_length(self, length: int, record: Record) -> None:
        if length > self.max_length:
            raise UserError(
                f"record {record.id}: {length} tokens with its images, over max_length {self.max_length}; "
                "raise max_length or drop the record"
            )

    def _empty_row(self) -> dict[str, np.ndarray]:
        # Which id pads is immaterial under the mask, but it must be one the embedding has.
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        row = {
            "input_ids": np.full(self.max_length, pad, np.int32),
            "attention_mask": np.zeros(self.max_length, np.int32),
            "labels": np.full(self.max_length, IGNORE, np.int32),
        }
        if self.image_loader is not None:
            row["pixel_values"] = np.zeros((self.max_images, *self.image_loader.shape), np.float32)
        return row

    def _fill_images(self, row: dict[str, np.ndarray], record: Record, augment_seed: tuple[int, ...] | None) -> None:
        if not record.images:
            return
        if self.image_loader is None:
            raise UserError(f"record {record.id}: has an image but the model has no vision tower; drop it")
        if len(record.images) > self.max_images:
            raise UserError(
                f"record {record.id}: {len(record.images)} images, over max_images {self.max_images}; raise max_images"
            )
        for slot, path in enumerate(record.images):
            pixels = self.image_loader.load(path, record.id)
            if augment_seed is not None:
                pixels = augment_flip_shift(pixels, (*augment_seed, slot))
            row["pixel_values"][slot] = pixels


def train_batches(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    epochs: int | None,
    drop_remainder: bool,
    augment: str,
    process_index: int,
    process_count: int,
    threads: int,
    prefetch: int,
) -> grain.IterDataset[Batch]:
    """Return this process's rows of every global batch of `batch_size`, as a grain dataset of Batch.

    The order of the records is a function of `seed` and the epoch alone (epochs=None never ends); batches run across
    epoch borders. Process p takes rows [p, p + 1) * batch_size / process_count: joined, they are the batch that one
    process would read. A last short batch is dropped, or filled up with padding rows. The iterator's
    `get_state`/`set_state` continue exactly. `augment="flip_shift"` (pretraining only) is seeded by (seed, place in
    the stream).
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"augment {augment!r} is not supported; use one of {', '.join(AUGMENTATIONS)}")
    if drop_remainder and epochs is not None and len(records) * epochs < batch_size:
        raise UserError(
            f"{len(records)} records x {epochs} epochs do not fill one batch of {batch_size}; use a smaller batch size"
        )
    rows = _local_rows(len(records), batch_size, process_index, process_count, seed if shuffle else None, epochs,
                       drop_remainder)  # fmt: skip

    def load(local: np.ndarray) -> Batch:
        encoded, names = [], []
        for place, index in local.tolist():
            if index == _PADDING_ROW:
                encoded.append(encoder.padding_row())
                names.append("")
            else:
                augment_seed = (seed, place) if augment == "flip_shift" else None
                encoded.append(encoder.training_row(records[index], augment_seed))
                names.append(records[index].id)
        return Batch(_stack(encoded), tuple(names))

    return rows.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def generation_batches(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    batch_size: int,
    process_index: int,
    process_count: int,
    threads: int,
    prefetch: int,
) -> grain.IterDataset[GenerationBatch]:
    """Return this process's rows of every global batch of prompts, in file order, with the last answers as references.

    The last batch is filled with copies of the first record whose `valid` is False, so that all shapes are equal and
    every process sees ceil(len(records) / batch_size) batches.
    """
    rows = _local_rows(len(records), batch_size, process_index, process_count, None, 1, False)

    def load(local: np.ndarray) -> GenerationBatch:
        valid = local[:, 1] != _PADDING_ROW
        chosen = [records[max(index, 0)] for index in local[:, 1].tolist()]
        arrays = _stack([encoder.generation_row(record) for record in chosen])
        names = tuple(record.id if real else "" for record, real in zip(chosen, valid, strict=True))
        references = tuple(_reference(record) if real else "" for record, real in zip(chosen, valid, strict=True))
        return GenerationBatch(arrays, names, references, valid)

    return rows.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def _reference(record: Record) -> str:
    speaker, text = record.turns[-1]
    return text if speaker == "gpt" else ""


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _local_rows(
    count: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    shuffle_seed: int | None,
    epochs: int | None,
    drop_remainder: bool,
) -> grain.MapDataset[np.ndarray]:
    """Return int64[local rows, 2] per batch: (place in the stream, record index or _PADDING_ROW).

    Only numbers go through the global batch, so a process never reads a row that is not its own.
    """
    if not count:
        raise UserError("there are no records to batch; check the data file")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch size {batch_size} must be a positive multiple of the {process_count} processes")
    local = batch_size // process_count
    order = grain.MapDataset.range(count)
    if shuffle_seed is not None:
        order = order.shuffle(seed=shuffle_seed)
    pairs = order.repeat(epochs).map_with_index(lambda place, index: np.array([place, index], np.int64))

    def take_slice(rows: np.ndarray) -> np.ndarray:
        mine = rows[process_index * local : (process_index + 1) * local]
        padding = np.full((local - len(mine), 2), _PADDING_ROW, np.int64)
        return np.concatenate([mine, padding])

    return pairs.batch(batch_size, drop_remainder=drop_remainder).map(take_slice)
