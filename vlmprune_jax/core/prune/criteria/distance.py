"""Distances between states before and after layers: Block Influence (ShortGPT, arXiv 2403.03853) of each layer, and
the angle over several consecutive layers (arXiv 2403.17887).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.activations import LayerSums, LayerValues, Tokens
from vlmprune_jax.core.prune.calibration import positive
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared


def distances(layer: LayerValues, tokens: Tokens, *, reference_compat: bool) -> dict[str, jax.Array]:
    """Return the weighted sum over tokens of 1 - cos(layer input, layer output), and the sum of weights.

    The last layer's output is the state after the final norm. A token whose input or output is zero contributes 0.5.
    `reference_compat`: sum over all positions, padding included.
    """
    weight = jnp.ones_like(tokens.weight) if reference_compat else tokens.weight
    # where, not a product: padding may hold anything, and NaN * 0 is NaN
    distance = cosine_distance(layer.before, layer.after)
    total = jnp.sum(jnp.where(weight > 0, weight * distance, jnp.zeros_like(distance)))
    return {"total": total, "weight": jnp.sum(weight)}


def mean_distance(sums: Sequence[LayerSums], model: Model, *, reference_compat: bool, stack: str) -> Values:
    """Return each layer's cosine distance between input and output, averaged over tokens (Block Influence)."""
    weight = 1 if reference_compat else positive(sums[0]["weight"])
    return {Key(stack, None, LAYERS): np.array([layer["total"] for layer in sums]) / weight}


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


def angles(
    layer: LayerValues, tokens: Tokens, *, carry: jax.Array | None, layers_removed: int | None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the sum over sequences of angles to the state `layers_removed` layers before, and the sequence count.

    Each row is represented by its last token with weight, and has the weight of this token. `carry`: float[layers,
    batch, embed], states before the last `layers_removed` layers. Raises UserError if `layers_removed` is not set.
    """
    if layers_removed is None:
        raise UserError("criterion 'angular' needs layers_removed= (the number of consecutive layers to remove)")
    weight = tokens.weight
    last = weight.shape[1] - 1 - jnp.argmax(weight[:, ::-1] > 0, axis=1)
    counts = jnp.take_along_axis(weight, last[:, None], axis=1)[:, 0]
    before, after = (jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0] for x in (layer.before, layer.after))
    carry = jnp.zeros((layers_removed, *before.shape), before.dtype) if carry is None else carry
    carry = jnp.concatenate([carry[1:], before[None]])
    # clipped: rounding can leave a cosine above 1, whose arccos is NaN
    cosine = jnp.clip(1 - cosine_distance(carry[0], after), -1, 1)
    angle = jnp.where(counts > 0, counts * jnp.arccos(cosine) / jnp.pi, jnp.zeros_like(cosine))
    return {"total": angle.sum(), "rows": counts.sum()}, carry


def mean_angle(
    sums: Sequence[LayerSums], model: Model, *, layers_removed: int, reference_compat: bool, stack: str
) -> Values:
    """Return the mean angular distance of each block of consecutive layers, by the block's first layer.

    First layers whose block would extend beyond the last layer have the value +inf (never removed). Raises UserError
    if `layers_removed` leaves no layer.
    """
    n_layers = len(sums)
    if not 0 < layers_removed < n_layers:
        raise UserError(f"layers_removed={layers_removed} must be between 1 and {n_layers - 1} for {n_layers} layers")
    importance, rows = np.full(n_layers, np.inf), 1 if reference_compat else positive(sums[0]["rows"])
    ends = [layer["total"] for layer in sums[layers_removed - 1 :]]
    importance[: len(ends)] = np.array(ends) / rows
    return {Key(stack, None, LAYERS): importance}


_of_layers = functools.partial(Criterion, ("layers",), "activations", stacks=STACKS, splits=True)
BLOCK_INFLUENCE = _of_layers(distances, mean_distance, declared("reference_compat"))
ANGULAR = _of_layers(angles, mean_angle, declared("layers_removed", "reference_compat"))
