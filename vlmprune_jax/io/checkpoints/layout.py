"""Mapping of checkpoint tensors to `params`, derived from the family's table and the modules' axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.weight_files import WEIGHT_DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import array_axes
from vlmprune_jax.core.models.params import locate, param_axes, param_shapes
from vlmprune_jax.core.part import AXES
from vlmprune_jax.io.checkpoints.disk.checkpoint import Checkpoint
from vlmprune_jax.io.families import Family
from vlmprune_jax.io.families.table import Weight, checked_table

PARTS = ("text", "projector", "vision")
# Entries (experts) of all layers: each has slots of its own (Qwen3.5's 60 layers of 512 experts: 30,720).
MAX_ENTRIES = 2**17
# Axes that are one dimension in files, up to another axis, as heads are with their channels.
_JOINED = {"patch_row": "channel", "depth": "extra"}


@dataclass(frozen=True)
class Slot:
    """Location of one parameter: tensor and rows in the checkpoint, and path in `params`.

    Attributes:
      key: canonical key of the tensor in files.
      name: path of the parameter, with the layer's number instead of group and index.
      hf_shape: shape of the whole tensor in files.
      path: path in `params`.
      index: position in a group of stacked layers.
      shape: shape of the array: the shape in files with the named `axes` split, so that conversion is a reshape.
      layer: number of the block in its stack.
      start, stop: first row and end of the parameter's rows; several parameters share a tensor if files fuse them.
      width: number of values of a row of the tensor, including values of other parameters.
      columns: values of a row that belong to the parameter; None if all do.
      entry: index on the parameter's first axis; None if the slot covers the whole axis. Weights with an axis and its
        parent axis (neurons and their experts) have a slot per parent.
      turned: True if the two axes of an entry are transposed in files.
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
    width: int
    columns: tuple[int, int] | None = None
    entry: int | None = None
    turned: bool = False

    @property
    def place(self) -> tuple[int, ...]:
        """Index of the slot's array in the stacked parameter: layer and entry, if the parameter has these axes."""
        return tuple(number for number in (self.index, self.entry) if number is not None)

    @property
    def offset(self) -> int:
        """Position in the tensor, in values, of the first row."""
        return self.start * self.width

    @property
    def stride(self) -> int:
        """Distance in the file, in values, between consecutive indices of the array's first axis."""
        return math.prod(self.shape[1:]) if self.columns is None else self.width

    def rows_of(self, values: np.ndarray) -> np.ndarray:
        """Return the parameter's part of flat `values` of the file, which begin and end between two strides."""
        rows = values.reshape(-1, self.stride)[:, slice(*(self.columns or (None,)))]
        return rows.reshape(-1, *self.shape[1:])

    def array_of(self, tensor: np.ndarray) -> np.ndarray:
        """Extract the parameter's array from the whole checkpoint tensor."""
        array = self.rows_of(tensor.reshape(-1)[self.offset :][: self.shape[0] * self.stride])
        return array.T if self.turned else array

    @property
    def part(self) -> str:
        """Part of the model that the parameter is loaded with, one of `PARTS`; that of an encoder is "text"."""
        return part if (part := self.path.split("/")[0]) in PARTS else "text"


@dataclass
class Match:
    """Result of matching checkpoint keys with a model: {canonical key: key in the files}, and mismatches.

    `passthrough`: known keys of tensors that no computation uses. `tied`: key of the copy of the embedding that some
    checkpoints with tied embeddings store as output head.
    """

    keys: dict[str, str] = field(default_factory=dict)
    passthrough: list[str] = field(default_factory=list)
    tied: str | None = None
    problems: list[str] = field(default_factory=list)


