"""Fixed-shape batches of records, shuffled and resumable."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grain
import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.recovery.loop import BatchShapes
from vlmprune_jax.io.data.cached_arrays import TeacherRows
from vlmprune_jax.io.data.encoding import Encoder, Shape
from vlmprune_jax.io.data.records import Record

PREFETCH = 4  # batches read ahead, so that image decoding overlaps with computation
_PADDING_ROW = -1
MEGABATCH = 50  # batches sorted together, like `mega_batch_mult` of transformers' `group_by_length`


@dataclass(frozen=True)
class Batch:
    """Arrays of one padded batch for training or scoring; all rows have the same shape.

    `arrays`: input_ids, attention_mask, labels int32[batch, tokens] (labels are not shifted), and "media", which has a
    `Packed` under "vision" if the model takes images: a packed row has the images and video frames of batch / packs
    neighbouring rows, then zeros, as pixels or as features from a cache. The patches of a token are next to each other.
    Models with M-RoPE also have position_ids int32[batch, 3, tokens]. A cached teacher adds the arrays of
    `TeacherRows`.

    A padding row has attention mask 0 and the id "". `skipped`: (record id, reason) of unreadable records, replaced by
    padding.
    """

    arrays: dict[str, Any]
    record_ids: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """Iterator over one process's share of every global training batch; it knows all batch shapes in advance.

    Like grain's iterators, its iterators have `get_state` and `set_state`. `rows`: see `_batch_rows`. `mine`: the rows
    of each batch that this process loads, with `threads` threads. `packs`: packed rows of images in each batch, over
    all processes. `skips`: unreadable records become padding.
    """

    rows: grain.MapDataset[np.ndarray]
    records: Sequence[Record]
    encoder: Encoder
    sizes: np.ndarray | None
    teacher: TeacherRows | None
    mine: np.ndarray
    packs: int
    threads: int
    skips: bool

    @property
    def batches(self) -> grain.IterDataset[Batch]:
        """Data set of this process's batches."""
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=PREFETCH)
        return self.rows.map(self._load).to_iter_dataset(options)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def kinds(self, first: int, last: int) -> Sequence[BatchShapes]:
        """Return the distinct array shapes and dtypes of batches `first` to `last` - 1, longest sequences first.

        The list is equal on all processes, and empty if the shapes depend on images that were not measured. Raises
        UserError if a batch needs more memory than this machine has.
        """
        kinds = []
        for shape in sorted(self._shapes(first, min(last, len(self.rows))), reverse=True):
            local = len(self.mine)
            packs = self.packs * local // len(self.rows[0])
            check_memory(local, shape, self.encoder, 0, packs)
            row = self._row(None, shape)
            kind = {name: jax.ShapeDtypeStruct((local, *array.shape), array.dtype) for name, array in row.items()}
            kinds.append({**kind, "media": self.encoder.packed_shapes(shape, local, packs)})
        return kinds

    def _shapes(self, first: int, last: int) -> set[Shape]:
        if first >= last or (self.sizes is None and self.encoder.images_decide):
            return set()
        if self.sizes is None:
            return {self.encoder.least_shape}
        shapes: set[Shape] = set()
        most = self.encoder.count_shapes(self.sizes)
        # 50 microseconds per record: LLaVA's 665k take half a minute, unless all shapes occur earlier
        for place in range(first, last):
            shapes.add(self.encoder.shape(_sizes_of(self.rows[place], self.sizes), self.packs))
            if len(shapes) == most:
                break
        return shapes

    def _load(self, batch: np.ndarray) -> Batch:
        sizes, encoder = self.sizes, self.encoder
        if sizes is None:
            every = [None if index == _PADDING_ROW else self.records[index] for index in batch.tolist()]
            shape = encoder.shape_of(every, self.packs)
        else:
            shape = encoder.shape(_sizes_of(batch, sizes), self.packs)
        packs = self.packs * len(self.mine) // len(batch)
        check_memory(len(self.mine), shape, encoder, 0, packs)
        rows, pictures, names, skipped = [], [], [], []
        for index in batch[self.mine].tolist():
            row, images, name = None, list[Any](), ""
            if index != _PADDING_ROW:
                record = self.records[index]
                try:
                    if sizes is not None and not sizes[index, 0]:
                        problem = encoder.problem(record) or f"record {record.id}: could not be read when measured"
                        raise UserError(problem)
                    row, images, name = self._row(record, shape), encoder.images(record), record.id
                except UserError as error:
                    if not self.skips:
                        raise
                    skipped.append((record.id, str(error)))
            rows.append(self._row(None, shape) if row is None else row)
            pictures.append(images)
            names.append(name)
        arrays: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        arrays["media"] = encoder.packed(pictures, shape, packs)
        return Batch(arrays, tuple(names), skipped=tuple(skipped))

    def _row(self, record: Record | None, shape: Shape) -> dict[str, np.ndarray]:
        encoder, tokens = self.encoder, shape.tokens
        row = encoder.padding_row(tokens) if record is None else encoder.training_row(record, tokens)
        if self.teacher is not None:
            self.teacher.fill(row, record)
        return row


