"""Arrays by key on disk, computed once and read many times: features of a frozen tower, a teacher's logits."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlmprune_jax.distributed.mesh import from_all, on_process_zero, process_count
from vlmprune_jax.errors import UserError, differences

IDENTITY, SUFFIX = "cache.json", ".safetensors"
VERSION = 1  # of the files' layout
SHARD_BYTES = 64 << 20  # what a run that is killed computes again, at most
_ABANDONED_SECONDS = 3600.0  # no shard takes so long to write: a killed process left it


class ArrayCache:
    """A folder of safetensors shards, and `cache.json`, which says what the arrays were made from.

    There is no index: the headers of the shards list the keys. A shard appears whole or not at all, under a name that
    its keys decide, so that a run that was killed continues after the shards that are there, and runs may share a
    folder. Reading is memory-mapped and safe in several threads. All processes of a run open and `publish` together;
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
        self._where: dict[str, Any] = {}  # key -> its shard, open
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
          UserError: it is not there.
        """
        if key not in self._where:
            raise UserError(f"{self.folder}: holds nothing for {key}: run the same command again, which computes it")
        return self._where[key].get_tensor(key)

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
                found = json.loads((self.folder / IDENTITY).read_text(encoding="utf-8"))
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
            try:
                if name == IDENTITY:
                    path.stat()
                    continue
                shard = safe_open(path, "np")
            except OSError as error:
                raise UserError(
                    f"{path}: process {process} of {process_count()} has it, but here it cannot be opened "
                    f"({error.strerror or error}): the folder must lie on a disk that all processes share"
                ) from error
            except SafetensorError as error:
                raise UserError(f"{path}: damaged ({error}): remove it, and what it held is computed again") from error
            for key in shard.keys():  # noqa: SIM118 (no mapping)
                self._where.setdefault(key, shard)

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
