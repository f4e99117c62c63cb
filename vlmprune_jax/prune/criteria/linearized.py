"""One decoder block and its derivative, with the products that the derivative needs beside weights, input and mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.models.context import KEYS
from vlmprune_jax.models.layers import Projection, contract
from vlmprune_jax.models.params import flatten, unflatten
from vlmprune_jax.models.stack import REMAT_POLICIES, fill
from vlmprune_jax.models.vlm import Params, stack_module

Products = list[jax.Array]
Shared = dict[int, tuple[jax.Array, jax.Array]]  # window -> keys and values of the layer that others reuse


def linearized(
    layer: Params,
    x: jax.Array,
    mask: jax.Array,
    counts: jax.Array | None,
    text: TextConfig,
    positions: jax.Array | None = None,
    layer_input: jax.Array | None = None,
    shared: Shared | None = None,
    produces: bool = False,
) -> tuple[tuple[jax.Array, Shared], Products, Callable[[Products], Callable[..., Any]]]:
    """Return (block output, its matrix products, pull), where `pull(products)` is the block's vector-Jacobian product.

    The output is the stream and, if the block `produces` keys and values for others, those. The derivative is with
    respect to parameters, stream and `shared`.

    The products (outputs of projections and attention, which the remat policy "dots" saves) and the arguments are all
    that the derivative needs. If `pull` gets other products, the block's own are not computed: XLA drops their
    computation. So a backward pass is one program, the same to the bit, whether its products were kept or are
    recomputed.

    Args:
      layer, x, mask: the block's parameters, float[batch, seq, embed] input and int[batch, seq] mask.
      counts: float32[ways, batch, seq], weights of the tokens in the gradients of the projections, which come out as
        [ways, *shape]; None: 1, in one way.
      text: a decoder's config that has this layer only.
      positions: int[batch, seq] or int[batch, 3, seq], by default counted along the mask.
      layer_input: float[batch, seq, n], the layer's own input, a constant.
      shared: keys and values for a layer that has none.
      produces: other layers use this one's keys and values.
    """
    decoder, used = stack_module("text", text), dict(shared or {})
    ctx, size = decoder.context(mask, positions)._replace(layer_input=layer_input), text.layers[0].mixer.window or 0

    def block(params: Params, h: jax.Array, used: Shared) -> tuple[jax.Array, Shared]:
        module = fill(decoder.layers["0"], params)
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Projection):
                part.product = lambda x, weight, n: _product(x, weight, counts, n)
        y, _, values = module(h, ctx._replace(shared=used), None, (KEYS,) if produces else ())
        return y, {size: values[KEYS]} if produces else {}

    ways = 1 if counts is None else len(counts)
    projections = {name for name, leaf in flatten(layer).items() if name.endswith("/weight") and leaf.ndim > 1}
    params = unflatten(
        {
            name: jnp.broadcast_to(leaf[None], (ways, *leaf.shape)) if name in projections else leaf
            for name, leaf in flatten(layer).items()
        }
    )
    saving = jax.checkpoint(block, policy=REMAT_POLICIES["dots"], prevent_cse=False)
    y, transpose = jax.vjp(saving, params, x, used)
    leaves, structure = jax.tree.flatten(transpose)
    given = {id(leaf) for leaf in jax.tree.leaves((params, x, used, ctx, counts))}

    def pull(products: Products) -> Callable[..., Any]:
        others = iter(products)
        return jax.tree.unflatten(structure, [leaf if id(leaf) in given else next(others) for leaf in leaves])

    return y, [leaf for leaf in leaves if id(leaf) not in given], pull


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, weight: jax.Array, counts: jax.Array | None, n: int) -> jax.Array:
    """Multiply x by weight[0]; the equal copies in `weight` collect gradients of different token types.

    The gradient has the narrower factor first: XLA:CPU transposes the first factor and, to do so, recomputes it. In
    jax's own gradient that is the gradient of the output, at the end of a long computation; the input is narrower for
    gate_proj and up_proj, and one for both (10 % of the backward pass of SmolLM2-135M).
    """
    return contract(x, weight[0], n)


def _product_forward(x: jax.Array, weight: jax.Array, counts: jax.Array | None, n: int) -> tuple[jax.Array, Any]:
    return contract(x, weight[0], n), (x, weight, counts)


def _product_backward(n: int, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, (first, *_), counts = saved[0], saved[1], saved[2]
    tokens, outputs = tuple(range(x.ndim - n)), tuple(range(first.ndim - n))
    by_input = jax.lax.dot_general(grad, first, ((tuple(range(len(tokens), grad.ndim)), outputs), ((), ())))
    more_inputs = first.size > math.prod(first.shape[: len(outputs)]) ** 2

    def by_weight(grad: jax.Array) -> jax.Array:
        if more_inputs:
            return jax.lax.dot_general(grad, x, ((tokens, tokens), ((), ())))
        turned = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())))
        return jnp.moveaxis(turned, tuple(range(n)), tuple(range(-n, 0)))

    if counts is None:
        return by_input, by_weight(grad)[None], None
    counted = counts.astype(grad.dtype).reshape(*counts.shape, *(1,) * len(outputs))
    return by_input, jnp.stack([by_weight(token_weights * grad) for token_weights in counted]), None


_product.defvjp(_product_forward, _product_backward)