def make_slots(cfg: ModelConfig, family: Family) -> list[Slot]:
    """Return the checkpoint location (`Slot`) of every parameter, layer by layer, in the order of the weight table.

    Raises UserError if the family's table does not match the model's parameters.
    """
    axes, shapes = param_axes(cfg), param_shapes(cfg)
    slots = []
    for weight in weight_table(cfg, family):
        layout = dimensions(weight.layout or "")
        tokens = [*itertools.chain(*layout)]
        places = [place for place in locate(cfg, weight.path) if place[1] in axes]
        for i, path, index in places:
            line = weight if i is None else weight.at(i)
            names, shape = axes[path], shapes[path]
            if index is not None:
                names, shape = names[1:], shape[1:]
            unnamed = () if "unit" in tokens else ("unit",)  # single numbers have no axis in files
            entries = array_axes(names) != names
            stored = [axis for axis in tokens if axis != "1"]
            if entries:  # entries (experts) share a tensor or have one each; the order of axes is free
                stored = sorted({*stored, *re.findall("{(.*?)}", line.key)}, key=names.index)
            if stored != [name for name in names if name not in unnamed]:
                raise UserError(
                    f"family {family.name}: layout {line.layout!r} of {line.path} does not match the parameter's "
                    f"axes {names}"
                )
            size = {"1": 1, **dict(zip(names, shape, strict=True))}
            hf_shape = tuple(math.prod(size[axis] for axis in dimension) for dimension in layout)
            rows, width = hf_shape[0] if hf_shape else 1, math.prod(hf_shape[1:])
            slot = Slot(line.key, line.path, hf_shape, path, index, shape, names, i, 0, rows, width)
            if entries and shape[0] * len(places) > MAX_ENTRIES:
                raise UserError(
                    f"config.json: {len(places)} layers have {shape[0]:,} {names[0]} each, more than any model "
                    f"({MAX_ENTRIES:,} in all): correct or restore the file"
                )
            slots += _entries(slot, tokens[-2:]) if entries else [slot]
    slots = _fused(slots)
    missing = sorted(set(shapes) - {slot.path for slot in slots})
    if missing:
        raise UserError(f"family {family.name}: its weight table lacks {', '.join(missing[:3])}")
    return slots


def weight_table(cfg: ModelConfig, family: Family) -> list[Weight]:
    """Return the family's weight table with one entry per parameter, all of which the model has and have a layout.

    Raises UserError if the model was loaded without its vision tower.
    """
    if cfg.vision is not None and not cfg.tower:
        raise UserError("the model was loaded without its vision tower: load all parts of the model")
    axes, table = param_axes(cfg), []
    for line in checked_table(family.weights, family.weights(cfg)):
        places = locate(cfg, line.path)
        for leaf in ("", "weight", "bias"):
            names = next((axes[path] for _, at, _ in places if (path := f"{at}/{leaf}".rstrip("/")) in axes), None)
            if names is not None:
                inside = [name for name in names if f"{{{name}}}" not in line.key]  # not the expert in the key
                layout = usual_layout(inside) if line.layout is None or leaf == "bias" else line.layout
                key = f"{line.key}.{leaf}".rstrip(".")
                table.append(Weight(f"{line.path}/{leaf}".rstrip("/"), key, layout))
    return table


def usual_layout(names: Sequence[str]) -> str:
    """Return the layout of a parameter with these axes in PyTorch's modules, without the axis of stacked layers."""
    joined = {name: axis.channels for name, axis in AXES.items()} | _JOINED
    tokens, end = list[str](), ""
    for place, name in enumerate(names):
        if name == "layer":
            continue
        start = not end and joined.get(name) in names[place + 1 :]
        tokens.append(f"{'1 ' if name == 'tap' else ''}{'(' if start else ''}{name}{')' if name == end else ''}")
        end = joined[name] if start else "" if name == end else end
    return " ".join(tokens)


def _entries(slot: Slot, axes: Sequence[str]) -> list[Slot]:
    """Split a slot into one per entry of the parameter's first axis (experts); `axes`: an entry's axes in files."""
    (count, *inner), (parent, *names) = slot.shape, slot.axes
    turned = list(axes) != names
    shape = tuple(reversed(inner)) if turned else tuple(inner)
    one = dataclasses.replace(slot, shape=shape, axes=tuple(axes), turned=turned, width=shape[1], stop=shape[0])
    return [
        dataclasses.replace(one, entry=e, key=slot.key.replace(f"{{{parent}}}", str(e)), name=f"{slot.name}/{e}")
        for e in range(count)
    ]


