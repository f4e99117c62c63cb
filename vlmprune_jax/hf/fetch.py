"""Arrays of devices, other processes or files as host arrays, one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.core.weight_files import WEIGHT_DTYPES, Extent
from vlmprune_jax.hf.lazy import FileArray, FileStack


def to_host(array: Any, index: int | None) -> np.ndarray:
    """Return an array, or entry `index` of a stack, in host memory; every process must call it for split arrays."""
    stored = _in_file(array, index)
    if stored is not None:
        return stored.read()
    if isinstance(array, np.ndarray):
        return array if index is None else array[index]
    if is_split(array):
        part = array if index is None else _entry(array, index)
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    if array.is_fully_replicated:
        # On CPU this is a view of the device buffer.
        host = np.asarray(array.addressable_data(0))
        return host if index is None else host[index]
    # Assembled by hand: np.asarray(array) would keep a host copy of every weight alive inside the model.
    part = array if index is None else _entry(array, index)
    host = np.empty(part.shape, part.dtype)
    for shard in part.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def is_split(array: Any) -> bool:
    """Return True if no single process can read the whole array."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def extent_of(parts: Sequence[tuple[Any, int | None]], dtype: str) -> Extent | None:
    """Return the byte range of arrays (or entries of stacks) that are consecutive in a file as written, or None."""
    arrays = [_in_file(*part) for part in parts]
    extents = [array.extent for array in arrays if array is not None and array.dtype == WEIGHT_DTYPES[dtype]]
    known = [extent for extent in extents if extent is not None]
    consecutive = all(a.file == b.file and a.end == b.begin for a, b in itertools.pairwise(known))
    return Extent(known[0].file, known[0].begin, known[-1].end) if len(known) == len(parts) and consecutive else None


def origin(array: Any, index: int | None) -> str | None:
    """Return file and key of an array (or entry of a stack) that is read from a file, or None."""
    stored = _in_file(array, index)
    return None if stored is None else f"{stored.source.file}: tensor {stored.source.key}"


def _in_file(array: Any, index: int | None) -> FileArray | None:
    entry = array[index] if isinstance(array, FileStack) and index is not None else array
    return entry if isinstance(entry, FileArray) else None


@jax.jit
def _entry(stack: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, axis=0, keepdims=False)
