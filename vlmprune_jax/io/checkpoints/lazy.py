"""Weights that stay in their checkpoint files, can be pruned like device arrays, and are read when needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.files import open_file
from vlmprune_jax.base.weight_files import DTYPES, WEIGHT_DTYPES, Extent, advise
from vlmprune_jax.core.models.lazy import LazyArray, lazy_entry
from vlmprune_jax.core.models.params import unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.checkpoint import StoredWeight
from vlmprune_jax.io.checkpoints.layout import Slot, make_slots, stacked
from vlmprune_jax.io.checkpoints.read import find_weights, read_config

BLOCK = 2**25  # bytes that are read at a time from a large weight


@dataclass(frozen=True, eq=False)
class FileArray(LazyArray):
    """One layer's weight, read from its file only when accessed; `take` selects indices of an axis without reading.

    Attributes:
      slot: rows (and columns) of the tensor `source` that belong to the weight.
      picks: pairs (axis in the file, kept indices).
      cast: dtype of the weight once it is read; None = the file's dtype.
    """

    source: StoredWeight
    slot: Slot
    picks: tuple[tuple[int, np.ndarray], ...] = ()
    cast: np.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight after the selected indices are applied."""
        sizes = list(self.slot.shape)
        for axis, indices in self.picks:
            sizes[axis] = len(indices)
        return tuple(reversed(sizes)) if self.slot.turned else tuple(sizes)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight once it is read."""
        return WEIGHT_DTYPES[self.source.dtype] if self.cast is None else self.cast

    @property
    def location(self) -> str:
        """File and tensor of the weight, for messages."""
        return f"{self.source.file}: tensor {self.source.key}"

    def take(self, indices: np.ndarray, axis: int) -> FileArray:
        """Select `indices` along one axis without reading the weight; allowed once per axis."""
        return replace(self, picks=(*self.picks, (1 - axis if self.slot.turned else axis, np.asarray(indices))))

    @property
    def extent(self) -> Extent | None:
        """Byte range of the weight's rows in its file; None if its bytes differ (pruned, cast or quantised)."""
        changed = self.picks or self.dtype != WEIGHT_DTYPES[self.source.dtype]
        return None if changed else self._extent(0, self.slot.shape[0])

    def read(self) -> np.ndarray:
        """Read the weight from its file."""
        array = self._rows(0, self.slot.shape[0])
        return array.T if self.slot.turned else array

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield a weight that is not `turned` in consecutive groups of rows, of at most `BLOCK` bytes each."""
        rows = self.slot.shape[0]
        step = max(1, BLOCK // (self.slot.stride * self.dtype.itemsize))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield self._rows(start, stop)
            # Bytes that are read once need no room in the operating system's page cache.
            if extent := self._extent(start, stop):
                with open_file(extent.file) as file:
                    advise(file.fileno(), extent.begin, extent.end - extent.begin, "POSIX_FADV_DONTNEED")

    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        """Read single elements, given one index array per axis."""
        assert not self.picks, "elements index the weight as stored"
        row, *inner = positions[::-1] if self.slot.turned else positions
        column = np.ravel_multi_index(inner, self.slot.shape[1:]) if inner else 0
        first = self.slot.offset + (self.slot.columns or (0,))[0]
        return self.source.elements(first + row * self.slot.stride + column)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Read indices `start` to `stop` - 1 of the first axis in the file, of them only those that `picks` keeps."""
        slot, stored = self.slot, WEIGHT_DTYPES[self.source.dtype]
        values = self.source.values(slot.offset + start * slot.stride, (stop - start) * slot.stride)
        # Integers of the same width: numpy has fast paths for them, and none for bfloat16.
        array = slot.rows_of(values.view(f"u{stored.itemsize}"))
        for axis, indices in self.picks:
            inside = indices[(indices >= start) & (indices < stop)] - start if axis == 0 else indices
            array = np.take(array, inside, axis=axis)
        return np.ascontiguousarray(array).view(stored).astype(self.dtype, copy=False)

    def _extent(self, start: int, stop: int) -> Extent | None:
        size = WEIGHT_DTYPES[self.source.dtype].itemsize
        first, end = (self.slot.offset + row * self.slot.stride for row in (start, stop))
        return self.source.extent(first * size, (end - first) * size)


def open_model(folder: Path, vision_dir: Path | None = None, dtype: str | None = None) -> Model:
    """Open a model folder without reading weights; the arrays are `FileArray`s in `LazyStack`s.

    `dtype`: data type of the weights once they are read; None = as stored. `apply_plan`, `save` and `reconstruct`
    accept the model; `forward` and `generate` do not. Raises UserError under the conditions of `load`; weights that are
    not finite are detected only when they are read.
    """
    family, cfg = read_config(folder, vision_dir)
    slots = make_slots(cfg, family)
    sources, cast = find_weights(slots, cfg, family, folder, vision_dir), None if dtype is None else DTYPES[dtype]
    arrays = [(slot, FileArray(sources[slot.key], slot, cast=cast)) for slot in slots]
    return Model(unflatten(stacked(arrays, FileArray.stack)), cfg, source=folder.absolute())


def extent_of(weights: Sequence[tuple[Any, tuple[int, ...]]], dtype: str) -> Extent | None:
    """Return the byte range of rows of one file that these weights fill side by side; None if their bytes differ."""
    arrays = [lazy_entry(*weight) for weight in weights]
    files = [x for x in arrays if isinstance(x, FileArray) and x.dtype == WEIGHT_DTYPES[dtype]]
    if len(files) < len(arrays) or len({x.extent for x in files}) > 1:
        return None
    columns = [x.slot.columns for x in files if x.slot.columns is not None]
    ends, starts = [0, *(stop for _, stop in columns)], [*(start for start, _ in columns), files[0].slot.width]
    return files[0].extent if not columns or ends == starts else None


def blocks_of(array: Any, index: tuple[int, ...]) -> Callable[[], Iterator[np.ndarray]] | None:
    """Return a function that yields a large weight from its file in blocks; None for small or in-memory weights."""
    stored = lazy_entry(array, index)
    if not isinstance(stored, FileArray) or stored.slot.turned or stored.slot.columns:
        return None
    return None if math.prod(stored.slot.shape) * stored.dtype.itemsize <= 4 * BLOCK else stored.blocks
