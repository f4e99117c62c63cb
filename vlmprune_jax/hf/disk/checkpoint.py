"""A checkpoint folder: its shards, the tensors in them, and the weights that these make up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vlmprune_jax.checked_files import read_json
from vlmprune_jax.errors import UserError
from vlmprune_jax.hf.disk.storage import StoredWeight, find_storage, join_parts
from vlmprune_jax.hf.disk.weight_files import Entry, read_header, read_torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"


class Checkpoint(Mapping[str, np.ndarray]):
    """All weights of a folder by key; an array is a memory map (or decoded), read when it is looked at.

    `tensors` are what the files hold, `entries` the weights: the same, but where config.json names a `storage`, whose
    weights are several tensors each.

    Raises:
      UserError: no weights, a missing or damaged shard, the same key in two shards, a storage that is not known, or
        parts of weights that are missing or do not fit one another.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards, self.indexed = list_shards(folder)
        self.tensors: dict[str, Entry] = {}
        for shard in self.shards:
            found = read_torch(shard) if shard.suffix == ".bin" else read_header(shard)
            twice = sorted(set(found) & set(self.tensors))
            if twice:
                raise UserError(
                    f"{shard}: tensor {twice[0]} ({len(twice)} in all) is also in {self.tensors[twice[0]].file.name}: "
                    "shards of different checkpoints are mixed, download the folder again"
                )
            self.tensors.update(found)
        held = {key: entry.file.name for key, entry in self.tensors.items()}
        wrong = sorted(key for key, shard in self.indexed.items() if held.get(key) != shard)
        if wrong:
            raise UserError(
                f"{folder}: the index lists {wrong[0]} in {self.indexed[wrong[0]]} ({len(wrong)} in all), but "
                "that shard does not hold it: a shard of another checkpoint? download the folder again"
            )
        config = folder / "config.json"
        self.storage = find_storage(read_json(config), str(config)) if config.is_file() else None
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
