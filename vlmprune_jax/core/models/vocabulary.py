"""Output head, and sums over its logits in chunks of positions, so that no [batch, seq, vocab] array exists."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.layers import at_layer

_LEAST = 8  # minimum number of chunks per row; with fewer, little could be skipped


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["cap"])
@dataclasses.dataclass(frozen=True)
class Head:
    """Output head: weight [vocab, embed], bias [vocab] or None, and the limit of soft-capped logits (0 = no cap)."""

    weight: jax.Array
    bias: jax.Array | None
    cap: float = 0.0

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the logits [..., vocab] for hidden states [..., embed] after the final norm."""
        logits = jnp.einsum("...d,vd->...v", hidden, self.weight)
        if self.bias is not None:
            logits = logits + self.bias.reshape((1,) * (logits.ndim - 1) + self.bias.shape)
        return jnp.tanh(logits / self.cap) * self.cap if self.cap else logits

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Return the float32 logits of hidden states."""
        return self.logits(hidden).astype(jnp.float32)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the negative log-probability, float32[...], of target ids int[...].

    A mask selects the target's logit; a gather would break the split of the vocabulary over devices. The logits are
    multiplied by the mask; with `jnp.where`, XLA would keep an array of zeros as large as the logits.
    """
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,)) == targets[..., None]
    picked = jnp.sum(logits * hit.astype(logits.dtype), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def chunks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """Split [batch, seq, ...] along seq into [n >= 2, batch, chunk, ...], padding the last chunk with `fill`."""
    batch, seq = x.shape[:2]
    size = min(size, -(-seq // 2))
    x = jnp.pad(x, ((0, 0), (0, -seq % size)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)


def cross_entropy_sum(hidden: jax.Array, head: Head, labels: jax.Array, *, chunk: int) -> jax.Array:
    """Return the summed cross-entropy, float32[], of labels int[batch, seq] (not shifted, -100 ignored)."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return chunk_sums(_summed, chunk, head, hidden, targets != IGNORED, targets, None)


def _summed(head: Head, states: jax.Array, counted: jax.Array, targets: jax.Array, fixed: None) -> jax.Array:
    del fixed
    return jnp.sum(jnp.where(counted, cross_entropy(head(states), targets), 0.0))


Tree = Any  # a nested container of arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunk_sums(
    body: Callable[..., Tree],
    chunk: int,
    head: Head,
    states: jax.Array,
    counted: jax.Array,
    pieces: Tree,
    fixed: Tree,
) -> Tree:
    """Sum losses over all scored positions, with gradients, computing logits for one chunk at a time.

    In every row, scored positions are moved to the front, and chunks without such positions are skipped. Most
    tokens of a question are not part of the answer, and their unused logits would be a quarter of SmolLM2-135M's
    arithmetic.

    Args:
      body: function of (head, states, counted, pieces, fixed) that returns a chunk's sums, float32[] each; all
        arguments except head and fixed are restricted to the chunk's positions. The function is computed again for the
        gradient, and must not close over tracers.
      chunk: maximum number of positions of a row per chunk.
      head: the model's output head; differentiated.
      states: hidden states after the final norm, [batch, seq, embed]; differentiated.
      counted: bool[batch, seq], True for scored positions (those that contribute to the loss).
      pieces: additional inputs of `body` by position, [batch, seq, ...].
      fixed: additional inputs of `body` that are the same for all chunks.
    """
    _, arrays, used = _cut(chunk, states, counted, pieces)

    def add(i: jax.Array, totals: Tree) -> Tree:
        return jax.tree.map(jnp.add, totals, body(head, *at_layer(arrays, i), fixed))

    sums = jax.eval_shape(lambda: body(head, *at_layer(arrays, 0), fixed))
    return _loop(arrays, used, add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums))


def _cut(chunk: int, *arrays: Tree) -> tuple[jax.Array, Tree, jax.Array]:
    """Split states, counted and pieces into chunks along the sequence, with scored positions first in each row.

    Returns the positions in their new order, int[batch, seq]; the chunks [n, batch, chunk, ...] of the arrays; and the
    number of chunks with a scored position, int[].
    """
    counted = arrays[1]
    size = min(chunk, -(-counted.shape[1] // _LEAST))
    order = jnp.argsort(~counted, axis=1, stable=True)
    used = -(-jnp.max(jnp.sum(counted, axis=1, dtype=jnp.int32)) // size)
    return order, jax.tree.map(lambda x: chunks(_ordered(x, order), size, 0), arrays), used


def _loop(arrays: Tree, used: jax.Array, step: Callable[[jax.Array, Tree], Tree], start: Tree) -> Tree:
    """Run `step(number, carry)` for the first `used` chunks; return the final carry."""
    n = len(arrays[1])  # constant bound of the loop, which planning reads from the program

    def go_on(state: tuple[jax.Array, Tree]) -> jax.Array:
        return (state[0] < n) & (state[0] < used)

    return jax.lax.while_loop(go_on, lambda state: (state[0] + 1, step(*state)), (jnp.int32(0), start))[1]


def _ordered(x: jax.Array, order: jax.Array) -> jax.Array:
    """Reorder the positions of an array [batch, seq, ...]; row i takes the positions `order[i]`."""
    rows = jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(x, order)
    return constrain(rows, ("batch",) + (None,) * (x.ndim - 1))


def _forward(body: Any, chunk: int, *primals: Any) -> tuple[Any, Any]:
    arrays = jax.tree.map(lambda primal: primal.value, primals, is_leaf=lambda x: hasattr(x, "perturbed"))
    trains = any(primal.perturbed for primal in jax.tree.leaves(primals[0], is_leaf=lambda x: hasattr(x, "perturbed")))
    return chunk_sums(body, chunk, *arrays), (arrays, () if trains else None)  # a structure, since values are traced


def _backward(body: Any, chunk: int, kept: Any, cotangent: Any) -> tuple[Any, ...]:
    (head, states, counted, pieces, fixed), trains = kept
    order, arrays, used = _cut(chunk, states, counted, pieces)
    zero = jax.custom_derivatives.SymbolicZero
    cotangent = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, zero) else leaf,
        cotangent,
        is_leaf=lambda leaf: isinstance(leaf, zero),
    )

    def add(i: jax.Array, gradients: tuple[Head | None, jax.Array]) -> tuple[Head | None, jax.Array]:
        of_head, of_states = gradients
        here, *rest = at_layer(arrays, i)
        if of_head is None:
            _, pull = jax.vjp(lambda here: body(head, here, *rest, fixed), here)
            (gradient,) = pull(cotangent)
        else:
            _, pull = jax.vjp(lambda head, here: body(head, here, *rest, fixed), head, here)
            more, gradient = pull(cotangent)
            of_head = jax.tree.map(jnp.add, of_head, more)
        return of_head, jax.lax.dynamic_update_index_in_dim(of_states, gradient, i, 0)

    start = None if trains is None else jax.tree.map(jnp.zeros_like, head)
    of_head, of_states = _loop(arrays, used, add, (start, jnp.zeros_like(arrays[0])))
    of_states = jnp.moveaxis(of_states, 0, 1).reshape(len(states), -1, states.shape[-1])[:, : states.shape[1]]
    return of_head, _ordered(of_states, jnp.argsort(order, axis=1)), None, None, None


chunk_sums.defvjp(_forward, _backward, symbolic_zeros=True)
