"""Next-token cross-entropy in chunks of the sequence, so that no [batch, seq, vocab] array exists."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlmprune_jax.config import IGNORED


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32[...] negative log-probability of int[...] targets.

    The target is picked with a mask instead of a gather, so that a vocabulary split over devices stays split; times the
    mask, not by a select, whose zeros XLA would keep in memory as an array of the logits' size.
    """
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,)) == targets[..., None]
    picked = jnp.sum(logits * hit.astype(logits.dtype), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[batch, seq, ...] -> [n, batch, chunk, ...]: at least two chunks of at most `size`; `fill` fills up the last."""
    batch, seq = x.shape[:2]
    size = min(size, -(-seq // 2))
    x = jnp.pad(x, ((0, 0), (0, -seq % size)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)


def cross_entropy_sum(
    hidden: jax.Array, head: Callable[[jax.Array], jax.Array], labels: jax.Array, *, chunk: int
) -> jax.Array:
    """float32[] sum over int[batch, seq] labels (not shifted, -100 ignored); `head` gives float32 logits of states."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)

    @jax.checkpoint  # else the logits of all chunks wait for a gradient
    def body(total: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        states, wanted = x
        return total + jnp.sum(jnp.where(wanted == IGNORED, 0.0, cross_entropy(head(states), wanted))), None

    return jax.lax.scan(body, jnp.float32(0), (chunks(hidden, chunk, 0), chunks(targets, chunk, IGNORED)))[0]
