"""Positions of patches in packed rows of images of any size, computed from each image's grid."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Row and column of every patch in its image; all arrays are int32[packs, patches].

    A packed row has its images one after the other, then padding. Patches are ordered by merged cell (row by row), and
    row by row inside a cell.
    """

    row: jax.Array
    column: jax.Array
    cell_row: jax.Array
    """Row of the patch's merged cell."""

    cell_column: jax.Array
    """Column of the patch's merged cell."""

    rows: jax.Array
    """Number of rows of patches of the image."""

    columns: jax.Array
    """Number of columns of patches of the image."""

    image: jax.Array
    """Number of the patch's image or video frame in its packed row; for padding, the number of images and frames."""

    real: jax.Array
    """bool, False for padding."""


def places_of(grid: jax.Array, patches: int, merge: int) -> Places:
    """Return row and column of every patch in packed rows of `patches` patches, from image grids int[packs, images, 3].

    Every temporal patch of a video (its grid's first number) counts as an image.
    """
    index = jnp.arange(patches, dtype=jnp.int32)[None]
    sizes = grid.prod(axis=-1, dtype=jnp.int32)
    ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)
    visual = (index[..., None] >= ends[:, None]).sum(axis=-1, dtype=jnp.int32)

    def of_visual(values: jax.Array) -> jax.Array:
        at = jnp.minimum(visual, values.shape[1] - 1)
        return jnp.take_along_axis(values.astype(jnp.int32), at, axis=1)

    rows, columns = (of_visual(grid[..., axis]) for axis in (1, 2))
    frame, place = jnp.divmod(index - of_visual(ends - sizes), jnp.maximum(rows * columns, 1))
    cell, inside = jnp.divmod(place, merge**2)
    cell_row, cell_column = jnp.divmod(cell, jnp.maximum(columns // merge, 1))
    row, column = cell_row * merge + inside // merge, cell_column * merge + inside % merge
    frames = grid[..., 0].astype(jnp.int32)
    before, real = jnp.cumsum(frames, axis=1, dtype=jnp.int32) - frames, index < ends[:, -1:]
    image = jnp.where(real, of_visual(before) + frame, (before + frames)[:, -1:])
    return Places(row, column, cell_row, cell_column, rows, columns, image, real)


def split_tiles(tiles: jax.Array, patch: int) -> jax.Array:
    """Split tiles [tiles, channel, height, width] into patches [tiles, patches, channel * row * column], row by row.

    Incomplete patches at the edges are left out.
    """
    rows, columns = (side // patch for side in tiles.shape[2:])
    whole = tiles[:, :, : rows * patch, : columns * patch]
    cells = whole.reshape(*tiles.shape[:2], rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    return cells.reshape(len(tiles), rows * columns, -1)


def windows_of(places: Places, merge: int, side: int) -> jax.Array:
    """Return each patch's attention window (`side` merged patches wide), int32[packs, patches].

    Windows are numbered image by image, row by row from the upper left; windows at the right and at the bottom may be
    smaller. Padding has its own window.
    """
    down, across = (-(-sides // (merge * side)) for sides in (places.rows, places.columns))
    window = places.cell_row // side * across + places.cell_column // side
    # windows of all images up to the patch's own, each counted at its first patch
    first = places.real & (places.row + places.column == 0)
    windows = jnp.cumsum(jnp.where(first, down * across, 0), axis=1, dtype=jnp.int32)
    return jnp.where(places.real, windows - down * across + window, windows)


def resampled(table: jax.Array, places: Places) -> jax.Array:
    """Interpolate a position table [side * side, vision] to each image's grid: float[packs, patches, vision].

    Interpolation is bilinear, with aligned corners.
    """
    side = round(table.shape[0] ** 0.5)
    top, left = _between(places.row, places.rows, side), _between(places.column, places.columns, side)
    ((row, below), down), ((column, beside), right) = top, left
    taps = [
        table[r * side + c] * (share_r * share_c)[..., None].astype(table.dtype)
        for r, share_r in ((row, 1 - down), (below, down))
        for c, share_c in ((column, 1 - right), (beside, right))
    ]
    return taps[0] + taps[1] + taps[2] + taps[3]


def antialiased(table: jax.Array, places: Places) -> jax.Array:
    """Interpolate like `resampled`, but without aligned corners, and with an antialiasing filter for smaller images."""
    side = round(table.shape[0] ** 0.5)

    def shares(at: jax.Array, count: jax.Array) -> jax.Array:
        """Return interpolation weights of the table's entries along one image axis, float32[packs, patches, side]."""
        scale = side / jnp.maximum(count, 1).astype(jnp.float32)[..., None]
        centre = (jnp.minimum(at, count - 1).astype(jnp.float32)[..., None] + 0.5) * scale - 0.5
        distance = jnp.abs(jnp.arange(side, dtype=jnp.float32)[None, None] - centre) / jnp.maximum(scale, 1)
        weights = jnp.maximum(1 - distance, 0)
        return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-6)

    down, across = shares(places.row, places.rows), shares(places.column, places.columns)
    weights = (down[..., :, None] * across[..., None, :]).reshape(*down.shape[:2], side * side)
    return weights.astype(table.dtype) @ table


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
    """Return 2-D rotary cosines and sines by row and column, float32[packs, patches, head_dim / 2] each."""
    quarter = head_dim // 4
    inverse = 1.0 / theta ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    axes = (places.column, places.row) if columns_first else (places.row, places.column)
    at = jnp.stack(axes, axis=-1).astype(jnp.float32)
    angles = (at[..., None] * inverse[None, None, None]).reshape(*places.row.shape, 2 * quarter)
    return jnp.cos(angles), jnp.sin(angles)