def _fused(slots: Sequence[Slot]) -> list[Slot]:
    """Return slots with their ranges in tensors that several parameters share; entries (experts) come last.

    Fused parameters have consecutive rows. Those of an expert (gate and up) lie side by side along the axis with a
    parent (its neurons), which may be rows or columns.
    """
    tensors: dict[tuple[str, int | None], list[Slot]] = {}
    for slot in slots:
        tensors.setdefault((slot.key, slot.entry), []).append(slot)
    placed = []
    for (_, entry), group in sorted(tensors.items(), key=lambda item: item[0][1] is not None):
        first = group[0]
        by_columns = entry is not None and any(AXES[name].parent for name in first.axes[1:] if name in AXES)
        edges = [0, *itertools.accumulate(slot.width if by_columns else slot.stop for slot in group)]
        rows, width = (first.stop, edges[-1]) if by_columns else (edges[-1], first.width)
        if entry is None:
            hf_shape, begin = (rows, *first.hf_shape[1:])[: len(first.hf_shape)], 0
        else:
            outer = first.hf_shape[:-2]  # () if every expert has a tensor of its own
            hf_shape, begin = (*outer, rows, width), entry * rows if outer else 0
        for slot, (low, high) in zip(group, itertools.pairwise(edges), strict=True):
            start, stop = (begin, begin + rows) if by_columns else (begin + low, begin + high)
            columns = (low, high) if by_columns and len(group) > 1 else None
            slot = dataclasses.replace(slot, hf_shape=hf_shape, start=start, stop=stop, width=width, columns=columns)
            placed.append(slot)
    return placed


def by_key(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """Group slots by checkpoint tensor, in the order of their rows and columns."""
    tensors: dict[str, list[Slot]] = {}
    for slot in slots:
        tensors.setdefault(slot.key, []).append(slot)
    return {key: sorted(group, key=lambda slot: (slot.start, slot.columns or ())) for key, group in tensors.items()}


def stacked(arrays: Iterable[tuple[Slot, Any]], stack: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Stack the arrays of all slots to {path: parameter}; `stack` joins layers (and experts) on a new axis."""
    params: dict[str, Any] = {}
    for slot, array in arrays:
        params.setdefault(slot.path, []).append((slot.place, array))
    for path, members in params.items():
        members.sort(key=operator.itemgetter(0))
        while members[0][0]:  # the last axis first
            groups = itertools.groupby(members, key=lambda member: member[0][:-1])
            members = [(place, stack([array for _, array in group])) for place, group in groups]
        params[path] = members[0][1]
    return params


def dimensions(layout: str) -> list[list[str]]:
    """Return the axes of every dimension of an einops layout: "(q_heads head) embed" -> [[q_heads, head], [embed]]."""
    groups = re.findall(r"\(([^)]*)\)|([^\s()]+)", layout)
    return [(inside or axis).split() for inside, axis in groups]


def match_keys(
    slots: Sequence[Slot], cfg: ModelConfig, family: Family, checkpoint: Checkpoint, parts: Collection[str] = PARTS
) -> Match:
    """Match checkpoint keys with the slots of the model's `parts`; report mismatches as problems.

    Keys of other parts are ignored, because these parts may come from another checkpoint.
    """
    known = {slot.key: slot for slot in slots}
    wanted = {key: slot for key, slot in known.items() if slot.part in parts}
    match, head, blocks = Match(), tied_head(cfg, family), block_prefix("vision", cfg, family)
    unused = {None}  # blocks of the tower whose features are not used
    if cfg.vision is not None:
        unused |= {*range(len(cfg.vision.layers), cfg.vision.n_layers_total)}
    for key, entry in checkpoint.entries.items():
        name = family.canonical(key)
        slot = wanted.get(name)
        if slot is None and name in known:
            continue
        if slot is None and name == head:
            match.tied, slot = key, next(slot for slot in slots if slot.path == "text/embed_tokens/weight")
        elif slot is None:
            if family.is_ignored(name) and block_number(name, blocks) in unused:
                match.passthrough.append(key)
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
    """Return the output head's checkpoint key if embeddings are tied (the key is then optional), otherwise None."""
    if not cfg.text.tie_embeddings:
        return None
    untied = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tie_embeddings=False))
    head = next(line.key for line in family.weights(untied) if line.path.startswith("text/lm_head"))
    return f"{head.removesuffix('.weight')}.weight"


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
