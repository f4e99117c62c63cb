"""Block Influence: how much each layer changes its input (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlmprune_jax.core.config import STACKS
from vlmprune_jax.models.block import BlockValues
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.criteria.activations import Blocks, Tokens
from vlmprune_jax.prune.criteria.calibration import positive
from vlmprune_jax.prune.criteria.criterion import Criterion, Parts, declared


def distances(blocks: Blocks, tokens: Tokens, *, reference_compat: bool) -> tuple[jax.Array, jax.Array]:
    """Return weighted sums over tokens of 1 - cos(input, output) of each layer, float[n_layers], and the sum of the
    weights.

    The last layer's output is taken after the final norm. A token whose input or output is zero contributes 0.5.
    `reference_compat` sums over all positions, padding included.
    """
    weight = jnp.ones_like(tokens.weight) if reference_compat else tokens.weight

    def tap(block: BlockValues) -> jax.Array:
        # where, not a product: padding may hold anything, and NaN * 0 is NaN
        distance = cosine_distance(block.before, block.after)
        return jnp.sum(jnp.where(weight > 0, weight * distance, jnp.zeros_like(distance)))

    return jnp.stack(blocks(tap)), jnp.sum(weight)


def mean_distance(sums: Any, model: Model, *, reference_compat: bool) -> Parts:
    """Return the float64[n_layers] mean over real tokens; `reference_compat`: the sums, as in the reference code."""
    total, tokens = sums
    return {"importance": total if reference_compat else total / positive(tokens)}


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return 1 - cos over the last axis in float32; 0.5 if a vector is zero.

    Computed as |a/|a| - b/|b||^2 / 2, which keeps its relative precision for the nearly equal states of deep layers,
    where 1 - cos cancels.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norm_a, norm_b = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    zero = (norm_a == 0) | (norm_b == 0)
    gap = a / jnp.where(zero, jnp.ones_like(norm_a), norm_a) - b / jnp.where(zero, jnp.ones_like(norm_b), norm_b)
    return jnp.where(zero[..., 0], jnp.float32(0.5), 0.5 * jnp.sum(gap * gap, axis=-1))


BLOCK_INFLUENCE = Criterion(
    scores=("layers",),
    needs="activations",
    function=distances,
    finish=mean_distance,
    options=declared("reference_compat"),
    journals=True,
    stacks=STACKS,
    splits=True,
)
