"""Mixers whose state has a fixed size: gated delta net (`DeltaNet`) and gated short convolution (`ShortConv`).

Both have a causal convolution, whose state is its last inputs. Padding never reaches the state: rows are computed with
their real tokens first, and padding neither decays nor writes.

The delta net's recurrence has a matrix per value head as its state, and runs in chunks: within one, a triangular system
gives all its updates at once (Yang et al. 2024, arXiv 2406.06484); between chunks only the matrices are carried.
Numbers are float32 or wider, whatever the model's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.models.context import Builder, Context, LayerState, Mixed, dropout_masks
from vlmprune_jax.core.models.layers import Leaf, Norm, at_layer, broadcast, widen

CHUNK = 64  # positions per chunk; a shorter sequence is a single chunk
_EPS = 1e-6  # added to squared lengths of queries and keys
_PRECISE = jax.lax.Precision.HIGHEST
_matmul = functools.partial(jnp.matmul, precision=_PRECISE)
State = tuple[jax.Array, ...]  # arrays of `Mixer.state`, with the rows of a batch


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
        places = jnp.argsort(self.order, axis=1)
        return jnp.take_along_axis(x, places.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), axis=1)

    def convolve(self, x: jax.Array, kernel: jax.Array, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Return the causal depthwise convolution of x [batch, seq, channels], and its last inputs for the next call.

        `kernel`: [channels, taps], the last tap for the current position. `before`: [batch, taps - 1, channels], the
        last inputs of the previous call (None: zeros).
        """
        (channels, taps), length = kernel.shape, x.shape[1]
        if before is None:
            before = jnp.zeros((x.shape[0], taps - 1, channels), x.dtype)
        inputs = jnp.concatenate([before, x], axis=1)
        mixed = sum(inputs[:, i : i + length] * kernel[None, None, :, i] for i in range(taps))
        assert not isinstance(mixed, int)
        if self.valid is None:
            return mixed, inputs[:, length:]
        last = self.valid.sum(axis=1, dtype=jnp.int32)[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)[None]
        return mixed, jnp.take_along_axis(inputs, last[:, :, None], axis=1)


class Recurrent(nnx.Module):
    """Base class: projections of the input, a computation with a state, and an output projection."""

    writer = "out_proj"
    inputs: tuple[str, ...]  # names of the projections of the input

    def mix(
        self, projected: Sequence[jax.Array], rows: RealFirst, before: State | None, dtype: Any
    ) -> tuple[jax.Array, State]:
        """Return the input of the output projection, in `dtype`, and the state after these positions.

        `projected`: outputs of the input projections, [batch, seq, ...]; `before`: the state before (None: zeros).
        """
        raise NotImplementedError

    def __call__(self, x: jax.Array, ctx: Context, state: LayerState | None) -> Mixed:
        """Run the mixer on its input float[batch, seq, embed], and update the cached state."""
        rows = RealFirst.of(ctx, x.shape[1])
        x = rows.take(x)
        *projections, out_proj = (getattr(self, name) for name in (*self.inputs, self.writer))
        *masks, last = dropout_masks(ctx.dropout_key, x, [*projections, out_proj])
        projected = [projection(x, mask) for projection, mask in zip(projections, masks, strict=True)]
        mixed, after = self.mix(projected, rows, None if state is None else at_layer(*state), x.dtype)
        mixed, updated = rows.restore(mixed), None
        if state is not None:
            updated = tuple(
                jax.lax.dynamic_update_index_in_dim(stacked, new.astype(stacked.dtype), state.layer, axis=0)
                for stacked, new in zip(state.stacked, after, strict=True)
            )
        return Mixed(out_proj(mixed, last), mixed, updated, None)


class ShortConv(Recurrent):
    """Gated short convolution: out_proj(c * convolution(b * x)); b, c and x are projections of the mixer's input."""

    inputs = ("b_proj", "c_proj", "x_proj")

    def __init__(self, build: Builder):
        stream = (build.names.axis,)
        for name in self.inputs:
            setattr(self, name, build.projection(name, ("conv",), stream))
        self.conv = Leaf(build.sizes, ("conv", "tap"))
        self.out_proj = build.projection("out_proj", stream, ("conv",))

    def mix(
        self, projected: Sequence[jax.Array], rows: RealFirst, before: State | None, dtype: Any
    ) -> tuple[jax.Array, State]:
        """Return c * convolution(b * x), and the last inputs of the convolution."""
        b, c, x = projected
        mixed, tail = rows.convolve(b * x, self.conv.weight.get_value(), None if before is None else before[0])
        return c * mixed, (tail,)


