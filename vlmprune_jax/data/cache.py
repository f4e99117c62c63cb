"""Arrays by key on disk, computed once and read many times: features of a frozen tower, a teacher's logits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
from msgspec import Meta
from safetensors.numpy import save

from vlmprune_jax.core.errors import UserError, differences
from vlmprune_jax.core.files import MAX_JSON_BYTES, checked, open_file, parse_json, read_json, reading
from vlmprune_jax.distributed.mesh import from_all, on_process_zero, process_count

IDENTITY, SUFFIX = "cache.json", ".safetensors"
VERSION = 1  # of the files' layout
SHARD_BYTES = 64 << 20  # what a run that is killed computes again, at most
_ABANDONED_SECONDS = 3600.0  # no shard takes so long to write: a killed process left it
_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)} | {
    name: np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}")
    for name in ("F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
}
_MAX_ARRAY = 2**31  # bytes; those of an image or a record are far less
_AGAIN = "remove it, and what it held is computed again"
_Size = Annotated[int, Meta(ge=0)]


class _Tensor(TypedDict):
    """What the header of a safetensors file says of an array."""

    dtype: str
    shape: Annotated[list[_Size], Meta(max_length=32)]
    data_offsets: Annotated[list[_Size], Meta(min_length=2, max_length=2)]


class _Place(NamedTuple):
    """Where an array lies."""

    shard: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class ArrayCache:
    """A folder of safetensors shards, and `cache.json`, which says what the arrays were made from.

    There is no index: the headers of the shards list the keys. A shard appears whole or not at all, under a name that
    its keys decide, so that a run that was killed continues after the shards that are there, and runs may share a
    folder. Reading is safe in several threads, and nothing is mapped: a shard that is cut meanwhile ends in a message,
    not the process. All processes of a run open and `publish` together;
    each adds what it computed, and the folder must be one that all of them see.

    Args:
      folder: made if it is not there.
      made_from: everything that the values depend on beside their key (JSON values).

    Raises:
      UserError: the folder holds something else or was made from something else, a shard is damaged, or the processes
        do not see the same folder.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
        self.folder = folder
        self._made_from = json.loads(json.dumps({"version": VERSION, **made_from}))
        self._where: dict[str, _Place] = {}
        self._pending: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._written: list[str] = []
        shards = on_process_zero(self._begin)
        from_all(lambda: self._open([IDENTITY, *shards], 0))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys, each once and in order, that are not there."""
        return [key for key in dict.fromkeys(keys) if key not in self._where]

    def __getitem__(self, key: str) -> np.ndarray:
        """A copy of an array.

        Raises:
          UserError: it is not there, or no longer.
        """
        if key not in self._where:
            raise UserError(f"{self.folder}: holds nothing for {key}: run the same command again, which computes it")
        shard, dtype, shape, start, size = self._where[key]
        array = np.empty(size, np.uint8)
        with open_file(shard) as file, reading(shard, _AGAIN):
            file.seek(start)
            if file.readinto(array.data) != size:
                raise UserError(f"{shard}: damaged (it was cut while it was in use): {_AGAIN}")
        return array.view(dtype).reshape(shape)

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take arrays that belong together; they are there for all after `publish`.

        Raises:
          UserError: a shard cannot be written.
        """
        # The library writes the buffer of a transposed view as if it were in order.
        self._pending |= {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def publish(self) -> None:
        """Write what is left, and open what all processes wrote; every process must call it, in step.

        Raises:
          UserError: a shard cannot be written, or a process does not see what another one wrote.
        """

        def written() -> list[str]:
            self._flush()
            return self._written

        names = from_all(written)
        self._written = []

        def see() -> None:
            for process, shards in enumerate(names):
                self._open(shards, process)

        from_all(see)

    def _begin(self) -> list[str]:
        """Check or make the folder; returns the names of its shards (process 0)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.folder.iterdir())
            if IDENTITY in names:
                found = read_json(self.folder / IDENTITY, todo="give another folder, or remove this one", unicode=False)
            elif names and not all(name.startswith(".") for name in names):
                raise UserError(f"{self.folder}: is not empty and no cache (no {IDENTITY}): give another folder")
            else:
                found = self._made_from
                self._write(IDENTITY, (json.dumps(found, indent=2) + "\n").encode())
            for name in names:
                path = self.folder / name
                if name.endswith(".partial") and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: cannot be used as a cache ({error}): give another folder") from error
        with reading(self.folder / IDENTITY, "give another folder, or remove this one"):
            different = differences(found, self._made_from)
        if different:
            raise UserError(
                f"{self.folder}: holds what something else gave ({'; '.join(different[:4])}): give another folder, or "
                "remove this one"
            )
        return [name for name in names if name.endswith(SUFFIX)]

    def _open(self, names: Iterable[str], process: int) -> None:
        """Read the headers of shards that `process` saw or wrote, by name: a listing may be behind on network disks."""
        for name in names:
            path = self.folder / name
            if not path.exists():
                raise UserError(
                    f"{path}: process {process} of {process_count()} has it, but here it cannot be opened: the folder "
                    "must lie on a disk that all processes share"
                )
            if name != IDENTITY:
                for key, place in _arrays_of(path).items():
                    self._where.setdefault(key, place)

    def _flush(self) -> None:
        if not self._pending:
            return
        name = hashlib.sha256("\n".join(self._pending).encode()).hexdigest()[:24] + SUFFIX
        try:
            self._write(name, save(self._pending))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self.folder}: cannot be written ({reason}): make room or give another folder; what is there counts"
            ) from error
        self._written.append(name)
        self._pending, self._bytes = {}, 0

    def _write(self, name: str, content: bytes) -> None:
        """A file that appears whole or not at all."""
        partial = self.folder / f".{name}.{socket.gethostname()}-{os.getpid()}.partial"
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _arrays_of(shard: Path) -> dict[str, _Place]:
    """Where the arrays of a shard lie, by its header: all in bytes that are there, and no byte is left over.

    Raises:
      UserError: it is damaged.
    """
    with open_file(shard) as file, reading(shard, _AGAIN):
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_JSON_BYTES):
            raise UserError(f"{shard}: damaged (no header): {_AGAIN}")
        header = parse_json(file.read(length), str(shard), _AGAIN)
    checked(header, dict[str, Any], str(shard), _AGAIN).pop("__metadata__", None)
    places, end = {}, 0
    for key, tensor in checked(header, dict[str, _Tensor], str(shard), _AGAIN).items():
        dtype, shape, (start, stop) = _DTYPES.get(tensor["dtype"]), tuple(tensor["shape"]), tensor["data_offsets"]
        if dtype is None or stop - start != math.prod(shape) * dtype.itemsize or stop - start > _MAX_ARRAY:
            raise UserError(f"{shard}: damaged ({key} is not as large as it says): {_AGAIN}")
        places[key], end = _Place(shard, dtype, shape, 8 + length + start, stop - start), max(end, stop)
    if 8 + length + end != size:
        raise UserError(f"{shard}: damaged ({size:,} bytes instead of {8 + length + end:,}): {_AGAIN}")
    return places