def train_batches(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    batch_size: int,
    threads: int,
    seed: int | None = None,
    epochs: int | None = 1,
    drop_remainder: bool = False,
    mine: np.ndarray | None = None,
    packs: int | None = None,
    sizes: np.ndarray | None = None,
    group_by: str = "none",
    on_error: str = "stop",
    teacher: TeacherRows | None = None,
) -> TrainBatches:
    """Return an iterator over this process's share of every global batch of `batch_size` records.

    The order of records depends only on `seed` (None: the order of the file) and the epoch, and with `group_by` on
    `sizes`. With epochs=None the batches never end; batches continue across epoch borders. `mine`, int[local], are the
    rows that this process loads (`mesh.rows_of_process`; None: all). The rows of all processes together are the batch
    that a single process would read. A last short batch is dropped or filled with padding rows. The iterator's state
    resumes exactly. `packs`: packed rows of images in a global batch, each from a single process (None: one per row).

    `sizes`, int[records, 3] (`encoding.measure`), must be equal on all processes and determine the shape of each batch.
    They are required for grouping (`grouping.grouped_order`), for length buckets, and for `on_error="skip"`, which
    replaces unreadable records by padding rows. `teacher` adds its arrays to every row.
    """
    if sizes is None and (group_by, on_error, encoder.length_buckets) != ("none", "stop", None):
        raise UserError(
            "group_by, length buckets and on_error='skip' need record sizes: pass sizes=measure(records, encoder, ...)"
        )
    if drop_remainder and epochs is not None and len(records) * epochs < batch_size:
        raise UserError(
            f"{len(records)} records x {epochs} epochs do not fill one batch of {batch_size}: use a smaller batch size"
        )
    mine, packs = np.arange(batch_size) if mine is None else mine, packs or batch_size
    check_memory(len(mine), encoder.least_shape, encoder, PREFETCH, packs * len(mine) // batch_size)
    indices, order = grain.MapDataset.range(len(records)), None
    if sizes is not None and group_by != "none":
        grouped = functools.partial(grouped_order, sizes, group_by=group_by, batch_size=batch_size, seed=seed or 0)
        order = functools.lru_cache(maxsize=2)(grouped)  # a batch may span two epochs
    elif seed is not None:
        indices = indices.shuffle(seed=seed)
    rows = _batch_rows(indices, batch_size, epochs, drop_remainder, order)
    return TrainBatches(rows, records, encoder, sizes, teacher, mine, packs, threads, on_error == "skip")


def _sizes_of(batch: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.where(batch[:, None] == _PADDING_ROW, 0, sizes[batch])


def check_memory(rows: int, shape: Shape, encoder: Encoder, prefetch: int, packs: int) -> None:
    """Raise UserError if a batch and the batches read ahead need more memory than this machine has."""
    arrays = jax.tree.leaves(encoder.packed_shapes(shape, rows, packs))
    image_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    needed = (prefetch + 1) * (rows * 3 * 4 * shape.tokens + image_bytes)
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        images, setting = "images", "data.max_images"
        if shape.image_tokens:
            images, setting = f"images of {shape.image_tokens} tokens together", "data.max_image_tokens"
        raise UserError(
            f"batches of {rows} rows of {shape.tokens} tokens and {shape.slots} {images}: {prefetch + 1} batches take "
            f"{needed / 2**30:,.0f} GiB, more than this machine has: lower batch_size, {setting} or data.max_length"
        )


def _batch_rows(
    indices: grain.MapDataset[int],
    batch_size: int,
    epochs: int | None,
    drop_remainder: bool,
    order: Callable[..., np.ndarray] | None,
) -> grain.MapDataset[np.ndarray]:
    """Return the record indices int64[batch_size] of every global batch; _PADDING_ROW marks empty rows.

    `order(epoch=n)` returns an epoch's record indices in order. Global batches hold numbers only, so that a process
    decodes only its own images (for tile buckets it also reads the headers of the others, since all processes must
    agree on the shape).
    """
    count = len(indices)

    def record_of(place: int, index: int) -> np.int64:
        return np.int64(index if order is None else order(epoch=place // count)[index])

    def fill(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows, np.full(batch_size - len(rows), _PADDING_ROW, np.int64)])

    return indices.repeat(epochs).map_with_index(record_of).batch(batch_size, drop_remainder=drop_remainder).map(fill)


def grouped_order(sizes: np.ndarray, *, group_by: str, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return one epoch's record indices, shuffled and grouped by length or modality, int64[records].

    Records are permuted (with "modality_length" separately for each modality, as in LLaVA) and divided into
    megabatches. Each megabatch is sorted by length and divided into batches of `batch_size`; the batches of all
    megabatches are permuted. The batch with the longest row comes first, so that a lack of memory shows at once, and
    records that do not fill a batch come last. An epoch begins with the records that complete the previous epoch's last
    batch. In LLaVA, a megabatch is a single batch, which separates modalities but does not save padding.

    `sizes`: int[records, ...], tokens and image slots first (`measure`). Unreadable records (0 tokens) are spread like
    the others, so that no batch is empty.
    """
    draw = np.random.Generator(np.random.PCG64([seed, epoch]))
    unreadable = sizes[:, 0] == 0
    if unreadable.any() and not unreadable.all():
        sizes = sizes.copy()
        sizes[unreadable] = sizes[draw.choice(np.flatnonzero(~unreadable), int(unreadable.sum()))]
    order = draw.permutation(len(sizes))
    begun = -epoch * len(sizes) % batch_size
    head, rest = order[:begun], order[begun:]
    kinds = [rest]
    if group_by == "modality_length":
        has_image = sizes[rest, 1] > 0
        kinds = [rest[has_image], rest[~has_image]]
    batches, tails = list[np.ndarray](), list[np.ndarray]()
    for kind in kinds:
        whole, tail = np.split(kind, [len(kind) // batch_size * batch_size])
        tails.append(tail)
        for start in range(0, len(whole), MEGABATCH * batch_size):
            mega = whole[start : start + MEGABATCH * batch_size]
            mega = mega[np.argsort(-sizes[mega, 0], kind="stable")]
            batches += list(mega.reshape(-1, batch_size))
    batches = [batches[place] for place in draw.permutation(len(batches)).tolist()]
    if batches:
        longest = int(np.argmax([sizes[batch, 0].max() for batch in batches]))
        batches.insert(0, batches.pop(longest))
    return np.concatenate([head, *batches, *tails])
