"""Cache of arrays by key on disk: features of a frozen tower, logits of a teacher."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from vlmprune_jax.base.errors import Stopped, UserError, differences
from vlmprune_jax.base.files import read_json, reading, replacing
from vlmprune_jax.base.processes import from_all, is_main_process, on_process_zero, process_count
from vlmprune_jax.base.weight_files import FILE_DTYPES, Entry, read_header

IDENTITY, SUFFIX = "cache.json", ".safetensors"
VERSION = 1  # version of the file layout
SHARD_BYTES = 64 << 20  # shard size, and so the maximum that a killed run must compute again
_ABANDONED_SECONDS = 3600.0  # older partial files were left by killed processes
_AGAIN = "remove the file, and run the command again to recompute it"
_OTHER_FOLDER = "use another folder or remove this one"


class ArrayCache:
    """Folder of arrays in safetensors shards; `cache.json` records the inputs from which the arrays were computed.

    There is no index; the shards' headers list the keys. Shards are written atomically under a name derived from their
    keys, so that a killed run continues after its last shard and runs may share a folder. Reading is thread-safe and
    uses no memory maps, so that a truncated shard raises an error instead of killing the process. All processes of a
    run must create the object and call `publish` at the same time. Each process adds its own results to the folder,
    which all processes must see.

    Args:
      folder: folder of the cache, created if missing.
      made_from: what the values depend on besides the key, as JSON values.

    Raises:
      UserError: the folder has other content or was computed from other inputs, a shard is damaged, or the processes
        do not see the same folder.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]):
        self.folder = folder
        self._made_from = json.loads(json.dumps({"version": VERSION, **made_from}))
        self._entries: dict[str, Entry] = {}
        self._pending: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._written: list[str] = []
        shards = on_process_zero(self._begin)
        from_all(lambda: self._open([IDENTITY, *shards], 0))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the `keys` that are not in the cache, without duplicates and in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._entries]

    def __getitem__(self, key: str) -> np.ndarray:
        """Return a copy of the cached array with this key.

        Raises UserError if the array is not in the cache, or the file has been removed.
        """
        if key not in self._entries:
            raise UserError(
                f"{self.folder}: the cache has no array for {key}: run the same command again to compute it"
            )
        return self._entries[key].array()

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add arrays to the cache as one shard; other processes see them after `publish`.

        Raises UserError if a shard cannot be written.
        """
        # safetensors would write the buffer of a transposed view in the wrong order
        self._pending |= {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def fill(self, results: Iterable[tuple[int, Mapping[str, Any]]], progress: Callable[[int], None]) -> None:
        """Add (number of finished items, arrays) of a pass; publish, also if `progress` stops the pass (collective)."""
        try:
            for finished, arrays in results:
                self.add(arrays)
                progress(finished)
        except Stopped:
            self.publish()
            raise
        self.publish()

    def publish(self) -> None:
        """Write the added arrays so that all processes can read them (collective: every process must call it).

        Raises UserError if a shard cannot be written, or a process does not see another process's shards.
        """

        def flush() -> list[str]:
            self._flush()
            return self._written

        names, self._written = from_all(flush), []

        def open_all() -> None:
            for process, shards in enumerate(names):
                self._open(shards, process)

        from_all(open_all)

    def _begin(self) -> list[str]:
        """Create the cache folder, or check that it fits, and return the names of its shards (process 0)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.folder.iterdir())
            if IDENTITY in names:
                recorded = read_json(self.folder / IDENTITY, todo=_OTHER_FOLDER, unicode=False)
            elif names and not all(name.startswith(".") for name in names):
                raise UserError(f"{self.folder}: is neither empty nor a cache (no {IDENTITY}): use another folder")
            else:
                recorded = self._made_from
                self._write(IDENTITY, (json.dumps(recorded, indent=2) + "\n").encode())
            for name in names:
                path = self.folder / name
                if name.endswith(".partial") and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: cannot be used as a cache ({error}): use another folder") from error
        with reading(self.folder / IDENTITY, _OTHER_FOLDER):
            different = differences(recorded, self._made_from)
        if different:
            inputs = "; ".join(different[:4])
            raise UserError(f"{self.folder}: this cache was computed from other inputs ({inputs}): {_OTHER_FOLDER}")
        return [name for name in names if name.endswith(SUFFIX)]

    def _open(self, names: Iterable[str], process: int) -> None:
        """Read the headers of the shards that `process` wrote, with retries for network disks that list files late."""
        for name in names:
            path = self.folder / name
            if not path.exists():
                raise UserError(
                    f"{path}: written by process {process} of {process_count()} but not visible to this process: use a "
                    "folder on a disk that all processes share"
                )
            if name != IDENTITY:
                for key, entry in read_header(path, _AGAIN).items():
                    if entry.dtype not in FILE_DTYPES:
                        raise UserError(
                            f"{path}: array {key} of this cache has the unknown dtype {entry.dtype}: {_AGAIN}"
                        )
                    self._entries.setdefault(key, entry)

    def _flush(self) -> None:
        if not self._pending:
            return
        name = hashlib.sha256("\n".join(self._pending).encode()).hexdigest()[:24] + SUFFIX
        try:
            self._write(name, save(self._pending))
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror or error}): free disk space or use another folder "
                "(finished shards are kept)"
            ) from error
        self._written.append(name)
        self._pending, self._bytes = {}, 0

    def _write(self, name: str, content: bytes) -> None:
        with replacing(self.folder / name, writer=f".{socket.gethostname()}-{os.getpid()}") as file:
            file.write(content)


def recorded(
    cache: ArrayCache | None, keys: Collection[str], compute: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Return the cached arrays `keys`; if any is missing, cache the arrays that `compute()` returns.

    Every process must call this function at the same time; process 0 writes. Without a cache, `compute` always runs.
    """
    if cache is None:
        return compute()
    if cache.missing(keys):
        arrays = compute()
        if is_main_process():
            cache.add(arrays)
        cache.publish()
    return {key: cache[key] for key in keys}
