"""Comparisons that hold on any processor, with tolerances from bounds on rounding.

The shape of a product and the processor decide in which order its sums are added: only a program that runs twice gives
equal bits. Float32 logits of products of other shapes differ by rounding that grows from layer to layer (a padded
InternVL: 4e-7 behind its first layer, 3e-6 behind its fifth, 1e-5 in logits up to 11).
"""

from typing import Any

import jax
import numpy as np

from vlmprune_jax.core.models.vlm import Model, forward


def double_logits(model: Model, **inputs: Any) -> np.ndarray:
    """Logits of a model in float64, so that rounding hides no difference between two functions."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)
        return np.asarray(forward(Model(params, model.cfg), **inputs)[0])


def assert_same_function(found: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    """Compare `double_logits` of two models.

    Two orders of a sum of n terms differ by at most n x 2**-52 of the terms' size (Higham 2002, section 4.2). 2**-40 of
    the largest logit has room for 4,096 terms; the longest sum of a tiny model has 100, that of SmolLM2 1,536.
    """
    assert found.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=2.0**-40 * np.abs(expected).max(), rtol=0, err_msg=message)


def assert_same_sums(found: Any, expected: Any, magnitude: Any, message: str = "") -> None:
    """Compare sums of weight x gradient, of which `magnitude` is the sum of absolute values.

    If gradients have a relative error of 1e-4, these sums have one of at most 1e-4 x magnitude. Relative to a signed
    sum that cancels, this is more: 1e-2 where a hundredth remains.
    """
    difference, limit = np.abs(np.asarray(found) - expected), 1e-4 * np.asarray(magnitude)
    assert (difference <= limit).all(), f"{message}: {(difference / limit).max():.3g} times the tolerance"
