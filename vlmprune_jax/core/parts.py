"""Parts of transformer layers as frozen dataclasses: a layer is a mixer and a channel mixer, each with named axes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Self

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.rope import RopeConfig


@dataclass(frozen=True)
class Axis:
    """Prunable axis of a part; the part's field of the same name is its size."""

    name: str
    """Name in the weight layouts, plans and scores."""

    title: str
    """Units of the axis in messages and tables (plural)."""

    parent: str = ""
    """Axis of the same part of which every index owns equally many indices of this axis; "" for none.

    Indices count over all parents: index i belongs to parent index i // (size / parent's size). A weight that names the
    parent before the axis has the axis once per parent, so that its array has size / parent's size indices of it.
    """

    channels: str = ""
    """Axis of the weights whose channels make up one unit (a head's "head"); "" if a unit is one channel."""

    mesh: str = ""
    """Mesh axis that shards it; "" if it is replicated."""

    where_divisible: bool = False
    """True if the axis is replicated on a mesh that does not divide it, instead of refusing that mesh."""

    multiple: str = ""
    """Setting with the multiple of the remaining units; "" for that of the part (`Part.settings`)."""


# Every prunable axis by its name in the weight layouts; parts add theirs when their class is defined.
AXES: dict[str, Axis] = {}
WRITERS: dict[str, str] = {}  # axis -> projection to whose input its units contribute


