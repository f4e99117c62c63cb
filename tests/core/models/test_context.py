"""Dropout's decisions: bit for bit those of jax.random."""

import jax
import numpy as np
import pytest

from vlmprune_jax.core.models.context import _counters, bernoulli


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 32, 96)])
@pytest.mark.parametrize("probability", [0.0, 0.05, 0.5, 0.95])
def test_decisions_are_those_of_jax_random(shape, probability):
    key = jax.random.fold_in(jax.random.key(3), 4)
    expected = jax.random.bernoulli(key, probability, shape)
    np.testing.assert_array_equal(bernoulli(key, probability, shape), expected)
    assert probability == 0 or shape == (1, 1, 1) or 0 < expected.mean() < 1


def test_numbers_go_beyond_32_bits():
    """The last two elements of three rows of 2^32, which no memory has to hold."""
    high, low = jax.jit(lambda: [x[:, -1, -2:] for x in _counters((3, 2**17, 2**15))])()
    np.testing.assert_array_equal(high, [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(low, [[2**32 - 2, 2**32 - 1]] * 3)
    high, low = jax.jit(lambda: [x[:, -1, -1] for x in _counters((3, 2**16 + 1, 2**15))])()  # rows end in between
    last = [(row + 1) * (2**16 + 1) * 2**15 - 1 for row in range(3)]
    assert [int(up) << 32 | int(down) for up, down in zip(high, low, strict=True)] == last
