"""Interface of image preparations for the vision tower, their padded sizes, and the base class for square tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.image_processor import normalize
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.families.tiles import ImageShape, VideoShape


class Preparation(Protocol):
    """Conversion of a decoded image to arrays for the vision tower; `sharing` is the number of images in its record.

    Attributes:
      merge: patch-merge factor n (n x n patches become one token) for images of varying size; 0 if the size is fixed.
      shares: True if an image's arrays depend on the number of images in its record.
      turns: True if image tokens have rotary positions by row and column (M-RoPE).
    """

    merge: int
    shares: bool = False
    turns: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vision tower's input: (channels, height, width); (values,) per patch if image sizes vary."""

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Numbers of tokens to which an image of varying size is padded, ascending; () if all images have one size."""
        return ()

    @property
    def settings(self: Any) -> dict[str, Any]:
        """Settings that determine the prepared arrays, as JSON values (used in cache keys)."""
        return {type(self).__name__.lower(): dataclasses.asdict(self)}

    @property
    def limit_fields(self) -> dict[str, Any]:
        """Fields of preprocessor_config.json that limit the tokens per image; {} if there are none."""

    @property
    def usual(self) -> tuple[int, ...]:
        """Usual tile counts per image, ascending, from which default batch shapes are chosen."""
        return (1,)

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return the grid and number of tiles of an image of this size after its preparation."""

    def most(self, images: int) -> int:
        """Return the maximum number of tiles of a record with up to `images` images."""
        return images * self.usual[-1]

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixel count of the largest intermediate image that the preparation creates."""

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Convert an RGB image to float32[tiles, channels, height, width], or float32[patches, values]."""

    def for_video(self, video: VideoConfig) -> FramePreparation | None:
        """Return the preparation of a video's frames for the same vision tower; None if the model takes no videos."""
        return None

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Preparation:
        """Return a copy of the preparation with at most `tokens` tokens per image; a tile has `slot_tokens` tokens.

        Raises UserError if the model cannot process images with so few tokens.
        """


class FramePreparation(Preparation, Protocol):
    """Preparation that also converts the frames of videos."""

    def frame_shape(self, frames: int, width: int, height: int) -> ImageShape:
        """Return the grid and number of tiles or tokens of one temporal patch of a video with `frames` frames."""
        return self.image_shape(width, height, 1)

    def prepare_frames(self, frames: Sequence[Image.Image]) -> np.ndarray:
        """Convert a video's RGB frames to arrays like `prepare`, one frame after the other."""
        first = self.prepare(frames[0], 1)
        prepared = np.empty((len(frames), *first.shape), first.dtype)  # one array: the list and its sum would be two
        for number, frame in enumerate(frames):
            prepared[number] = first if number == 0 else self.prepare(frame, 1)
        return prepared.reshape(-1, *first.shape[1:])

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> FramePreparation:
        """Return a copy with at most `tokens` tokens per image or temporal patch."""


class SquarePieces(FramePreparation, Protocol):
    """Preparation that divides an image into tiles of `size` x `size` pixels, normalised by `mean` and `std`."""

    merge: int = 0

    @property
    def shape(self: Any) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def prepare(self: Any, image: Image.Image, sharing: int) -> np.ndarray:
        pieces = np.stack([np.asarray(piece) for piece in self.cut(image, sharing)])
        return np.ascontiguousarray(normalize(pieces, self.mean, self.std).transpose(0, 3, 1, 2))


class Videos(Protocol):
    """Loader of the prepared frames of videos; errors name the record."""

    def shape(self, video: VideoSource, record: str) -> VideoShape:
        """Return the grid of a video's frames, and the times of the frames."""

    def load(self, video: VideoSource, record: str) -> np.ndarray:
        """Return a video's frames as float32[frames, 3, height, width], or float32[patches, values]."""

    def keys(self, video: VideoSource, record: str) -> list[str]:
        """Return a key for each temporal patch: the video's content, the numbers of its frames, and its grid."""


def fixed_size(slot_tokens: int) -> UserError:
    """Return the error for a limit on image tokens that a model with one image size cannot satisfy."""
    return UserError(
        f"every image of this model has {slot_tokens} tokens, whatever its size: unset this limit, or use a model "
        "whose "
        "images differ in tokens (InternVL, SmolVLM, Qwen-VL, Gemma)"
    )


def tile_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """Return the padded tile counts per record (`data.tile_buckets` or defaults); None for models without tiles."""
    buckets = data.tile_buckets
    if buckets or preparation is None or preparation.usual == (1,):
        return buckets or None
    most = preparation.most(data.max_images)
    return (*(bucket for bucket in preparation.usual if bucket < most), most)


def image_buckets(data: DataSpec, preparation: Preparation | None) -> tuple[int, ...] | None:
    """Return the padded numbers of image tokens per record; None for models without dynamic resolution.

    The numbers are `data.image_buckets` or the defaults, followed by doubled numbers until `data.max_images` of the
    largest images fit. Raises UserError if `data.image_buckets` is set for a model whose images have one size.
    """
    buckets, defaults = data.image_buckets, () if preparation is None else preparation.image_buckets
    if buckets and not defaults:
        raise UserError(f"data.image_buckets={buckets} is set, but this model's images have one size: unset it")
    several = list(buckets or defaults)
    while several and several[-1] < (buckets or defaults)[-1] * data.max_images:
        several.append(min(2 * several[-1], (buckets or defaults)[-1] * data.max_images))
    return tuple(several) or None


def within_row(image_tokens: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Return the image buckets (token counts), ascending, up to the first that holds `length` tokens."""
    return tuple(bucket for i, bucket in enumerate(image_tokens) if not i or image_tokens[i - 1] < length)