class DeltaNet(Recurrent):
    """Gated delta net: causal convolutions of queries, keys and values, the recurrence, and a gated norm."""

    inputs = ("q_proj", "k_proj", "v_proj", "z_proj", "b_proj", "a_proj")

    def __init__(self, build: Builder):
        self.part, sizes, stream = build.part, build.sizes, (build.names.axis,)
        keys, values, heads = ("delta_groups", "delta_key"), ("delta_heads", "delta_value"), ("delta_heads",)
        for name, out in zip(self.inputs, (keys, keys, values, values, heads, heads), strict=True):
            setattr(self, name, build.projection(name, out, stream))
        for name, out in {"q_conv": keys, "k_conv": keys, "v_conv": values}.items():
            setattr(self, name, Leaf(sizes, (*out, "tap")))
        self.decay, self.step = Leaf(sizes, heads), Leaf(sizes, heads)
        self.norm = Norm(sizes, "delta_value", kind="rms", eps=build.cfg.block.norm_eps)
        self.out_proj = build.projection("out_proj", stream, values)

    def mix(
        self, projected: Sequence[jax.Array], rows: RealFirst, before: State | None, dtype: Any
    ) -> tuple[jax.Array, State]:
        """Return the gated outputs of the recurrence, the last inputs of the convolution, and the matrices."""
        *convolved, z, b, a = projected
        tail, matrix = before or (None, None)
        flat = jnp.concatenate([array.reshape(*array.shape[:2], -1) for array in convolved], axis=-1)
        taps = [getattr(self, name).weight.get_value() for name in ("q_conv", "k_conv", "v_conv")]
        kernel = jnp.concatenate([tap.reshape(-1, tap.shape[-1]) for tap in taps], axis=0)
        mixed, tail = rows.convolve(flat, kernel, tail)
        ends = np.cumsum([math.prod(array.shape[2:]) for array in convolved])[:-1].tolist()
        pieces = jnp.split(jax.nn.silu(mixed), ends, axis=-1)
        q, k, v = (widen(piece.reshape(array.shape)) for piece, array in zip(pieces, convolved, strict=True))
        beta = widen(jax.nn.sigmoid(b))
        decay, step = (broadcast(widen(leaf.weight.get_value()), 3) for leaf in (self.decay, self.step))
        g = -jnp.exp(decay) * jax.nn.softplus(widen(a) + step)
        if rows.valid is not None:
            real = rows.valid[:, :, None]
            beta, g = jnp.where(real, beta, 0), jnp.where(real, g, 0)
        if matrix is None:
            matrix = jnp.zeros((len(v), v.shape[2], k.shape[-1], v.shape[-1]), v.dtype)
        run = recurrent if v.shape[1] == 1 else chunked
        out, matrix = run(unit(q) * self.part.key_dim**-0.5, unit(k), v, beta, g, matrix)
        mixed = self.norm(out.astype(dtype))
        return (widen(mixed) * jax.nn.silu(widen(z))).astype(dtype), (tail, matrix)


