"""Images in packed rows, from the arrays of tests."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vlmprune_jax.core.models.media import Packed


def packed(values: Any, grid: Any = None) -> Packed:
    """Return tiles [tiles, channel, height, width] as one packed row; other values are in packed rows already."""
    values = jnp.asarray(values)
    return Packed(values[None] if grid is None and values.ndim == 4 else values, grid)
