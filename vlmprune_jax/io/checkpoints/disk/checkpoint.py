"""Checkpoint folder: its shards, their tensors, and the (perhaps quantised) weights that the tensors store.

A storage format of quantised weights is an object with the methods of `Storage`. `storages` finds it by `quant_method`
of config.json, and `save` takes one. Code above `disk` sees one array per weight, decoded row by row on reading.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import read_json, reading
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES, Entry, read_header
from vlmprune_jax.io.checkpoints.disk.compressed_tensors import CompressedTensors, JsonDict
from vlmprune_jax.io.checkpoints.disk.torch_files import read_torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
_WEIGHT = ".weight"  # suffix of keys that a storage may encode: biases and buffers are plain


class Storage(Protocol):
    """Interface of a quantised storage format, in which a weight `KEY` is stored as tensors `KEY` + suffix.

    Dtypes are spelled as in weight files ("F32", "I8"); tensors of a weight are passed as a mapping by suffix.
    """

    @property
    def name(self) -> str:
        """Display name of the storage format for `inspect` and model cards."""

    @property
    def suffixes(self) -> Sequence[str]:
        """Key suffixes of the tensors that store one weight."""

    def weight(self, tensors: Mapping[str, Entry]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of the weight that these tensors encode; raise ValueError if they are inconsistent."""

    def tensors(self, dtype: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return {suffix: (dtype, shape)} of the tensors that encode a weight (the inverse of `weight`)."""

    def decode(self, tensors: Mapping[str, Entry], start: int, stop: int) -> np.ndarray:
        """Dequantise rows `start` to `stop` - 1 of a weight, in its dtype."""

    def encode(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        """Quantise the weight called `name`; return its tensors by suffix."""

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return True if the format quantises the weight with this path in `params` and this shape."""

    def to_config(self, shapes: Mapping[str, tuple[int, ...]]) -> JsonDict:
        """Return the `quantization_config` for a checkpoint with tensors {key: shape}."""


# quant_method -> function of quantization_config that returns the storage (UserError if it is not supported).
storages: dict[str, Callable[[JsonDict], Storage]] = {"compressed-tensors": CompressedTensors.from_config}


@dataclass(frozen=True)
class EncodedWeight:
    """Quantised weight with the interface of `Entry`; only the requested rows are dequantised."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    tensors: Mapping[str, Entry]

    @property
    def file(self) -> Path:
        """Path of the file that contains the weight's first tensor."""
        return next(iter(self.tensors.values())).file

    def array(self) -> np.ndarray:
        """Return the dequantised weight as an array."""
        return self.values(0, math.prod(self.shape)).reshape(self.shape)

    def values(self, first: int, count: int) -> np.ndarray:
        """Return `count` dequantised values, starting at flat index `first`."""
        width = max(1, math.prod(self.shape[1:]))
        start, stop = first // width, -(-(first + count) // width)
        with np.errstate(all="ignore"):  # non-finite values are reported with the weight's name
            rows = self.storage.decode(self.tensors, start, stop)
        assert rows.dtype == WEIGHT_DTYPES[self.dtype], f"{self.key}: {rows.dtype} decoded, {self.dtype} announced"
        return rows.reshape(-1)[first - start * width :][:count]

    def elements(self, positions: np.ndarray) -> np.ndarray:
        """Return the dequantised values at these flat indices."""
        values = [self.values(int(position), 1) for position in positions.reshape(-1)]
        return np.concatenate(values).reshape(positions.shape)

    def pieces(self, cuts: Sequence[int], *, once: bool = False) -> Iterator[np.ndarray]:
        """Yield the dequantised values between consecutive flat indices in `cuts` (ascending)."""
        return (self.values(begin, end - begin) for begin, end in itertools.pairwise(cuts))


StoredWeight = Entry | EncodedWeight


def find_storage(config: JsonDict, location: str) -> Storage | None:
    """Return the storage format named in config.json's `quantization_config`; None if weights are not quantised.

    Raises UserError if the quantisation is not supported.
    """
    for part in (config, config.get("text_config"), config.get("llm_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if not settings:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if not isinstance(settings, dict) or not isinstance(method, str) or method not in storages:
            raise UserError(
                f"{location}: the weights are quantised (quantization_config, quant_method {method!r}) "
                "and cannot be pruned: use the unquantised checkpoint"
            )
        with reading(f"{location}: quantization_config"), error_context(f"{location}: quantization_config"):
            return storages[method](settings)
    return None


def without_storage(config: JsonDict) -> JsonDict:
    """Return the content of config.json without `quantization_config`."""
    inner = {name: config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)}
    plain = {name: {k: v for k, v in part.items() if k != "quantization_config"} for name, part in inner.items()}
    return {name: value for name, value in (config | plain).items() if name != "quantization_config"}


def join_parts(storage: Storage, tensors: Mapping[str, Entry], location: str) -> dict[str, StoredWeight]:
    """Combine the tensors of quantised weights to one entry per weight; other tensors are returned unchanged.

    Raises UserError if tensors of a weight are missing or inconsistent.
    """
    marks = [suffix for suffix in storage.suffixes if suffix]
    groups: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        suffix = next((mark for mark in marks if name.endswith(_WEIGHT + mark)), "")
        groups.setdefault(name.removesuffix(suffix), {})[suffix] = entry
    weights: dict[str, StoredWeight] = {}
    problems = []
    for key, members in groups.items():
        plain = members.get("")
        if plain is not None and len(members) == 1 and (plain.dtype in WEIGHT_DTYPES or not key.endswith(_WEIGHT)):
            weights[key] = plain
            continue
        try:
            weights[key] = _join(storage, key, members)
        except (ValueError, LookupError, TypeError) as error:
            problems.append(f"{key}: {error}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{location}: the {storage.name} weights are incomplete ({'; '.join(problems[:8])}{more}): "
            "download them again"
        )
    return weights


def _join(storage: Storage, key: str, tensors: Mapping[str, Entry]) -> EncodedWeight:
    missing = [key + suffix for suffix in storage.suffixes if suffix not in tensors]
    if missing:
        raise ValueError(f"{next(iter(tensors.values())).key} has no {', '.join(missing)} beside it")
    if set(tensors) != set(storage.suffixes):
        raise ValueError("the weight is stored twice, unquantised and quantised")
    dtype, shape = storage.weight(tensors)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"is decoded to {dtype}, supported are {', '.join(WEIGHT_DTYPES)}")
    for suffix, (part_dtype, part_shape) in storage.tensors(dtype, shape).items():
        part = tensors[suffix]
        if (part.dtype, part.shape) != (part_dtype, part_shape):
            expected = f"{part_dtype} {list(part_shape)}"
            raise ValueError(f"{part.key} is {part.dtype} {list(part.shape)}, expected {expected}")
    return EncodedWeight(key, dtype, shape, storage, tensors)


class _Index(TypedDict):
    """Index file of a sharded checkpoint (`model.safetensors.index.json`)."""

    weight_map: dict[str, str]


class Checkpoint(Mapping[str, np.ndarray]):
    """Weights of a checkpoint folder by key; each weight is read (and dequantised) when it is accessed.

    `tensors` are the tensors in the files. `entries` are the weights: the same objects, unless config.json names a
    `storage` with several tensors per weight. Raises UserError if there are no weights, a shard is missing or damaged,
    two shards have the same key, the storage is unknown, or tensors of a weight are missing or inconsistent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards, self.indexed = list_shards(folder)
        self.tensors: dict[str, Entry] = {}
        for shard in self.shards:
            tensors = read_torch(shard) if shard.suffix == ".bin" else read_header(shard)
            repeated = sorted(set(tensors) & set(self.tensors))
            if repeated:
                raise UserError(
                    f"{shard}: tensor {repeated[0]} ({len(repeated)} in all) is also in "
                    f"{self.tensors[repeated[0]].file.name}: shards of different checkpoints are mixed, "
                    "download the folder again"
                )
            self.tensors.update(tensors)
        held = {key: entry.file.name for key, entry in self.tensors.items()}
        wrong = sorted(key for key, shard in self.indexed.items() if held.get(key) != shard)
        if wrong:
            raise UserError(
                f"{folder}: the index lists {wrong[0]} in {self.indexed[wrong[0]]} ({len(wrong)} in all), but "
                "that shard does not contain it: download the folder again"
            )
        config = folder / "config.json"
        self.storage = find_storage(read_json(config), str(config)) if os.path.lexists(config) else None
        self.entries: Mapping[str, StoredWeight] = self.tensors
        if self.storage is not None:
            self.entries = join_parts(self.storage, self.tensors, str(folder))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.entries[key].array()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def has_weights(folder: Path) -> bool:
    """Return True if a folder has a weight file or index under a known name, readable or not."""
    return any(os.path.lexists(folder / name) for name in (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX))


def list_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files that transformers would load, and their index {key: file name} or None."""
    for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
        if os.path.lexists(folder / single):
            return [folder / single], {}
        if os.path.lexists(folder / index):
            weight_map = read_json(folder / index, _Index)["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names:
                raise UserError(f"{folder / index}: the weight_map of this index is empty: download the file again")
            outside = [name for name in names if Path(name).name != name or name == ".."]
            if outside:
                raise UserError(f"{folder / index}: shard {outside[0]!r} is outside the folder: use another checkpoint")
            missing = [name for name in names if not os.path.lexists(folder / name)]
            if missing:
                listed = f"{', '.join(missing[:8])}{f' and {len(missing) - 8} more' if len(missing) > 8 else ''}"
                raise UserError(f"{folder}: shards listed in {index} are missing ({listed}): download them")
            return [folder / name for name in names], weight_map
    raise UserError(f"{folder}: contains no weights (looked for {SINGLE}, {INDEX}, {BIN_SINGLE}, {BIN_INDEX})")
