"""Gated delta net: the mixer of `DeltaNet` layers, a linear recurrence with a matrix per value head as its state.

The recurrence runs in chunks: within one, a triangular system gives all its updates at once (Yang et al. 2024, arXiv
2406.06484); between chunks only the matrices are carried. Numbers are float32 or wider, whatever the model's dtype.
Padding never reaches the state: rows are computed with their real tokens first, and padding neither decays nor writes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.core.models.context import Builder, Context, LayerState, Mixed, dropout_masks
from vlmprune_jax.core.models.layers import Leaf, Norm, at_layer, broadcast, widen
from vlmprune_jax.core.models.mixers.short_conv import RealFirst, convolve, write_layer

CHUNK = 64  # positions per chunk; a shorter sequence is a single chunk
_EPS = 1e-6  # added to squared lengths of queries and keys
_PRECISE = jax.lax.Precision.HIGHEST


class DeltaState(NamedTuple):
    """Cached state of delta nets in a run of equal layers; both arrays have a leading layer axis."""

    tail: jax.Array
    """[layer, batch, taps - 1, channels], the last inputs of the convolution: queries, keys and values."""

    matrix: jax.Array
    """float32[layer, batch, delta_heads, delta_key, delta_value]."""


class DeltaNet(nnx.Module):
    """Gated delta net: causal convolutions of queries, keys and values, the recurrence, and a gated norm."""

    writer = "out_proj"
    state_axes = ((None, "batch", None, None), (None, "batch", "delta_heads", None, None))

    def __init__(self, build: Builder):
        self.facts, sizes, stream = build.part, build.sizes, (build.names.axis,)
        keys, values, heads = ("delta_groups", "delta_key"), ("delta_heads", "delta_value"), ("delta_heads",)
        outputs = {"q_proj": keys, "k_proj": keys, "v_proj": values, "z_proj": values, "b_proj": heads, "a_proj": heads}
        self.inputs = tuple(outputs)
        for name, out in outputs.items():
            setattr(self, name, build.projection(name, out, stream))
        for name, out in {"q_conv": keys, "k_conv": keys, "v_conv": values}.items():
            setattr(self, name, Leaf(sizes, (*out, "tap")))
        self.decay, self.step = Leaf(sizes, heads), Leaf(sizes, heads)
        self.norm = Norm(sizes, "delta_value", kind="rms", eps=build.cfg.block.norm_eps)
        self.out_proj = build.projection("out_proj", stream, values)

    def _convolved(self, x: list[jax.Array], before: jax.Array | None) -> tuple[list[jax.Array], jax.Array]:
        """Return silu(convolution) of q, k and v in `x`, and the convolution's inputs, preceded by `before`."""
        shapes = [array.shape[2:] for array in x]
        flat = jnp.concatenate([array.reshape(*array.shape[:2], -1) for array in x], axis=-1)
        taps = [getattr(self, name).weight.get_value() for name in ("q_conv", "k_conv", "v_conv")]
        kernel = jnp.concatenate([tap.reshape(-1, tap.shape[-1]) for tap in taps], axis=0)
        mixed, seen = convolve(flat, kernel, before)
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
        pieces = jnp.split(jax.nn.silu(mixed), ends, axis=-1)
        return [p.reshape(*p.shape[:2], *s) for p, s in zip(pieces, shapes, strict=True)], seen

    def __call__(self, x: jax.Array, ctx: Context, state: LayerState | None) -> Mixed:
        """Run the delta net on its input float[batch, seq, embed], and update the cached state."""
        rows = RealFirst.of(ctx, x.shape[1])
        x = rows.take(x)
        projections = [getattr(self, name) for name in (*self.inputs, "out_proj")]
        masks = dropout_masks(ctx.dropout_key, x, projections)
        q, k, v, z, b, a = (module(x, mask) for module, mask in zip(projections[:-1], masks[:-1], strict=True))
        before = None if state is None else at_layer(*state)
        (q, k, v), seen = self._convolved([q, k, v], None if before is None else before.tail)
        beta = widen(jax.nn.sigmoid(b))
        decay, step = (broadcast(widen(leaf.weight.get_value()), 3) for leaf in (self.decay, self.step))
        g = -jnp.exp(decay) * jax.nn.softplus(widen(a) + step)
        if rows.valid is not None:
            real = rows.valid[:, :, None]
            beta, g = jnp.where(real, beta, 0), jnp.where(real, g, 0)
        q, k = unit(widen(q)) * self.facts.key_dim**-0.5, unit(widen(k))
        matrix = None if before is None else before.matrix
        out, matrix = (
            recurrent(q, k, widen(v), beta, g, matrix) if x.shape[1] == 1 else chunked(q, k, widen(v), beta, g, matrix)
        )
        mixed = self.norm(out.astype(x.dtype))
        mixed = (widen(mixed) * jax.nn.silu(widen(z))).astype(x.dtype)
        updated = None
        if state is not None:
            updated = write_layer(state, DeltaState(rows.tail(seen, self.facts.taps - 1), matrix))
        mixed = rows.restore(mixed)
        return Mixed(self.out_proj(mixed, masks[-1]), mixed, updated, None)

    @classmethod
    def empty_state(cls, part: Any, *, length: int, slots: int, batch: int, dtype: Any) -> DeltaState:
        """Return the initial cached state (zeros) of `length` equal delta nets; it does not depend on `slots`."""
        del slots
        matrix = (length, batch, part.delta_heads, part.key_dim, part.value_dim)
        full = np.promote_types(dtype, np.float32)
        return DeltaState(jnp.zeros((length, batch, part.taps - 1, part.channels), dtype), jnp.zeros(matrix, full))


