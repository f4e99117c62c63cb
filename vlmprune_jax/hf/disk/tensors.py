"""Tensors on their way to disk: fetched one at a time from the devices, streamed into safetensors shards."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmprune_jax.hf.disk.checkpoint import INDEX, OTHER_BYTES, SINGLE, WEIGHT_DTYPES, Extent
from vlmprune_jax.hf.disk.verified import CheckedFile, Look
from vlmprune_jax.hf.lazy import FileArray, FileStack


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its key, safetensors dtype and shape, and how to get its bytes (uint8[n_bytes]).

    Where the very bytes lie in a file, `extent` says so: they are copied block by block, and `look` sees every block.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    fetch: Callable[[], np.ndarray]
    extent: Extent | None = None
    look: Look = lambda block: None


def weight(
    key: str,
    dtype: str,
    shape: tuple[int, ...],
    fetch: Callable[[], np.ndarray],
    extent: Extent | None,
    check: Callable[[np.ndarray], None],
) -> Tensor:
    """A tensor whose `fetch` gives an array of any shape with the right number of elements and dtype.

    `extent` is where the same bytes lie in a file, if they do; `check` sees every value that is written.
    """

    def look(block: np.ndarray) -> None:
        check(block.view(WEIGHT_DTYPES[dtype]))

    def to_bytes() -> np.ndarray:
        array = fetch()
        check(array)
        # A transposed view's buffer is not in the order of its elements: always contiguous.
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return Tensor(key, dtype, shape, math.prod(shape) * WEIGHT_DTYPES[dtype].itemsize, to_bytes, extent, look)


def to_host(array: Any, index: int | None) -> np.ndarray:
    """An array, or entry `index` of a stack, in host memory; every process must call it for arrays split over them."""
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
        whole = np.asarray(array.addressable_data(0))
        return whole if index is None else whole[index]
    # Assembled by hand: np.asarray(array) would keep a host copy of every weight alive inside the model.
    part = array if index is None else _entry(array, index)
    host = np.empty(part.shape, part.dtype)
    for shard in part.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host


def is_split(array: Any) -> bool:
    """Whether no process alone can read the whole array."""
    return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def extent_of(parts: Sequence[tuple[Any, int | None]], dtype: str) -> Extent | None:
    """Where these arrays (or entries of stacks) lie in a file one after the other, as they are written; or None."""
    pieces = [_in_file(*part) for part in parts]
    extents = [one.extent for one in pieces if one is not None and one.dtype == WEIGHT_DTYPES[dtype]]
    found = [extent for extent in extents if extent is not None]
    follows = all(a.file == b.file and a.end == b.begin for a, b in itertools.pairwise(found))
    return Extent(found[0].file, found[0].begin, found[-1].end) if len(found) == len(parts) and follows else None


def origin(array: Any, index: int | None) -> str | None:
    """File and key that an array (or entry of a stack) is read from, or None for one in memory."""
    one = _in_file(array, index)
    return None if one is None else f"{one.checkpoint.entries[one.key].file}: tensor {one.key}"


def _in_file(array: Any, index: int | None) -> FileArray | None:
    one = array[index] if isinstance(array, FileStack) and index is not None else array
    return one if isinstance(one, FileArray) else None


@jax.jit
def _entry(stack: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, index, axis=0, keepdims=False)


def split_shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Consecutive tensors in shards of at most `max_bytes` (a larger tensor has one of its own), in the order written.

    Within a shard wide dtypes come first, as the safetensors library writes them: every tensor is then aligned to its
    element.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return [sorted(shard, key=lambda tensor: -_item_bytes(tensor.dtype)) for shard in shards]


def write_weights(tensors: Sequence[Tensor], folder: Path, max_bytes: int) -> None:
    """`model.safetensors`, or numbered shards and their index."""
    shards = split_shards(tensors, max_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with CheckedFile(folder / name) as file:
            write_safetensors(shard, file)
        weight_map.update({tensor.key: name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(tensors: Sequence[Tensor], file: CheckedFile) -> None:
    """One safetensors file, a tensor in memory at a time (the library's own writer wants all of them at once)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.n_bytes],
        }
        end += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        if tensor.extent is not None:
            file.copy(tensor.extent, tensor.look)
            continue
        data = tensor.fetch()
        assert data.nbytes == tensor.n_bytes, f"{tensor.key}: {data.nbytes} bytes, {tensor.n_bytes} announced"
        file.write(data)


def _item_bytes(dtype: str) -> int:
    return WEIGHT_DTYPES[dtype].itemsize if dtype in WEIGHT_DTYPES else OTHER_BYTES.get(dtype, 1)
