"""Positions of the patches of images of any size, from the grid of each image."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Row and column of every patch in its image; all arrays are int32[images, patches].

    Patches come in merged cells, row by row of cells and row by row inside a cell. `cell_row`, `cell_column`: of the
    cell; `row`, `column`: of the patch; `image`: 0, or -1 for padding after an image's own patches.
    """

    row: jax.Array
    column: jax.Array
    cell_row: jax.Array
    cell_column: jax.Array
    image: jax.Array


def places_of(grid: jax.Array, patches: int, merge: int) -> Places:
    """Return row and column of every patch, padded to `patches` per image, from image grids int[images, 3]."""
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    rows, columns = (grid[:, axis, None].astype(jnp.int32) for axis in (1, 2))
    cell, inside = index // merge**2, index % merge**2
    across = jnp.maximum(columns // merge, 1)
    cell_row, cell_column = cell // across, cell % across
    image = jnp.where(index < rows * columns, jnp.int32(0), jnp.int32(-1))
    row, column = cell_row * merge + inside // merge, cell_column * merge + inside % merge
    return Places(row, column, cell_row, cell_column, image)


def windows_of(places: Places, grid: jax.Array, merge: int, side: int) -> jax.Array:
    """Return each patch's attention window (`side` merged patches wide), int32[images, patches] (-1 = padding).

    Windows are numbered row by row from the upper left, and cut short at the right and at the bottom.
    """
    across = -(-grid[:, 2, None].astype(jnp.int32) // (merge * side))
    window = places.cell_row // side * across + places.cell_column // side
    return jnp.where(places.image < 0, places.image, window)


def resampled(table: jax.Array, places: Places, grid: jax.Array) -> jax.Array:
    """Interpolate a position table [side * side, vision] to each image's grid: float[images, patches, vision].

    Bilinear, with aligned corners.
    """
    side = round(table.shape[0] ** 0.5)
    (top, down), (left, right) = (
        _between(at, grid[:, axis, None], side) for at, axis in ((places.row, 1), (places.column, 2))
    )
    (row, below), (column, beside) = top, left
    taps = [
        table[r * side + c] * (share_r * share_c)[..., None].astype(table.dtype)
        for r, share_r in ((row, 1 - down), (below, down))
        for c, share_c in ((column, 1 - right), (beside, right))
    ]
    return taps[0] + taps[1] + taps[2] + taps[3]


def _between(at: jax.Array, count: jax.Array, side: int) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Return the two table entries around position `at` of `count`, and the interpolation weight of the second."""
    last = jnp.maximum(count.astype(jnp.int32) - 1, 1)
    scaled = jnp.clip(at * (side - 1), 0, last * (side - 1))
    # integers until the end, so that rounding cannot move a position past an entry
    first = scaled // last
    share = (scaled - first * last).astype(jnp.float32) / last.astype(jnp.float32)
    return (first, jnp.minimum(first + 1, side - 1)), share


def axial_angles(
    places: Places, head_dim: int, theta: float, columns_first: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Return 2-D rotary cosines and sines by row and column, float32[images, patches, head_dim / 2] each."""
    quarter = head_dim // 4
    inverse = 1.0 / theta ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    axes = (places.column, places.row) if columns_first else (places.row, places.column)
    at = jnp.stack(axes, axis=-1).astype(jnp.float32)
    angles = (at[..., None] * inverse[None, None, None]).reshape(*places.row.shape, 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)


def slot_index(marks: jax.Array, counts: jax.Array, room: int) -> jax.Array:
    """Return the index of every image token's feature among its row's features, int32[batch, seq].

    marks: bool[batch, seq], image tokens; counts: int[batch, slots], features of each image, which come first in its
    `room`. Other positions have an arbitrary index.
    """
    nth = jnp.cumsum(marks, axis=1, dtype=jnp.int32) - 1
    ends = jnp.cumsum(counts.astype(jnp.int32), axis=1, dtype=jnp.int32)
    slot = (nth[..., None] >= ends[:, None]).sum(axis=-1, dtype=jnp.int32)
    slot = jnp.minimum(slot, counts.shape[1] - 1)
    start = jnp.take_along_axis(ends - counts.astype(jnp.int32), slot, axis=1)
    return jnp.clip(slot * room + nth - start, 0, counts.shape[1] * room - 1)
