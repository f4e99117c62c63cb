"""Preparation of a decoded image for the vision tower: its interface, and the whole image as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.image_processor import (
    make_processor,
    sides,
)
from vlmprune_jax.data.tiling import pad_to_square
from vlmprune_jax.families.tiles import ImageShape

ASPECT_RATIOS = ("auto", "pad", "square")


class Preparation(Protocol):
    """Conversion of a decoded image to arrays for the tower; `sharing` is the number of images in the same record."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tower's input: (channels, height, width), or (values,) of a patch if images have any size."""

    @property
    def merge(self) -> int:
        """Patch-merge factor n (n x n patches become one token) if images have any size; 0 if the size is fixed."""

    @property
    def turns(self) -> bool:
        """True if tokens get rotary positions by row and column of their image (M-RoPE)."""

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Token counts to which images of any size are padded, ascending; () if the size is fixed."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the arrays, as JSON values."""

    @property
    def limit_fields(self) -> dict[str, Any]:
        """Fields of the image processor's settings that limit the tokens per image; {} if they cannot."""

    @property
    def shares(self) -> bool:
        """True if an image's arrays depend on the number of images in its record."""

    @property
    def usual(self) -> tuple[int, ...]:
        """Common numbers of slots per image, in ascending order."""

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the grid and number of slots of an image after preparation."""

    def most(self, images: int) -> int:
        """Return the maximum number of slots needed by a record with up to `images` images."""

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the number of pixels of the largest intermediate image."""

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return an RGB image as float32[slots, channels, height, width], or float32[1, patches, values]."""

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Preparation:
        """Return a copy with at most `tokens` tokens per image; a slot has `slot_tokens` if images have one size.

        Raises UserError (`must be ...: what to do`) if the model does not have such images.
        """


class WholeImage:
    """Preparation of an image as one picture: LLaVA's `image_aspect_ratio`, then the folder's image processor.

    `aspect_ratio` "pad" centres the image on a square of the colour int(255 * mean); "square" passes it on
    unchanged.
    """

    shares, usual, merge, image_buckets, turns = False, (1,), 0, (), False

    def __init__(self, config: Mapping[str, Any], *, where: str, aspect_ratio: str) -> None:
        if aspect_ratio not in ASPECT_RATIOS[1:]:
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is unknown: use one of pad, square")
        self._processor = make_processor(config, where)
        self._pad = aspect_ratio == "pad"
        self.limit_fields: dict[str, Any] = {}
        self.settings: dict[str, Any] = {"aspect_ratio": aspect_ratio, "processor": dict(config)}
        crops = getattr(self._processor, "do_center_crop", None)
        if not (crops or self._processor.do_resize):
            raise UserError(f"{where}: do_resize and do_center_crop are off, so images differ in size: restore one")
        self._resized = sides(self._processor.size, where)
        self._short_side = "shortest_edge" in dict(self._processor.size)
        self.shape = (3, *(sides(self._processor.crop_size, where) if crops else self._resized))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the shape of an image that is not cut into tiles: one slot of the batch."""
        return ImageShape()

    def most(self, images: int) -> int:
        """Return `images`, since every image takes one slot."""
        return images

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the number of pixels after padding or resizing, which is huge for thin images."""
        height_after, width_after = self._resized
        if self._pad:
            return max(max(width, height) ** 2, height_after * width_after)
        if self._short_side:
            return height_after * width_after * max(width, height) // min(width, height)
        return height_after * width_after

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return an RGB image as float32[1, 3, height, width]."""
        if self._pad:
            image = pad_to_square(image, tuple(self._processor.image_mean))
        return np.array(self._processor(image, return_tensors="np")["pixel_values"], np.float32, order="C")

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> WholeImage:
        """Refuse a limit, since the size of the tower's input fixes the tokens per image."""
        raise fixed_size(slot_tokens)


def fixed_size(slot_tokens: int) -> UserError:
    """Return the error about a limit on image tokens for a model whose images have one size."""
    return UserError(
        f"every image of this model has {slot_tokens} tokens, whatever its size: unset it, or use a model with tiles, "
        "patches or a token budget (InternVL, SmolVLM, Qwen-VL, Gemma)"
    )
