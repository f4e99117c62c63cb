"""Comparison of models that compute the same function, on any processor.

The shape of a product and the processor decide in which order its sums are added: only a program that runs twice gives
equal bits. Float32 logits of products of other shapes differ by rounding that grows from layer to layer (a padded
InternVL: 4e-7 behind its first layer, 3e-6 behind its fifth, 1e-5 in logits up to 11).
"""

from typing import Any

import jax
import numpy as np

from vlmprune_jax.models.vlm import Model, forward


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
