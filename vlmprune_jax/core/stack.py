"""Stacks of transformer blocks as frozen dataclasses: one shape per layer, and the kind of block that all share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

from vlmprune_jax.core.errors import UserError


@dataclass(frozen=True)
class LayerShape:
    """Widths of one transformer layer: numbers of query heads, key/value heads and MLP neurons.

    `window` is the layer's attention window, None for full attention (causal in a decoder): the number of tokens of a
    sliding window, or in a tower the side, in merged cells, of square windows. A `shared` layer has no keys and values
    of its own: it attends to those of the last layer before it that has, with the same window. Pruning never changes
    either, and plans do not record them.
    """

    q_heads: int
    kv_heads: int
    mlp: int
    window: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if min(*self.widths, 1 if self.window is None else self.window) < 1:
            raise UserError(
                f"{self}: numbers of heads, channels and neurons, and the attention window, must be at least 1"
            )
        if self.q_heads % self.kv_heads:
            raise UserError(f"{self}: q_heads must be a multiple of kv_heads (grouped-query attention)")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Tuple (q_heads, kv_heads, mlp) of the layer, the form in which plans and `per_layer_shapes` store widths."""
        return self.q_heads, self.kv_heads, self.mlp

    def with_widths(self, q_heads: int, kv_heads: int, mlp: int) -> LayerShape:
        """Return a copy of the layer shape with other numbers of heads and neurons."""
        return dataclasses.replace(self, q_heads=q_heads, kv_heads=kv_heads, mlp=mlp)


_CHOICES = {
    "block": ("sequential", "parallel"),
    "norm": ("rms", "layer"),
    "norm_place": ("before", "after", "both"),
    "mlp_kind": ("gated", "plain"),
}


@dataclass(frozen=True)
class Stack:
    """Configuration of the decoder's or the vision tower's transformer layers, with one `LayerShape` per layer.

    The fields by keyword describe the block (`models/block.py`). `norm` is "rms" or "layer"; `norm_place` is "before"
    each branch, "after" it (its output is normalised before it is added to the stream) or "both"; norms multiply by
    their weight + `norm_offset`. `block` is "sequential", or "parallel" for x + attention(norm x) + mlp(norm x).
    `mlp_kind` is "gated" or "plain" (two projections). `qk_norm` normalises every query and key head; `layer_scale`
    scales what a branch adds, channel by channel. Attention scores are multiplied by `query_scale` (0: head_dim **
    -0.5); `v_norm` divides every value head by its root mean square. `clips` bounds inputs and outputs of every
    projection. A head is rotated in `rope_parts` independent parts.
    """

    causal: ClassVar[bool] = False  # whether a position sees only itself and those before it

    hidden_size: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    _: KW_ONLY
    norm_eps: float
    activation: str
    norm: str
    mlp_kind: str
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    block: str = "sequential"
    norm_place: str = "before"
    norm_offset: float = 0.0
    query_scale: float = 0.0
    v_norm: bool = False
    clips: bool = False
    rope_parts: int = 1

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} of a layer is not one of {', '.join(known)}")

    def producer(self, shape: LayerShape) -> int | None:
        """Return the number of the layer whose keys and values `shared` layers of this window reuse, or None."""
        found = [i for i, other in enumerate(self.layers) if not other.shared and other.window == shape.window]
        return found[-1] if found else None

    @property
    def producers(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values later layers reuse."""
        found = map(self.producer, {shape for shape in self.layers if shape.shared})
        return frozenset(number for number in found if number is not None)

    @property
    def even(self) -> bool:
        """True if all layers have equal widths, as stock transformers classes require."""
        return len({shape.widths for shape in self.layers}) <= 1

    def head_dim_of(self, shape: LayerShape) -> int:
        """Return the number of channels per attention head in a layer of this shape."""
        return self.head_dim

    def with_layers(self, layers: Sequence[LayerShape]) -> Self:
        """Return a copy of the stack config with other layer shapes."""
        return dataclasses.replace(self, layers=tuple(layers))

    def alone(self, shape: LayerShape) -> Self:
        """Return a copy of the stack config with a single layer of this shape."""
        return self.with_layers((shape,))


def runs(layers: Sequence[LayerShape]) -> tuple[tuple[int, int, LayerShape], ...]:
    """Group consecutive layers of equal shape as (first layer, number of layers, shape); each group is one scan."""
    result, start = [], 0
    for shape, group in itertools.groupby(layers):
        length = len(list(group))
        result.append((start, length, shape))
        start += length
    return tuple(result)


def describe_layers(layers: Sequence[LayerShape], most: int | None = None) -> str:
    """Return layer widths as text, such as "3 x (6/2 heads, 64 neurons), 1 x (4/2 heads, 64 neurons)".

    Only the first `most` groups of equal neighbours are listed, with the number of all layers.
    """
    parts = []
    for (q_heads, kv_heads, mlp), alike in itertools.groupby(layers, lambda shape: shape.widths):
        windows = [shape.window for shape in alike]
        heads = f"{q_heads} heads" if q_heads == kv_heads else f"{q_heads}/{kv_heads} heads"
        whole = windows.count(None)
        without = f", {whole} of them without windows" if 0 < whole < len(windows) else ""
        parts.append(f"{len(windows)} x ({heads}, {mlp:,} neurons){without}")
    more = [] if most is None or len(parts) <= most else [f"... ({len(layers)} layers)"]
    return ", ".join([*(parts[:most] if more else parts), *more])
