"""LFM2-VL's image preparation: images near their own size, large ones also as square tiles before an overview."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.image_processor import check_steps, crop_grid, normalize, pixel_fields
from vlmprune_jax.io.data.patching import Patches, token_buckets
from vlmprune_jax.io.data.preparation import Plan
from vlmprune_jax.io.data.tiling import closest_grid
from vlmprune_jax.io.families.tiles import BILINEAR, MAX_TILES, ImageShape


@dataclass(frozen=True)
class NaFlex(Patches):
    """Image preparation of LFM2-VL (reference: transformers' `Lfm2VlImageProcessor`).

    An image is resized to `min_tokens` to `max_tokens` tokens; a token is `merge` x `merge` patches of `patch` x
    `patch` pixels. An image that originally has more than `tolerance` x `max_tokens` tokens is also divided into
    `min_tiles` to `max_tiles` tiles of `size` x `size` pixels, which come before the resized image (`thumbnail`).
    `mean` and `std` normalise pixels. `resample` is PIL's number of the resampling filter.
    """

    patch: int
    merge: int
    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    min_tokens: int
    max_tokens: int
    tolerance: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @property
    def _tile_side(self) -> int:
        return self.size // (self.patch * self.merge)

    @property
    def _most_tokens(self) -> int:
        tiles = self.max_tiles if self.max_tiles > 1 else 0
        # rounding up small sides may exceed the limit
        return tiles * self._tile_side**2 + max(self.max_tokens, 4 * self.min_tokens)

    @property
    def image_buckets(self) -> tuple[int, ...]:
        return token_buckets(self._most_tokens)

    @property
    def usual(self) -> tuple[int, ...]:
        most = self.max_tiles + self.thumbnail if self.max_tiles > 1 else 1
        return (*(n for n in (1, 3, 5, 7) if n < most), most)

    @property
    def limit_fields(self) -> dict[str, Any]:
        names = {"min_tiles": self.min_tiles, "max_tiles": self.max_tiles, "max_image_tokens": self.max_tokens}
        return {**names, "do_image_splitting": self.max_tiles > 1}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> NaFlex:
        if tokens < self.min_tokens:
            raise UserError(
                f"tokens per image must be at least {self.min_tokens}, the number of tokens of the smallest image: "
                "raise the limit"
            )
        tiles = min((tokens - self.max_tokens) // self._tile_side**2, self.max_tiles)
        if tiles >= self.min_tiles:
            return dataclasses.replace(self, max_tiles=tiles)
        return dataclasses.replace(self, min_tiles=1, max_tiles=1, max_tokens=min(tokens, self.max_tokens))

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> Plan:
        columns, rows = self._tiles(width, height)
        side, whole = self._tile_side * self.merge, self._grid(width, height)
        tiled = rows * columns > 1
        pieces = [(side, side)] * (rows * columns) * tiled + [whole] * (self.thumbnail or not tiled)
        tokens = sum(r * c for r, c in pieces) // self.merge**2
        largest = max(columns * rows * self.size**2, math.prod(whole) * self.patch**2)
        return Plan(ImageShape(rows, columns, len(pieces), tokens, tuple(pieces)), largest)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        shape, (columns, rows) = self.image_shape(*image.size, sharing), self._tiles(*image.size)
        pieces = list[Image.Image]()
        if rows * columns > 1:
            tiled = image.resize((columns * self.size, rows * self.size), self.resample)
            pieces = crop_grid(tiled, self.size)
        for across, down in [(c, r) for r, c in shape.pieces[len(pieces) :]]:
            pieces.append(image.resize((across * self.patch, down * self.patch), self.resample))
        normalized = (normalize(np.asarray(piece), self.mean, self.std) for piece in pieces)
        return np.concatenate([self.cells(pixels).reshape(-1, *self.shape) for pixels in normalized])

    def _tiles(self, width: int, height: int) -> tuple[int, int]:
        """Return (columns, rows) of tiles; (1, 1) for an image that is not cut."""
        side = self.patch * self.merge
        rounded = [max(self.patch, round(length / side) * side) for length in (width, height)]
        if self.max_tiles == 1 or math.prod(rounded) <= self.max_tokens * side**2 * self.tolerance:
            return 1, 1
        return closest_grid(width, height, self.size, self.min_tiles, self.max_tiles)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        side = self.patch * self.merge
        rounded = max(1, round(height / side)), max(1, round(width / side))
        return self.fitted(width, height, rounded, (self.min_tokens * side**2, self.max_tokens * side**2))


def naflex_from_processor(config: Mapping[str, Any], location: str) -> NaFlex:
    """Return the image preparation of checked settings of LFM2-VL's image processor.

    Raises UserError if resizing, rescaling or normalisation is off, tiles are not a whole number of tokens, or a
    minimum of tiles or tokens is above the maximum.
    """
    check_steps(config, location, "images in tiles before an overview")
    values: dict[str, Any] = {
        name: config.get(name) or default
        for name, default in {
            "encoder_patch_size": 16, "downsample_factor": 2, "tile_size": 512, "min_tiles": 2, "max_tiles": 10,
            "min_image_tokens": 64, "max_image_tokens": 256, "max_pixels_tolerance": 2.0,
        }.items()
    }  # fmt: skip
    patch, merge, size, min_tiles, max_tiles, min_tokens, max_tokens, tolerance = values.values()
    if config.get("do_image_splitting") is False:
        min_tiles = max_tiles = 1
    if size % (patch * merge) or not 1 <= min_tiles <= max_tiles <= MAX_TILES or min_tokens > max_tokens:
        raise UserError(
            f"{location}: tile_size {size}, {min_tiles} to {max_tiles} tiles, {min_tokens} to {max_tokens} tokens and "
            f"{merge} x {merge} patches of {patch} pixels per token contradict each other: restore the file from the "
            "model's source"
        )
    thumbnail = config.get("use_thumbnail") is not False
    limits = (min_tiles, max_tiles, thumbnail, min_tokens, max_tokens, tolerance)
    return NaFlex(patch, merge, size, *limits, **pixel_fields(config, resample=BILINEAR))
