"""Tensors of weight files: dtypes by their names in files and configs, validated headers, and reading."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import open_file, reading

# Dtypes of safetensors headers.
FILE_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
        "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    }.items()
}  # fmt: skip
# Dtypes of unquantised weights; tensors of other dtypes are quantised, or buffers that are copied as bytes.
WEIGHT_DTYPES = {name: FILE_DTYPES[name] for name in ("F32", "F16", "BF16")}
# The same dtypes, under their names in settings, configs, numpy and torch.
DTYPES = {FILE_DTYPES[name].name: FILE_DTYPES[name] for name in ("F32", "BF16", "F16")}
# Choices for the weights of a new folder: "source" keeps the dtype of each tensor.
WRITTEN = (*DTYPES, "source")
# A header lists names and offsets; the limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64  # as numpy has it
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")  # spelling of known and future dtypes


def file_name(dtype: str) -> str:
    """Return the safetensors name of a NumPy or torch dtype, such as "BF16" for "bfloat16", or the name itself."""
    return next((name for name, known in FILE_DTYPES.items() if known.name == dtype), dtype)


def bytes_in_file(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor of this dtype (one of `FILE_DTYPES`) and shape."""
    return math.prod(shape) * FILE_DTYPES[dtype].itemsize


@dataclass(frozen=True, slots=True)
class Entry:
    """Metadata of one tensor in a checkpoint file: key, safetensors dtype, shape and byte range.

    Data are read on each access and not cached; reading raises UserError if the file was deleted or became shorter.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensor's data in the file, in bytes."""
        return self.end - self.begin

    def raw(self) -> np.ndarray:
        """Return the tensor's bytes as uint8[bytes], for any dtype."""
        return self._read(self.begin, self.n_bytes)

    def array(self) -> np.ndarray:
        """Return the tensor as an array of its shape."""
        return self.raw().view(self._kind()).reshape(self.shape)

    def _kind(self) -> np.dtype:
        if self.dtype not in FILE_DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.key} has the unsupported dtype {self.dtype} (supported: "
                f"{', '.join(FILE_DTYPES)})"
            )
        return FILE_DTYPES[self.dtype]

    def values(self, first: int, count: int) -> np.ndarray:
        """Read `count` values of the tensor, starting at flat index `first`."""
        dtype = self._kind()
        return self._read(self.begin + first * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def elements(self, positions: np.ndarray) -> np.ndarray:
        """Read the tensor's values at these flat indices, with one read per value."""
        values = np.empty(positions.shape, self._kind())
        flat, size = values.reshape(-1).view(np.uint8).data, values.itemsize
        with open_file(self.file) as file:
            advise(file.fileno(), 0, 0, "POSIX_FADV_RANDOM")
            for number, at in enumerate(positions.reshape(-1).tolist()):
                read_at(file.fileno(), flat[number * size :][:size], self.begin + at * size, self.file)
        return values

    def pieces(self, cuts: Sequence[int], *, once: bool = False) -> Iterator[np.ndarray]:
        """Yield the tensor's values between consecutive flat indices in `cuts`; the buffer is reused for every array.

        `once`: the values are not read again. Keeping gigabytes of them in the operating system's page cache took two
        thirds of the CPU time. The file is not memory-mapped: a page fault per 4 KiB costs more than copying, and a
        file that becomes shorter would kill the process.
        """
        dtype = self._kind()
        bounds = [self.begin + cut * dtype.itemsize for cut in cuts]
        room = np.empty(max(end - begin for begin, end in itertools.pairwise(bounds)), np.uint8)
        with open_file(self.file) as file:
            for begin, end in itertools.pairwise(bounds):
                part = room[: end - begin]
                read_at(file.fileno(), part.data, begin, self.file)
                if once:
                    advise(file.fileno(), begin, end - begin, "POSIX_FADV_DONTNEED")
                yield part.view(dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop` - 1 of the tensor, as an array [stop - start, ...]."""
        width = math.prod(self.shape[1:])
        return self.values(start * width, (stop - start) * width).reshape(stop - start, *self.shape[1:])

    def _read(self, begin: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        with open_file(self.file) as file:
            read_at(file.fileno(), data.data, begin, self.file)
        return data


def read_at(descriptor: int, room: memoryview, offset: int, path: Path) -> None:
    """Fill the buffer `room` with file bytes from `offset`; raise UserError if the file is too short."""
    while room:
        count = os.preadv(descriptor, [room], offset)
        if not count:
            raise UserError(f"{path}: became shorter while it was read: stop other programs that write to it")
        room, offset = room[count:], offset + count


def advise(descriptor: int, begin: int, size: int, name: str) -> None:
    """Tell the operating system how bytes of a file will be used (`posix_fadvise`); do nothing where unsupported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, begin, size, getattr(os, name))


def read_header(path: Path, todo: str = "download it again") -> dict[str, Entry]:
    """Return the tensors listed in a safetensors header, after checking their byte ranges against the file's size.

    Raises:
      UserError: not a regular file, truncated or too long, overlapping or out-of-range tensors, gaps, a size that does
        not match its shape, or a repeated name (the checks of the safetensors library).
    """
    with open_file(path) as file, reading(path, todo):
        check_no_pointer(path, file)
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: truncated or not safetensors ({size} bytes): {todo}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
            last = max(entries.values(), key=lambda entry: entry.end, default=None)
            if last is not None and last.end > size:
                raise UserError(f"{path}: truncated: tensor {last.key} ends at byte {last.end} of {size}: {todo}")
            _check_layout(entries, 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged safetensors header ({reason(error)}): {todo}") from error
    return entries


def check_no_pointer(path: Path, file: BinaryIO) -> None:
    """Raise UserError if an open file is a Git LFS pointer; otherwise rewind it."""
    if file.read(12) == b"version http":
        size = os.fstat(file.fileno()).st_size
        raise UserError(f"{path}: a Git LFS pointer, not the file itself ({size} bytes): download it again")
    file.seek(0)


def _check_layout(entries: Mapping[str, Entry], first: int, size: int) -> None:
    """Raise ValueError if a tensor has the wrong size, or the tensors do not exactly fill the file after its header."""
    end = first
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype in FILE_DTYPES and bytes_in_file(entry.dtype, entry.shape) != entry.n_bytes:
            raise ValueError(f"tensor {key} cannot take {entry.n_bytes} bytes: {entry.dtype} {list(entry.shape)}")
        if entry.begin < end:
            raise ValueError(f"tensor {key} overlaps the one before it")
        if entry.begin > end:
            raise ValueError(f"{entry.begin - end} bytes before tensor {key} belong to no tensor")
        end = entry.end
    if end != size:
        raise ValueError(f"{size - end} bytes after the last tensor belong to no tensor")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's pairs as a dictionary; raise ValueError for repeated keys."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name} is repeated")
        result[name] = value
    return result


def _entry(path: Path, key: str, value: Mapping[str, Any], start: int) -> Entry:
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], tuple(value["shape"])
    check_shape(shape)
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"{key}: dtype {dtype}")
    if any(type(n) is not int or not 0 <= n < 2**64 for n in (begin, end)) or end < begin:
        raise ValueError(f"{key}: offsets {begin}..{end}")
    return Entry(key, path, dtype, shape, start + begin, start + end)


def check_shape(shape: Sequence[Any]) -> None:
    """Raise ValueError unless a shape is a short list of whole numbers that are not negative."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    if any(type(n) is not int or not 0 <= n < 2**64 for n in shape):
        raise ValueError("a tensor whose shape is not a list of whole numbers")