def unit(x: jax.Array) -> jax.Array:
    """Normalise vectors along the last axis to Euclidean length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence for one token per sequence; return the token's outputs and the new state matrices.

    The old matrices are read once, for keys and queries together: S^T q = exp(g) S_old^T q + update (k^T q).
    """
    group = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x[:, 0], group, axis=1) for x in (q, k))
    v, beta, g = v[:, 0], beta[:, 0], g[:, 0]
    decay = jnp.exp(g)[..., None, None]
    read = jnp.einsum("bhck,bhkv->bhcv", jnp.stack([k, q], axis=2), matrix, precision=_PRECISE) * decay
    update = beta[..., None] * (v - read[:, :, 0])
    out = read[:, :, 1] + update * jnp.sum(k * q, axis=-1, keepdims=True)
    return out[:, None], matrix * decay + k[..., :, None] * update[..., None, :]


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence over all positions; return outputs [batch, seq, heads, value] and the last matrices.

    `q`, `k`: [batch, seq, groups, key], unit vectors (queries scaled); `v`: [batch, seq, heads, value]; `beta`, `g`:
    [batch, seq, heads], step sizes and logarithms of decays. Positions with beta = g = 0 leave the state alone. The
    backward pass computes a chunk again from its inputs and the matrices before it. Only these are stored: 64 KiB per
    token and layer for Qwen3.5-4B (16 groups, 32 heads, keys and values of 128 channels), until its layer is done.
    """
    batch, length, heads = v.shape[:3]
    group, size = heads // q.shape[2], min(CHUNK, length)
    n = -(-length // size)

    def chunks(x: jax.Array) -> jax.Array:
        """Split x [batch, seq, heads, ...] into zero-padded chunks [chunk, batch, heads, position, ...]."""
        x = jnp.pad(x, ((0, 0), (0, n * size - length), *(((0, 0),) * (x.ndim - 2))))
        return jnp.moveaxis(x.reshape(batch, n, size, *x.shape[2:]), (1, 3), (0, 2))

    matrix, out = jax.lax.scan(
        jax.checkpoint(functools.partial(_chunk, group)), matrix, tuple(map(chunks, (q, k, v, beta, g)))
    )
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, n * size, heads, v.shape[-1])
    return out[:, :length], matrix


def _chunk(group: int, matrix: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Run one chunk of positions; return the state matrices after it, and outputs [batch, heads, position, value]."""
    q, k, v, beta, g = arrays
    product = functools.partial(jnp.einsum, precision=_PRECISE)
    # products of queries and keys once per group, before both are repeated for each value head
    of_keys, of_queries = (jnp.repeat(product("bgik,bgjk->bgij", x, k), group, axis=1) for x in (k, q))
    q, k = (jnp.repeat(x, group, axis=1) for x in (q, k))
    total = jnp.cumsum(g, axis=-1)
    # masked before exp: differences above the diagonal may overflow
    length = g.shape[-1]
    past = jnp.tri(length, dtype=bool)[None, None]
    decay = jnp.exp(jnp.where(past, total[..., :, None] - total[..., None, :], -jnp.inf))
    lower = jnp.where(jnp.tri(length, k=-1, dtype=bool)[None, None], of_keys * beta[..., None] * decay, 0)
    right = jnp.concatenate([v, k * jnp.exp(total)[..., None]], axis=-1) * beta[..., None]
    solved = product("bhij,bhjc->bhic", _inverse(lower), right)
    update, read = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    values = update - product("bhik,bhkv->bhiv", read, matrix)
    out = product("bhik,bhkv->bhiv", q * jnp.exp(total)[..., None], matrix)
    out = out + product("bhij,bhjv->bhiv", of_queries * decay, values)
    last = total[..., -1:]
    matrix = matrix * jnp.exp(last)[..., None] + product(
        "bhik,bhiv->bhkv", k * jnp.exp(last - total)[..., None], values
    )
    return matrix, out


@jax.custom_vjp
def _inverse(lower: jax.Array) -> jax.Array:
    """Return the inverse of I + `lower`, for strictly lower triangular matrices float32[..., n, n].

    With [[a, 0], [c, b]]^-1 = [[a^-1, 0], [-b^-1 c a^-1, b^-1]] the inverses of diagonal blocks of 1, 2, 4, ... rows
    follow from each other. A batched triangular solve is not used: on CPUs, jaxlib 0.10.2 splits it over XLA's threads
    and waits for them in one of these threads, so that two solves at a time on two cores wait forever.
    """
    position = jnp.arange(lower.shape[-1])

    def double(step: Any, inverse: jax.Array) -> jax.Array:
        row, column = position[:, None] >> step, position[None, :] >> step  # block number of each row and column
        corners = jnp.where((row >> 1 == column >> 1) & (row > column), lower, 0)
        return inverse - _matmul(inverse, _matmul(corners, inverse))

    # A loop, and the derivative below: compilers for TPUs take minutes for the products of an unrolled one.
    start = jnp.broadcast_to(jnp.eye(len(position), dtype=lower.dtype), lower.shape)
    return jax.lax.fori_loop(0, (len(position) - 1).bit_length(), double, start)


def _inverse_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Return the gradient of `lower`: d(m^-1) = -m^-1 dm m^-1."""
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(turned, _matmul(gradient, turned)),)


_inverse.defvjp(lambda lower: (_inverse(lower),) * 2, _inverse_backward)
