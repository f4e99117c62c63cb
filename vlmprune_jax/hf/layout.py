"""Mapping of checkpoint tensors to `params`, derived from the family's table and the modules' axes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.weight_files import WEIGHT_DTYPES
from vlmprune_jax.families import Family
from vlmprune_jax.hf.disk.checkpoint import Checkpoint
from vlmprune_jax.models.params import locate, param_axes, param_shapes

PARTS = ("text", "projector", "vision")


@dataclass(frozen=True)
class Slot:
    """Location of one parameter: tensor and rows in the checkpoint, and path in `params`.

    Attributes:
      key: canonical key of the tensor in files.
      name: path of the parameter, with the layer's number instead of run and index.
      hf_shape: shape of the whole tensor in files.
      path: path in `params`.
      index: position in a run of stacked layers.
      shape: shape of the array: that in files with the named `axes` split, so that conversion is a reshape.
      layer: number of the block in its stack.
      start, stop: rows of the tensor; parameters that files fuse share a tensor, others own all rows.
    """

    key: str
    name: str
    hf_shape: tuple[int, ...]
    path: str
    index: int | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layer: int | None
    start: int
    stop: int

    @property
    def part(self) -> str:
        """Part of the model that the parameter belongs to: "text", "projector" or "vision"."""
        return self.path.split("/")[0]


@dataclass
class Match:
    """Result of matching checkpoint keys with a model: {canonical key: key in the files}, and mismatches.

    `carried` are known keys that are not computed with; `tied` is the copy of the embedding that some checkpoints with
    tied embeddings store as output head.
    """

    keys: dict[str, str] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    tied: str | None = None
    problems: list[str] = field(default_factory=list)


def make_slots(cfg: ModelConfig, family: Family) -> list[Slot]:
    """Return the checkpoint location (`Slot`) of every parameter, layer by layer, in the order of the weight table.

    Raises UserError if the family's table does not match the model's parameters.
    """
    axes, shapes = param_axes(cfg), param_shapes(cfg)
    slots = []
    for weight in family.weights(cfg):
        tokens = weight.layout.replace("(", " ( ").replace(")", " ) ").split()
        places = locate(cfg, weight.path)
        some = any(path in axes for _, path, _ in places)  # layers may lack it
        for i, path, index in places:
            line = weight if i is None else weight.at(i)
            if path not in axes:
                if some:
                    continue
                raise UserError(
                    f"family {family.name}: its weight table lists {line.path}, which is not a parameter of this model"
                )
            names, shape = axes[path], shapes[path]
            if index is not None:
                names, shape = names[1:], shape[1:]
            unnamed = () if "unit" in tokens else ("unit",)  # numbers without an axis in files
            if [t for t in tokens if t not in "()1"] != [name for name in names if name not in unnamed]:
                raise UserError(
                    f"family {family.name}: layout {line.layout!r} of {line.path} does not match the parameter's "
                    f"axes {names}"
                )
            size = {"1": 1, **dict(zip(names, shape, strict=True))}
            hf_shape = _grouped(tokens, size)
            rows = hf_shape[0] if hf_shape else 1
            slots.append(Slot(line.key, line.path, hf_shape, path, index, shape, names, i, 0, rows))
    slots = _fused(slots)
    missing = sorted(set(shapes) - {slot.path for slot in slots})
    if missing:
        raise UserError(f"family {family.name}: its weight table lacks {', '.join(missing[:3])}")
    return slots


def _fused(slots: Sequence[Slot]) -> list[Slot]:
    """Return slots with row ranges: parameters that share a fused checkpoint tensor get consecutive rows."""
    rows: Counter[str] = Counter()
    placed = []
    for slot in slots:
        start = rows[slot.key]
        rows[slot.key] += slot.stop
        placed.append(dataclasses.replace(slot, start=start, stop=rows[slot.key]))
    return [
        dataclasses.replace(slot, hf_shape=(rows[slot.key], *slot.hf_shape[1:])) if slot.hf_shape else slot
        for slot in placed
    ]


def by_key(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """Group slots by checkpoint tensor, in the order of their rows."""
    tensors: dict[str, list[Slot]] = {}
    for slot in slots:
        tensors.setdefault(slot.key, []).append(slot)
    return tensors


def join_tensor(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the arrays of the parameters that form one checkpoint tensor (flat)."""
    return arrays[0] if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays])


