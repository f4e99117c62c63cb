"""Qwen-VL's images: resized to whole patches near their own size, each one sequence of patches with a grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.core.config import ImageShape
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.families.tiles import BICUBIC

_THINNEST = 200  # long over short side, as the reference refuses more
_SMALLEST_BUCKET = 64  # tokens; below it another program saves nothing


@dataclass(frozen=True)
class Patching:
    """How images become patches of `patch` x `patch` pixels, of which `merge` x `merge` make one token.

    Sides are rounded to whole tokens, the area brought between `min_pixels` and `max_pixels`. A patch is its channels,
    each repeated `temporal` times (a video has frames there). `mean` and `std` normalise, `resample` is PIL's number of
    the filter (reference: transformers' `Qwen2VLImageProcessor`).
    """

    patch: int
    temporal: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    shares, usual = False, (1,)

    @property
    def shape(self) -> tuple[int, ...]:
        """(values,) of a patch."""
        return (3 * self.temporal * self.patch**2,)

    @property
    def settings(self) -> dict[str, Any]:
        """What the patches depend on beside the image, as JSON values."""
        return {"patching": dataclasses.asdict(self)}

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Doublings up to what any image may have."""
        buckets = [_SMALLEST_BUCKET]
        while buckets[-1] < self._most_tokens:
            buckets.append(2 * buckets[-1])
        return (*buckets[:-1], self._most_tokens)

    @property
    def _most_tokens(self) -> int:
        """A bound: thin images are a token wide however few pixels they may have, and small ones are rounded up."""
        side = self.patch * self.merge
        most, least = self.max_pixels / side**2, self.min_pixels / side**2
        rounded_up = least + math.sqrt(least) * (math.sqrt(_THINNEST) + 1 / math.sqrt(_THINNEST)) + 1
        return math.ceil(max(most, math.sqrt(_THINNEST * most), rounded_up))

    def with_most_tokens(self, tokens: int) -> Patching:
        """The same with images of at most so many tokens (thin ones: see `_most_tokens`), if it allows more.

        Raises:
          UserError: fewer than the least area makes.
        """
        pixels = tokens * (self.patch * self.merge) ** 2
        if pixels < self.min_pixels:
            least = -(-self.min_pixels // (self.patch * self.merge) ** 2)
            raise UserError(
                f"data.max_image_tokens={tokens} is less than the {least} that the model's folder gives the smallest "
                f"image ({self.min_pixels} pixels): raise it"
            )
        return dataclasses.replace(self, max_pixels=min(pixels, self.max_pixels))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the grid of an image's patches. Raises UserError where it is too thin."""
        del sharing
        rows, columns = self._grid(width, height)
        return ImageShape(rows, columns, tokens=rows * columns // self.merge**2)

    def most(self, images: int) -> int:
        """Return `images`."""
        return images

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels of all patches. Raises UserError where it is too thin."""
        del sharing
        rows, columns = self._grid(width, height)
        return rows * columns * self.temporal * self.patch**2

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return float32[1, patches, values] of an RGB image, the patches of a token one after the other."""
        del sharing
        rows, columns = self._grid(*image.size)
        resized = image.resize((columns * self.patch, rows * self.patch), self.resample)
        pixels = np.asarray(resized).astype(np.float32)
        pixels /= np.float32(255)
        pixels -= np.array(self.mean, np.float32)
        pixels /= np.array(self.std, np.float32)
        m, p = self.merge, self.patch
        cells = pixels.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.broadcast_to(cells[..., None, :, :], (*cells.shape[:5], self.temporal, p, p))
        return frames.reshape(1, rows * columns, -1)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Return (rows, columns) of patches, both multiples of `merge`."""
        if max(width, height) > _THINNEST * min(width, height):
            raise UserError(
                f"image of {width}x{height} pixels: its long side is over {_THINNEST} times the short one, which the "
                "model's processor refuses; crop it"
            )
        side = self.patch * self.merge
        # Halves go to the even number, and a side below half a token to none, which the smallest area lifts again.
        rows, columns = round(height / side), round(width / side)
        if rows * columns * side**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
        elif rows * columns * side**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(length * grow / side) for length in (height, width))
        return rows * self.merge, columns * self.merge


def patching_from_processor(config: Mapping[str, Any], where: str) -> Patching:
    """Return the patching of a Qwen-VL folder; `min_pixels` and `max_pixels` go before the `size` of newer files.

    `config`: settings as `image_processor.checked_processor` returns them. Several models share the class, whose
    defaults are those of one: what is missing is refused.

    Raises:
      UserError: a step is switched off, or a setting is missing or contradicts another.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            raise UserError(f"{where}: {step} false is not supported for images of any size; set it to true")
    if abs(float(config.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-9:
        raise UserError(f"{where}: rescale_factor {config['rescale_factor']} is not supported; Qwen-VL's is 1/255")
    size = config.get("size") or {}
    found: dict[str, Any] = {
        "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
        **{name: config.get(name) for name in ("patch_size", "temporal_patch_size", "merge_size")},
        **{name: config.get(name) for name in ("image_mean", "image_std")},
    }
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(f"{where}: says nothing of {', '.join(missing)}; restore it from the model's source")
    least, most, patch, temporal, merge, mean, std = found.values()
    if least > most:
        raise UserError(f"{where}: min_pixels {least} is above max_pixels {most}; restore them")
    resample = config.get("resample")
    return Patching(
        patch=patch,
        temporal=temporal,
        merge=merge,
        min_pixels=least,
        max_pixels=most,
        mean=tuple(mean),
        std=tuple(std),
        resample=BICUBIC if resample is None else resample,
    )
