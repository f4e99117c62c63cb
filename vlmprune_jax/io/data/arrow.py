"""Checks of Arrow files from untrusted sources: declared sizes and column types, before pyarrow decodes anything.

A record batch of a few bytes may decode to any size: compressed buffers, null and run-end encoded columns, views and
dictionaries repeat values that the file holds once. `save_to_disk` writes none of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

MAX_ROWS, MAX_COLUMNS = 5_000_000, 1000
_MAX_METADATA, _MAX_BATCH, _MAX_VALUES, _MAX_DEPTH = 2**24, 2**31, 2**26, 8
_SCHEMA, _RECORD_BATCH = 1, 3  # types of messages
_TYPES = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal,
    pa.types.is_temporal, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip
_LISTS = (pa.types.is_list, pa.types.is_large_list)


def check_schema(schema: pa.Schema) -> pa.Schema:
    """Return an Arrow schema; raise ValueError for a column of unsupported type, or too many columns."""
    if len(schema) > MAX_COLUMNS or len(set(schema.names)) < len(schema):
        raise ValueError(f"{len(schema):,} columns, expected at most {MAX_COLUMNS:,} of different names")
    for field in schema:
        kinds = [field.type]
        for _ in range(_MAX_DEPTH):
            lists = [kind.value_type for kind in kinds if any(is_kind(kind) for is_kind in _LISTS)]
            fields = [part.type for kind in kinds if pa.types.is_struct(kind) for part in kind]
            plain = [kind for kind in kinds if any(is_kind(kind) for is_kind in _TYPES)]
            structs = [kind for kind in kinds if pa.types.is_struct(kind) and kind.num_fields]
            if len(plain) + len(lists) + len(structs) < len(kinds):
                break
            kinds = lists + fields
        if kinds:
            raise ValueError(f"column {field.name!r} has type {field.type}: save it as texts, numbers, lists or images")
    return schema


def bounded_messages(file: BinaryIO) -> Iterator[int]:
    """Yield the byte offsets of an Arrow file's schema and record batches, after checking the sizes that it declares.

    Raises:
      ValueError: a message of another type, a size above the bounds, or missing bytes.
      struct.error: damaged metadata.
    """
    offset, size, wanted = 0, os.fstat(file.fileno()).st_size, _SCHEMA
    while offset < size:
        file.seek(offset)
        mark, length = struct.unpack("<Ii", file.read(8))
        if mark == 0xFFFFFFFF and length == 0:
            return
        if mark != 0xFFFFFFFF or not 0 < length <= min(_MAX_METADATA, size - offset - 8):
            raise ValueError("is damaged (no message)")
        message = _Table(file.read(length), None)
        body, kind = message.number(3, "<q"), message.number(1, "<B")
        if kind != wanted:
            raise ValueError(f"contains a message of type {kind}, expected a schema and record batches")
        if not 0 <= body <= min(_MAX_BATCH, size - offset - 8 - length):
            raise ValueError(f"claims a record batch of {body:,} bytes, the file has {size:,}, the maximum is 2 GiB")
        if kind == _RECORD_BATCH:
            batch = message.table(2)
            lengths = [length for length, _ in batch.pairs(1)]
            if batch.has(3):
                raise ValueError("has compressed record batches")
            if not 0 <= batch.number(0, "<q") <= MAX_ROWS or sum(map(abs, lengths)) > _MAX_VALUES:
                raise ValueError(f"claims more than {MAX_ROWS:,} rows or {_MAX_VALUES:,} values in a record batch")
        yield offset
        offset, wanted = offset + 8 + length + body, _RECORD_BATCH


class _Table:
    """Reader of one flatbuffer table at a byte offset; fields are accessed by number (see Arrow's Message.fbs)."""

    def __init__(self, content: bytes, at: int | None):
        self._content = content
        self._at = self._read("<I", 0) if at is None else at
        self._fields = self._at - self._read("<i", self._at)

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise ValueError("is damaged (metadata)")
        return struct.unpack_from(form, self._content, at)[0]

    def _place(self, field: int) -> int:
        entry = 4 + 2 * field
        offset = self._read("<H", self._fields + entry) if entry < self._read("<H", self._fields) else 0
        return offset and self._at + offset

    def has(self, field: int) -> bool:
        return self._place(field) != 0

    def number(self, field: int, form: str) -> int:
        place = self._place(field)
        return self._read(form, place) if place else 0

    def _target(self, field: int) -> int:
        place = self._place(field)
        if not place:
            raise ValueError("is damaged (metadata)")
        return place + self._read("<I", place)

    def table(self, field: int) -> _Table:
        return _Table(self._content, self._target(field))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yield (int, int) for each element of a flatbuffer vector of two-number structs."""
        at = self._target(field)
        for number in range(self._read("<I", at)):
            yield struct.unpack_from("<qq", self._content, at + 4 + 16 * number)
