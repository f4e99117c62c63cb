"""SmolVLM's image splitting: an image at its own ratio becomes square sub-images, the whole image the last of them."""

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
from vlmprune_jax.families.tiles import MAX_SIDE, MAX_TILES

_LANCZOS = 1  # PIL.Image.Resampling.LANCZOS
_HALF = (0.5, 0.5, 0.5)  # ImageNet's "standard" mean and deviation, the class's defaults
_SIDE = 364  # as are sub-images of 364, and a longest side of four of them


@dataclass(frozen=True)
class Splitting:
    """How images become sub-images of `size` x `size` pixels: the long side is made `longest` pixels first.

    With `splits` both sides are then rounded up to whole sub-images, and an image of several has the whole image as its
    last one; without, an image becomes one sub-image. `mean` and `std` normalise, `resample` is PIL's number of the
    filter (reference: transformers' `SmolVLMImageProcessor`).
    """

    size: int
    longest: int
    splits: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    shares, merge, image_buckets = False, 0, ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of a sub-image."""
        return (3, self.size, self.size)

    @property
    def settings(self) -> dict[str, Any]:
        """What the sub-images depend on beside the image, as JSON values."""
        return {"splitting": dataclasses.asdict(self)}

    @property
    def _along(self) -> int:
        """Sub-images along the long side, whatever the image."""
        return -(-min(self.longest, MAX_SIDE) // self.size) if self.splits else 1

    @property
    def usual(self) -> tuple[int, ...]:
        """Slots of an image with one row of sub-images, two, ... up to a square of them."""
        along = self._along
        return (1,) if along == 1 else (1, *(along * rows + 1 for rows in range(1, along + 1)))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the grid of an image, and how many sub-images it has with its overview."""
        del sharing
        rows, columns = self._grid(width, height)
        return ImageShape(rows, columns, rows * columns + (rows * columns != 1))

    def most(self, images: int) -> int:
        """Return the most sub-images of a record with up to `images` images."""
        return images * self.usual[-1]

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels in the largest picture on the way."""
        del sharing
        rows, columns = self._grid(width, height)
        first_width, first_height = self._resized(width, height)
        return max(rows * columns * self.size**2, first_width * first_height)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return float32[sub-images, 3, size, size]: the grid row by row, then the whole image."""
        del sharing
        pieces = np.stack([np.asarray(piece) for piece in self.cut(image)]).astype(np.float32)
        pieces /= np.float32(255)
        pieces -= np.array(self.mean, np.float32)
        pieces /= np.array(self.std, np.float32)
        return np.ascontiguousarray(pieces.transpose(0, 3, 1, 2))

    def cut(self, image: Image.Image) -> list[Image.Image]:
        """Return the sub-images of an RGB image; it is resized up to three times, as the reference does."""
        rows, columns = self._grid(*image.size)
        image = image.resize(self._resized(*image.size), self.resample)
        image = image.resize((columns * self.size, rows * self.size), self.resample)
        if rows * columns == 1:
            return [image]
        pieces = [
            image.crop((left, top, left + self.size, top + self.size))
            for top in range(0, rows * self.size, self.size)
            for left in range(0, columns * self.size, self.size)
        ]
        return [*pieces, image.resize((self.size, self.size), self.resample)]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) with the long side at `longest`, the short one even, and both at most `MAX_SIDE`."""
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
        """Return (rows, columns); 1 x 1 is an image that stays whole."""
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


def splitting_from_processor(config: Mapping[str, Any], where: str) -> Splitting:
    """Return the splitting of a SmolVLM folder.

    `config`: settings as `image_processor.checked_processor` returns them.

    Raises:
      UserError: a step is switched off, a size is not that of the longest edge, or images become too many pieces.
    """
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            raise UserError(f"{where}: {step} false is not supported for images that are split; set it to true")
    if abs(float(config.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-9:
        raise UserError(f"{where}: rescale_factor {config['rescale_factor']} is not supported; SmolVLM's is 1/255")
    resample = config.get("resample")
    splitting = Splitting(
        size=_longest_edge(config, "max_image_size", _SIDE, where),
        longest=_longest_edge(config, "size", 4 * _SIDE, where),
        splits=config.get("do_image_splitting") is not False,
        mean=tuple(config.get("image_mean") or _HALF),
        std=tuple(config.get("image_std") or _HALF),
        resample=_LANCZOS if resample is None else resample,
    )
    if splitting.most(1) > MAX_TILES:
        raise UserError(
            f"{where}: size {splitting.longest} and max_image_size {splitting.size} make up to {splitting.most(1)} "
            f"sub-images of an image, at most {MAX_TILES} are supported; restore them from the model's source"
        )
    return splitting


def _longest_edge(config: Mapping[str, Any], name: str, default: int, where: str) -> int:
    size = config.get(name)
    if size is None:
        return default
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    if edge is None:
        raise UserError(f"{where}: {name} {size} does not give the longest edge; restore it from the model's source")
    return int(edge)
