"""Solving in blocks, as devices without LAPACK do, against float64."""

import jax
import numpy as np
import pytest

from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.prune.least_squares import RIDGES, Sums, change, held_out_errors, in_blocks


def sums(n, tokens, seed=0, width=5):
    """Of channels whose sizes differ by orders of magnitude."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((tokens, n)).astype(np.float32) * np.logspace(-1, 1, n, dtype=np.float32)
    r = draw.standard_normal((tokens, width)).astype(np.float32)
    return Sums(x.T @ x, x.T @ r, np.sum(r * r))


@pytest.mark.parametrize("n", [7, 256, 300, 700, 1300])
@pytest.mark.parametrize("ridge", [RIDGES[1], 1.0])
def test_blocks_solve_what_float64_solves(n, ridge):
    gram, cross, *_ = sums(n, 2 * n)
    matrix = gram + np.diag(ridge * np.diag(gram))
    expected = np.linalg.solve(matrix.astype(np.float64), cross.astype(np.float64))
    scale = np.sqrt(np.diag(gram))[:, None]  # what a change of each channel weighs
    found = np.asarray(jax.jit(in_blocks)(matrix, cross))
    np.testing.assert_allclose(found * scale, expected * scale, atol=1e-4 * np.abs(expected * scale).max())
    lapack = np.asarray(change(Sums(gram, cross, 0.0), ridge))
    np.testing.assert_allclose(found * scale, lapack * scale, atol=1e-4 * np.abs(expected * scale).max())


@pytest.mark.parametrize("ridges", [RIDGES, RIDGES[3:6]], ids=["8 devices, 9 ridges", "2 devices per ridge"])
def test_the_devices_of_a_mesh_share_the_solves(ridges):
    fit, held = sums(7, 14), sums(7, 14, seed=1)
    expected, best = np.asarray(held_out_errors(fit, held, np.float32(ridges))), change(fit, ridges[0])
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found, shared = held_out_errors(fit, held, np.float32(ridges)), change(fit, ridges[0])
    assert found.is_fully_replicated
    assert shared.is_fully_replicated
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(shared, best, rtol=1e-5)


def test_what_cannot_be_solved_is_nan_and_not_chosen():
    broken = sums(7, 14)
    broken = broken._replace(gram=-broken.gram)
    assert np.isnan(np.asarray(held_out_errors(broken, broken, np.float32(RIDGES)))).all()
    assert np.isnan(np.asarray(jax.jit(in_blocks)(broken.gram, broken.cross))).all()
