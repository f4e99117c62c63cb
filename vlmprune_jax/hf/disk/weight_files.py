"""The tensors of weight files: where each lies, with every claim of a header checked, and how its bytes are read."""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.errors import UserError, reason
from vlmprune_jax.hf.disk.dtypes import FILE_DTYPES, bytes_in_file, file_name

_LFS = "a Git LFS pointer, not the file itself"
# A header lists names and offsets; the limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Extent:
    """Bytes `begin` to `end` of a file."""

    file: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, the file's name for its dtype, its shape, and its bytes `begin` to `end`."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    def raw(self) -> np.ndarray:
        """uint8[bytes], a memory map (but inside a `.bin`); works for every dtype."""
        if self.begin == self.end:
            return np.empty(0, np.uint8)
        # A fresh map per tensor: its pages are given back when the array goes, so peak memory is one tensor.
        if self._archived:
            return _torch_bytes(_torch_load(self.file)[self.key])
        start = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self.end - start, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(mapped, np.uint8, self.end - self.begin, self.begin - start)

    def array(self) -> np.ndarray:
        """The values in their shape, read when they are looked at."""
        return self.raw().view(FILE_DTYPES[self.dtype]).reshape(self.shape)

    def values(self, first: int, count: int) -> np.ndarray:
        """`count` values from flat position `first` on, read when they are looked at."""
        return self.raw().view(FILE_DTYPES[self.dtype])[first : first + count]

    def extent(self, first: int, size: int) -> Extent | None:
        """Where the bytes `first` to `first + size` are, or None inside a `.bin`, which is an archive."""
        return None if self._archived else Extent(self.file, self.begin + first, self.begin + first + size)

    def elements(self, positions: np.ndarray) -> np.ndarray:
        """The values at flat positions; single reads, since a map would read 128 KiB around every one of them."""
        dtype = FILE_DTYPES[self.dtype]
        if self._archived:
            return self.raw().view(dtype)[positions]
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            size = dtype.itemsize
            parts = [os.pread(descriptor, size, self.begin + int(at) * size) for at in positions.reshape(-1)]
        finally:
            os.close(descriptor)
        return np.frombuffer(b"".join(parts), dtype).reshape(positions.shape)

    def pieces(self, cuts: Sequence[int]) -> Iterator[np.ndarray]:
        """The values between consecutive `cuts` (ascending flat positions), each array valid until the next is asked.

        Read and not mapped: a page fault per 4 KiB costs more than copying them.
        """
        dtype = FILE_DTYPES[self.dtype]
        if self._archived:
            whole = self.raw().view(dtype)
            yield from (whole[begin:end] for begin, end in itertools.pairwise(cuts))
            return
        room = memoryview(bytearray(max(end - begin for begin, end in itertools.pairwise(cuts)) * dtype.itemsize))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.begin + cuts[0] * dtype.itemsize)
            for begin, end in itertools.pairwise(cuts):
                part = room[: (end - begin) * dtype.itemsize]
                if read_fully(file, part) < len(part):
                    raise UserError(f"{self.file}: became shorter while it was read: is something else writing to it?")
                yield np.frombuffer(part, dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows `start` to `stop`: [stop - start, ...]."""
        width = math.prod(self.shape[1:])
        (values,) = self.pieces((start * width, stop * width))
        return values.reshape(stop - start, *self.shape[1:])

    @property
    def _archived(self) -> bool:
        return self.file.suffix == ".bin"


def read_fully(file: io.RawIOBase, room: memoryview) -> int:
    """Fill `room` from an unbuffered file; returns the bytes read, fewer at its end."""
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            break
        done += count
    return done


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, with every claim of its header checked against the file.

    Raises:
      UserError: truncated or too long, overlapping or with gaps, out of range, a size that does not fit its shape, or a
        name that comes twice (the safetensors library refuses the same).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            what = _LFS if start == b"version " else "truncated or not safetensors"
            raise UserError(f"{path}: {what} ({size} bytes): download it again")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            entries = {key: _entry(path, key, value, 8 + length) for key, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged safetensors header ({error}): download it again") from error
    last = max(entries, key=lambda key: entries[key].end, default=None)
    if last is not None and entries[last].end > size:
        raise UserError(
            f"{path}: truncated: tensor {last} ends at byte {entries[last].end} of {size}: download it again"
        )
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.dtype in FILE_DTYPES and bytes_in_file(entry.dtype, entry.shape) != entry.n_bytes:
            raise UserError(
                f"{path}: tensor {key} of shape {list(entry.shape)} and dtype {entry.dtype} cannot take "
                f"{entry.n_bytes} bytes: damaged header, download it again"
            )
        if entry.begin < end:
            raise UserError(f"{path}: tensor {key} overlaps the one before it: damaged header, download it again")
        if entry.begin > end:
            raise UserError(
                f"{path}: {entry.begin - end} bytes before tensor {key} belong to none: damaged header, "
                "download it again"
            )
        end = entry.end
    if end != size:
        raise UserError(f"{path}: {size - end} bytes after the last tensor belong to none: download it again")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json alone would keep the last of two equal names."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} comes twice")
    return result


def _entry(path: Path, key: str, value: Mapping[str, Any], start: int) -> Entry:
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], tuple(value["shape"])
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end < begin:
        raise ValueError(f"dtype {dtype}, shape {list(shape)}, offsets {begin}..{end}")
    return Entry(key, path, dtype, shape, start + begin, start + end)


def read_torch(path: Path) -> dict[str, Entry]:
    """The tensors of a `pytorch_model*.bin`."""
    entries = {}
    for key, tensor in _torch_load(path).items():
        dtype = file_name(str(tensor.dtype).removeprefix("torch."))
        entries[key] = Entry(key, path, dtype, tuple(tensor.shape), 0, tensor.nbytes)
    return entries


def _torch_load(path: Path) -> dict[str, Any]:
    """A state dict, memory-mapped; only plain tensors are unpickled (weights_only)."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: reading .bin checkpoints needs torch: pip install 'vlmprune-jax[torch]'") from error
    with path.open("rb") as file:
        if file.read(12) == b"version http":
            raise UserError(f"{path}: {_LFS} ({path.stat().st_size} bytes): download it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors alike for a damaged file
        raise UserError(f"{path}: not a plain PyTorch state dict ({reason(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a plain PyTorch state dict: it must map names to tensors and hold nothing else")
    return state


def _torch_bytes(tensor: Any) -> np.ndarray:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
