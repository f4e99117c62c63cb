"""Run of one layer whose projection outputs are computed or passed in, and the gradients of its projection weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.block import Block
from vlmprune_jax.core.models.context import STREAM
from vlmprune_jax.core.models.layers import Leaf, Projection, contract
from vlmprune_jax.core.prune.layers import Layer, Rows, State

Products = list[jax.Array]


def run_with_products(
    layer: Layer,
    rows: Rows,
    probes: Mapping[str, jax.Array],
    products: Products | None = None,
    counts: jax.Array | None = None,
) -> tuple[State, Products]:
    """Run one layer; return (state after it, outputs of its projections).

    If `products`, the projection outputs of an earlier run, are passed, XLA drops the code that would compute them. The
    backward pass is therefore one program, the same to the bit, whether products were kept or are computed again.

    Args:
      probes: {path of a weight: zeros of shape [ways, *shape]}; the gradient with respect to a probe is the gradient of
        the weight, for each way of weighting tokens (weights outside projections, such as those of experts, have it
        without `counts` only). The weights themselves are constants.
      counts: float32[ways, rows, seq], weights of the tokens in these gradients; None = one way with all weights 1.
    """
    outputs = Products()

    def product(name: str, x: jax.Array, weight: jax.Array, n: int) -> jax.Array:
        computed = None if products is None else products[len(outputs)]
        outputs.append(_product(x, weight, computed, probes.get(name), counts, n))
        return outputs[-1]

    def prepare(block: Block) -> None:
        for path, part in nnx.iter_modules(block):
            name = "/".join((*map(str, path), "weight"))
            if isinstance(part, Projection):
                part.product = functools.partial(product, name)
            elif isinstance(part, Leaf) and name in probes and counts is None:
                part.weight.set_value(part.weight.get_value() + probes[name][0])

    _, state, _ = layer.compute(rows, prepare=prepare)
    return State(constrain(state.x, STREAM), state.shared), outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _product(
    x: jax.Array,
    weight: jax.Array,
    computed: jax.Array | None,
    probe: jax.Array | None,
    counts: jax.Array | None,
    n: int,
) -> jax.Array:
    """Multiply x by a weight, or return the `computed` product; the probe receives the weight's gradient.

    The narrower factor comes first in the product that computes the gradient, because XLA:CPU transposes the first
    factor and recomputes it to do so. In jax's own gradient, the first factor is the output's gradient, the end of a
    long computation. The input is narrower for gate_proj and up_proj, which share it. (This saves 10 % of the backward
    pass of SmolLM2-135M.)
    """
    return contract(x, weight, n) if computed is None else computed


def _product_forward(x: Any, weight: Any, computed: Any, probe: Any, counts: Any, n: int) -> tuple[jax.Array, Any]:
    return _product(x, weight, computed, probe, counts, n), (x, weight, probe is not None, counts)


def _product_backward(n: int, saved: Any, grad: jax.Array) -> tuple[jax.Array, None, None, jax.Array | None, None]:
    x, weight, probed, counts = saved
    tokens, outputs = tuple(range(x.ndim - n)), tuple(range(weight.ndim - n))
    by_input = jax.lax.dot_general(grad, weight, ((tuple(range(len(tokens), grad.ndim)), outputs), ((), ())))
    more_inputs = weight.size > math.prod(weight.shape[: len(outputs)]) ** 2

    def by_weight(grad: jax.Array) -> jax.Array:
        if more_inputs:
            return jax.lax.dot_general(grad, x, ((tokens, tokens), ((), ())))
        turned = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())))
        return jnp.moveaxis(turned, tuple(range(n)), tuple(range(-n, 0)))

    if not probed:
        return by_input, None, None, None, None
    if counts is None:
        return by_input, None, None, by_weight(grad)[None], None
    counted = counts.astype(grad.dtype).reshape(*counts.shape, *(1,) * len(outputs))
    return by_input, None, None, jnp.stack([by_weight(token_weights * grad) for token_weights in counted]), None


_product.defvjp(_product_forward, _product_backward)
