"""Preparation of a decoded image for the vision tower: its interface, and what images in square pieces share."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.image_processor import normalize
from vlmprune_jax.families.tiles import ImageShape


class Preparation(Protocol):
    """Conversion of a decoded image to arrays for the vision tower; `sharing` is the number of images in the record.

    Attributes:
      merge: patch-merge factor n (n x n patches become one token) if images have any size; 0 if the size is fixed.
      shares: True if an image's arrays depend on the number of images in its record.
      turns: True if tokens get rotary positions by row and column of their image (M-RoPE).
    """

    merge: int
    shares: bool
    turns: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vision tower's input: (channels, height, width), or (values,) per patch (any size)."""

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Token counts to which images of any size are padded, ascending; () if the size is fixed."""
        return ()

    @property
    def settings(self: Any) -> dict[str, Any]:
        """Settings on which the prepared arrays depend, as JSON values."""
        return {type(self).__name__.lower(): dataclasses.asdict(self)}

    @property
    def limit_fields(self) -> dict[str, Any]:
        """Fields of the image processor's settings that limit the tokens per image; {} if they cannot."""

    @property
    def usual(self) -> tuple[int, ...]:
        """Common numbers of slots per image, in ascending order."""
        return (1,)

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the grid and number of slots of an image after preparation."""

    def most(self, images: int) -> int:
        """Return the maximum number of slots needed by a record with up to `images` images."""
        return images * self.usual[-1]

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the number of pixels of the largest intermediate image."""

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return an RGB image as float32[slots, channels, height, width], or float32[1, patches, values]."""

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Preparation:
        """Return a copy with at most `tokens` tokens per image; a slot has `slot_tokens` if images have one size.

        Raises UserError (`must be ...: what to do`) if the model does not have such images.
        """


class SquarePieces(Preparation, Protocol):
    """Preparation that `cut`s an image into pieces of `size` x `size` pixels, normalised by `mean` and `std`."""

    merge: int = 0

    @property
    def shape(self: Any) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def prepare(self: Any, image: Image.Image, sharing: int) -> np.ndarray:
        pieces = np.stack([np.asarray(piece) for piece in self.cut(image, sharing)])
        return np.ascontiguousarray(normalize(pieces, self.mean, self.std).transpose(0, 3, 1, 2))


def fixed_size(slot_tokens: int) -> UserError:
    """Return the error message for a limit on image tokens if all images of the model have one size."""
    return UserError(
        f"every image of this model has {slot_tokens} tokens, whatever its size: unset this limit, or use a model "
        "whose "
        "images differ in tokens (InternVL, SmolVLM, Qwen-VL, Gemma)"
    )
