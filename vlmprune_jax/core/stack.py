"""Stacks of transformer blocks as frozen dataclasses: the parts of each layer, and the kind of block that all share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.parts import Axis, Layer, describe_layers

_CHOICES = {
    "block": ("sequential", "parallel"),
    "norm": ("rms", "layer"),
    "norm_place": ("before", "after", "both"),
    "mlp_kind": ("gated", "plain"),
}


@dataclass(frozen=True)
class Stack:
    """Configuration of the decoder's or the vision tower's transformer layers, one `Layer` each.

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
    layers: tuple[Layer, ...]
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

    def producer(self, window: int | None) -> int | None:
        """Return the number of the layer whose keys and values later layers with this window reuse, or None."""
        mixers = enumerate(layer.mixer for layer in self.layers)
        return max((i for i, mixer in mixers if not mixer.kv_shared and mixer.window == window), default=None)

    @property
    def producers(self) -> frozenset[int]:
        """Numbers of the layers whose keys and values later layers reuse."""
        numbers = map(self.producer, {layer.mixer.window for layer in self.layers if layer.mixer.kv_shared})
        return frozenset(number for number in numbers if number is not None)

    @property
    def even(self) -> bool:
        """True if all layers have equal widths, as stock transformers classes require."""
        return len({tuple(layer.sizes.items()) for layer in self.layers}) <= 1

    def head_dim_of(self, layer: Layer) -> int:
        """Return the number of channels per attention head in a layer."""
        return self.head_dim

    def channels_of(self, axis: Axis) -> int:
        """Return the number of channels that make up one unit of a prunable axis."""
        return self.head_dim if axis.channels else 1

    def describe(self, most: int | None = None) -> str:
        """Return the sizes of the layers as text (see `parts.describe_layers`)."""
        windows = [layer.mixer.window for layer in self.layers]
        return describe_layers([layer.sizes for layer in self.layers], windows, most)

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """Return a copy of the stack config with other layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    def alone(self, layer: Layer) -> Self:
        """Return a copy of the stack config with this layer alone."""
        return self.with_layers((layer,))
