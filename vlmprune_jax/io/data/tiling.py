"""InternVL's dynamic tiling: an image becomes a grid of square tiles, optionally followed by a thumbnail."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.image_processor import check_steps, crop_grid, pixel_fields, sides
from vlmprune_jax.io.data.preparation import SquarePieces
from vlmprune_jax.io.families.tiles import ImageShape, TilingConfig


@dataclass(frozen=True)
class Tiling(TilingConfig, SquarePieces):
    """Image preparation that divides an image into a grid of tiles (InternVL)."""

    @property
    def usual(self) -> tuple[int, ...]:
        """Usual numbers of tiles per image: 1, or 1, 3, 6 or 12 tiles plus a thumbnail."""
        return (1, 2, 4, 7, 13)

    def grid(self, width: int, height: int, sharing: int) -> tuple[int, int]:
        """Return (columns, rows) of tiles for an image that is one of `sharing` images in its record."""
        if self.pad:
            width = height = max(width, height)
        return closest_grid(width, height, self.size, self.min_tiles, self._most_tiles(sharing))

    def _most_tiles(self, sharing: int) -> int:
        return max(1, self.max_tiles // sharing) if self.shares else self.max_tiles

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return an image's tile grid, and its number of tiles including the thumbnail."""
        columns, rows = self.grid(width, height, sharing)
        return ImageShape(rows, columns, columns * rows + (self.thumbnail and columns * rows != 1))

    def most(self, images: int) -> int:
        def tiles(sharing: int) -> int:
            most = self._most_tiles(sharing)
            return sharing * (most + (self.thumbnail and most != 1))

        # beyond max_tiles images each has one tile
        return max(map(tiles, (*range(1, min(images, self.max_tiles) + 1), images)))

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"max_patches": self.max_tiles}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Tiling:
        """Return a copy of the preparation with at most `tokens` tokens per image; a tile has `slot_tokens` tokens.

        Raises UserError if fewer than `min_tiles` tiles fit.
        """
        slots = tokens // slot_tokens
        tiles = slots - (self.thumbnail and slots > 1)
        if tiles < self.min_tiles:
            least = (self.min_tiles + (self.thumbnail and self.min_tiles > 1)) * slot_tokens
            raise UserError(
                f"tokens per image must be at least {least}, because a tile has {slot_tokens} tokens: raise the limit"
            )
        return dataclasses.replace(self, max_tiles=min(tiles, self.max_tiles))

    def for_video(self, video: VideoConfig) -> Tiling | None:
        if video.size is None:
            return None
        pixels: dict[str, Any] = {"mean": video.mean, "std": video.std, "resample": video.resample}
        whole = dataclasses.replace(self, size=video.size[0], min_tiles=1, max_tiles=1, thumbnail=False, pad=False)
        return dataclasses.replace(whole, **pixels)

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        columns, rows = self.grid(width, height, sharing)
        return max(columns * rows * self.size**2, max(width, height) ** 2 if self.pad else 0)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        """Return an image's tiles row by row, then its thumbnail (like InternVL's `dynamic_preprocess`)."""
        if self.pad:
            image = pad_to_square(image, self.mean)
        columns, rows = self.grid(*image.size, sharing)
        resized = image.resize((columns * self.size, rows * self.size), self.resample)
        tiles = crop_grid(resized, self.size)
        if self.thumbnail and len(tiles) != 1:
            tiles.append(image.resize((self.size, self.size), self.resample))
        return tiles


@functools.lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Return all tile grids (columns, rows) with `min_tiles` to `max_tiles` tiles, ordered by area.

    The order within an area does not matter: neighbouring ratios have different areas.
    """
    pairs = [(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    return tuple(sorted((pair for pair in pairs if pair[0] * pair[1] >= min_tiles), key=lambda pair: pair[0] * pair[1]))


def closest_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the (columns, rows) of tiles whose aspect ratio is closest to the image's.

    Of two equally close grids, the larger is used if the image has more than half of this grid's pixels (reference:
    InternVL dataset.py `find_closest_aspect_ratio`). Returns one tile if min_tiles is above max_tiles.
    """
    best, closest = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        difference = abs(width / height - columns / rows)
        large = width * height > 0.5 * tile * tile * columns * rows
        if difference < closest or (difference == closest and large):
            best, closest = (columns, rows), difference
    return best


def pad_to_square(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Paste an RGB image onto a square of colour int(255 * mean), centred as in LLaVA's `expand2square`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def tiling_from_processor(config: Mapping[str, Any], location: str) -> Tiling:
    """Return the tiling described in a transformers InternVL folder (`GotOcr2ImageProcessor`).

    `config`: result of `image_processor.checked_processor`. `InternVLProcessor` always uses tiles. Raises UserError if
    resizing, rescaling or normalisation is off, or the size is not a square.
    """
    check_steps(config, location, "InternVL tiles")
    size = config.get("size") or 384
    height, width = (size.get("height"), size.get("width")) if isinstance(size, Mapping) else sides(size, location)
    if height != width or height is None:
        raise UserError(f"{location}: image size {size} must be square for InternVL's tiles: restore the file")
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return Tiling(
        size=height,
        min_tiles=config.get("min_patches") or 1,
        max_tiles=config.get("max_patches") or 12,
        thumbnail=True,
        pad=False,
        shares=False,
        **pixel_fields(config, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    )
