"""Stacks of transformer blocks as frozen dataclasses: the parts of each layer, and the kind of block that all share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import Layer, describe_layers, suppliers
from vlmprune_jax.core.mixers import NO_LAYER, Attention


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