def _grouped(tokens: Iterable[str], size: dict[str, int]) -> tuple[int, ...]:
    """Return the tensor shape that an einops layout gives: `( q_heads head ) embed` -> (q_heads * head, embed)."""
    shape: list[int] = []
    inside: list[int] | None = None
    for token in tokens:
        if token == "(":
            inside = []
        elif token == ")":
            shape.append(math.prod(inside or ()))
            inside = None
        else:
            (shape if inside is None else inside).append(size[token])
    return tuple(shape)


def match_keys(
    slots: Sequence[Slot], cfg: ModelConfig, family: Family, checkpoint: Checkpoint, parts: Collection[str] = PARTS
) -> Match:
    """Match checkpoint keys with the slots of some parts of the model; report mismatches as problems.

    Keys of other parts are ignored: they may come from another checkpoint.
    """
    known = {slot.key: slot for slot in slots}
    wanted = {key: slot for key, slot in known.items() if slot.path.split("/")[0] in parts}
    match, head, blocks = Match(), tied_head(cfg, family), block_prefix("vision", cfg, family)
    for key, entry in checkpoint.entries.items():
        name = family.canonical(key)
        slot = wanted.get(name)
        if slot is None and name in known:
            continue
        if slot is None and name == head:
            match.tied, slot = key, next(slot for slot in slots if slot.path == "text/embed_tokens/weight")
        elif slot is None:
            if family.is_ignored(name) and not _in_computed_block(block_number(name, blocks), cfg):
                match.carried.append(key)
            else:
                match.problems.append(f"unknown key {key}")
            continue
        elif name in match.keys:
            match.problems.append(f"{key} and {match.keys[name]} are the same weight")
            continue
        else:
            match.keys[name] = key
        if entry.shape != slot.hf_shape:
            match.problems.append(f"{key} has shape {list(entry.shape)}, config.json says {list(slot.hf_shape)}")
        if entry.dtype not in WEIGHT_DTYPES:
            match.problems.append(f"{key} has dtype {entry.dtype}, supported are {', '.join(WEIGHT_DTYPES)}")
    match.problems += [f"missing key {key}" for key in wanted if key not in match.keys]
    return match


def refuse(problems: Sequence[str], family: Family, location: object) -> None:
    """Raise one UserError that lists all mismatches between checkpoint and config, if there are any."""
    if not problems:
        return
    order = sorted(problems, key=lambda text: ("missing key" in text, "unknown key" in text))
    more = f"; and {len(order) - 8} more" if len(order) > 8 else ""
    raise UserError(
        f"{location}: the weights do not match config.json ({'; '.join(order[:8])}{more}): use a complete, "
        f"unquantised {family.name} checkpoint in {family.layout} layout"
    )


def tied_head(cfg: ModelConfig, family: Family) -> str | None:
    """Return the output head's checkpoint key if embeddings are tied, since it is then optional; otherwise None."""
    if not cfg.text.tie_embeddings:
        return None
    untied = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tie_embeddings=False))
    return next(w.key for w in family.weights(untied) if w.path == "text/lm_head/weight")


def _in_computed_block(number: int | None, cfg: ModelConfig) -> bool:
    """Return True if a vision tower's block is computed, or has a number that does not exist."""
    if number is None or cfg.vision is None:
        return False
    return number < len(cfg.vision.layers) or number >= cfg.vision.n_layers_total


def block_prefix(part: str, cfg: ModelConfig, family: Family) -> str | None:
    """Return the prefix of a model part's checkpoint keys up to the block number; None if the part has no blocks."""
    keys = (weight.key for weight in family.weights(cfg) if weight.path.startswith(f"{part}/layers/{{i}}"))
    return next((key.split("{i}")[0] for key in keys), None)


def block_number(name: str, prefix: str | None) -> int | None:
    """Return the block number in a checkpoint key; None outside blocks, -1 if it is not a number."""
    if prefix is None or not name.startswith(prefix):
        return None
    number = name[len(prefix) :].partition(".")[0]
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else -1


def template(key: str) -> str:
    """Return a checkpoint key with its block number replaced by `{}`."""
    return re.sub(r"\b(layers?)\.\d+\.", r"\1.{}.", key, count=1)
