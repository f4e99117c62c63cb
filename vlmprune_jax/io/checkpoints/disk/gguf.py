"""Headers of GGUF files from any source, read in bounded time and memory (gguf's reader maps and trusts the file)."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlmprune_jax.base.files import open_file, reading

MAX_HEADER = 2**26  # bytes; of a vocabulary of 260,000 tokens: 20 MB; its strings are read one by one
_MAX_FIELDS, _MAX_TENSORS, _MAX_NAME, _MAX_DIMENSIONS, _MAX_LAYERS = 10_000, 100_000, 1000, 4, 1000
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_INTEGERS, _STRING, _ARRAY = (0, 1, 2, 3, 4, 5, 10, 11), 8, 9
_ROUTER = "ffn_gate_inp.weight"  # of a layer: embed x experts

Value = int | float | bool | str | tuple[int, ...]


class GgufHeader(NamedTuple):
    """Header of a GGUF file: metadata (numbers, short strings, integers per layer), tensor bytes by type, weights."""

    fields: dict[str, Value]
    types: dict[str, int]
    weights: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file; raise UserError if the header claims more bytes than the file has.

    Raises UserError if the file cannot be opened (see `open_file`), is not GGUF of version 2 or 3, or is damaged; also
    if its numbers of experts contradict each other or its routers, on which llama.cpp aborts the process.
    """
    with open_file(path) as file, reading(path, "export it again, or download it again"):
        header = _Header(file, os.fstat(file.fileno()).st_size)
        if header.take(4) != b"GGUF" or header.number("<I") not in (2, 3):
            raise ValueError("is not a GGUF file of version 2 or 3")
        n_tensors, n_fields = header.count(_MAX_TENSORS, "tensors"), header.count(_MAX_FIELDS, "fields")
        fields: dict[str, Value] = {}
        for _ in range(n_fields):
            name, value = header.text(), header.value(header.number("<I"))
            if name in fields:
                raise ValueError(f"has field {name} twice")
            if value is not None:
                fields[name] = value
        tensors = [header.tensor() for _ in range(n_tensors)]
        _check_experts(fields, tensors)
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise ValueError(f"has general.alignment {alignment!r}")
        begin = -(-header.at // alignment) * alignment
        types: dict[str, int] = {}
        for tensor in tensors:
            end = begin + tensor.offset + tensor.n_bytes
            if end > header.size:
                raise ValueError(f"is cut short ({header.size:,} bytes, its tensors end at {end:,})")
            types[tensor.kind] = types.get(tensor.kind, 0) + tensor.n_bytes
        return GgufHeader(fields, types, sum(math.prod(tensor.shape) for tensor in tensors))


class _TensorInfo(NamedTuple):
    """Entry of a tensor in the header: name, shape (fastest axis first), data type, bytes and data offset."""

    name: str
    shape: tuple[int, ...]
    kind: str
    n_bytes: int
    offset: int


def _check_experts(fields: Mapping[str, Value], tensors: Sequence[_TensorInfo]) -> None:
    """Raise ValueError if the numbers of experts in metadata do not fit each other or the routers' shapes."""
    name = f"{fields.get('general.architecture')}.expert"
    count, used = fields.get(f"{name}_count", 0), fields.get(f"{name}_used_count", 0)
    router = next((x for x in tensors if x.name.endswith(_ROUTER) and x.shape[1:] != (count,)), None)
    if router is not None:
        shape = " x ".join(map(str, router.shape))
        raise ValueError(f"says {count} experts ({name}_count), but the router {router.name} is {shape}")
    most = max(used, default=0) if isinstance(used, tuple) else used
    if not isinstance(count, int) or not isinstance(most, int) or not min(count, 1) <= most <= count:
        raise ValueError(f"says that a token uses {used} of {count} experts ({name}_used_count)")


class _Header:
    """Sequential reader of a GGUF header; `at` is the number of bytes read so far."""

    def __init__(self, file: BinaryIO, size: int):
        self.size, self.at, self._file = size, 0, file

    def _advance(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > self.size:
            raise ValueError(f"is cut short ({self.size:,} bytes, its header is longer)")
        if self.at > MAX_HEADER:
            raise ValueError(f"has a header of more than {MAX_HEADER:,} bytes")

    def take(self, n_bytes: int) -> bytes:
        self._advance(n_bytes)
        return self._file.read(n_bytes)

    def skip(self, n_bytes: int) -> None:
        self._advance(n_bytes)
        self._file.seek(n_bytes, os.SEEK_CUR)

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int, what: str) -> int:
        count = self.number("<Q")
        if count > most:
            raise ValueError(f"claims {count:,} {what}, more than the maximum of {most:,}")
        return count

    def text(self) -> str:
        return self.take(self.count(_MAX_NAME, "characters in a name")).decode(errors="replace")

    def value(self, kind: int) -> Value | None:
        """Read one metadata value; return a number, a short string or a short array of integers, otherwise None."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            length = self.number("<Q")
            if length <= _MAX_NAME:
                return self.take(length).decode(errors="replace")
            self.skip(length)
            return None
        if kind != _ARRAY:
            raise ValueError(f"has a field of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _INTEGERS and count <= _MAX_LAYERS:
            return tuple(self.number(_SCALARS[inner]) for _ in range(count))
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            self._advance(0 if count <= self.size // 8 else self.size)  # each text has a length of 8 bytes
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"has an array of the type {inner}")
        return None

    def tensor(self) -> _TensorInfo:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name, dimensions = self.text(), self.number("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions, the maximum is {_MAX_DIMENSIONS}")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind = GGMLQuantizationType(self.number("<I"))
        block, size = GGML_QUANT_SIZES[kind]
        weights = math.prod(shape)
        if weights % block:
            raise ValueError(f"tensor {name} {shape} is not in whole blocks of {block} values, as {kind.name} has them")
        return _TensorInfo(name, tuple(shape), kind.name, weights // block * size, self.number("<Q"))