@dataclass(frozen=True)
class Part:
    """Facts of one part of a layer that do not depend on the other part, among them the sizes of its prunable axes."""

    axes: ClassVar[tuple[Axis, ...]] = ()
    """Prunable axes, parents before their children."""

    module: ClassVar[str]
    """Name of the part in parameter paths and captured values."""

    writer: ClassVar[str]
    """Projection to whose input the units contribute: "o_proj" of a mixer, "down_proj" of a channel mixer."""

    settings: ClassVar[tuple[str, str]]
    """Settings that limit pruning of this part: range of layers, and multiple of the remaining units."""

    def __init_subclass__(cls) -> None:
        AXES.update({axis.name: axis for axis in cls.axes})
        WRITERS.update({axis.name: cls.writer for axis in cls.axes})

    def __post_init__(self) -> None:
        for axis in self.axes:
            size, parents = self.sizes[axis.name], self.sizes.get(axis.parent, 1)
            if size < 1:
                raise UserError(f"{self.module}: {axis.name} {size} must be at least 1")
            if size % parents:
                raise UserError(
                    f"{self.module}: {axis.name} {size} must be a multiple of {axis.parent} {parents} "
                    f"({axis.title} in groups)"
                )

    @property
    def relative_width(self) -> int:
        """Width relative to the layers that config.json states one number for; all keep the same share of it."""
        return 1

    @property
    def problem(self) -> str | None:
        """Return why no layer can have a part with these sizes, with advice; None if it can."""
        return None

    def least(self, axis: str) -> int:
        """Return the smallest size of an axis with which the part can be computed."""
        return 1

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis of the weights that the computation of this many tokens uses at most."""
        return self.sizes

    @property
    def root(self) -> str:
        """Name of the first axis, whose units take those of its children along."""
        return self.axes[0].name

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every prunable axis by name."""
        return {axis.name: getattr(self, axis.name) for axis in self.axes}

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of the other axes of the part's weights by name: those that pruning leaves alone."""
        return {}

    def channels_of(self, axis: Axis) -> int:
        """Return the number of channels that make up one unit of a prunable axis."""
        return self.fixed_sizes.get(axis.channels, 1)

    def resized(self, sizes: Mapping[str, int]) -> Self:
        """Return a copy of the part with other sizes of its own axes; other names in `sizes` are ignored."""
        changes: dict[str, Any] = {axis.name: sizes[axis.name] for axis in self.axes if axis.name in sizes}
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Mixer(Part):
    """Part that mixes positions; what its computation costs beside its weights depends on the length of a sequence."""

    writer = "o_proj"
    settings = ("attn_layers", "heads_multiple")

    @property
    def window(self) -> int | None:
        """Number of positions that it mixes at most; None for all."""
        return None

    @property
    def kv_shared(self) -> bool:
        """True if it reads the keys and values of an earlier layer."""
        return False

    @property
    def group(self) -> int:
        """Number of units of its last axis per unit of its first, such as query heads per key/value head."""
        return self.sizes[self.axes[-1].name] // self.sizes[self.root]

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return the forward FLOPs of a causal sequence beside products with weights; `last`: of its last token."""
        raise NotImplementedError

    def state_size(self, length: int) -> int:
        """Return the number of values that generation caches for a sequence of `length` tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Attention(Mixer):
    """Grouped-query attention of one layer."""

    module = "self_attn"
    axes = (
        Axis("kv_heads", "key/value heads", channels="head", mesh="tensor"),
        Axis("q_heads", "query heads", parent="kv_heads", channels="head", mesh="tensor"),
    )

    q_heads: int
    """Number of query heads."""

    kv_heads: int
    """Number of key/value heads; each serves equally many query heads."""

    window: int | None = None
    """Attention window, None for full attention (causal in a decoder).

    In a decoder the number of tokens of a sliding window; in a tower the side, in merged cells, of square windows.
    """

    kv_shared: bool = False
    """True if the layer attends to the keys and values of the last earlier layer with its own and the same window."""

    _: KW_ONLY
    head_dim: int
    """Number of channels per head."""

    rope: RopeConfig | None = None
    """Rotary position embedding, None for none."""

    rotary_dim: int = 0
    """Number of leading channels of a head that rotate; 0 for all."""

    rope_parts: int = 1
    """Number of equal parts of a head that rotate independently (2 in towers that rotate by row and by column)."""

    scale: float = 0.0
    """Factor on the scores of queries and keys; 0 for head_dim ** -0.5."""

    bias: bool = False
    """True if queries, keys and values are projected with a bias."""

    out_bias: bool = False
    """True if the output projection has a bias."""

    qk_norm: bool = False
    """True if every query and key head is normalised (RMS) before rotation."""

    v_norm: bool = False
    """True if every value head is divided by its root mean square."""

    keys_as_values: bool = False
    """True if the values are the keys before norm and rotation."""

    gated: bool = False
    """True if queries come with a gate: what a head reads is multiplied by sigmoid(gate) before the output."""

    sees_images: bool = False
    """True if tokens of an image also see those that follow them in the same image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise UserError(f"{self.module}: the attention window {self.window} must be at least 1")
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", 0)  # so that equal computations are equal
        if self.rope is not None:
            if not 0 < self.rotated <= self.head_dim or self.rotated % 2:
                raise UserError(f"rotary_dim {self.rotated} must be even (pairs) and at most head_dim {self.head_dim}")
            self.rope.check(self.rotated)

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of the other axes of the part's weights by name: those that pruning leaves alone."""
        return {"head": self.head_dim, "gate": 2}

    @property
    def rotated(self) -> int:
        """Number of leading channels of a head that rotate."""
        return self.rotary_dim or self.head_dim

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return 4 FLOPs per channel and pair of a query and a key that it sees."""
        span = min(self.window or length, length)  # from this position on a query sees a whole window
        pairs = span if last else span * (span + 1) // 2 + (length - span) * span
        return 4 * pairs * self.q_heads * self.head_dim

    def state_size(self, length: int) -> int:
        """Return the number of cached keys and values: none if they are another layer's, a window's if it has one."""
        return 0 if self.kv_shared else 2 * self.kv_heads * self.head_dim * min(self.window or length, length)


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """Gated delta net of one layer (Yang et al. 2024, arXiv 2412.06464): a matrix per value head as its state.

    Per token: S = exp(g) S; S = S + k (beta (v - S^T k))^T; output S^T q.
    """

    module = "linear_attn"
    axes = (
        Axis("delta_groups", "delta-net groups", channels="delta_key", mesh="tensor"),
        Axis("delta_heads", "delta-net heads", parent="delta_groups", channels="delta_value", mesh="tensor"),
    )

    delta_heads: int
    """Number of value heads; each has a gate, a decay and a step size."""

    delta_groups: int
    """Number of key heads; each serves equally many value heads."""

    _: KW_ONLY
    key_dim: int
    """Channels per key head, of queries and keys."""

    value_dim: int
    """Channels per value head."""

    taps: int = 4
    """Positions that the convolution over queries, keys and values sees, the present one included."""

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of the other axes of the part's weights by name: those that pruning leaves alone."""
        return {"delta_key": self.key_dim, "delta_value": self.value_dim, "tap": self.taps}

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return 8 FLOPs per token and number of the state (decay, reading, writing), and those of the convolution."""
        tokens = 1 if last else length
        channels = 2 * self.delta_groups * self.key_dim + self.delta_heads * self.value_dim
        return tokens * (8 * self.delta_heads * self.key_dim * self.value_dim + 2 * self.taps * channels)

    def state_size(self, length: int) -> int:
        """Return the number of values of the matrices and of the convolution's last inputs, whatever the length."""
        channels = 2 * self.delta_groups * self.key_dim + self.delta_heads * self.value_dim
        return self.delta_heads * self.key_dim * self.value_dim + (self.taps - 1) * channels


