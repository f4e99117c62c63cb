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
    pixel_values float32[batch, slots, 3, height, width]; rows with fewer images (or tiles of images) carry zeros in the
    other slots, which come last.
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
    """How one record becomes one row of `max_length` tokens and of image slots.

    Every image, or every tile of one, takes `tokens_per_image` positions that hold `image_token_id`, and one slot.
    `image_loader` is None for a model without a vision tower. `truncate` cuts longer training rows at the right, as the
    reference does; without it they are refused. A record has at most `max_images` images. With `tile_buckets`
    (ascending) a batch has as many slots as the smallest of them that holds each of its rows, so that there are as many
    compiled programs as buckets; None = always `max_images` slots.
    """

    tokenizer: Any
    template: Template
    max_length: int
    image_loader: ImageLoader | None
    image_token_id: int
    tokens_per_image: int
    max_images: int
    truncate: bool
    tile_buckets: tuple[int, ...] | None = None

    def training_row(
        self, record: Record, augment_seed: tuple[int, ...] | None, slots: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a Batch, padded at the right. Raises UserError naming the record."""
        ids, labels = self._training_tokens(record)
        if len(ids) > self.max_length and self.truncate:
            if record.images and self._cuts_image(ids):
                raise UserError(f"record {record.id}: an image lies beyond max_length {self.max_length}; raise it")
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        check_length(len(ids), record, self.max_length)
        row = self._empty_row(self.slots([record]) if slots is None else slots)
        row["input_ids"][: len(ids)] = ids
        row["attention_mask"][: len(ids)] = 1
        row["labels"][: len(ids)] = labels
        self._fill_images(row, record, augment_seed)
        return row

    def generation_row(self, record: Record, slots: int | None = None) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a GenerationBatch, padded at the left. Raises UserError naming the record."""
        ids = self.prompt_ids(record)
        check_length(len(ids), record, self.max_length)
        row = self._empty_row(self.slots([record]) if slots is None else slots)
        del row["labels"]
        row["input_ids"][self.max_length - len(ids) :] = ids
        row["attention_mask"][self.max_length - len(ids) :] = 1
        self._fill_images(row, record, None)
        return row

    def padding_row(self, slots: int) -> dict[str, np.ndarray]:
        """Return a row that counts nowhere."""
        return self._empty_row(slots)

    def prompt_ids(self, record: Record) -> np.ndarray:
        """Return int32[tokens] of the prompt, images expanded. Raises UserError naming the record."""
        return tokenize_prompt(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            tiles=self.tiles(record),
        )

    def images(self, record: Record, slots: int) -> np.ndarray:
        """Return float32[slots, 3, height, width]: the record's images or tiles in order, then zeros."""
        row = self._empty_row(slots)
        self._fill_images(row, record, None)
        return row["pixel_values"]

    def tiles(self, record: Record) -> list[int]:
        """Return the slots that each image of a record takes; none for text. Raises UserError naming the record."""
        if not record.images:
            return []
        if self.image_loader is None:
            raise UserError(f"record {record.id}: has an image but the model has no vision tower; drop it")
        if len(record.images) > self.max_images:
            raise UserError(
                f"record {record.id}: {len(record.images)} images, over max_images {self.max_images}; raise max_images"
            )
        return self.image_loader.tiles(record.images, record.id)

    def slots(self, records: Sequence[Record]) -> int:
        """Return the image slots of a batch of these records. Raises UserError naming a record with too many tiles."""
        if self.tile_buckets is None or self.image_loader is None:
            return self.max_images
        most = self.tile_buckets[0]
        for record in records:
            needed = sum(self.tiles(record))
            if needed > self.tile_buckets[-1]:
                raise UserError(
                    f"record {record.id}: its images make {needed} tiles, over the largest bucket of "
                    f"{self.tile_buckets[-1]}; raise data.tile_buckets or lower data.max_tiles"
                )
            most = max(most, next(bucket for bucket in self.tile_buckets if bucket >= needed))
        return most

    def longest(self, records: Sequence[Record], *, generation: bool) -> int:
        """Return the largest number of tokens of any record, to choose `max_length` by (tokenises all of them)."""
        if generation:
            return max(len(self.prompt_ids(record)) for record in records)
        return max(len(self._training_tokens(record)[0]) for record in records)

    def _training_tokens(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        return tokenize_training(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            cut_text_at=self.max_length if self.truncate else None,
            tiles=self.tiles(record),
        )

    def _cuts_image(self, ids: np.ndarray) -> bool:
        """Whether `max_length` falls before the last position of an image, or before the mark that closes it."""
        last_is_image = bool(ids[self.max_length - 1] == self.image_token_id)
        closed = self.template.image_tokens is not None
        return bool(np.any(ids[self.max_length :] == self.image_token_id)) or (closed and last_is_image)

    def _empty_row(self, slots: int) -> dict[str, np.ndarray]:
        # Which id pads is immaterial under the mask, but it must be one the embedding has.
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        row = {
            "input_ids": np.full(self.max_length, pad, np.int32),
            "attention_mask": np.zeros(self.max_length, np.int32),
            "labels": np.full(self.max_length, IGNORE, np.int32),
        }
        if self.image_loader is not None:
            row["pixel_values"] = np.zeros((slots, *self.image_loader.shape), np.float32)
        return row

    def _fill_images(self, row: dict[str, np.ndarray], record: Record, augment_seed: tuple[int, ...] | None) -> None:
        slot = 0
        for path in record.images:
            assert self.image_loader is not None  # the prompt was tokenised, which checks it
            for pixels in self.image_loader.load(path, record.id, len(record.images)):
                row["pixel_values"][slot] = (
                    pixels if augment_seed is None else augment_flip_shift(pixels, (*augment_seed, slot))
                )
                slot += 1


def check_length(length: int, record: Record, limit: int) -> None:
    """Raise UserError naming the record where its tokens exceed a limit."""
    if length > limit:
        raise UserError(
            f"record {record.id}: {length} tokens with its images, over max_length {limit}; "
            "raise max_length or drop the record"
        )


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
    rows = _batch_rows(len(records), batch_size, process_count, seed if shuffle else None, epochs, drop_remainder)
    mine = _slice(batch_size, process_index, process_count)

    def load(batch: np.ndarray) -> Batch:
        slots = encoder.slots([records[index] for index in batch[:, 1].tolist() if index != _PADDING_ROW])
        encoded, names = [], []
        for place, index in batch[mine].tolist():
            if index == _PADDING_ROW:
                encoded.append(encoder.padding_row(slots))
                names.append("")
            else:
                augment_seed = (seed, place) if augment == "flip_shift" else None
                encoded.append(encoder.training_row(records[index], augment_seed, slots))
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
    rows = _batch_rows(len(records), batch_size, process_count, None, 1, False)
    mine = _slice(batch_size, process_index, process_count)

    def load(batch: np.ndarray) -> GenerationBatch:
        valid = batch[mine, 1] != _PADDING_ROW
        everyone = [records[max(index, 0)] for index in batch[:, 1].tolist()]
        slots, chosen = encoder.slots(everyone), everyone[mine]
        arrays = _stack([encoder.generation_row(record, slots) for record in chosen])
        names = tuple(record.id if real else "" for record, real in zip(chosen, valid, strict=True))
        references = tuple(_reference(record) if real else "" for record, real in zip(chosen, valid, strict=True))
        return GenerationBatch(arrays, names, references, valid)

    return rows.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def _reference(record: Record) -> str:
    speaker, text = record.turns[-1]
    return text if speaker == "gpt" else ""


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _slice(batch_size: int, process_index: int, process_count: int) -> slice:
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _batch_rows(
    count: int,
    batch_size: int,
    process_count: int,
    shuffle_seed: int | None,
    epochs: int | None,
    drop_remainder: bool,
) -> grain.MapDataset[np.ndarray]:
    """Return int64[batch_size, 2] per global batch: (place in the stream, record index or _PADDING_ROW).

    Only numbers go through the global batch: a process never decodes an image that is not its own (for tile buckets it
    reads the headers of the others', because all processes must agree on the shape).
    """
    if not count:
        raise UserError("there are no records to batch; check the data file")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch size {batch_size} must be a positive multiple of the {process_count} processes")
    order = grain.MapDataset.range(count)
    if shuffle_seed is not None:
        order = order.shuffle(seed=shuffle_seed)
    pairs = order.repeat(epochs).map_with_index(lambda place, index: np.array([place, index], np.int64))

    def fill(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.full((batch_size - len(rows), 2), _PADDING_ROW, np.int64)])

    return pairs.batch(batch_size, drop_remainder=drop_remainder).map(fill)