def unit(x: jax.Array) -> jax.Array:
    """Normalise vectors along the last axis to Euclidean length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)


def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array, matrix: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Run the recurrence for one token per sequence; return the token's outputs and the new state matrices.

    The old matrices are read once, for keys and queries together: S^T q = exp(g) S_old^T q + update (k^T q).
    """
    group = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x[:, 0], group, axis=1) for x in (q, k))
    v, beta, g = v[:, 0], beta[:, 0], g[:, 0]
    if matrix is None:
        matrix = jnp.zeros((*v.shape[:2], k.shape[-1], v.shape[-1]), v.dtype)
    decay = jnp.exp(g)[..., None, None]
    read = jnp.einsum("bhck,bhkv->bhcv", jnp.stack([k, q], axis=2), matrix, precision=_PRECISE) * decay
    update = beta[..., None] * (v - read[:, :, 0])
    out = read[:, :, 1] + update * jnp.sum(k * q, axis=-1, keepdims=True)
    return out[:, None], matrix * decay + k[..., :, None] * update[..., None, :]


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array, matrix: jax.Array | None
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
    if matrix is None:
        matrix = jnp.zeros((batch, heads, k.shape[-1], v.shape[-1]), v.dtype)

    def chunks(x: jax.Array) -> jax.Array:
        """Split x [batch, seq, heads, ...] into zero-padded chunks [chunk, batch, heads, position, ...]."""
        x = jnp.pad(x, ((0, 0), (0, n * size - length), *(((0, 0),) * (x.ndim - 2))))
        return jnp.moveaxis(x.reshape(batch, n, size, *x.shape[2:]), (1, 3), (0, 2))

    matrix, out = jax.lax.scan(
        jax.checkpoint(functools.partial(_chunk, group)), matrix, tuple(map(chunks, (q, k, v, beta, g)))
    )
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, n * size, heads, v.shape[-1])
    assert matrix is not None
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
    place = jnp.arange(g.shape[-1])
    past = (place[:, None] >= place[None, :])[None, None]
    decay = jnp.exp(jnp.where(past, total[..., :, None] - total[..., None, :], -jnp.inf))
    strictly = (place[:, None] > place[None, :])[None, None]
    lower = jnp.where(strictly, of_keys * beta[..., None] * decay, 0)
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
    place = jnp.arange(lower.shape[-1])

    def double(step: Any, inverse: jax.Array) -> jax.Array:
        row, column = place[:, None] >> step, place[None, :] >> step  # block number of each row and column
        corners = jnp.where((row >> 1 == column >> 1) & (row > column), lower, 0)
        return inverse - _matmul(inverse, _matmul(corners, inverse))

    # A loop, and the derivative below: compilers for TPUs take minutes for the products of an unrolled one.
    start = jnp.broadcast_to(jnp.eye(len(place), dtype=lower.dtype), lower.shape)
    return jax.lax.fori_loop(0, (len(place) - 1).bit_length(), double, start)


def _inverse_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Return the gradient of `lower`: d(m^-1) = -m^-1 dm m^-1."""
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-_matmul(turned, _matmul(gradient, turned)),)


_inverse.defvjp(lambda lower: (_inverse(lower),) * 2, _inverse_backward)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=_PRECISE)
