"""Lazy arrays: weights that stay in their files, can be pruned like device arrays, and are read when needed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.files import open_file
from vlmprune_jax.core.weight_files import DTYPES, WEIGHT_DTYPES, Extent, advise
from vlmprune_jax.hf.disk.storage import StoredWeight
from vlmprune_jax.hf.layout import Slot, make_slots, stacked
from vlmprune_jax.hf.read import Sources, check_finite, find_weights, read_config
from vlmprune_jax.models.params import unflatten
from vlmprune_jax.models.stack import at_layer
from vlmprune_jax.models.vlm import Model

BLOCK = 2**25  # bytes that are read at a time from a large weight


@dataclass(frozen=True, eq=False)
class FileArray:
    """One layer's weight, read from its file only when accessed; `take` selects indices of an axis without reading.

    Attributes:
      stored: shape of the weight in the file.
      first: position of the weight's first element, in a tensor that holds several weights in sequence.
      picks: pairs (axis, kept indices).
      cast: dtype of the weight once it is read; None = the file's dtype.
      columns: values of each row in the file that belong to the weight; None = all.
      turned: True if the two axes of the weight are transposed in the file.

    Only `read` and `elements` read data. Like a numpy array, it has `shape`, `dtype` and `take`.
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

    @staticmethod
    def stack(members: Sequence[FileArray | FileStack]) -> FileStack:
        """Stack weights of several layers along a new first axis, without reading them."""
        return FileStack(tuple(members))


@dataclass(frozen=True, eq=False)
class FileStack:
    """One weight of several equal layers (or experts), with a leading axis, which stays in its files until accessed."""

    members: tuple[FileArray | FileStack, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape `[layer, ...]` of the stacked weight."""
        return (len(self.members), *self.members[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the stacked weight once it is read."""
        return self.members[0].dtype

    def __getitem__(self, index: int) -> FileArray | FileStack:
        return self.members[index]

    def take(self, indices: np.ndarray, axis: int) -> FileStack:
        """Select `indices` along one axis of the stacked weight, without reading it."""
        if axis == 0:
            return FileStack(tuple(self.members[i] for i in indices))
        return FileStack(tuple(member.take(indices, axis - 1) for member in self.members))

    def take_each(self, indices: np.ndarray, axis: int) -> FileStack:
        """Select other indices in each layer (or expert): `indices[i]` along axis `axis - 1` of member i."""
        pairs = zip(self.members, indices, strict=True)
        return FileStack(tuple(member.take(own, axis - 1) for member, own in pairs))

    def read(self) -> np.ndarray:
        """Read the weight from its files."""
        return np.stack([member.read() for member in self.members])

    def elements(self, positions: tuple[np.ndarray, ...]) -> np.ndarray:
        """Read single elements, given one index array per axis."""
        numbers, *inner = positions
        parts = [(number, numbers == number) for number in np.unique(numbers)]
        read = [self.members[number].elements(tuple(p[mask] for p in inner)) for number, mask in parts]
        result = np.empty(numbers.shape, read[0].dtype)
        for (_, mask), values in zip(parts, read, strict=True):
            result[mask] = values
        return result

    @staticmethod
    def stack(members: Sequence[FileArray | FileStack]) -> FileStack:
        """Stack several stacked weights along a new first axis, without reading them."""
        return FileStack(tuple(members))


def open_model(folder: Path, vision_dir: Path | None = None, dtype: str | None = None) -> Model:
    """Open a model folder without reading weights; the arrays are `FileArray` and `FileStack`.

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


Place = int | tuple[int, ...] | None  # index of a layer in a stacked array, or (layer, expert); None: whole array


def _indices(place: Place) -> tuple[int, ...]:
    return () if place is None else (place,) if isinstance(place, int) else place


def to_host(array: Any, place: Place) -> np.ndarray:
    """Return an array, or the layer or entry of a stacked array at `place`, in host memory.

    Collective for sharded arrays.
    """
    indices, stored = _indices(place), _in_file(array, place)
    if stored is not None:
        return stored.read()
    if isinstance(array, np.ndarray):
        host: np.ndarray = array[indices]
        return host
    if not is_split(array) and array.is_fully_replicated:
        # On CPU this is a view of the device buffer.
        return np.asarray(array.addressable_data(0))[indices]
    part = functools.reduce(at_layer, indices, array)
    if is_split(array):
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    # Assembled by hand: np.asarray(array) would keep a host copy of every weight alive inside the model.
    host = np.empty(part.shape, part.dtype)
    for shard in part.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def to_device(array: Any, index: int | None = None) -> jax.Array:
    """Return an array, or layer `index` of a stacked array, on the device; an array in a file is read first.

    Raises UserError if a weight from a file is not finite.
    """
    if isinstance(array, jax.Array):
        return array if index is None else array[index]
    array, index = (array[index], None) if isinstance(array, FileStack) and index is not None else (array, index)
    if isinstance(array, FileStack):
        return jnp.stack([to_device(member) for member in array.members])
    host, location = to_host(array, index), origin(array, index)
    if location is not None:
        check_finite(host, location)
    return jnp.asarray(host)


def is_split(array: Any) -> bool:
    """Return True if an array is sharded so that no single process holds all of it."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def extent_of(weights: Sequence[tuple[Any, Place]], dtype: str) -> Extent | None:
    """Return the byte range of weights that are stored consecutively in one file, or side by side in its rows.

    None if other bytes are between them, or their bytes differ from those in the file.
    """
    arrays, known = [_in_file(*weight) for weight in weights], list[Extent]()
    whole = [x for x in arrays if isinstance(x, FileArray) and x.dtype == WEIGHT_DTYPES[dtype]]
    for extent, group in itertools.groupby(whole, key=lambda array: array.extent):
        members = [*group]
        columns = [x.columns for x in members if x.columns is not None]
        edges = [0, *(stop for _, stop in columns)], [*(start for start, _ in columns), members[0].stored[-1]]
        if extent is None or (edges[0] != edges[1] if columns else len(members) > 1):
            return None
        known.append(extent)
    consecutive = all(a.file == b.file and a.end == b.begin for a, b in itertools.pairwise(known))
    return Extent(known[0].file, known[0].begin, known[-1].end) if len(whole) == len(weights) and consecutive else None


def blocks_of(array: Any, place: Place) -> Callable[[], Iterator[np.ndarray]] | None:
    """Return a function that yields a large weight from its file in blocks; None for small or in-memory weights."""
    stored = _in_file(array, place)
    if not isinstance(stored, FileArray) or stored.turned or stored.columns:
        return None
    return None if math.prod(stored.stored) * stored.dtype.itemsize <= 4 * BLOCK else stored.blocks


def origin(array: Any, place: Place) -> str | None:
    """Return "FILE: tensor KEY" for a weight that is still in its file; None for arrays in memory."""
    stored = _in_file(array, place)
    while isinstance(stored, FileStack):
        stored = stored.members[0]
    return None if stored is None else f"{stored.source.file}: tensor {stored.source.key}"


def _in_file(array: Any, place: Place) -> FileArray | FileStack | None:
    entry = array
    for index in _indices(place) if isinstance(array, FileStack) else ():
        entry = entry[index]
    return entry if isinstance(entry, FileArray | FileStack) else None
