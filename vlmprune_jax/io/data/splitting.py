"""SmolVLM's image splitting: square sub-images at the image's own aspect ratio, then the whole image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.image_processor import check_steps, crop_grid, pixel_fields
from vlmprune_jax.io.data.preparation import SquarePieces
from vlmprune_jax.io.families.tiles import MAX_SIDE, MAX_TILES, ImageShape

_LANCZOS = 1  # PIL.Image.Resampling.LANCZOS
_SIDE = 364  # default pixels per side of a sub-image; the default longest side is four of them


@dataclass(frozen=True)
class Splitting(SquarePieces):
    """Image preparation that splits an image into tiles of `size` x `size` pixels (SmolVLM).

    The longer side is first resized to `longest` pixels. With `splits`, both sides are then rounded up to multiples of
    `size`, and a small copy of the whole image follows the tiles. Without `splits`, the whole image is one tile. `mean`
    and `std` normalise pixels. `resample` is PIL's number of the resampling filter (reference: transformers'
    `SmolVLMImageProcessor`).
    """

    size: int
    longest: int
    splits: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    shares = False

    @property
    def _along(self) -> int:
        """Maximum number of tiles along the longer side."""
        return -(-min(self.longest, MAX_SIDE) // self.size) if self.splits else 1

    @property
    def usual(self) -> tuple[int, ...]:
        """Usual numbers of tiles per image, the whole image included: from one row of tiles up to a square."""
        along = self._along
        return (1,) if along == 1 else (1, *(along * rows + 1 for rows in range(1, along + 1)))

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"size": {"longest_edge": self.longest}}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Splitting:
        """Return a copy of the preparation with at most `tokens` tokens per image; a tile has `slot_tokens` tokens.

        Raises UserError if `tokens` is less than one tile.
        """
        slots = tokens // slot_tokens
        if not slots:
            raise UserError(
                f"tokens per image must be at least {slot_tokens}, the number for an image without tiles: raise it"
            )
        along = max(math.isqrt(slots - 1), 1)  # a square image has along x along pieces and the overview
        return self if along >= self._along else dataclasses.replace(self, longest=along * self.size)

    def for_video(self, video: VideoConfig) -> Splitting | None:
        if video.size is None or video.longest_edge is None:
            return None
        whole = dataclasses.replace(self, size=video.size[0], longest=video.longest_edge, splits=False)
        return dataclasses.replace(whole, mean=video.mean, std=video.std, resample=video.resample)

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return an image's tile grid, and its number of tiles including the whole image."""
        rows, columns = self._grid(width, height)
        return ImageShape(rows, columns, rows * columns + (rows * columns != 1))

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        rows, columns = self._grid(width, height)
        first_width, first_height = self._resized(width, height)
        return max(rows * columns * self.size**2, first_width * first_height)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        """Return an image's tiles row by row, then the whole image, resized as in the reference code."""
        rows, columns = self._grid(*image.size)
        image = image.resize(self._resized(*image.size), self.resample)
        image = image.resize((columns * self.size, rows * self.size), self.resample)
        if rows * columns == 1:
            return [image]
        return [*crop_grid(image, self.size), image.resize((self.size, self.size), self.resample)]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the resized (width, height): long side `longest`, even short side, both at most `MAX_SIDE`."""
        ratio = width / height
        if width >= height:
            short = int(self.longest / ratio)
            width, height = self.longest, max(short + short % 2, 1)
        else:
            short = int(self.longest * ratio)
            width, height = max(short + short % 2, 1), self.longest
        ratio = width / height
        if width >= height and width > MAX_SIDE:
            width, height = MAX_SIDE, int(MAX_SIDE / ratio)
        elif height > MAX_SIDE:
            width, height = int(MAX_SIDE * ratio), MAX_SIDE
        return max(width, 1), max(height, 1)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return an image's (rows, columns) of tiles; (1, 1) if it is not split."""
        if not self.splits:
            return 1, 1
        width, height = self._resized(width, height)
        ratio, size = width / height, self.size
        if width >= height:
            width = math.ceil(width / size) * size
            height = math.ceil(int(width / ratio) / size) * size
        else:
            height = math.ceil(height / size) * size
            width = math.ceil(int(height * ratio) / size) * size
        return max(height // size, 1), max(width // size, 1)


def splitting_from_processor(config: Mapping[str, Any], location: str) -> Splitting:
    """Return the image splitting that a SmolVLM folder's image processor describes.

    `config`: result of `image_processor.checked_processor`. Raises UserError if resizing, rescaling or normalisation is
    off, a size does not state the longest edge, or an image could have too many tiles.
    """
    check_steps(config, location, "split images (SmolVLM)")
    splitting = Splitting(
        size=_longest_edge(config, "max_image_size", _SIDE, location),
        longest=_longest_edge(config, "size", 4 * _SIDE, location),
        splits=config.get("do_image_splitting") is not False,
        **pixel_fields(config, resample=_LANCZOS),
    )
    if splitting.most(1) > MAX_TILES:
        raise UserError(
            f"{location}: size {splitting.longest} and max_image_size {splitting.size} give up to {splitting.most(1)} "
            f"tiles per image, more than the maximum of {MAX_TILES}: restore the file from the model's source"
        )
    return splitting


def _longest_edge(config: Mapping[str, Any], name: str, default: int, location: str) -> int:
    size = config.get(name)
    if size is None:
        return default
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    if edge is None:
        raise UserError(f"{location}: {name} {size} has no longest_edge: restore the file from the model's source")
    return int(edge)
