"""Random numbers for dropout masks, equal to those of jax.random but computed in one pass over memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# Threefry-2x32: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, int, int]) -> jax.Array:
    """Return random bool[rows, seq, width], True with this probability; values equal those of jax.random.bernoulli.

    On CPUs, jax.random writes to memory after every fourth round of its generator, and dropout took 15 % of a step of
    SmolLM2-135M (docs/explanation/results.md). A row may have at most 2^32 values.
    """
    first, second = jax.random.key_data(key)[:2]
    schedule = (first, second, first ^ second ^ _PARITY)
    high, low = _counters(shape)
    high, low = high + first, low + second
    for block in range(5):
        for bits in _ROTATIONS[block % 2]:
            high = high + low
            low = (low << np.uint32(bits) | low >> np.uint32(32 - bits)) ^ high
        high = high + schedule[(block + 1) % 3]
        low = low + (schedule[(block + 2) % 3] + np.uint32(block + 1))
    # jax.random makes 23 bits a float32 in [0, 1), which it compares: the same as this.
    return (high ^ low) < np.uint32(math.ceil(float(np.float32(probability)) * 2**23) << 9)


def _counters(shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the upper and lower 32 bits of each element's index, uint32[rows, seq, width] each."""
    rows, seq, width = shape
    position, channel = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (1, 2))
    within = position * np.uint32(width) + channel
    start = (np.arange(rows, dtype=np.uint64) * np.uint64(seq * width))[:, None, None]
    low = within + start.astype(np.uint32)
    return (low < within).astype(jnp.uint32) + (start >> np.uint64(32)).astype(np.uint32), low
