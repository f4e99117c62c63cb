"""Vision towers: CLIP, SigLIP, InternViT, and the towers of SmolVLM, Qwen-VL and Gemma."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import VisionConfig
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import Context, Names, Pattern
from vlmprune_jax.core.models.kernels import in_blocks
from vlmprune_jax.core.models.layers import Leaf, Norm, Projection
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.stack import BlockStack

# Parameter a of the cubic convolution kernel (Keys 1981), as in torch (jax.image.resize uses -0.5).
_CUBIC = -0.75


class Places(NamedTuple):
    """Row and column of every patch in its image; all arrays are int32[packs, patches].

    A packed row has its images one after the other, then padding. Patches are ordered by merged cell (row by row), and
    row by row inside a cell.
    """

    row: jax.Array
    column: jax.Array
    rows: jax.Array
    """Number of rows of patches of the image."""

    columns: jax.Array
    """Number of columns of patches of the image."""

    image: jax.Array
    """Number of the patch's image or video frame in its packed row; for padding, the number of images and frames."""

    real: jax.Array
    """bool, False for padding."""


class VisionTower(BlockStack):
    """Vision tower up to the layer whose features are used; later layers are not loaded."""

    cfg: VisionConfig

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg, Names("vision", ("layer_norm1", "layer_norm2"), "out_proj"))
        self.by_axis = by_axis = 0 if cfg.positions is None else cfg.positions.by_axis
        sizes = {
            "vision": cfg.hidden_size,
            "channel": cfg.channels,
            "temporal": cfg.patches.temporal,
            "patch_row": cfg.patch_size,
            "patch_column": cfg.patch_size,
            "position": by_axis or cfg.position_grid**2 + cfg.class_token,
            "axis": 2,
        }
        self.class_embedding = Leaf(sizes, ("vision",)) if cfg.class_token else None
        patch = ("channel", *(("temporal",) if cfg.dynamic_resolution else ()), "patch_row", "patch_column")
        patch = ("patch_row", "patch_column", "channel") if cfg.patches.channels_last else patch
        # a convolution with stride = kernel size, as one matrix product
        self.patch_embedding = Projection(sizes, ("vision",), patch, bias=cfg.patches.bias)
        axes = ("axis", "position", "vision") if by_axis else ("position", "vision")
        self.position_embedding = Leaf(sizes, axes) if cfg.positions is not None else None
        norm = functools.partial(Norm, sizes, "vision", kind="layer", eps=cfg.block.norm_eps)
        self.pre_layrnorm = norm() if cfg.pre_norm else None
        self.post_layernorm = norm() if cfg.post_norm else None

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Apply the vision tower's final norm; return `x` unchanged in towers without one."""
        return x if self.post_layernorm is None else self.post_layernorm(x)

    def _table(self) -> jax.Array:
        assert self.position_embedding is not None
        return self.position_embedding.weight.get_value()

    def positions(self, rows: int, columns: int) -> jax.Array:
        """Return the position embeddings for an image of rows x columns patches, class token first.

        Raises UserError if the tower was trained with a different grid and does not resize its table (only InternViT
        does).
        """
        table, cfg, first = self._table(), self.cfg, int(self.cfg.class_token)
        grid = cfg.position_grid
        if (rows, columns) == (grid, grid):
            return table
        if cfg.positions is None or not cfg.positions.resizes:
            raise UserError(
                f"an image has {rows} x {columns} patches, but the {cfg.kind} vision tower takes {grid} per side: "
                f"resize images to {cfg.image_size} pixels per side"
            )
        patches = table[first:].astype(jnp.float32).reshape(grid, grid, -1)
        down, across = jnp.asarray(bicubic(grid, rows)), jnp.asarray(bicubic(grid, columns))
        resized = jnp.einsum("ri,cj,ijd->rcd", down, across, patches).reshape(rows * columns, -1)
        return jnp.concatenate([table[:first], resized.astype(table.dtype)])

    def spread(self, patches: jax.Array) -> jax.Array:
        """Return position embeddings float[images, positions, vision] for images that fill only part of their pixels.

        Patch i of n real patches in a row or column takes the position at i / n of the table's length, as if the real
        patches covered the whole image (Dehghani et al. 2023; reference: transformers' `SmolVLMVisionEmbeddings`, whose
        float32 boundaries equal these integers).
        """
        table, grid = self._table(), self.cfg.position_grid

        def places(real: jax.Array) -> jax.Array:
            count = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)[:, None]
            return jnp.minimum(jnp.arange(real.shape[1], dtype=jnp.int32)[None] * grid // count, grid - 1)

        down, across = places(patches[:, :, 0]), places(patches[:, 0])
        index = down[:, :, None] * grid + across[:, None]
        return table[jnp.where(patches, index, 0).reshape(len(patches), -1)]

    def context_of(self, x: jax.Array, arrays: Mapping[str, Any]) -> Context:
        """Return masks and rotary tables for hidden states float[images, positions, ...], from fields of `Packed`."""
        cfg = self.cfg
        if arrays["grid"] is None:
            real = None if arrays.get("real") is None else arrays["real"].reshape(len(x), -1)
            pattern = Pattern() if real is None else Pattern(real[:, None, None])
            return Context({mixer.pattern: pattern for mixer in cfg.attentions}, valid=real)
        places, facts, patterns = places_of(arrays["grid"], x.shape[1], cfg.merge), cfg.attention, dict[Any, Pattern]()
        rope = None
        if facts.rope is not None:
            rope = axial_angles(places, facts.head_dim, facts.rope.theta, columns_first=facts.rope_parts > 1)
        for key, side in {mixer.pattern: mixer.window for mixer in cfg.attentions}.items():
            segments = windows_of(places, cfg.merge, side) if side else places.image
            mask = None if in_blocks(x.shape[1]) else (segments[:, :, None] == segments[:, None])[:, None]
            patterns[key] = Pattern(mask, rope, segments)
        return Context(patterns)

    def embed(self, images: Packed) -> jax.Array:
        """Embed images as the first block's input: float[tiles, positions, vision], or float[packs, patches, vision].

        The class token of a tile (if any) comes first; patches follow row by row.
        """
        cfg, pixels = self.cfg, 2 * (images.values - 0.5) if self.cfg.patches.centres else images.values
        tiles = images.grid is None
        patches = split_tiles(pixels.reshape(-1, *pixels.shape[2:]), cfg.patch_size) if tiles else pixels
        x = self.patch_embedding(patches.reshape(*patches.shape[:2], *self.patch_embedding.inputs))
        if not tiles:
            places = places_of(images.grid, pixels.shape[1], cfg.merge)
            if self.by_axis:
                columns, rows = self._table()
                x = x + columns[places.column] + rows[places.row]
            elif cfg.positions is not None:
                table = constrain(self._table(), (None, None))  # replicated, since any device reads any row
                x = x + resampled(table, places, antialiased=cfg.positions.antialiased)
            return constrain(x, ("batch", None, None))
        rows, columns = (side // cfg.patch_size for side in pixels.shape[-2:])
        if self.class_embedding is not None:
            cls = self.class_embedding.weight.get_value()[None, None]
            x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, x.shape[-1])), x], axis=1)
        if images.real is None:
            x = x + self.positions(rows, columns)[None]
        else:
            x = x + self.spread(images.real.reshape(-1, rows, columns))
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        return constrain(x, ("batch", None, None))

    def __call__(self, images: Packed) -> jax.Array:
        """Run the vision tower; return the hidden states after the final norm."""
        return self.levels(images)[0]

    def levels(self, images: Packed) -> list[jax.Array]:
        """Return hidden states float[packs, patches, vision] after the final norm and each block in `deepstack`."""
        x, deep = self.embed(images), self.cfg.deepstack
        passed = self.pass_through(x, self.context_of(x, images._asdict()), keep=deep)
        kept = [] if passed.kept is None else [passed.kept[i] for i in range(len(deep))]
        return [self.final_norm(passed.last), *kept]


