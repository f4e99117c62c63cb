"""Gated short convolution: the mixer of `ShortConv` layers, and causal convolutions whose state padding never reaches.

Rows are computed with their real tokens first, so that the last inputs of a row are those of real tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.models.context import Builder, Context, LayerState, Mixed, dropout_masks
from vlmprune_jax.core.models.layers import Leaf, at_layer


class RealFirst(NamedTuple):
    """Reordering of each row's positions that puts padding last; both fields are None if there is no padding."""

    order: jax.Array | None
    """int[batch, seq], the original position of each entry."""

    valid: jax.Array | None
    """bool[batch, seq], True for real tokens, in the new order."""

    @classmethod
    def of(cls, ctx: Context, length: int) -> RealFirst:
        """Return the reordering for a call that computes `length` positions (None fields in decoding: no padding)."""
        if ctx.valid is None or length == 1:
            return cls(None, None)
        valid = jax.lax.dynamic_slice_in_dim(ctx.valid, ctx.slot, length, axis=1)
        order = jnp.argsort(~valid, axis=1, stable=True)
        return cls(order, jnp.take_along_axis(valid, order, axis=1))

    def take(self, x: jax.Array) -> jax.Array:
        """Reorder the positions of x [batch, seq, embed] so that padding comes last."""
        return x if self.order is None else jnp.take_along_axis(x, self.order[:, :, None], axis=1)

    def restore(self, x: jax.Array) -> jax.Array:
        """Return the positions of x [batch, seq, ...] to their original order (undoes `take`)."""
        if self.order is None:
            return x
        return jnp.take_along_axis(
            x, jnp.argsort(self.order, axis=1).reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), axis=1
        )

    def tail(self, inputs: jax.Array, count: int) -> jax.Array:
        """Return the convolution's inputs at the last `count` tokens that are not padding, for the next call.

        `inputs`: [batch, count + seq, channels]; the first `count` are kept from the previous call.
        """
        if self.valid is None:
            return inputs[:, inputs.shape[1] - count :]
        at = self.valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        return jnp.take_along_axis(inputs, at[:, :, None], axis=1)


def convolve(x: jax.Array, kernel: jax.Array, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the causal depthwise convolution of x [batch, seq, channels], and x preceded by the earlier inputs.

    `kernel`: [channels, taps], the last tap for the current position. `before`: [batch, taps - 1, channels], the
    earlier inputs (None: zeros).
    """
    channels, taps = kernel.shape
    if before is None:
        before = jnp.zeros((x.shape[0], taps - 1, channels), x.dtype)
    inputs = jnp.concatenate([before, x], axis=1)
    mixed = sum(inputs[:, i : i + x.shape[1]] * kernel[None, None, :, i] for i in range(taps))
    assert not isinstance(mixed, int)
    return mixed, inputs


class ShortConv(nnx.Module):
    """Gated short convolution: out_proj(c * convolution(b * x)); b, c and x are projections of the branch's input.

    The cached state of a run of equal layers is the array of the last inputs of their convolutions.
    """

    writer = "out_proj"
    state_axes = ((None, "batch", None, None),)

    def __init__(self, build: Builder):
        self.facts, stream = build.part, (build.names.axis,)
        for name in ("b_proj", "c_proj", "x_proj"):
            setattr(self, name, build.projection(name, ("conv",), stream))
        self.conv = Leaf(build.sizes, ("conv", "tap"))
        self.out_proj = build.projection("out_proj", stream, ("conv",))

    def __call__(self, x: jax.Array, ctx: Context, state: LayerState | None) -> Mixed:
        """Run the gated convolution on its input float[batch, seq, embed], and update the cached state."""
        rows = RealFirst.of(ctx, x.shape[1])
        x = rows.take(x)
        projections = [getattr(self, name) for name in ("b_proj", "c_proj", "x_proj", "out_proj")]
        *masks, last = dropout_masks(ctx.dropout_key, x, projections)
        b, c, values = (module(x, mask) for module, mask in zip(projections[:-1], masks, strict=True))
        before = None if state is None else at_layer(*state)
        mixed, inputs = convolve(b * values, self.conv.weight.get_value(), before)
        updated = None
        if state is not None:
            updated = write_layer(state, rows.tail(inputs, self.facts.taps - 1))
        mixed = rows.restore(c * mixed)
        return Mixed(projections[-1](mixed, last), mixed, updated, None)

    @classmethod
    def empty_state(cls, part: Any, *, length: int, slots: int, batch: int, dtype: Any) -> jax.Array:
        """Return the initial inputs (zeros) of `length` equal convolutions, [layer, batch, taps - 1, channels]."""
        del slots
        return jnp.zeros((length, batch, part.taps - 1, part.channels), dtype)


def write_layer(state: LayerState, new: Any) -> Any:
    """Return the stacked states of a run of equal layers, with the current layer's state replaced by `new`."""
    return jax.tree.map(
        lambda leaf, values: jax.lax.dynamic_update_index_in_dim(leaf, values.astype(leaf.dtype), state.layer, axis=0),
        state.stacked,
        new,
    )
