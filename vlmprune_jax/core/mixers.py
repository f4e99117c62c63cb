"""Configurations of mixers, which combine positions: attention, gated delta net, short convolution."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.part import Axis, Part
from vlmprune_jax.core.rope import RopeConfig

NO_LAYER = -1  # `Attention.source` in a stack that cannot be computed, because no layer has the keys and values


@dataclass(frozen=True)
class Mixer(Part):
    """Base class of mixers (attention, delta net, convolution), which combine positions of a sequence."""

    writer = "o_proj"
    settings = ("attn_layers", "heads_multiple")

    @property
    def window(self) -> int | None:
        """Maximum number of positions that the mixer combines for one token; None for no limit."""
        return None

    @property
    def source(self) -> int | None:
        """Number of the layer whose keys and values the mixer reads; None if it computes what it needs."""
        return None

    @property
    def group(self) -> int:
        """Number of units of the last axis per unit of the first, such as query heads per key/value head (or 1)."""
        return 1 if not self.axes else self.sizes[self.axes[-1].name] // self.sizes[self.root]

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return the FLOPs of mixing a causal sequence, without weight products; `last`: for its last token only."""
        raise NotImplementedError

    def state_size(self, length: int) -> int:
        """Return the number of values that generation caches for a sequence of `length` tokens."""
        raise NotImplementedError

    def state_bytes(self, length: int, itemsize: float) -> float:
        """Return the bytes that generation caches for a sequence of `length` tokens, in values of `itemsize` bytes."""
        return self.state_size(length) * itemsize


@dataclass(frozen=True)
class Attention(Mixer):
    """Grouped-query attention of one layer."""

    module = "self_attn"
    fixed_axes = (("head", "head_dim"), ("gate", "gates"))
    axes = (
        Axis("kv_heads", "key/value heads", channels="head", mesh="tensor"),
        Axis("q_heads", "query heads", parent="kv_heads", channels="head", mesh="tensor"),
    )

    gates: ClassVar[int] = 2
    """Outputs of a query projection with a gate: query and gate."""

    q_heads: int
    """Number of query heads."""

    kv_heads: int
    """Number of key/value heads; each serves equally many query heads."""

    window: int | None = None
    """Attention window, None for full attention (causal in a decoder).

    In a decoder, this is the number of tokens of a sliding window. In a vision tower, windows are squares, and this is
    their side in merged cells.
    """

    source: int | None = None
    """Number of the earlier layer whose keys and values this layer reuses; None if it computes its own.

    Pruning renumbers it (`layer.keep_layers`). `NO_LAYER` stands for a layer that pruning removed without a substitute.
    """

    _: KW_ONLY
    head_dim: int
    """Number of channels per head."""

    rope: RopeConfig | None = None
    """Rotary position embedding; None if the layer has none."""

    rotary_dim: int = 0
    """Number of leading channels of a head that rotary embedding rotates; 0 for all."""

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
    """True if the query projection also returns a gate: a head's result is multiplied by sigmoid(gate)."""

    sees_images: bool = False
    """True if image tokens also attend to later tokens of the same image."""

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
    def rotated(self) -> int:
        """Number of leading channels of a head that rotary embedding rotates."""
        return self.rotary_dim or self.head_dim

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return the FLOPs of attention scores and sums: 4 per channel for every key that a query attends to."""
        span = min(self.window or length, length)  # from this position on a query sees a whole window
        pairs = span if last else span * (span + 1) // 2 + (length - span) * span
        return 4 * pairs * self.q_heads * self.head_dim

    def state_size(self, length: int) -> int:
        """Return the number of cached keys and values, at most of one window; 0 if another layer caches them."""
        return 0 if self.source is not None else 2 * self.kv_heads * self.head_dim * min(self.window or length, length)


@dataclass(frozen=True)
class DeltaNet(Mixer):
    """Gated delta net of one layer (Yang et al. 2024, arXiv 2412.06464); its state is one matrix per value head.

    Per token: S = exp(g) S; S = S + k (beta (v - S^T k))^T; output S^T q.
    """

    module = "linear_attn"
    fixed_axes = (("delta_key", "key_dim"), ("delta_value", "value_dim"), ("tap", "taps"))
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

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return 8 FLOPs per token and state value (decay, reading, writing), plus the FLOPs of the convolution."""
        return (1 if last else length) * (8 * self._matrix_size + 2 * self.taps * self.channels)

    def state_size(self, length: int) -> int:
        """Return the number of values in the matrices and in the convolution's last inputs, for any `length`."""
        return self._matrix_size + (self.taps - 1) * self.channels

    def state_bytes(self, length: int, itemsize: float) -> float:
        """Return the bytes of the state; its matrices are in float32."""
        return 4 * self._matrix_size + (self.taps - 1) * self.channels * itemsize

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.delta_groups * self.key_dim + self.delta_heads * self.value_dim

    @property
    def _matrix_size(self) -> int:
        return self.delta_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class ShortConv(Mixer):
    """Gated short convolution of one layer (LFM2): a causal, depthwise convolution between two gates."""

    module = "short_conv"
    fixed_axes = (("conv", "channels"), ("tap", "taps"))
    why_fixed = "transformers gives its gates and state as many channels as the residual stream"

    channels: int
    """Channels of the convolution."""

    taps: int = 3
    """Positions that the convolution sees, the present one included."""

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return 2 FLOPs per channel, tap and token of the convolution, and 2 per channel and token of the gates."""
        return (1 if last else length) * 2 * (self.taps + 1) * self.channels

    def state_size(self, length: int) -> int:
        """Return the number of the convolution's last inputs, the same for every `length`."""
        return (self.taps - 1) * self.channels
