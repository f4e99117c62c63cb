"""A layer as the sizes of its mixer and its channel mixer, and stacks of layers with the kind of block they share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import ChannelMixer
from vlmprune_jax.core.mixers import NO_LAYER, Attention
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


def stack_title(name: str) -> str:
    """Return the name of a stack in printed lines, such as "decoder" for "text"."""
    return {"text": "decoder", "vision": "vision tower"}.get(name, name)


@dataclass(frozen=True)
class BlockConfig:
    """Norms and residual sums around the mixers and channel mixers of all blocks of a stack (models/block.py)."""

    norm_eps: float
    """Number added to the mean of squares (variance) in norms."""

    norm: str = "rms"
    """"rms" or "layer"."""

    norm_offset: float = 0.0
    """Number added to the weights of norms."""

    norm_place: str = "before"
    """Position of norms: "before" each branch, "after" (on the branch's output, before the sum), or "both"."""

    parallel: bool = False
    """True for x + attention(norm x) + mlp(norm x), with one norm for both branches."""

    layer_scale: bool = False
    """True if the output of each branch is scaled by channel."""

    layer_scalar: bool = False
    """True if a block's output is multiplied by one learned number."""

    layer_inputs: int = 0
    """Channels of the per-layer inputs, computed for each token from a table and the embeddings (0: none)."""

    clips: bool = False
    """True if inputs and outputs of every projection are clipped to stored bounds."""

    def __post_init__(self) -> None:
        one_of("norm of a layer", self.norm, ("rms", "layer"))
        one_of("norm_place of a layer", self.norm_place, ("before", "after", "both"))

    @property
    def norm_facts(self) -> dict[str, Any]:
        """Keyword arguments (kind, eps, offset) with which blocks build their norms."""
        return {"kind": self.norm, "eps": self.norm_eps, "offset": self.norm_offset}


@dataclass(frozen=True)
class Stack:
    """Configuration of the decoder's or the vision tower's transformer layers, one `Layer` each."""

    causal: ClassVar[bool] = False  # whether a position sees only itself and those before it

    hidden_size: int
    """Channels of the residual stream."""

    layers: tuple[Layer, ...]
    """Parts of every layer, in order."""

    block: BlockConfig
    """Norms and residual sums around the parts of all blocks."""

    def __post_init__(self) -> None:
        for i, layer in enumerate(self.layers):
            for part in layer.parts:
                for axis in part.axes:
                    size, least = layer.sizes[axis.name], part.least(axis.name)
                    if size < least:
                        raise UserError(
                            f"layer {i}: has {size} {axis.title}, but every token uses {least}: keep at least {least}"
                        )

    @property
    def attentions(self) -> list[Attention]:
        """Attention parts of all layers that have one, in order."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention)]

    @property
    def attention(self) -> Attention:
        """Attention of the first layer without a window, or else of the first layer; configs state its facts."""
        mixers = self.attentions
        return next((mixer for mixer in mixers if mixer.window is None), mixers[0])

    @property
    def local_attention(self) -> Attention:
        """Attention of the first layer with a window; `attention` if no layer has a window."""
        return next((mixer for mixer in self.attentions if mixer.window is not None), self.attention)

    @property
    def channel(self) -> Any:
        """Channel mixer of the first layer."""
        return self.layers[0].channel

    @property
    def producers(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values later layers reuse."""
        return frozenset(layer.mixer.source for layer in self.layers if layer.mixer.source is not None) - {NO_LAYER}

    def supplies(self, number: int) -> int | None:
        """Return the producer for which layer `number` computes keys and values, or would if that were removed."""
        return min((source for source in self.producers if number in suppliers(self.layers, source)), default=None)

    @property
    def uniform(self) -> bool:
        """True if one number per axis describes the widths of all layers, as stock transformers classes require."""
        sizes: dict[tuple[str, bool], set[float]] = {}
        for layer in self.layers:
            # full attention whose values are its keys has a number of key/value heads of its own
            apart = isinstance(layer.mixer, Attention) and layer.mixer.keys_as_values
            for part in layer.parts:
                for axis, size in part.sizes.items():
                    sizes.setdefault((axis, apart and axis == "kv_heads"), set()).add(size / part.relative_width)
        return all(len(of_axis) == 1 for of_axis in sizes.values())

    def describe(self, most: int | None = None) -> str:
        """Return the sizes of the layers as text, equal neighbours together."""
        windows = [layer.mixer.window for layer in self.layers]
        return describe_layers([layer.sizes for layer in self.layers], windows, most)

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """Return a copy of the stack config with other layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    def alone(self, layer: Layer) -> Self:
        """Return a copy of the stack config with `layer` as its only layer."""
        return self.with_layers((layer,))


@dataclass(frozen=True)
class Encoder(Stack):
    """Base class for configurations of user-defined encoders (such as audio), whose outputs become decoder tokens.

    A subclass adds the fields of one encoder; `vp.encoders` maps the subclass to its module.
    """

    array: str
    """Name of the batch's array with the items, float[rows, items, ...]; a row's items come first, then zeros."""

    token_id: int
    """Id of the tokens that the output replaces."""

    tokens: int
    """Tokens of an item."""

    positions: int
    """Positions of an item inside the encoder."""
