"""A teacher's distribution as its k likeliest tokens and the probability of all others together."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_ABSENT = -1e30  # the log-probability of what is not among the k; finite, so that exp(_ABSENT) * _ABSENT is 0


def top_k_logprobs(logits: jax.Array, temperature: float, k: int) -> tuple[jax.Array, jax.Array]:
    """Of float32[..., vocab] logits the k likeliest tokens, int32[..., k], and log-probabilities float32[..., k + 1].

    The last one is of all other tokens together, -inf where there are none; their exponentials sum to 1.
    """
    logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
    values, ids = jax.lax.top_k(logprobs, k)
    rest = _log_rest(logprobs, _spread(ids, values, logits.shape[-1]))
    return ids, jnp.concatenate([values, rest[..., None]], axis=-1)


def top_k_divergence(student: jax.Array, ids: jax.Array, logprobs: jax.Array, temperature: float) -> jax.Array:
    """float32[...] KL(teacher || student) over the teacher's k likeliest tokens and one more that stands for the rest.

    Both distributions are summed over the tokens outside the k (the "ghost token" of arXiv 2503.16870): the exact KL
    where there are none, and never more than it (log-sum inequality). The gradient of the rest is spread over its
    tokens as the student spreads it. Without that token, or with the k scaled up to 1, the student would learn that
    all others are impossible.

    Args:
      student: float32[..., vocab] logits.
      ids, logprobs: int[..., k] and [..., k + 1], see `top_k_logprobs`; in any precision, they are normalised again.
      temperature: of both distributions.
    """
    ours, theirs = jax.nn.log_softmax(student / temperature, axis=-1), logprobs.astype(jnp.float32)
    theirs -= jax.nn.logsumexp(theirs, axis=-1, keepdims=True)
    chosen = _spread(ids, theirs[..., :-1], student.shape[-1])
    # As the KL of two whole distributions, which keeps the precision of their small differences.
    divergence = jnp.sum(jnp.exp(chosen) * (chosen - ours), axis=-1)
    if ids.shape[-1] == student.shape[-1]:
        return divergence
    rest = theirs[..., -1]
    return divergence + jnp.exp(rest) * (rest - _log_rest(ours, chosen))


def _spread(ids: jax.Array, values: jax.Array, vocab: int) -> jax.Array:
    """float32[..., vocab] with [..., k] values at their ids and _ABSENT elsewhere.

    Every position is a batch of the scatter, so that each device fills its own part of a split vocabulary; and it
    carries no gradient, where gathering the student's k values would need a scatter backwards.
    """
    place = functools.reduce(lambda f, _: jax.vmap(f), ids.shape[:-1], lambda row, at, x: row.at[at].set(x))
    return place(jnp.full((*ids.shape[:-1], vocab), _ABSENT), ids, values)


def _log_rest(logprobs: jax.Array, chosen: jax.Array) -> jax.Array:
    """float32[...] log of the probability of all tokens that are _ABSENT in `chosen`; [..., vocab] both."""
    return jax.nn.logsumexp(jnp.where(chosen > _ABSENT, -jnp.inf, logprobs), axis=-1)
