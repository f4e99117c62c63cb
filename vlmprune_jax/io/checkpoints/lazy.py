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
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.lazy import LazyArray, Place, lazy_entry
from vlmprune_jax.core.models.params import unflatten
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.io.checkpoints.disk.storage import StoredWeight
from vlmprune_jax.io.checkpoints.layout import Slot, make_slots, stacked
from vlmprune_jax.io.checkpoints.read import Sources, find_weights, read_config

BLOCK = 2**25  # bytes that are read at a time from a large weight


@dataclass(frozen=True, eq=False)
class FileArray(LazyArray):
    """One layer's weight, read from its file only when accessed; `take` selects indices of an axis without reading.

    Attributes:
      stored: shape of the weight in the file.
      first: position of the weight's first element, in a tensor that holds several weights in sequence.
      picks: pairs (axis, kept indices).
      cast: dtype of the weight once it is read; None = the file's dtype.
      columns: values of each row in the file that belong to the weight; None = all.
      turned: True if the two axes of the weight are transposed in the file.
    """

    source: StoredWeight
    stored: tuple[int, ...]
    first: int = 0
    picks: tuple[tuple[int, np.ndarray], ...] = ()
    cast: np.dtype | None = None
    columns: tuple[int, int] | None = None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight after the selected indices are applied."""
        sizes = list(self.stored)
        if self.columns is not None:
            sizes[1] = self.columns[1] - self.columns[0]
        for axis, indices in self.picks:
            sizes[axis] = len(indices)
        return tuple(reversed(sizes)) if self.turned else tuple(sizes)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight once it is read."""
        return self._stored_dtype if self.cast is None else self.cast

    @property
    def location(self) -> str:
        """File and tensor of the weight, for messages."""
        return f"{self.source.file}: tensor {self.source.key}"

    def take(self, indices: np.ndarray, axis: int) -> FileArray:
        """Select `indices` along one axis without reading the weight; allowed once per axis."""
        return replace(self, picks=(*self.picks, (1 - axis if self.turned else axis, np.asarray(indices))))

    @property
    def extent(self) -> Extent | None:
        """Byte range of the weight's rows in its file; None if its bytes differ (pruned, cast or quantised)."""
        return None if self.picks or self.dtype != self._stored_dtype else self._stored_extent()

    def read(self) -> np.ndarray:
        """Read the weight from its file."""
        # Integers of the same width: numpy has fast paths for them, and none for bfloat16.
        bits = self.source.values(self.first, self._size).view(f"u{self._stored_dtype.itemsize}")
        array = bits.reshape(self.stored)
        if self.columns is not None:
            array = np.ascontiguousarray(array[:, slice(*self.columns)])
        for axis, indices in self.picks:
            array = np.take(array, indices, axis=axis)
        array = array.view(self._stored_dtype).astype(self.dtype, copy=False)
        return array.T if self.turned else array

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the weight in consecutive groups of rows, of at most `BLOCK` bytes each."""
        width, chosen = math.prod(self.stored[1:]), None
        step = max(1, BLOCK // (width * self.dtype.itemsize))
        inner = [(axis, indices) for axis, indices in self.picks if axis]
        for axis, indices in self.picks:
            chosen = indices if axis == 0 else chosen
        for start in range(0, self.stored[0], step):
            stop = min(start + step, self.stored[0])
            first = replace(self, stored=(stop - start, *self.stored[1:]), first=self.first + start * width, picks=())
            if chosen is not None:
                rows = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, stop)] - start
                first = first.take(rows, 0)
            yield replace(first, picks=(*first.picks, *inner)).read()
            first.forget()

    def forget(self) -> None:
        """Drop the weight's bytes from the operating system's page cache, which speeds up surgery on large files."""
        if extent := self._stored_extent():
            with open_file(extent.file) as file:
                advise(file.fileno(), extent.begin, extent.end - extent.begin, "POSIX_FADV_DONTNEED")

    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        """Read single elements, given one index array per axis."""
        assert not self.picks, "elements index the weight as stored"
        positions = positions[::-1] if self.turned else positions
        if self.columns is not None:
            positions = (positions[0], positions[1] + self.columns[0])
        flat = np.ravel_multi_index(positions, self.stored)
        return self.source.elements(self.first + flat)

    @property
    def _size(self) -> int:
        return math.prod(self.stored)

    @property
    def _stored_dtype(self) -> np.dtype:
        return WEIGHT_DTYPES[self.source.dtype]

    def _stored_extent(self) -> Extent | None:
        size = self._stored_dtype.itemsize
        return self.source.extent(self.first * size, self._size * size)


def open_model(folder: Path, vision_dir: Path | None = None, dtype: str | None = None) -> Model:
    """Open a model folder without reading weights; the arrays are `FileArray`s in `LazyStack`s.

    `dtype`: data type of the weights once they are read; None = as stored. `apply_plan`, `save` and `reconstruct`
    accept the model; `forward` and `generate` do not. Raises UserError under the conditions of `load`; weights that are
    not finite are detected only when they are read.
    """
    family, cfg = read_config(folder, vision_dir)
    slots = make_slots(cfg, family)
    sources, cast = find_weights(slots, cfg, family, folder, vision_dir), None if dtype is None else DTYPES[dtype]
    return Model(file_params(cfg, slots, sources, cast), cfg, source=folder.absolute())


def file_params(
    cfg: ModelConfig, slots: Sequence[Slot], sources: Sources, cast: np.dtype | None = None
) -> dict[str, Any]:
    """Return `params` whose arrays stay in their checkpoint files."""
    arrays = []
    for slot in slots:
        stored = slot.shape if slot.columns is None else (slot.stop - slot.start, slot.width)
        first = slot.start * slot.width
        own = FileArray(sources[slot.key], stored, first, cast=cast, columns=slot.columns, turned=slot.turned)
        arrays.append((slot, own))
    return unflatten(stacked(arrays, FileArray.stack))


def extent_of(weights: Sequence[tuple[Any, Place]], dtype: str) -> Extent | None:
    """Return the byte range of rows of one file that these weights fill side by side; None if their bytes differ."""
    arrays = [lazy_entry(*weight) for weight in weights]
    whole = [x for x in arrays if isinstance(x, FileArray) and x.dtype == WEIGHT_DTYPES[dtype]]
    if len(whole) < len(arrays) or len({x.extent for x in whole}) > 1:
        return None
    columns = [x.columns for x in whole if x.columns is not None]
    ends, starts = [0, *(stop for _, stop in columns)], [*(start for start, _ in columns), *whole[0].stored[-1:]]
    return whole[0].extent if not columns or ends == starts else None


def blocks_of(array: Any, place: Place) -> Callable[[], Iterator[np.ndarray]] | None:
    """Return a function that yields a large weight from its file in blocks; None for small or in-memory weights."""
    stored = lazy_entry(array, place)
    if not isinstance(stored, FileArray) or stored.turned or stored.columns:
        return None
    return None if math.prod(stored.stored) * stored.dtype.itemsize <= 4 * BLOCK else stored.blocks
