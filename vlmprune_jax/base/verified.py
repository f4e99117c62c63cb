"""Writing of files in large blocks past the page cache; every block is read back and compared."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file
from vlmprune_jax.base.weight_files import Extent, advise, read_at

BLOCK = 16 * 2**20
_WORKERS = 3  # blocks that are written and read back concurrently: with one, the disk is idle a quarter of the time
_PART = 2**20  # bytes compared at a time, since numpy allocates a bool per byte
_ALIGNMENT = 4096  # bytes; required for memory, offsets and lengths of direct I/O
_DIRECT = getattr(os, "O_DIRECT", 0)

# Function that receives every block of a copied extent before the block is written.
Look = Callable[[np.ndarray], None]


class CheckedFile:
    """New file, written sequentially without the page cache; every written block is read back and compared.

    Background threads write and read back full blocks while the caller fills the next block. Writing through the page
    cache is slower (tens of seconds more for 13.5 GB), and reading back would only test the cache. File systems without
    direct I/O (tmpfs, some network file systems) are written through the cache.

    Raises:
      UserError: a block read back differs from the block written.
      OSError: the disk is full or fails.
    """

    def __init__(self, path: Path):
        self._path = path
        self._descriptor, self._direct = _create(path)
        self._free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._spare: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()  # buffers to read back into
        for _ in range(_WORKERS):
            self._free.put(mmap.mmap(-1, BLOCK))
            self._spare.put(mmap.mmap(-1, BLOCK))
        self._block, self._filled = mmap.mmap(-1, BLOCK), 0
        self._size = 0
        self._workers = ThreadPoolExecutor(_WORKERS)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._workers.shutdown(cancel_futures=True)
            os.close(self._descriptor)

    def write(self, data: bytes | np.ndarray) -> None:
        """Append bytes to the file."""
        rest = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        while rest:
            room = memoryview(self._block)[self._filled :]
            part = rest[: len(room)]
            room[: len(part)] = part
            self._advance(len(part))
            rest = rest[len(part) :]

    def copy(self, extent: Extent, look: Look) -> None:
        """Append bytes from another file, holding at most one block in memory.

        Args:
          extent: file and byte range to copy.
          look: function that receives each block, uint8[bytes], in order; blocks end at multiples of 8 bytes.
        """
        begin = extent.begin
        with open_file(extent.file) as source:
            advise(source.fileno(), begin, extent.end - begin, "POSIX_FADV_SEQUENTIAL")
            while begin < extent.end:
                room = memoryview(self._block)[self._filled :][: extent.end - begin]
                read_at(source.fileno(), room, begin, extent.file)
                # Keeping gigabytes in the page cache that are not read again took two thirds of the CPU time.
                advise(source.fileno(), begin, len(room), "POSIX_FADV_DONTNEED")
                look(np.frombuffer(room, np.uint8))
                begin += len(room)
                self._advance(len(room))

    def _advance(self, count: int) -> None:
        self._filled += count
        if self._filled == BLOCK:
            self._flush()
            self._block, self._filled = self._free.get(), 0

    def _flush(self) -> None:
        while self._pending and self._pending[0].done():  # raise an error now and not at the last byte
            self._pending.pop(0).result()
        self._pending.append(self._workers.submit(self._put, self._block, self._filled, self._size))
        self._size += self._filled

    def _put(self, block: mmap.mmap, length: int, offset: int) -> None:
        """Write one block, read it back and compare it, in a worker thread."""
        try:
            padded = min(-(-length // _ALIGNMENT) * _ALIGNMENT, BLOCK) if self._direct else length
            rest = memoryview(block)[:padded]
            while rest:
                written = self._pwrite(rest, offset + padded - len(rest))
                rest = rest[written:]
            self._compare(block, length, offset)
        finally:
            self._free.put(block)  # also after an error, so that a waiting caller continues and sees the error

    def _pwrite(self, data: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            # The file system accepts the flag on opening a file but not on writing.
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            return os.pwrite(self._descriptor, data, offset)

    def _compare(self, block: mmap.mmap, length: int, offset: int) -> None:
        spare = self._spare.get()
        room, count_read = memoryview(spare), 0
        try:
            while count_read < length:  # direct reads need whole blocks; the last one ends with the file
                count = os.preadv(self._descriptor, [room[count_read:]], offset + count_read)
                if not count:
                    break
                count_read += count
            written, reread = (np.frombuffer(buffer, np.uint8, length) for buffer in (block, room))
            slices = (slice(begin, begin + _PART) for begin in range(0, length, _PART))
            # Comparing bytes is several times faster than checksums of both buffers.
            same = count_read >= length and all(np.array_equal(written[piece], reread[piece]) for piece in slices)
        finally:
            self._spare.put(spare)
        if not same:
            raise UserError(
                f"{self._path}: bytes {offset} to {offset + length} read back differ from what was written: "
                "the disk or its connection is failing, use another one"
            )

    def _finish(self) -> None:
        """Write the last block, cut its padding off, and flush the file to disk."""
        if self._filled:
            memoryview(self._block)[self._filled :][: -self._filled % _ALIGNMENT] = bytes(-self._filled % _ALIGNMENT)
            self._flush()
        for future in self._pending:
            future.result()
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)


def _create(path: Path) -> tuple[int, bool]:
    """Create a file; return its descriptor, and True if writes bypass the page cache (O_DIRECT)."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    if _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o644), False
