"""Preparation of images as square tiles: grids (InternVL), pieces at the image's own aspect (SmolVLM), or crops."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.data.processor_files import crop_grid, pixel_fields, sides
from vlmprune_jax.io.families.tiles import BILINEAR, LANCZOS, MAX_SIDE, MAX_TILES, ImageShape, TilingConfig

_SIDE = 364  # default pixels per side of SmolVLM's tiles; the default longest side is four of them
# Defaults of Gemma 3's crops: minimum side (pixels), maximum number, minimum aspect ratio.
_LEAST, _MOST, _RATIO = 256, 4, 1.2


@dataclass(frozen=True)
class Tiling(TilingConfig, Preparation):
    """Image preparation that divides an image into a grid of tiles (InternVL)."""

    merge = 0

    @property
    def usual(self) -> tuple[int, ...]:
        return (1, 2, 4, 7, 13)  # 1, or 1, 3, 6 or 12 tiles plus a thumbnail

    def _most_tiles(self, sharing: int) -> int:
        return max(1, self.max_tiles // sharing) if self.shares else self.max_tiles

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        if self.pad:
            width = height = max(width, height)
        columns, rows = closest_grid(width, height, self.size, self.min_tiles, self._most_tiles(sharing))
        pixels = max(columns * rows * self.size**2, width * height if self.pad else 0)
        return ImageShape(rows, columns, columns * rows + (self.thumbnail and columns * rows != 1), pixels=pixels)

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
        whole = dataclasses.replace(self, size=video.size[0], min_tiles=1, max_tiles=1, thumbnail=False, pad=False)
        return dataclasses.replace(whole, mean=video.mean, std=video.std, resample=video.resample)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        if self.pad:  # like InternVL's `dynamic_preprocess`
            image = pad_to_square(image, self.mean)
        shape = self.plan(*image.size, sharing)
        resized = image.resize((shape.columns * self.size, shape.rows * self.size), self.resample)
        tiles = crop_grid(resized, self.size)
        if shape.slots > len(tiles):
            tiles.append(image.resize((self.size, self.size), self.resample))
        return tiles


@functools.lru_cache(maxsize=4096)
def closest_grid(width: int, height: int, tile: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the (columns, rows) of tiles whose aspect ratio is closest to the image's; (1, 1) if no grid is allowed.

    Of two equally close grids, the larger is used if the image has more than half of this grid's pixels (reference:
    InternVL dataset.py `find_closest_aspect_ratio`).
    """
    best, closest = (1, 1), float("inf")
    grids = [(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    allowed = [grid for grid in grids if math.prod(grid) >= min_tiles]
    for columns, rows in sorted(allowed, key=math.prod):  # grids of neighbouring ratios have different areas
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
    """Return the tiling of `GotOcr2ImageProcessor`, which always uses tiles; raise UserError if they are not square."""
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


@dataclass(frozen=True)
class Splitting(Preparation):
    """Image preparation that splits an image into tiles of `size` x `size` pixels (SmolVLM).

    The longer side is first resized to `longest` pixels. With `splits`, both sides are then rounded up to multiples of
    `size`, and a small copy of the whole image follows the tiles. Without `splits`, the whole image is one tile. `mean`
    and `std` normalise pixels. `resample` is PIL's number of the resampling filter (reference: transformers'
    `SmolVLMImageProcessor`).
    """

    merge = 0
    size: int
    longest: int
    splits: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @property
    def _along(self) -> int:
        return -(-min(self.longest, MAX_SIDE) // self.size) if self.splits else 1

    @property
    def usual(self) -> tuple[int, ...]:
        along = self._along  # with the whole image: from one row of tiles up to a square
        return (1,) if along == 1 else (1, *(along * rows + 1 for rows in range(1, along + 1)))

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"size": {"longest_edge": self.longest}}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Splitting:
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

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        rows, columns, size, resized = 1, 1, self.size, self._resized(width, height)
        if self.splits:
            (width, height), ratio = resized, resized[0] / resized[1]
            if width >= height:
                width = math.ceil(width / size) * size
                height = math.ceil(int(width / ratio) / size) * size
            else:
                height = math.ceil(height / size) * size
                width = math.ceil(int(height * ratio) / size) * size
            rows, columns = max(height // size, 1), max(width // size, 1)
        pixels = max(rows * columns * size**2, math.prod(resized))
        return ImageShape(rows, columns, rows * columns + (rows * columns != 1), pixels=pixels)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        shape = self.plan(*image.size)
        image = image.resize(self._resized(*image.size), self.resample)
        image = image.resize((shape.columns * self.size, shape.rows * self.size), self.resample)
        if shape.slots == 1:
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


def splitting_from_processor(config: Mapping[str, Any], location: str) -> Splitting:
    """Return the image splitting of SmolVLM's image processor.

    Raises UserError if a size does not state the longest edge, or an image could have too many tiles.
    """
    splitting = Splitting(
        size=_longest_edge(config, "max_image_size", _SIDE, location),
        longest=_longest_edge(config, "size", 4 * _SIDE, location),
        splits=config.get("do_image_splitting") is not False,
        **pixel_fields(config, resample=LANCZOS),
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


@dataclass(frozen=True)
class Cropping(Preparation):
    """Image preparation that resizes an image to `size` x `size` pixels and may add crops of that size (Gemma 3).

    With `crops`, an image whose aspect ratio is at least `least_ratio` is divided along its longer side into equal
    crops, unless the shorter side of the crops would be below `least_side`. `mean` and `std` normalise pixels.
    `resample` is PIL's number of the resampling filter (reference: transformers' `Gemma3ImageProcessor`).
    """

    merge = 0
    size: int
    crops: bool
    least_side: int
    most_crops: int
    least_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @property
    def usual(self) -> tuple[int, ...]:
        return (1, *range(3, self.most_crops + 2)) if self.crops else (1,)  # the whole image and 2 or more crops

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"do_pan_and_scan": self.crops, "pan_and_scan_max_num_crops": self.most_crops}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Cropping:
        crops = tokens // slot_tokens - 1
        if crops < 0:
            raise UserError(
                f"tokens per image must be at least {slot_tokens}, the number for an image without crops: raise it"
            )
        if crops < 2:  # an image is cut into at least two
            return dataclasses.replace(self, crops=False)
        return dataclasses.replace(self, most_crops=min(crops, self.most_crops))

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        long, short, count = max(width, height), min(width, height), 1
        if self.crops and long / short >= self.least_ratio:
            count = min(self.most_crops, max(2, min(long // self.least_side, math.floor(long / short + 0.5))))
            count = count if min(math.ceil(long / count), short) >= self.least_side else 1
        rows, columns, slots = *((1, count) if width >= height else (count, 1)), count + (count != 1)
        return ImageShape(rows, columns, slots, pixels=slots * self.size**2)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        (width, height), shape = image.size, self.plan(*image.size)
        count = shape.rows * shape.columns
        step = math.ceil(max(width, height) / count)
        starts = range(0, count * step, step) if count != 1 else ()
        across = ((at, 0, min(at + step, width), height) for at in starts)
        down = ((0, at, width, min(at + step, height)) for at in starts)
        crops = map(image.crop, across if width >= height else down)
        return [piece.resize((self.size, self.size), self.resample) for piece in (image, *crops)]


def cropping_from_processor(config: Mapping[str, Any], location: str) -> Cropping:
    """Return the image cropping of Gemma 3's image processor; raise UserError if its size is not a square."""
    height, width = sides(config.get("size") or 224, location)
    if height != width:
        raise UserError(f"{location}: image size {height} x {width} must be square for Gemma 3: restore the file")
    return Cropping(
        size=height,
        crops=bool(config.get("do_pan_and_scan")),
        least_side=config.get("pan_and_scan_min_crop_size") or _LEAST,
        most_crops=config.get("pan_and_scan_max_num_crops") or _MOST,
        least_ratio=config.get("pan_and_scan_min_ratio_to_activate") or _RATIO,
        **pixel_fields(config, resample=BILINEAR),
    )
