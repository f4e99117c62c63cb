"""Records of folders written by `save_to_disk` of Hugging Face datasets, read with pyarrow, and of hub data sets.

A folder is one split: Arrow streams, `state.json` that lists them, and `dataset_info.json`. Texts are read at once, an
image's bytes when it is decoded, so that at most one Arrow record batch is in memory. Files are not memory-mapped, so
that a truncated file raises an error instead of killing the process. Rows and sizes that a file claims are bounded
before anything is decoded (`bounded_messages`), and only types are read whose values lie in the file one by one.

Rows have one of the forms of JSON entries (forms.py). All columns except images become fields, which metrics read.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import pyarrow as pa

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.files import open_file, read_json, reading
from vlmprune_jax.io.data.forms import to_entry
from vlmprune_jax.io.data.media import StoredImage
from vlmprune_jax.io.data.records import DATASETS, Record, Source, records_of

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_TODO = "save it again with save_to_disk"
_MOST_IMAGES = 1000  # maximum images per row
_AT_ONCE = 1000  # rows that are converted to Python values together
MAX_ROWS, MAX_COLUMNS = 5_000_000, 1000
_MAX_METADATA, _MAX_BATCH, _MAX_VALUES, _MAX_DEPTH = 2**24, 2**31, 2**26, 8
_SCHEMA, _RECORD_BATCH = 1, 3  # types of messages
_TYPES = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal,
    pa.types.is_temporal, pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
)  # fmt: skip


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


class _File(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_File]


class _Dict(TypedDict):
    splits: list[str]


def datasets_source(text: str) -> Source:
    """Return the split that `datasets:FOLDER` names; the name of the only split may be omitted.

    Raises UserError if the folder has several splits, or was not written by `save_to_disk`.
    """
    folder = Path(text.removeprefix(DATASETS))
    if text == DATASETS or "://" in text:
        raise UserError(f"{text}: is not a folder: use {DATASETS}DIR with a folder written by save_to_disk")
    if (folder / _SPLITS).exists():
        splits = read_json(folder / _SPLITS, _Dict, todo=_TODO)["splits"]
        if len(splits) != 1 or splits[0] in (".", "..") or set(splits[0]) & set("/\\\0"):
            raise UserError(f"{text}: has the splits {', '.join(splits) or '(none)'}: use {DATASETS}{folder}/SPLIT")
        folder /= splits[0]
    state = folder / _STATE
    saved = str(state.stat().st_mtime_ns) if state.is_file() else ""
    return Source([folder], saved, functools.partial(read_datasets, folder))


def read_datasets(folder: Path, *, image_lead: bool = False, on_error: str = "stop") -> list[Record]:
    """Return the records of a split that Hugging Face datasets saved to disk; see `read_records` for malformed rows."""
    split = _Split(folder)
    none = f"{folder}: contains no rows: {_TODO}"
    return records_of(split.entries(), folder, split, image_lead, on_error, none=none)


class _Split:
    """Reader of a saved split's rows by record batch; safe for concurrent image reads from threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = f"no such file: use {DATASETS}DIR or {DATASETS}DIR/SPLIT with a folder written by save_to_disk"
        state = read_json(folder / _STATE, _State, missing=missing, todo=_TODO)
        self._files = [folder / file["filename"] for file in state["_data_files"]]
        outside = [file.name for file in self._files if file.parent != folder]
        if len(set(self._files)) < len(self._files):
            raise UserError(f"{folder / _STATE}: lists a file twice: {_TODO}")
        if outside:
            raise UserError(f"{folder / _STATE}: lists {outside[0]!r}, which is not a file of this folder: {_TODO}")
        self._firsts: list[int] = []  # number of the first row of each batch
        self._places: list[tuple[Path, int]] = []  # file and offset of each batch
        self._schemas: dict[Path, pa.Schema] = {}
        self._numbers: dict[str, int] = {}  # digest of an image's bytes -> its number
        self._batch: tuple[int, pa.RecordBatch | None] = (-1, None)  # number and content of the record batch read last
        self._lock = threading.Lock()

    @functools.cached_property
    def identity(self) -> str:
        """Digest of all images in the split."""
        return hashlib.sha256("".join(self._numbers).encode()).hexdigest()[:16]

    def find(self, name: str, location: str) -> StoredImage:
        """Return the stored image with this digest; rows with equal images share one stored image."""
        return StoredImage(name, self._numbers[name], self)

    def read(self, number: int) -> bytes:
        """Return the encoded bytes (such as JPEG) of an image; raise UserError for a damaged folder."""
        row, place = divmod(number, _MOST_IMAGES)
        batch = bisect.bisect_right(self._firsts, row) - 1
        with self._lock, reading(f"{self.folder}, row {row}", _TODO):
            if self._batch[0] != batch:
                path, offset = self._places[batch]
                with open_file(path) as file, pa.PythonFile(file, mode="r") as source:
                    self._batch = (batch, _read_batch(source, offset, self._schemas[path]))
            _, rows = self._batch
            assert rows is not None
            images = _images(rows.slice(row - self._firsts[batch], 1), _image_columns(rows.schema))[0]
            return list(itertools.chain(*images.values()))[place]

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield every row of the split as an entry of a JSON data file."""
        row = 0
        for path in self._files:
            with reading(path, _TODO), open_file(path) as file, pa.PythonFile(file, mode="r") as source:
                messages = bounded_messages(file)
                source.seek(next(messages, 0))
                self._schemas[path] = schema = check_schema(pa.ipc.read_schema(pa.ipc.read_message(source)))
                images = _image_columns(schema)
                for offset in messages:
                    batch = _read_batch(source, offset, schema)
                    self._firsts.append(row)
                    self._places.append((path, offset))
                    for start in range(0, batch.num_rows, _AT_ONCE):
                        for entry in self._rows(batch.slice(start, _AT_ONCE), row, images):
                            yield entry
                            row += 1
                    if row > MAX_ROWS:
                        raise ValueError(f"the split has more than {MAX_ROWS:,} rows, the maximum that is read")

    def _rows(self, batch: pa.RecordBatch, first: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        texts = batch.select([name for name in batch.schema.names if name not in columns])
        of_rows = zip(texts.to_pylist(), _images(batch, columns), strict=True)
        for row, (values, pictures) in enumerate(of_rows, start=first):
            named: dict[str, list[str]] = {}
            number = row * _MOST_IMAGES
            for column, contents in pictures.items():
                named[column] = [hashlib.sha256(content).hexdigest()[:20] for content in contents]
                for name in named[column]:
                    self._numbers.setdefault(name, number)
                    number += 1
            yield to_entry(json.loads(json.dumps(values, default=str)), named)


def _read_batch(source: pa.PythonFile, offset: int, schema: pa.Schema) -> pa.RecordBatch:
    source.seek(offset)
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(source), schema)
    batch.validate(full=True)  # offsets and texts, which pyarrow has not checked
    return batch


def _image_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns whose feature type is `Image` or a list of `Image`."""
    items = {field.name: field.type.value_type if _is_list(field.type) else field.type for field in schema}
    structs = {name: kind for name, kind in items.items() if pa.types.is_struct(kind)}
    return [name for name, kind in structs.items() if {field.name for field in kind} == {"bytes", "path"}]