@dataclass(frozen=True)
class ChannelMixer(Part):
    """Part that mixes channels, position by position."""

    writer = "down_proj"
    settings = ("mlp_layers", "neurons_multiple")

    @property
    def neuron_counts(self) -> tuple[int, ...]:
        """Lengths of the rows that its writers read."""
        return tuple(self.sizes.values())


@dataclass(frozen=True)
class Dense(ChannelMixer):
    """Multi-layer perceptron of one layer."""

    module = "mlp"
    axes = (Axis("mlp", "neurons", mesh="tensor"),)

    mlp: int
    """Number of neurons."""

    wide: int = 1
    """Relative width (Gemma 4: some layers are twice as wide as the others)."""

    _: KW_ONLY
    activation: str = "silu"
    """Activation by its name in transformers."""

    gated: bool = True
    """True for down(act(gate(x)) * up(x)), False for two projections."""

    bias: bool = False
    """True if its projections have biases."""

    @property
    def relative_width(self) -> int:
        """Width relative to the layers that config.json states one number for."""
        return self.wide


@dataclass(frozen=True)
class Experts(ChannelMixer):
    """Mixture of experts: a router sends every token to a few of many gated MLPs, and weighs their outputs."""

    module = "mlp"
    axes: ClassVar[tuple[Axis, ...]] = (
        Axis("experts", "experts", mesh="fsdp", where_divisible=True, multiple="experts_multiple"),
        Axis("expert_mlp", "neurons of experts", parent="experts", mesh="tensor"),
    )

    experts: int
    """Number of experts."""

    expert_mlp: int
    """Number of neurons of all experts together, equally many of each."""

    top_k: int
    """Number of experts per token, those with the largest router probabilities."""

    renormalise: bool = True
    """True if the probabilities of a token's experts are divided by their sum."""

    _: KW_ONLY
    activation: str = "silu"
    """Activation by its name in transformers."""

    bias: ClassVar[bool] = False

    @property
    def neurons(self) -> int:
        """Number of neurons of one expert."""
        return self.expert_mlp // self.experts

    @property
    def problem(self) -> str | None:
        """Return why no layer can have these experts, with advice; None if it can."""
        if self.top_k <= self.experts:
            return None
        return f"every token uses {self.top_k} experts, but the layer has {self.experts}: keep at least {self.top_k}"

    @property
    def neuron_counts(self) -> tuple[int, ...]:
        """Lengths of the rows that its writers read: neurons of one expert, and of a dense MLP beside them."""
        return self.neurons, *(size for axis, size in self.sizes.items() if axis not in ("experts", "expert_mlp"))

    def least(self, axis: str) -> int:
        """Return the smallest size of an axis: as many experts as a token uses."""
        return self.top_k if axis == "experts" else 1

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis of the weights that tokens use at most: neurons of `top_k` experts each."""
        return {**self.sizes, "expert_mlp": min(self.experts, tokens * self.top_k) * self.neurons}


@dataclass(frozen=True)
class ExpertsBesideDense(Experts):
    """Experts and a dense MLP that read the same residual stream; their outputs are added.

    Each has norms of its own before and after it. The router reads the stream itself, divided by its root mean square
    and scaled by channel; a learned factor per expert multiplies the gates.
    """

    axes = (*Experts.axes, *Dense.axes)

    _: KW_ONLY
    mlp: int
    """Number of neurons of the dense MLP."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer: a mixer over positions, then a mixer over channels."""

    mixer: Any
    """Part that mixes positions (a `Mixer`)."""

    channel: ChannelMixer
    """Part that mixes channels, position by position."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The layer's parts in the order in which a token passes them."""
        return self.mixer, self.channel

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Prunable axes of all parts."""
        return tuple(axis for part in self.parts for axis in part.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every prunable axis of the layer by name, the form in which plans store layers."""
        return {name: size for part in self.parts for name, size in part.sizes.items()}

    def active_sizes(self, tokens: int = 1) -> dict[str, int]:
        """Return the sizes by axis of the weights that the computation of this many tokens uses at most."""
        return {name: size for part in self.parts for name, size in part.active_sizes(tokens).items()}

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Size of the weights' other axes by name, of all parts."""
        return {name: size for part in self.parts for name, size in part.fixed_sizes.items()}

    def shape_of(self, axis: Axis) -> tuple[int, int]:
        """Return (units, channels per unit) of a prunable axis."""
        part = next(part for part in self.parts if axis in part.axes)
        return part.sizes[axis.name], part.channels_of(axis)

    @property
    def kind(self) -> Layer:
        """The layer with all sizes 1: equal for layers that differ in their sizes only."""
        return self.resized(dict.fromkeys(self.sizes, 1))

    def resized(self, sizes: Mapping[str, int]) -> Layer:
        """Return a copy of the layer with other sizes by axis name; axes that are not named keep theirs."""
        return Layer(self.mixer.resized(sizes), self.channel.resized(sizes))

    def completed(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return `sizes` with those of children that follow: an axis keeps its ratio to a parent that `sizes` names."""
        follow = {
            axis.name: self.sizes[axis.name] // self.sizes[axis.parent] * sizes[axis.parent]
            for axis in self.axes
            if axis.name not in sizes and axis.parent in sizes
        }
        return {**sizes, **follow}


def array_axes(names: Sequence[str]) -> tuple[str, ...]:
    """Return the axes whose sizes multiply to an array's size: without parents of other axes that it names."""
    parents = {AXES[name].parent for name in names if name in AXES}
    return tuple(name for name in names if name not in parents)


def scan_groups(layers: Sequence[Layer]) -> tuple[tuple[int, int, Layer], ...]:
    """Group equal neighbours as (first layer, number of layers, layer); each group is one scan."""
    result, start = [], 0
    for layer, group in itertools.groupby(layers):
        length = len(list(group))
        result.append((start, length, layer))
        start += length
    return tuple(result)


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Return one layer's sizes as text, such as "6/2 heads, 64 neurons" (query heads / key/value heads)."""
    parents = {AXES[name].parent for name in sizes}
    texts = []
    for name, size in sizes.items():
        axis = AXES[name]
        if axis.parent and axis.channels and size != sizes[axis.parent]:
            texts.append(f"{size}/{sizes[axis.parent]} {axis.title.split()[-1]}")
        elif axis.parent and not axis.channels:
            texts.append(f"{sizes[axis.parent]} {AXES[axis.parent].title} of {size // sizes[axis.parent]:,} neurons")
        elif name not in parents:
            texts.append(f"{size:,} {axis.title.split()[-1]}")
    return ", ".join(texts)


def describe_layers(sizes: Sequence[Mapping[str, int]], windows: Sequence[Any] = (), most: int | None = None) -> str:
    """Return layer sizes as text, such as "3 x (6/2 heads, 64 neurons), 1 x (4/2 heads, 64 neurons)".

    With the `windows` of the layers, the text also says how many have none. Only the first `most` groups of equal
    neighbours are listed, with the number of all layers.
    """
    groups, start = [], 0
    for text, alike in itertools.groupby(map(describe_sizes, sizes)):
        stop = start + len(list(alike))
        full = list(windows[start:stop]).count(None)
        without = f", {full} of them without windows" if 0 < full < stop - start else ""
        groups.append(f"{stop - start} x ({text}){without}")
        start = stop
    more = [] if most is None or len(groups) <= most else [f"... ({len(sizes)} layers)"]
    return ", ".join([*(groups[:most] if more else groups), *more])