def bicubic(n_in: int, n_out: int) -> np.ndarray:
    """Return the weights float32[n_out, n_in] of torch's bicubic interpolation (align_corners=False)."""
    a = _CUBIC
    weights = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = (i + 0.5) * n_in / n_out - 0.5
        for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            t = abs(center - j)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(j, 0), n_in - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return weights.astype(np.float32)


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
    return Places(row, column, rows, columns, image, real)


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
    window = places.row // (merge * side) * across + places.column // (merge * side)
    # windows of all images up to the patch's own, each counted at its first patch
    first = places.real & (places.row + places.column == 0)
    windows = jnp.cumsum(jnp.where(first, down * across, 0), axis=1, dtype=jnp.int32)
    return jnp.where(places.real, windows - down * across + window, windows)


def resampled(table: jax.Array, places: Places, *, antialiased: bool) -> jax.Array:
    """Interpolate a position table [side * side, vision] bilinearly to each image's grid: [packs, patches, vision].

    Corners are aligned. With `antialiased`, they are not, and images smaller than the table get an antialiasing filter.
    """
    side = round(table.shape[0] ** 0.5)
    entries = jnp.arange(side, dtype=jnp.int32)[None, None]

    def shares(at: jax.Array, count: jax.Array) -> jax.Array:
        """Return interpolation weights of the table's entries along one image axis, float32[packs, patches, side]."""
        at, count = at[..., None], jnp.maximum(count, 1)[..., None]
        if not antialiased:  # in integers, so that no weight is lost to rounding
            last = jnp.maximum(count - 1, 1)
            near = jnp.maximum(last - jnp.abs(entries * last - at * (side - 1)), 0)
            return near.astype(jnp.float32) / last.astype(jnp.float32)
        scale = side / count.astype(jnp.float32)
        centre = (jnp.minimum(at, count - 1).astype(jnp.float32) + 0.5) * scale - 0.5
        distance = jnp.abs(entries.astype(jnp.float32) - centre) / jnp.maximum(scale, 1)
        weights = jnp.maximum(1 - distance, 0)
        return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-6)

    down, across = shares(places.row, places.rows), shares(places.column, places.columns)
    weights = (down[..., :, None] * across[..., None, :]).reshape(*down.shape[:2], side * side)
    return weights.astype(table.dtype) @ table


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