def _images(batch: pa.RecordBatch, columns: Sequence[str]) -> list[dict[str, list[bytes]]]:
    """Return {column: encoded images} for every row, without columns that have no image.

    Raises ValueError if an image is a path, which may point to any file; or a row has too many images.
    """
    rows: list[dict[str, list[bytes]]] = [{} for _ in range(batch.num_rows)]
    for name in columns:
        for row, value in zip(rows, batch.column(name).to_pylist(), strict=True):
            items = value if isinstance(value, list) else [value]
            images = [item["bytes"] for item in items if item is not None]
            if any(image is None for image in images):
                raise ValueError(f"column {name!r} has an image path instead of its bytes")
            if images:
                row[name] = images
    if any(sum(map(len, row.values())) > _MOST_IMAGES for row in rows):
        raise ValueError(f"a row has more than {_MOST_IMAGES} images, the maximum per record")
    return rows


# Data sets of the Hugging Face hub ------------------------------------------------------------------------------------

_HUB_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?:([\w.-]+)(?:\[:(\d+)\])?")


def is_hub(text: str | None) -> bool:
    """Return True if a setting's value names a data set on the Hugging Face hub."""
    return text is not None and text.startswith("hub:")


def fetch_dataset(text: str, folder: Path, what: str, scratch: Path | None = None) -> str:
    """Download a hub data set into `folder` if it is missing, and return "datasets:FOLDER".

    `text` is "hub:ORG/NAME:SPLIT", or "hub:ORG/NAME/CONFIG:SPLIT" for a configuration. With "[:N]" at the end, only the
    first N rows are streamed, so that the rest of a large data set is never downloaded. `what`: name of the setting,
    for messages. `scratch`: folder for a missing data set, instead of `folder` (None = none). Raises UserError for
    another form, or if the package datasets is missing, or the hub has no such data set or cannot be reached.
    """
    match = _HUB_NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{what}={text}: expected hub:ORG/NAME:SPLIT, as hub:lmms-lab/VQAv2:validation[:5000]")
    name, config, split, rows = match.groups()
    target = folder / re.sub(r"[^\w.-]+", "--", text).strip("-")
    if scratch is not None and not target.is_dir():
        target = scratch / target.name
    if target.is_dir():
        return f"{DATASETS}{target}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}={text}: needs the package datasets: pip install 'vlmprune-jax[hub]'") from error
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=rows is not None)
        if rows is not None:
            first = list(dataset.take(int(rows)))
            dataset = datasets.Dataset.from_list(first, features=dataset.features)
        building.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_to_disk(str(building))
    except Exception as error:  # its own errors, of the hub's client, of the network and of files
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(
            f"{what}={text}: not available from the hub ({reason(error)}): check name, split and connection, or give "
            "files or a folder written by save_to_disk"
        ) from error
    os.replace(building, target)
    return f"{DATASETS}{target}"


# Bounds on Arrow files ------------------------------------------------------------------------------------------------

# A record batch of a few bytes may decode to any size: compressed buffers, null and run-end encoded columns, views and
# dictionaries repeat values that the file holds once. `save_to_disk` writes none of them.


def check_schema(schema: pa.Schema) -> pa.Schema:
    """Return an Arrow schema; raise ValueError for a column of unsupported type, or too many columns."""
    if len(schema) > MAX_COLUMNS or len(set(schema.names)) < len(schema):
        raise ValueError(f"{len(schema):,} columns, expected at most {MAX_COLUMNS:,} of different names")
    for field in schema:
        kinds = [field.type]
        for _ in range(_MAX_DEPTH):
            lists = [kind.value_type for kind in kinds if _is_list(kind)]
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
            if batch.place(3):
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

    def place(self, field: int) -> int:
        entry = 4 + 2 * field
        offset = self._read("<H", self._fields + entry) if entry < self._read("<H", self._fields) else 0
        return offset and self._at + offset

    def number(self, field: int, form: str) -> int:
        place = self.place(field)
        return self._read(form, place) if place else 0

    def _target(self, field: int) -> int:
        place = self.place(field)
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
