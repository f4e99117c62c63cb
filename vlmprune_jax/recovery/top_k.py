"""A teacher's distribution, stored as its k likeliest tokens and the total probability of all others."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_ABSENT = -1e30  # log-probability of tokens outside the k; finite, so that exp(_ABSENT) * _ABSENT is 0


def top_k_logprobs(logits: jax.Array, temperature: float, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the k likeliest tokens, int32[..., k], and log-probabilities, float32[..., k + 1], of [..., vocab] logits.

    The last log-probability is that of all other tokens together (-inf if there are none); the probabilities sum to 1.
    """
    logprobs = jax.nn.log_softmax(logits / temperature, axis=-1)
    values, ids = jax.lax.top_k(logprobs, k)
    rest = _log_rest(logprobs, _spread(ids, values, logits.shape[-1]))
    return ids, jnp.concatenate([values, rest[..., None]], axis=-1)


def top_k_divergence(student: jax.Array, ids: jax.Array, logprobs: jax.Array, temperature: float) -> jax.Array:
    """Return float32[...], KL(teacher || student) over the teacher's k likeliest tokens and one token for all others.

    In both distributions the tokens outside the k are summed to one (the "ghost token" of arXiv 2503.16870). The result
    equals the exact KL if there are no others, and is never larger (log-sum inequality). The gradient of the others is
    distributed as in the student. Without this token, or with the k scaled to sum to 1, the student would learn that
    all other tokens are impossible.

    Args:
      student: float32[..., vocab] logits.
      ids, logprobs: int[..., k] and [..., k + 1] of any precision, see `top_k_logprobs`; they are normalised again.
      temperature: temperature of both distributions.
    """
    ours, theirs = jax.nn.log_softmax(student / temperature, axis=-1), logprobs.astype(jnp.float32)
    theirs -= jax.nn.logsumexp(theirs, axis=-1, keepdims=True)
    chosen = _spread(ids, theirs[..., :-1], student.shape[-1])
    # Computed like the KL of two full distributions, which keeps the precision of small differences.
    divergence = jnp.sum(jnp.exp(chosen) * (chosen - ours), axis=-1)
    if ids.shape[-1] == student.shape[-1]:
        return divergence
    rest = theirs[..., -1]
    return divergence + jnp.exp(rest) * (rest - _log_rest(ours, chosen))


def _spread(ids: jax.Array, values: jax.Array, vocab: int) -> jax.Array:
    """Return float32[..., vocab] with [..., k] values at their ids and _ABSENT elsewhere.

    The scatter is batched over positions, so that each device fills its own part of a sharded vocabulary. It carries no
    gradient, whereas gathering the student's k values would need a scatter in the backward pass.
    """
    place = functools.reduce(lambda f, _: jax.vmap(f), ids.shape[:-1], lambda row, at, x: row.at[at].set(x))
    return place(jnp.full((*ids.shape[:-1], vocab), _ABSENT), ids, values)


def _log_rest(logprobs: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return float32[...], the log-probability of all tokens that are _ABSENT in `chosen`; both are [..., vocab]."""
    return jax.nn.logsumexp(jnp.where(chosen > _ABSENT, -jnp.inf, logprobs), axis=-1)
