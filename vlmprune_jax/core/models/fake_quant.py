"""Matrix products with fake quantisation: rounding as in inference engines, and straight-through gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.layers import Product, contract
from vlmprune_jax.core.sections import FakeQuant

# Rounding in training by the names of integer formats; the packages that know such formats add theirs.
FAKE_QUANTS: dict[str, Callable[[ModelConfig], FakeQuant]] = {}


def fake_quant_product(fake_quant: FakeQuant) -> Product:
    """Return a matrix product that rounds inputs and weight to integers (quantisation-aware training).

    Gradients pass the rounding unchanged (the straight-through estimator of Bengio et al., arXiv 1308.3432), including
    the gradients of the values that determine a scale.
    """

    def product(x: jax.Array, weight: jax.Array, n: int) -> jax.Array:
        columns = math.prod(weight.shape[weight.ndim - n :])
        if columns % (fake_quant.group or 1):
            return contract(x, weight, n)
        if fake_quant.activations:
            x = _replace(x, _nearest(x, columns, 8))
        return contract(x, _replace(weight, _nearest(weight, fake_quant.group or columns, fake_quant.bits)), n)

    return product


def _nearest(values: jax.Array, group: int, bits: int) -> jax.Array:
    """Quantise values to the nearest integer codes with one scale per `group` values, and dequantise them again.

    The scale and its rounding are those of `CompressedTensors.grid` without zero points.
    """
    groups = values.reshape(-1, group).astype(jnp.float32)
    steps = 2**bits - 1
    scale = _divide(jnp.max(jnp.abs(groups), axis=1, keepdims=True), jnp.float32(steps / 2))
    scale = scale.astype(values.dtype).astype(jnp.float32)
    scale = jnp.where(scale == 0, 1.0, scale)
    codes = jnp.clip(jnp.rint(_divide(groups, scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).astype(values.dtype).reshape(values.shape)


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return x / by correctly rounded (XLA would multiply by the reciprocal instead)."""
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


@jax.custom_vjp
def _replace(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return `by` in the forward pass, with gradients passed to `x` (straight-through estimator)."""
    return by


_replace.defvjp(lambda x, by: (by, None), lambda _, grad: (grad, None))
