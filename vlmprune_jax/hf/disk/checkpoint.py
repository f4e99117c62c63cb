"""The tensors in a checkpoint folder as lazy, validated, memory-mapped arrays."""

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

import ml_dtypes
import numpy as np

from vlmprune_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
# The dtypes that are computed with.
WEIGHT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes per element of everything else that a header may name: buffers beside the weights (position_ids) are carried
# over as bytes, and a quantised weight is refused by name.
OTHER_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_LFS = "a Git LFS pointer, not the file itself"
# A header lists names and offsets; the limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, dtype name, shape, and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Extent:
    """Bytes `begin` to `end` of a file."""

    file: Path
    begin: int
    end: int


class Checkpoint(Mapping[str, np.ndarray]):
    """All tensors of a folder by their key in the files; an array is a memory map, read when it is looked at.

    Raises:
      UserError: no weights, a missing or damaged shard, or the same key in two shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards, self.indexed = list_shards(folder)
        self.entries: dict[str, Entry] = {}
        for shard in self.shards:
            found = _torch_entries(shard) if shard.suffix == ".bin" else read_header(shard)
            twice = sorted(set(found) & set(self.entries))
            if twice:
                raise UserError(
                    f"{shard}: tensor {twice[0]} ({len(twice)} in all) is also in {self.entries[twice[0]].file.name}: "
                    "shards of different checkpoints are mixed, download the folder again"
                )
            self.entries.update(found)
        held = {key: entry.file.name for key, entry in self.entries.items()}
        wrong = sorted(key for key, shard in self.indexed.items() if held.get(key) != shard)
        if wrong:
            raise UserError(
                f"{folder}: the index lists {wrong[0]} in {self.indexed[wrong[0]]} ({len(wrong)} in all), but "
                "that shard does not hold it: a shard of another checkpoint? download the folder again"
            )

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self.entries[key]
        return self.raw(key).view(WEIGHT_DTYPES[entry.dtype]).reshape(entry.shape)

    def raw(self, key: str) -> np.ndarray:
        """uint8[bytes] of a tensor of any dtype."""
        entry = self.entries[key]
        if entry.begin == entry.end:
            return np.empty(0, np.uint8)
        # A fresh map per tensor: its pages are given back when the array goes, so peak memory is one tensor.
        if entry.file.suffix == ".bin":
            return _torch_bytes(_torch_load(entry.file)[key])
        start = entry.begin - entry.begin % mmap.ALLOCATIONGRANULARITY
        with entry.file.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), entry.end - start, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(mapped, np.uint8, entry.end - entry.begin, entry.begin - start)

    def extent(self, key: str, first: int, size: int) -> Extent | None:
        """Where bytes `first` to `first + size` of a tensor are, or None inside a `.bin`, which is an archive."""
        entry = self.entries[key]
        if entry.file.suffix == ".bin":
            return None
        return Extent(entry.file, entry.begin + first, entry.begin + first + size)

    def elements(self, key: str, positions: np.ndarray) -> np.ndarray:
        """The weights at flat positions; single reads, since a map would read 128 KiB around every one of them."""
        entry, dtype = self.entries[key], WEIGHT_DTYPES[self.entries[key].dtype]
        if entry.file.suffix == ".bin":
            return self.raw(key).view(dtype)[positions]
        descriptor = os.open(entry.file, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            size = dtype.itemsize
            parts = [os.pread(descriptor, size, entry.begin + int(at) * size) for at in positions.reshape(-1)]
        finally:
            os.close(descriptor)
        return np.frombuffer(b"".join(parts), dtype).reshape(positions.shape)

    def pieces(self, key: str, cuts: Sequence[int]) -> Iterator[np.ndarray]:
        """The weights between consecutive `cuts` (ascending flat positions), each array valid until the next is asked.

        Read and not mapped: a page fault per 4 KiB costs more than copying them.
        """
        entry, dtype = self.entries[key], WEIGHT_DTYPES[self.entries[key].dtype]
        if entry.file.suffix == ".bin":
            whole = self.raw(key).view(dtype)
            yield from (whole[begin:end] for begin, end in itertools.pairwise(cuts))
            return
        room = memoryview(bytearray(max(end - begin for begin, end in itertools.pairwise(cuts)) * dtype.itemsize))
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.begin + cuts[0] * dtype.itemsize)
            for begin, end in itertools.pairwise(cuts):
                part = room[: (end - begin) * dtype.itemsize]
                if read_fully(file, part) < len(part):
                    raise UserError(f"{entry.file}: became shorter while it was read: is something else writing to it?")
                yield np.frombuffer(part, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_fully(file: io.RawIOBase, room: memoryview) -> int:
    """Fill `room` from an unbuffered file; returns the bytes read, fewer at its end."""
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            break
        done += count
    return done


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights in one of the known forms."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX))


def list_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder in order (transformers' precedence), and the index's key -> file name, if any."""
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if (folder / single).is_file():
            return [folder / single], {}
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{folder / index}: has no weight_map: download it again")
            names = sorted(set(map(str, weight_map.values())))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise UserError(f"{folder / index}: shard name {outside[0]!r} leaves the folder: refused")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder}: {index} names shards that are missing: {', '.join(missing)}: download them")
            return [folder / name for name in names], weight_map
    raise UserError(f"{folder}: no weights (looked for {SINGLE}, {INDEX}, {BIN_SINGLE}, {BIN_INDEX})")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing (is {path.parent} a Hugging Face model folder?)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): restore it from the model's source") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, expected an object: restore it from the model's source"
        )
    return value


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
            entries = {key: _entry(path, value, 8 + length) for key, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged safetensors header ({error}): download it again") from error
    last = max(entries, key=lambda key: entries[key].end, default=None)
    if last is not None and entries[last].end > size:
        raise UserError(
            f"{path}: truncated: tensor {last} ends at byte {entries[last].end} of {size}: download it again"
        )
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        known = WEIGHT_DTYPES[entry.dtype].itemsize if entry.dtype in WEIGHT_DTYPES else OTHER_BYTES.get(entry.dtype)
        if known is not None and entry.end - entry.begin != math.prod(entry.shape) * known:
            raise UserError(
                f"{path}: tensor {key} of shape {list(entry.shape)} and dtype {entry.dtype} cannot take "
                f"{entry.end - entry.begin} bytes: damaged header, download it again"
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


def _entry(path: Path, value: Mapping[str, Any], start: int) -> Entry:
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], tuple(value["shape"])
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in (*shape, begin, end)) or end < begin:
        raise ValueError(f"dtype {dtype}, shape {list(shape)}, offsets {begin}..{end}")
    return Entry(path, dtype, shape, start + begin, start + end)


_TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "bool": "BOOL"}


def _torch_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a `pytorch_model*.bin`."""
    entries = {}
    for key, tensor in _torch_load(path).items():
        name = str(tensor.dtype).removeprefix("torch.")
        entries[key] = Entry(path, _TORCH_NAMES.get(name, name), tuple(tensor.shape), 0, tensor.nbytes)
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
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a plain PyTorch state dict ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not a plain PyTorch state dict: it must map names to tensors and hold nothing else")
    return state


def _torch_bytes(tensor: Any) -> np.ndarray:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
