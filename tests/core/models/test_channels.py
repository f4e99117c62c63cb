"""Experts by a scan over blocks, and by ragged products as on TPUs, against all experts of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmprune_jax.core.mesh.mesh import make_mesh, use_mesh
from vlmprune_jax.core.models import channels


def all_experts(x, experts, gates, weights):
    gate, up, down = (jnp.einsum("th,eih->tei", x, w) if i < 2 else w for i, w in enumerate(weights))
    outputs = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, down)
    return jnp.einsum("tkh,tk->th", jnp.take_along_axis(outputs, experts[..., None], 1), gates)


@pytest.mark.parametrize(("tokens", "k", "n_experts"), [(1, 2, 8), (7, 3, 5), (300, 2, 4), (40, 2, 128)])
def test_values_and_gradients(tokens, k, n_experts):
    draw = np.random.default_rng(0)
    shapes = {"x": (tokens, 6), "gates": (tokens, k), "gate": (5, 6), "up": (5, 6), "down": (6, 5)}
    of_experts = {name: (n_experts, *shape) for name, shape in shapes.items() if name in ("gate", "up", "down")}
    x, gates, *weights = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in (shapes | of_experts).values())
    chosen = jnp.asarray([draw.choice(n_experts, k, replace=False) for _ in range(tokens)], jnp.int32)
    direction = jnp.asarray(draw.standard_normal(x.shape), jnp.float32)
    ways = {
        "scan": lambda x, gates, weights: channels._gated_sum("silu", x, chosen, gates, weights)[0],
        "ragged": lambda x, gates, weights: channels._weighted(
            gates, channels._ragged("silu", x, chosen, weights), x.dtype
        ),
    }
    arguments = x, gates, tuple(weights)

    def with_gradients(function):
        value = lambda *args: (jnp.sum(function(*args) * direction), function(*args))  # noqa: E731
        return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arguments)

    expected = with_gradients(lambda x, gates, weights: all_experts(x, chosen, gates, weights))
    for name, function in ways.items():
        for actual, wanted in zip(*map(jax.tree.leaves, (with_gradients(function), expected)), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-4, rtol=1e-4, err_msg=name)
    blocks = channels.blocks_of(chosen, n_experts)
    assert blocks.rows.size <= tokens * k + min(n_experts, tokens * k) * blocks.rows.shape[1]


def test_devices_share_the_neurons_of_experts():
    """Rows over two devices, neurons of every expert over four: the sums and norms of one device."""
    draw = np.random.default_rng(0)
    shapes = (4, 3, 6), (4, 3, 2), (5, 8, 6), (5, 8, 6), (5, 6, 8)
    x, gates, *weights = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)
    arguments = x, jnp.asarray(draw.integers(0, 5, (4, 3, 2)), jnp.int32), gates, tuple(weights)
    expected = channels.run_experts(*arguments, "silu")
    with use_mesh(make_mesh(2, 1, 4)):
        found = jax.jit(channels.run_experts, static_argnums=4)(*arguments, "silu")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
