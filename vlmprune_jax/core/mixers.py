"""Configurations of mixers, which combine positions: attention, gated delta net, short convolution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.part import Axis, Part

NO_LAYER = -1  # `Attention.source` in a stack that cannot be computed, because no layer has the keys and values


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of rotary position embedding, as in the Hugging Face fields `rope_theta` and `rope_scaling`.

    `kind` is "default", "linear", "llama3", "yarn", "longrope" or "proportional"; the other fields are its parameters,
    0 or empty if unused. Proportional RoPE rotates only the share `rotated` of all frequencies (the fastest ones).
    LongRoPE divides each frequency by its short factor. As soon as one position reaches `original_max_positions`, the
    whole batch uses the long factors instead.

    `sections` (M-RoPE) are the numbers of frequencies that rotate with an image's frame, row and column. These
    frequencies are in consecutive blocks, or `interleaved`.
    """

    theta: float
    kind: str
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    rotated: float = 1.0

    def __post_init__(self) -> None:
        wrong = (
            (self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor)
            or (self.kind == "yarn" and not (self.theta > 1 and 0 < self.beta_slow <= self.beta_fast))
            or (self.kind in ("llama3", "yarn") and self.original_max_positions < 1)
        )
        if wrong:
            raise UserError(
                f"{self.kind} rope with theta {self.theta:g}, original_max_position_embeddings "
                f"{self.original_max_positions}, low and high_freq_factor {self.low_freq_factor:g} and "
                f"{self.high_freq_factor:g}, beta_slow and beta_fast {self.beta_slow:g} and {self.beta_fast:g}: "
                "inconsistent values: check rope_parameters"
            )

    def check(self, rotary_dim: int) -> None:
        """Raise UserError unless scaling factors or M-RoPE sections match the number of rotary frequencies."""
        frequencies, sections = rotary_dim // 2, self.sections
        if sections and (len(sections) != 3 or min(sections) < 0 or sum(sections) != frequencies):
            raise UserError(
                f"mrope_section {list(sections)} must be three numbers that sum to {frequencies} (rotary_dim / 2)"
            )
        for factors in (self.short_factors, self.long_factors):
            if self.kind == "longrope" and len(factors) != frequencies:
                raise UserError(
                    f"longrope: short_factor and long_factor have {len(factors)} numbers, expected "
                    f"{frequencies} (one per rotary frequency)"
                )


class StateArray(NamedTuple):
    """Array that generation caches for one sequence in one layer."""

    sizes: Mapping[str, int]
    """Size of every named axis, in order; "batch" is 1."""

    wide: bool = False
    """True if the values are float32 or wider, whatever the model's data type."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.sizes.values())


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

    def state(self, slots: int) -> tuple[StateArray, ...]:
        """Return the arrays that generation caches for a sequence with room for `slots` tokens; () for none."""
        raise NotImplementedError

    def state_size(self, length: int) -> int:
        """Return the number of values that generation caches for a sequence of `length` tokens."""
        return sum(array.size for array in self.state(min(self.window or length, length)))

    def state_bytes(self, length: int, itemsize: float) -> float:
        """Return the bytes that generation caches for a sequence of `length` tokens, in values of `itemsize` bytes."""
        arrays = self.state(min(self.window or length, length))
        return sum(array.size * (4 if array.wide else itemsize) for array in arrays)


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

    @property
    def pattern(self) -> tuple[int, RopeConfig | None, int, bool]:
        """Fields that determine masks and rotary tables; layers in which they are equal share them."""
        return self.window or 0, self.rope, self.rotated, self.sees_images

    def mixing_flops(self, length: int, *, last: bool = False) -> int:
        """Return the FLOPs of attention scores and sums: 4 per channel for every key that a query attends to."""
        span = min(self.window or length, length)  # from this position on a query sees a whole window
        pairs = span if last else span * (span + 1) // 2 + (length - span) * span
        return 4 * pairs * self.q_heads * self.head_dim

    def state(self, slots: int) -> tuple[StateArray, ...]:
        """Return keys and values; () if another layer caches them."""
        keys = StateArray({"slots": slots, "kv_heads": self.kv_heads, "batch": 1, "head": self.head_dim})
        return () if self.source is not None else (keys, keys)


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
        tail, matrix = self.state(length)
        return (1 if last else length) * (8 * matrix.size + 2 * self.taps * tail.sizes["channel"])

    def state(self, slots: int) -> tuple[StateArray, ...]:
        """Return the last inputs of the convolution (queries, keys and values), and the matrices."""
        channels = 2 * self.delta_groups * self.key_dim + self.delta_heads * self.value_dim
        matrix = {"delta_heads": self.delta_heads, "delta_key": self.key_dim, "delta_value": self.value_dim}
        tail = {"batch": 1, "tap": self.taps - 1, "channel": channels}
        return StateArray(tail), StateArray({"batch": 1, **matrix}, wide=True)


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

    def state(self, slots: int) -> tuple[StateArray, ...]:
        """Return the last inputs of the convolution."""
        return (StateArray({"batch": 1, "tap": self.taps - 1, "channel": self.channels}),)
