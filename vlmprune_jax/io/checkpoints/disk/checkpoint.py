"""Checkpoint folder: its shards, their tensors, and the (perhaps quantised) weights that the tensors store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_json
from vlmprune_jax.base.weight_files import Entry, read_header
from vlmprune_jax.io.checkpoints.disk.storage import StoredWeight, find_storage, join_parts
from vlmprune_jax.io.checkpoints.disk.torch_files import read_torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"


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
