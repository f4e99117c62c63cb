"""Gemma 3's image preparation: a square resized image, and optional "pan and scan" crops along the long side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.image_processor import check_steps, pixel_fields, sides
from vlmprune_jax.io.data.preparation import SquarePieces
from vlmprune_jax.io.families.tiles import ImageShape

_BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
# Defaults: minimum side of a crop (pixels), maximum number of crops, minimum aspect ratio.
_LEAST, _MOST, _RATIO = 256, 4, 1.2


@dataclass(frozen=True)
class Cropping(SquarePieces):
    """Image preparation that resizes an image to `size` x `size` pixels and may add crops of that size (Gemma 3).

    With `crops`, an image whose aspect ratio is at least `least_ratio` is divided along its longer side into equal
    crops, unless the shorter side of the crops would be below `least_side`. `mean` and `std` normalise pixels.
    `resample` is PIL's number of the resampling filter (reference: transformers' `Gemma3ImageProcessor`).
    """

    size: int
    crops: bool
    least_side: int
    most_crops: int
    least_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    shares = False

    @property
    def usual(self) -> tuple[int, ...]:
        """Usual tile counts per image: 1 without crops, otherwise the whole image and 2 or more crops."""
        return (1, *range(3, self.most_crops + 2)) if self.crops else (1,)

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"do_pan_and_scan": self.crops, "pan_and_scan_max_num_crops": self.most_crops}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Cropping:
        """Return a copy of the preparation with at most `tokens` tokens per image; each crop has `slot_tokens` tokens.

        Raises UserError if the resized whole image alone has more tokens.
        """
        crops = tokens // slot_tokens - 1
        if crops < 0:
            raise UserError(
                f"tokens per image must be at least {slot_tokens}, the number for an image without crops: raise it"
            )
        if crops < 2:  # an image is cut into at least two
            return dataclasses.replace(self, crops=False)
        return dataclasses.replace(self, most_crops=min(crops, self.most_crops))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return an image's crop grid, and its number of tiles (crops plus the whole image)."""
        count = self._count(width, height)
        return ImageShape(*((1, count) if width >= height else (count, 1)), count + (count != 1))

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        return self.image_shape(width, height, sharing).slots * self.size**2

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        """Return the resized whole image, followed by crops along its longer side."""
        count, (width, height) = self._count(*image.size), image.size
        step = math.ceil(max(width, height) / count)
        starts = range(0, count * step, step) if count != 1 else ()
        if width >= height:
            crops = [image.crop((at, 0, min(at + step, width), height)) for at in starts]
        else:
            crops = [image.crop((0, at, width, min(at + step, height))) for at in starts]
        return [piece.resize((self.size, self.size), self.resample) for piece in (image, *crops)]

    def _count(self, width: int, height: int) -> int:
        """Return the number of crops of an image (1 = not cropped)."""
        long, short = max(width, height), min(width, height)
        if not self.crops or long / short < self.least_ratio:
            return 1
        count = min(self.most_crops, max(2, min(long // self.least_side, math.floor(long / short + 0.5))))
        return count if min(math.ceil(long / count), short) >= self.least_side else 1


def cropping_from_processor(config: Mapping[str, Any], location: str) -> Cropping:
    """Return the image cropping described by a Gemma 3 folder's image processor.

    `config`: result of `image_processor.checked_processor`. Raises UserError if resizing, rescaling or normalisation is
    off, or the size is not a square.
    """
    check_steps(config, location, "Gemma 3")
    height, width = sides(config.get("size") or 224, location)
    if height != width:
        raise UserError(f"{location}: image size {height} x {width} must be square for Gemma 3: restore the file")
    return Cropping(
        size=height,
        crops=bool(config.get("do_pan_and_scan")),
        least_side=config.get("pan_and_scan_min_crop_size") or _LEAST,
        most_crops=config.get("pan_and_scan_max_num_crops") or _MOST,
        least_ratio=config.get("pan_and_scan_min_ratio_to_activate") or _RATIO,
        **pixel_fields(config, resample=_BILINEAR),
    )
