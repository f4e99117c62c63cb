"""Sums over the vocabulary in chunks of the positions that count: equal to sums over all, and no chunk too many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.vocabulary import Head, chunk_sums, cross_entropy, cross_entropy_sum

ROWS, SEQ, EMBED, VOCAB = 8, 37, 6, 50


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    head = Head(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((VOCAB, EMBED), (VOCAB,))))
    return head, jnp.asarray(rng.standard_normal((ROWS, SEQ, EMBED)), jnp.float32)


def labels_of(share: float) -> jax.Array:
    rng = np.random.default_rng(1)
    labels = rng.integers(VOCAB, size=(ROWS, SEQ))
    return jnp.asarray(np.where(rng.random((ROWS, SEQ)) < share, labels, -100))


def plain(head, states, labels):
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    return jnp.sum(jnp.where(targets == -100, 0.0, cross_entropy(head(states), targets)))


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_sum_and_its_gradients_are_those_of_all_positions(arrays, share, mesh):
    labels = labels_of(share)
    total = lambda head, states: cross_entropy_sum(states, head, labels, chunk=4)  # noqa: E731
    chunked = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, gradients = jax.value_and_grad(plain, argnums=(0, 1))(*arrays, labels)
    if mesh is None:
        found = chunked(*arrays)
    else:
        with jax.set_mesh(make_mesh(*mesh)):
            found = chunked(*arrays)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5), found, (value, gradients))


@pytest.mark.parametrize(("counted", "runs"), [([], 0), ([36], 1), ([0, 9, 20, 30], 1), (range(6), 2), (range(37), 8)])
def test_chunks_without_a_position_that_counts_are_left_out(arrays, counted, runs):
    """In one row; the others have none."""
    seen = []

    def body(head, states, counted, pieces, fixed):
        jax.debug.callback(lambda: seen.append(1))
        return {"sum": jnp.sum(jnp.where(counted, cross_entropy(head(states), pieces), 0.0))}

    mask = np.zeros((ROWS, SEQ), bool)
    mask[3, list(counted)] = True
    total = lambda *of: chunk_sums(body, 128, *of, jnp.asarray(mask), jnp.zeros((ROWS, SEQ), int), None)  # noqa: E731
    jax.block_until_ready(jax.jit(total)(*arrays))
    jax.effects_barrier()
    assert len(seen) == runs
