"""What is known of a program before it runs on TPUs: its arithmetic, and where slices lie."""

import functools

import jax
import jax.numpy as jnp
from refusal import refused

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.kernels import splash_attention
from vlmprune_jax.run.planning.ahead_of_time import executed_flops, make_slice


def test_kernels_count_their_grid():
    """Splash attention forward: scores and mixing of 2 rows, 4 query and 2 key heads, in blocks of 512 positions."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.make_jaxpr(functools.partial(splash_attention, causal=True))(q, k, k)
    assert executed_flops(traced.jaxpr) == 4 * 2 * 4 * 1024**2 * 64


def test_loops_count_as_often_as_they_run_at_most():
    """One that ends when the data says so: see core/models/vocabulary.py."""
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)

    def loop(x, used):
        return jax.lax.while_loop(
            lambda state: (state[0] < 5) & (state[0] < used), lambda state: (state[0] + 1, state[1] @ x.T @ x), (0, x)
        )[1]

    assert executed_flops(jax.make_jaxpr(loop)(x, 2).jaxpr) == 5 * 2 * (2 * 3 * 3 * 8)


def test_slices_lie_along_data():
    target = make_slice("v5e:2x2:2")
    mesh = make_mesh(2, 2, 2, devices=target.devices)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    refused(r"mesh\.data=1 must be a multiple of the number of TPU slices", make_mesh, 1, -1, 1, devices=target.devices)
