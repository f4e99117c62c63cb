"""Qwen-VL's image preparation: images are resized to whole patches near their own size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.image_processor import check_steps, normalize, pixel_fields
from vlmprune_jax.data.preparation import Preparation
from vlmprune_jax.families.tiles import ImageShape
from vlmprune_jax.models.patch_rows import padded_tokens

_THINNEST = 200  # maximum ratio of long to short side, as in the reference
_SMALLEST_BUCKET = 64  # tokens; smaller buckets save no time


@dataclass(frozen=True)
class Patching(Preparation):
    """Image preparation that cuts patches of `patch` x `patch` pixels; `merge` x `merge` patches become one token.

    Sides are rounded to whole tokens, and the area is brought between `min_pixels` and `max_pixels`. A patch holds its
    channels, each repeated `temporal` times (the frames of a video). `mean` and `std` normalise, `resample` is PIL's
    number of the filter (reference: transformers' `Qwen2VLImageProcessor`).
    """

    patch: int
    temporal: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    shares, turns = False, True

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.temporal * self.patch**2,)

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens to which an image is padded: 64, 96, 128, 192, 256, ..., up to the maximum."""
        buckets = [_SMALLEST_BUCKET]
        while buckets[-1] < self._most_tokens:
            buckets.append(padded_tokens(buckets[-1] + 1))
        return (*buckets[:-1], self._most_tokens)

    @property
    def _most_tokens(self) -> int:
        """Upper bound on tokens per image, allowing for thin images and rounding up of small ones."""
        side = self.patch * self.merge
        most, least = self.max_pixels / side**2, self.min_pixels / side**2
        rounded_up = least + math.sqrt(least) * (math.sqrt(_THINNEST) + 1 / math.sqrt(_THINNEST)) + 1
        return math.ceil(max(most, math.sqrt(_THINNEST * most), rounded_up))

    @property
    def limit_fields(self) -> dict[str, Any]:
        least, most = self.min_pixels, self.max_pixels
        return {"min_pixels": least, "max_pixels": most, "size": {"shortest_edge": least, "longest_edge": most}}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Patching:
        """Return a copy of the preparation with at most `tokens` tokens per image.

        Raises UserError if images of `min_pixels` have more tokens.
        """
        pixels = tokens * (self.patch * self.merge) ** 2
        if pixels < self.min_pixels:
            least = -(-self.min_pixels // (self.patch * self.merge) ** 2)
            raise UserError(
                f"tokens per image must be at least {least}, the number of tokens of the smallest image "
                f"that the model takes ({self.min_pixels} pixels): raise it"
            )
        return dataclasses.replace(self, max_pixels=min(pixels, self.max_pixels))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        rows, columns = self._grid(width, height)
        return ImageShape(rows, columns, tokens=rows * columns // self.merge**2)

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        rows, columns = self._grid(width, height)
        return rows * columns * self.temporal * self.patch**2

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        rows, columns = self._grid(*image.size)
        resized = image.resize((columns * self.patch, rows * self.patch), self.resample)
        pixels = normalize(np.asarray(resized), self.mean, self.std)
        m, p = self.merge, self.patch
        cells = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.broadcast_to(cells[..., None, :, :], (*cells.shape[:5], self.temporal, p, p))
        return frames.reshape(rows * columns, -1)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return an image's (rows, columns) in patches, both multiples of `merge`."""
        if max(width, height) > _THINNEST * min(width, height):
            raise UserError(
                f"image of {width}x{height} pixels: the long side is more than {_THINNEST} times the short side: "
                "crop it"
            )
        side = self.patch * self.merge
        # Python rounds halves to even; a side below half a token becomes 0, and min_pixels enlarges it again
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
        elif rows * columns * side**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(length * grow / side) for length in (height, width))
        return rows * self.merge, columns * self.merge


def patching_from_processor(config: Mapping[str, Any], location: str) -> Patching:
    """Return the patching that a Qwen-VL folder's image processor describes.

    `config` has the settings that `image_processor.checked_processor` returns. Missing settings are refused, since
    several models share the class and its defaults are those of one of them. Raises UserError if a step is switched
    off, or a setting is missing or contradicts another.
    """
    check_steps(config, location, "images of any size (Qwen-VL)")
    size = config.get("size") or {}
    fields: dict[str, Any] = {
        "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
        **{
            name: config.get(name)
            for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        },
    }
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        raise UserError(f"{location}: has no {', '.join(missing)}: restore the file from the model's source")
    least, most, patch, temporal, merge, *_ = fields.values()
    if least > most:
        raise UserError(
            f"{location}: min_pixels {least} is above max_pixels {most}: restore the file from the model's source"
        )
    return Patching(
        patch=patch,
        temporal=temporal,
        merge=merge,
        min_pixels=least,
        max_pixels=most,
        **pixel_fields(config),
    )
