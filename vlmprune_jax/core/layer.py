"""A layer as the sizes of its mixer and its channel mixer, and sequences of layers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmprune_jax.core.channels import ChannelMixer
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.part import AXES, Axis, Part


@dataclass(frozen=True)
class Layer:
    """One transformer layer: a mixer over positions, then a mixer over channels."""

    mixer: Any
    """Part that mixes positions (a `Mixer`)."""

    channel: ChannelMixer
    """Part that mixes channels (a `ChannelMixer`), separately for each position."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The layer's parts in the order of the computation."""
        return self.mixer, self.channel

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Prunable axes of all parts."""
        return tuple(axis for part in self.parts for axis in part.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every prunable axis of the layer by name, as stored in plans."""
        return {name: size for part in self.parts for name, size in part.sizes.items()}

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis, counting only the weights that `tokens` tokens can use."""
        return {name: size for part in self.parts for name, size in part.active_sizes(tokens).items()}

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of each axis of the layer's weights that pruning leaves unchanged, by name."""
        return {name: size for part in self.parts for name, size in part.fixed_sizes.items()}

    def shape_of(self, axis: Axis) -> tuple[int, int]:
        """Return (units, channels per unit) of a prunable axis."""
        part = next(part for part in self.parts if axis in part.axes)
        return part.sizes[axis.name], part.fixed_sizes.get(axis.channels, 1)

    @property
    def kind(self) -> Layer:
        """The layer with all sizes 1 and any source `NO_LAYER`; equal for layers that differ only in these numbers."""
        layer = self.resized(dict.fromkeys(self.sizes, 1))
        return layer if self.mixer.source is None else layer.reading(NO_LAYER)

    def reading(self, source: int) -> Layer:
        """Return a copy of the layer that reuses keys and values of layer `source` (`Attention.source`)."""
        return Layer(dataclasses.replace(self.mixer, source=source), self.channel)

    def resized(self, sizes: Mapping[str, int]) -> Layer:
        """Return a copy of the layer with new sizes by axis name; other axes keep their sizes."""
        return Layer(self.mixer.resized(sizes), self.channel.resized(sizes))

    def smaller(self, root: str, units: int | None = None) -> Layer:
        """Return a copy of the layer with one unit of a part's top axis (or `units`) and its child units fewer.

        At least one unit is kept; parts that are wider than usual lose as many units as they are times wider.
        """
        part = next(part for part in self.parts if part.root == root)
        fewer = self.sizes[root] - (part.relative_width if units is None else units)
        return self.resized(self.completed({root: max(1, fewer)}))

    def completed(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return `sizes` with the sizes of child axes added: each keeps its ratio to a parent axis in `sizes`."""
        follow = {
            axis.name: self.sizes[axis.name] // self.sizes[axis.parent] * sizes[axis.parent]
            for axis in self.axes
            if axis.name not in sizes and axis.parent in sizes
        }
        return {**sizes, **follow}


def suppliers(layers: Sequence[Layer], source: int) -> list[int]:
    """Return the numbers of the layers up to `source` whose keys and values can stand for those of layer `source`."""
    mixer = layers[source].kind.mixer
    return [number for number in range(source + 1) if layers[number].kind.mixer == mixer]


def keep_layers(layers: Sequence[Layer], numbers: Sequence[int]) -> tuple[Layer, ...]:
    """Return the layers with these ascending numbers as the layers of a smaller stack.

    A layer that reuses keys and values of a removed layer gets those of the last kept layer before it with the same
    attention, or has `NO_LAYER` as its source.
    """
    sources = {NO_LAYER: NO_LAYER}
    for source in {layers[number].mixer.source for number in numbers} - {None, NO_LAYER}:
        left = [number for number in suppliers(layers, source) if number in numbers]
        sources[source] = numbers.index(left[-1]) if left else NO_LAYER
    kept = [layers[number] for number in numbers]
    return tuple(x if x.mixer.source is None else x.reading(sources[x.mixer.source]) for x in kept)


def array_axes(names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` without parents of other axes in it; the remaining sizes multiply to the array's size."""
    parents = {AXES[name].parent for name in names if name in AXES}
    return tuple(name for name in names if name not in parents)


MOST_PERIOD = 12  # layers; patterns of models have 2 to 8


class LayerRun(NamedTuple):
    """Equal layers whose parameters are stacked along a leading axis."""

    numbers: tuple[int, ...]
    """Numbers of the layers: neighbours, or neighbours in every repetition of a pattern."""

    layer: Layer
    """Sizes of each of the layers."""


class ScanGroup(NamedTuple):
    """Layers that one `lax.scan` computes: a repeating pattern of runs. Each step computes one repetition."""

    repetitions: int
    runs: tuple[LayerRun, ...]


@functools.lru_cache(maxsize=256)
def scan_groups(layers: tuple[Layer, ...]) -> tuple[ScanGroup, ...]:
    """Group layers by repeated patterns of up to `MOST_PERIOD` layers (equal neighbours: a pattern of one layer).

    A grouping with few runs is chosen, because each run is traced and compiled once.
    """
    numbers, count = dict[Layer, int](), len(layers)
    types = [numbers.setdefault(layer, len(numbers)) for layer in layers]
    changes = [*itertools.accumulate(map(operator.ne, types, types[1:]), initial=0)]  # of type, up to each layer
    best = [(0, 0, 0)] * (count + 1)  # for the layers from each on: number of runs, first pattern's period and end
    for start in reversed(range(count)):
        best[start] = (best[start + 1][0] + 1, 1, start + 1)
        for period in range(1, min(MOST_PERIOD, count - start) + 1):
            end = start + period
            while types[end : end + period] == types[start : start + period]:
                end += period
            for stop in (end - period, end):  # the last repetition may belong to another pattern
                if start < stop:
                    blocks = 1 + changes[start + period - 1] - changes[start]
                    best[start] = min(best[start], (best[stop][0] + blocks, period, stop))
    groups, start = [], 0
    while start < count:
        _, period, stop = best[start]
        pattern = [
            [*neighbours] for _, neighbours in itertools.groupby(range(start, start + period), changes.__getitem__)
        ]
        repetitions = range(0, stop - start, period)
        runs = [LayerRun(tuple(i + offset for offset in repetitions for i in run), layers[run[0]]) for run in pattern]
        groups.append(ScanGroup(len(repetitions), tuple(runs)))
        start = stop
    return tuple(groups)


def layer_runs(layers: tuple[Layer, ...]) -> tuple[LayerRun, ...]:
    """Return all runs of equal layers in order; the index of a run is its number in parameter paths."""
    return tuple(run for group in scan_groups(layers) for run in group.runs)


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return one layer's sizes as text, such as "6/2 heads, 64 neurons" (query heads / key/value heads)."""
    parents = {AXES[name].parent for name in sizes}
    texts = []
    for name, size in sizes.items():
        axis = AXES[name]
        if axis.parent and axis.channels and size != sizes[axis.parent]:
            texts.append(f"{size}/{sizes[axis.parent]} {axis.title.removeprefix('query ')}")
        elif axis.parent and not axis.channels:
            texts.append(f"{sizes[axis.parent]} {AXES[axis.parent].title} of {size // sizes[axis.parent]:,} neurons")
        elif name not in parents:
            texts.append(f"{size:,} {axis.title.removeprefix('query ')}")
    return ", ".join(texts)


def describe_layers(sizes: Sequence[Mapping[str, int]], windows: Sequence[Any] = (), most: int | None = None) -> str:
    """Return layer sizes as text, such as "3 x (6/2 heads, 64 neurons), 1 x (4/2 heads, 64 neurons)".

    With `windows`, the attention window of each layer, the text also says how many layers have no window. Repeating
    groups are listed once, such as "8 x [3 x (...), 1 x (...)]". Only the first `most` groups are listed, followed by
    the number of all layers.
    """
    groups, start = [], 0
    for text, alike in itertools.groupby(map(describe_sizes, sizes)):
        stop = start + len(list(alike))
        full = list(windows[start:stop]).count(None)
        without = f", {full} of them without windows" if 0 < full < stop - start else ""
        groups.append(f"{stop - start} x ({text}){without}")
        start = stop
    period = next(n for n in range(1, len(groups) + 1) if groups == groups[:n] * (len(groups) // n))
    if 1 < period < len(groups):
        groups = [f"{len(groups) // period} x [{', '.join(groups[:period])}]"]
    more = [] if most is None or len(groups) <= most else [f"... ({len(sizes)} layers)"]
    return ", ".join([*(groups[:most] if more else groups), *more])
