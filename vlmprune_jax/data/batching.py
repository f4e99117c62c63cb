"""Records to fixed-shape batches: shuffled and resumable ones for training, in order and left-padded for generation."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.encoding import Encoder, Shape
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.data.grouping import GROUPINGS, grouped_order
from vlmprune_jax.data.records import Record
from vlmprune_jax.data.teacher_rows import TeacherRows

AUGMENTATIONS = ("none", "flip_shift")
ON_ERROR = ("stop", "skip")
_PADDING_ROW = -1
Kind = dict[str, tuple[tuple[int, ...], np.dtype]]  # of the arrays of a batch, by name: their sizes and dtypes


@dataclass(frozen=True)
class Batch:
    """Rows of equal shape for training and scoring.

    `arrays`: input_ids, attention_mask, labels int32[batch, tokens] (labels are not shifted) and, with a vision tower,
    pixel_values float32[batch, slots, 3, height, width], or with a feature cache vision_features [batch, slots, tokens,
    features]; rows with fewer images (or tiles of images) carry zeros in the other slots, which come last. A model that
    takes images of any size has pixel_values float32[batch, slots, patches, values], the patches of a token one after
    the other and zeros behind an image's last, image_grid_thw int32[batch, slots, 3] (frames, rows and columns of
    patches, 0 of an empty slot) and position_ids int32[batch, 3, tokens]. With a cached teacher also what `TeacherRows`
    adds.
    A padding row has mask 0 everywhere and the id "". `skipped`: (record id, reason) of the records that could not be
    read and whose rows are padding instead.
    """

    arrays: dict[str, np.ndarray]
    record_ids: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class GenerationBatch(Batch):
    """Left-padded prompts (no labels) and the records they are of; rows with `valid` False only fill the batch."""

    records: tuple[Record, ...]
    valid: np.ndarray  # bool[batch]


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """This process's rows of every global batch of a training, in order, and what their arrays will be.

    Iterators have `get_state` and `set_state` (grain's). `batches` are made of `rows`, see `_batch_rows`.
    """

    batches: grain.IterDataset[Batch]
    rows: grain.MapDataset[np.ndarray]
    encoder: Encoder
    sizes: np.ndarray | None
    teacher: TeacherRows | None
    local: int

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def kinds(self, first: int, last: int) -> list[Kind]:
        """What the arrays of the batches `first` ... `last` - 1 are, each kind once, the longest rows first.

        The same on all processes; nothing where only images that were not measured tell.

        Raises:
          UserError: a batch does not fit this machine's memory.
        """
        found = []
        for shape in sorted(self._shapes(first, min(last, len(self.rows))), reverse=True):
            check_memory(self.local, shape, self.encoder, 0)
            row = self.encoder.padding_row(shape)
            if self.teacher is not None:
                self.teacher.fill(row, None)
            found.append({name: ((self.local, *array.shape), array.dtype) for name, array in row.items()})
        return found

    def _shapes(self, first: int, last: int) -> set[Shape]:
        if first >= last or (self.sizes is None and self.encoder.images_decide):
            return set()
        if self.sizes is None:
            return {self.encoder.least_shape}
        found: set[Shape] = set()
        most = self.encoder.count_shapes(self.sizes)
        # 50 microseconds a record: all of LLaVA's 665k take half a minute, unless every shape turns up earlier.
        for place in range(first, last):
            found.add(self.encoder.shape(self.sizes[_real(self.rows[place])]))
            if len(found) == most:
                break
        return found


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
    sizes: np.ndarray | None = None,
    group_by: str = "none",
    on_error: str = "stop",
    teacher: TeacherRows | None = None,
) -> TrainBatches:
    """Return this process's rows of every global batch of `batch_size`.

    The order of the records is a function of `seed` and the epoch (and of `sizes` with `group_by`) alone; epochs=None
    never ends, and batches run across epoch borders. Process p takes rows [p, p + 1) * batch_size / process_count:
    joined, they are the batch that one process would read. A last short batch is dropped, or filled up with padding
    rows. The iterator's state continues exactly. `augment="flip_shift"` (pretraining) is seeded by (seed, place).

    `sizes`: int[records, 3] (`measure.measure`), equal on all processes; the shape of a batch follows from them. They
    are needed to group rows (`grouping.grouped_order`), for length buckets, and to skip what cannot be read: with
    `on_error="skip"` such a record keeps its place, and its row is padding. `teacher` adds its arrays to every row.
    """
    known = {"augment": (augment, AUGMENTATIONS), "group_by": (group_by, GROUPINGS), "on_error": (on_error, ON_ERROR)}
    for name, (value, values) in known.items():
        if value not in values:
            raise UserError(f"{name} {value!r} is not supported; use one of {', '.join(values)}")
    if augment != "none" and (teacher is not None or isinstance(encoder.image_loader, FeatureLoader)):
        raise UserError(f"augment {augment!r} changes images, and what is cached is of images as they are: drop one")
    if augment != "none" and encoder.image_buckets is not None:
        raise UserError(f"augment {augment!r} is for images of one size, and this model takes any: drop it")
    if sizes is None and (group_by, on_error, encoder.length_buckets) != ("none", "stop", None):
        raise UserError("group_by, length buckets and on_error='skip' need sizes=measure(records, encoder, ...)")
    if drop_remainder and epochs is not None and len(records) * epochs < batch_size:
        raise UserError(
            f"{len(records)} records x {epochs} epochs do not fill one batch of {batch_size}; use a smaller batch size"
        )
    order = None
    if sizes is not None and group_by != "none":
        grouped = functools.partial(grouped_order, sizes, group_by=group_by, batch_size=batch_size, seed=seed)
        order = functools.lru_cache(maxsize=2)(grouped)  # batches run across the border of two epochs
    shuffle_seed = seed if shuffle and order is None else None
    check_memory(batch_size // process_count, encoder.least_shape, encoder, prefetch)
    rows = _batch_rows(len(records), batch_size, process_count, shuffle_seed, epochs, drop_remainder, order)
    load = functools.partial(
        _load_training,
        records=records,
        encoder=encoder,
        mine=_slice(batch_size, process_index, process_count),
        augment_seed=seed if augment == "flip_shift" else None,
        sizes=sizes,
        skip=on_error == "skip",
        teacher=teacher,
    )
    batches = rows.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    return TrainBatches(batches, rows, encoder, sizes, teacher, batch_size // process_count)


def _real(batch: np.ndarray) -> list[int]:
    """The records of a global batch of (place, record index), without padding."""
    return [index for index in batch[:, 1].tolist() if index != _PADDING_ROW]


def _load_training(
    batch: np.ndarray,
    *,
    records: Sequence[Record],
    encoder: Encoder,
    mine: slice,
    augment_seed: int | None,
    sizes: np.ndarray | None,
    skip: bool,
    teacher: TeacherRows | None,
) -> Batch:
    """The rows `mine` of a global batch of (place, record index), in the shape that all of its rows need."""
    real = _real(batch)
    if sizes is None:
        shape = Shape(encoder.max_length, *encoder.room([records[index] for index in real]))
    else:
        shape = encoder.shape(sizes[real])
    check_memory(mine.stop - mine.start, shape, encoder, 0)
    rows, names, skipped = [], [], []
    for place, index in batch[mine].tolist():
        row, name = None, ""
        if index != _PADDING_ROW:
            record = records[index]
            try:
                if sizes is not None and not sizes[index, 0]:
                    raise UserError(encoder.problem(record) or f"record {record.id}: could not be read when measured")
                made = encoder.training_row(record, None if augment_seed is None else (augment_seed, place), shape)
                if teacher is not None:
                    teacher.fill(made, record)
                row, name = made, record.id
            except UserError as error:
                if not skip:
                    raise
                skipped.append((record.id, str(error)))
        if row is None:
            row = encoder.padding_row(shape)
            if teacher is not None:
                teacher.fill(row, None)
        rows.append(row)
        names.append(name)
    return Batch(_stack(rows), tuple(names), skipped=tuple(skipped))


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
    """Return this process's rows of every global batch of prompts, in file order.

    The last batch is filled with copies of the first record whose `valid` is False, so that all shapes are equal and
    every process sees ceil(len(records) / batch_size) batches.
    """
    check_memory(batch_size // process_count, encoder.least_shape, encoder, prefetch)
    rows = _batch_rows(len(records), batch_size, process_count, None, 1, False)
    mine = _slice(batch_size, process_index, process_count)

    def load(batch: np.ndarray) -> GenerationBatch:
        valid = batch[mine, 1] != _PADDING_ROW
        everyone = [records[max(index, 0)] for index in batch[:, 1].tolist()]
        room, chosen = encoder.room(everyone), everyone[mine]
        check_memory(len(chosen), Shape(encoder.max_length, *room), encoder, 0)
        arrays = _stack([encoder.generation_row(record, room) for record in chosen])
        names = tuple(record.id if real else "" for record, real in zip(chosen, valid, strict=True))
        return GenerationBatch(arrays, names, tuple(chosen), valid)

    return rows.map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))


def check_memory(rows: int, shape: Shape, encoder: Encoder, prefetch: int) -> None:
    """Refuse batches of so many rows of a shape where they and those read ahead take more than this machine's memory.

    Raises UserError naming what makes them large.
    """
    loader = encoder.image_loader
    arrays = {} if loader is None else loader.arrays(shape.slots, shape.image_tokens)
    of_images = sum(math.prod(size) * dtype.itemsize for size, dtype in arrays.values())
    needed = (prefetch + 1) * rows * (3 * 4 * shape.tokens + of_images)
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        images, ways = "images", "data.max_images"
        if shape.image_tokens:
            images, ways = f"images of up to {shape.image_tokens} tokens", "data.max_image_tokens"
        raise UserError(
            f"batches of {rows} rows of {shape.tokens} tokens and {shape.slots} {images}: {prefetch + 1} of them take "
            f"{needed / 2**30:,.0f} GiB, more than this machine has; lower batch_size, {ways} or data.max_length"
        )


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
    order: Callable[..., np.ndarray] | None = None,
) -> grain.MapDataset[np.ndarray]:
    """Return int64[batch_size, 2] per global batch: (place in the stream, record index or _PADDING_ROW).

    `order(epoch=n)`: the record indices of an epoch in order, instead of a shuffle.

    Only numbers go through the global batch: a process never decodes an image that is not its own (for tile buckets it
    reads the headers of the others', because all processes must agree on the shape).
    """
    if not count:
        raise UserError("there are no records to batch; check the data file")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch size {batch_size} must be a positive multiple of the {process_count} processes")
    indices = grain.MapDataset.range(count)
    if shuffle_seed is not None:
        indices = indices.shuffle(seed=shuffle_seed)

    def pair(place: int, index: int) -> np.ndarray:
        return np.array([place, index if order is None else order(epoch=place // count)[index]], np.int64)

    pairs = indices.repeat(epochs).map_with_index(pair)

    def fill(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.full((batch_size - len(rows), 2), _PADDING_ROW, np.int64)])

    return pairs.batch(batch_size, drop_remainder=drop_remainder).map(fill)
