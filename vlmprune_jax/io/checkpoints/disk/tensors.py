"""Writing of safetensors shards with little memory: bytes are fetched one tensor at a time and streamed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlmprune_jax.base.weight_files import FILE_DTYPES, WEIGHT_DTYPES, bytes_in_file, file_name
from vlmprune_jax.core.models.lazy import check_finite
from vlmprune_jax.io.checkpoints.disk.checkpoint import INDEX, SINGLE, Storage


@dataclass(frozen=True)
class Tensor:
    """One tensor to write to a checkpoint: key, safetensors dtype, shape, size, and a function that yields its bytes.

    `blocks` yields uint8[bytes] arrays in the order of the file; a buffer may be reused for the next one.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    blocks: Callable[[], Iterator[np.ndarray]]

    def fetch(self) -> np.ndarray:
        """Return all bytes of the tensor, uint8[n_bytes]."""
        data, end = np.empty(self.n_bytes, np.uint8), 0
        for block in self.blocks():
            data[end : end + len(block)] = block
            end += len(block)
        return data


def weight(
    key: str,
    dtype: str,
    shape: tuple[int, ...],
    pieces: Callable[[], Iterable[np.ndarray]],
    what: str | None = None,
) -> Tensor:
    """Return a tensor to write, whose values `pieces` yields in order, as arrays in the right dtype.

    `what`: begins the error message for values that are not finite (None = they are not checked).
    """

    def blocks() -> Iterator[np.ndarray]:
        for piece in pieces():
            if what is not None:
                check_finite(piece, what)
            yield _bytes_of(piece)

    return Tensor(key, dtype, shape, bytes_in_file(dtype, shape), blocks)


def constant(key: str, array: np.ndarray, what: str | None = None) -> Tensor:
    """Return a tensor to write that has the values of an array; `what`: see `weight`."""
    return weight(key, file_name(array.dtype.name), array.shape, lambda: [array], what)


def encoded(weights: Sequence[tuple[str, Tensor]], storage: Storage) -> list[Tensor]:
    """Return the tensors to write for weights (path in `params`, tensor), quantised by `storage` where it holds them.

    A weight is fetched and encoded when its first tensor is written. It is fetched again for tensors that are written
    after tensors of other weights (`split_shards` puts wide dtypes first).
    """

    @functools.lru_cache(maxsize=1)
    def encode(name: str, plain: Tensor) -> dict[str, np.ndarray]:
        return storage.encode(name, plain.fetch().view(WEIGHT_DTYPES[plain.dtype]).reshape(plain.shape))

    def blocks(name: str, plain: Tensor, suffix: str, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        array = encode(name, plain)[suffix]
        actual = (array.dtype, array.shape)
        assert actual == (FILE_DTYPES[dtype], shape), f"{plain.key}{suffix}: {actual}, {dtype} {shape} announced"
        yield _bytes_of(array)

    tensors = []
    for name, plain in weights:
        if not storage.holds(name, plain.shape):
            tensors.append(plain)
            continue
        for suffix, (dtype, shape) in storage.tensors(plain.dtype, plain.shape).items():
            part = functools.partial(blocks, name, plain, suffix, dtype, shape)
            tensors.append(Tensor(plain.key + suffix, dtype, shape, bytes_in_file(dtype, shape), part))
    return tensors


def _bytes_of(array: np.ndarray) -> np.ndarray:
    # Made contiguous, since a transposed view's buffer is not in the order of its elements.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def split_shards(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Split tensors into consecutive shards of at most `max_bytes`; a larger tensor gets a shard of its own.

    Within a shard, wide dtypes come first (like in the safetensors library), so that every tensor is aligned.
    """
    shards: list[list[Tensor]] = [[]]
    size, item_bytes = 0, {name: dtype.itemsize for name, dtype in FILE_DTYPES.items()}
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    return [sorted(shard, key=lambda tensor: -item_bytes.get(tensor.dtype, 1)) for shard in shards]


def write_weights(tensors: Sequence[Tensor], folder: Path, max_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards with their index."""
    shards = split_shards(tensors, max_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(shard, folder / name)
        weight_map.update({tensor.key: name for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(tensors: Sequence[Tensor], path: Path, **metadata: str) -> None:
    """Write one safetensors file; `metadata` is added to its header."""
    with path.open("wb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            write_tensor(tensor, file)


def bytes_on_disk(tensors: Sequence[Tensor], max_bytes: int) -> int:
    """Return the total size in bytes of the safetensors files that `write_weights` would write."""
    return sum(
        len(_header(shard, {})) + sum(tensor.n_bytes for tensor in shard) for shard in split_shards(tensors, max_bytes)
    )


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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
    return len(text).to_bytes(8, "little") + text


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Append the bytes of a tensor to a file."""
    written = sum(file.write(block.data) for block in tensor.blocks())
    assert written == tensor.n_bytes, f"{tensor.key}: {written} bytes, {tensor.n_bytes} announced"
