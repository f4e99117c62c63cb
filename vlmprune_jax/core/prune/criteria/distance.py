"""Distances between states before and after layers: Block Influence (ShortGPT, arXiv 2403.03853) of each layer, and
the angle over several consecutive layers (arXiv 2403.17887).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.context import BlockValues
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.activations import Blocks, Tokens
from vlmprune_jax.core.prune.calibration import positive
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared


def distances(blocks: Blocks, tokens: Tokens, *, reference_compat: bool) -> tuple[jax.Array, jax.Array]:
    """Return weighted sums over tokens of 1 - cos(layer input, layer output) per layer, and the sum of weights.

    The last layer's output is the state after the final norm. A token whose input or output is zero contributes 0.5.
    `reference_compat`: sum over all positions, padding included.
    """
    weight = jnp.ones_like(tokens.weight) if reference_compat else tokens.weight

    def hook(block: BlockValues) -> jax.Array:
        # where, not a product: padding may hold anything, and NaN * 0 is NaN
        distance = cosine_distance(block.before, block.after)
        return jnp.sum(jnp.where(weight > 0, weight * distance, jnp.zeros_like(distance)))

    return jnp.stack(blocks(hook)), jnp.sum(weight)


def mean_distance(sums: Any, model: Model, *, reference_compat: bool, stack: str) -> Values:
    """Return each layer's cosine distance between input and output, averaged over tokens (Block Influence)."""
    total, tokens = sums
    return {Key(stack, None, LAYERS): total if reference_compat else total / positive(tokens)}


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return 1 - cosine similarity over the last axis in float32; 0.5, with gradient 0, if a vector is zero.

    It is computed as |a/|a| - b/|b||^2 / 2, which keeps its relative precision for the nearly equal states of deep
    layers; 1 - cos would cancel there.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    square_a, square_b = (jnp.sum(x * x, axis=-1, keepdims=True) for x in (a, b))
    zero = (square_a == 0) | (square_b == 0)
    gap = a / jnp.sqrt(jnp.where(zero, 1, square_a)) - b / jnp.sqrt(jnp.where(zero, 1, square_b))
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


def angles(blocks: Blocks, tokens: Tokens, *, layers_removed: int | None) -> tuple[jax.Array, jax.Array]:
    """Return sums over sequences of angles between states `layers_removed` layers apart, and the sequence count.

    Each row is represented by its last token with weight, and has the weight of this token. Raises UserError if
    `layers_removed` is not set, or leaves no layer.
    """
    if layers_removed is None:
        raise UserError("criterion 'angular' needs layers_removed= (the number of consecutive layers to remove)")
    weight = tokens.weight
    last = weight.shape[1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=1)
    counts = jnp.take_along_axis(weight, last[:, None], axis=1)[:, 0]

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]

    def hook(block: BlockValues) -> tuple[jax.Array, jax.Array]:
        return at_last(block.before), at_last(block.after)

    ends = blocks(hook)
    if not 0 < layers_removed < len(ends):
        raise UserError(f"layers_removed={layers_removed} must be between 1 and {len(ends) - 1} for {len(ends)} layers")
    states = jnp.stack([*(before for before, _ in ends), ends[-1][1]])  # [n_layers + 1, batch, embed]
    # clipped: rounding can leave a cosine above 1, whose arccos is NaN
    cosine = jnp.clip(1 - cosine_distance(states[:-layers_removed], states[layers_removed:]), -1, 1)
    angle = jnp.where(counts[None] > 0, counts[None] * jnp.arccos(cosine) / jnp.pi, jnp.zeros_like(cosine))
    return angle.sum(axis=1), counts.sum()


def mean_angle(sums: Any, model: Model, *, reference_compat: bool, stack: str) -> Values:
    """Return the mean angular distance of each block of consecutive layers, by the block's first layer.

    First layers whose block would extend beyond the last layer have the value +inf (never removed).
    """
    total, rows = sums
    importance = np.full(len(model.cfg.stack(stack).layers), np.inf)
    importance[: len(total)] = total if reference_compat else total / positive(rows)
    return {Key(stack, None, LAYERS): importance}


ANGULAR = Criterion(
    scores=("layers",),
    needs="activations",
    function=angles,
    finish=mean_angle,
    options=declared("layers_removed", "reference_compat"),
    journals=True,
    stacks=STACKS,
    splits=True,
)
