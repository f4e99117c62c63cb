"""Conversion of images and video frames to arrays for the vision tower, and the padded sizes of these arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.processor_files import normalize
from vlmprune_jax.io.families.tiles import ImageShape


class Preparation:
    """Preparation of images and video frames: a subclass says how an image is planned and cut into pieces.

    `sharing` is the number of images in an image's record, `frames` the number of frames in its video.
    """

    merge: int  # patches per side of a token (n x n become one) for images of varying size; 0 if the size is fixed
    shares = False  # True if an image's arrays depend on the number of images in its record
    turns = False  # True if image tokens have rotary positions by row and column (M-RoPE)

    size: int  # pixels per side of a tile
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the vision tower's input: (channels, height, width); (values,) per patch if image sizes vary."""
        return (3, self.size, self.size)

    @property
    def described(self) -> str:
        """Text that states the shape of the vision tower's input in messages."""
        if self.merge:
            return described_patches(self.shape[0], self.merge)
        return f"{self.shape[1]} x {self.shape[2]} pixels"

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
        return {}

    @property
    def usual(self) -> tuple[int, ...]:
        """Usual tile counts per image, ascending, from which default batch shapes are chosen."""
        return (1,)

    def most(self, images: int) -> int:
        """Return the maximum number of tiles of a record with up to `images` images."""
        return images * self.usual[-1]

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        """Return what an image, or one temporal patch of a video, of this size becomes; it is not decoded."""
        raise NotImplementedError

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        """Return the resized pieces of an image, and its overview where it has one, in the order of the prompt."""
        raise NotImplementedError

    def arrange(self, pixels: np.ndarray) -> np.ndarray:
        """Convert a piece uint8[height, width, 3] to float32[1, 3, height, width], or float32[patches, values]."""
        return normalize(pixels, self.mean, self.std).transpose(2, 0, 1)[None]

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Convert an RGB image to float32[tiles, channels, height, width], or float32[patches, values]."""
        pieces = [self.arrange(np.asarray(piece)) for piece in self.cut(image, sharing)]
        return np.ascontiguousarray(np.concatenate(pieces))

    def prepare_frames(self, frames: Iterable[Image.Image], count: int) -> np.ndarray:
        """Convert a video's `count` RGB frames to arrays like `prepare`, one frame after the other."""
        prepared = np.empty(0)  # one array: a list and its sum would be two
        for number, frame in enumerate(frames):
            arrays = self.prepare(frame, 1)
            prepared = prepared if number else np.empty((count, *arrays.shape), arrays.dtype)
            prepared[number] = arrays
        return prepared.reshape(-1, *prepared.shape[2:])

    def for_video(self, video: VideoConfig) -> Preparation | None:
        """Return the preparation of a video's frames for the same vision tower; None if the model takes no videos."""
        return None

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Preparation:
        """Return a copy with at most `tokens` tokens per image or temporal patch; a tile has `slot_tokens` tokens.

        Raises UserError if the model cannot process images with so few tokens.
        """
        raise fixed_size(slot_tokens)


def described_patches(values: int, merge: int) -> str:
    """Return the shape of a vision tower's input as text, for images of varying size."""
    return f"patches of {values} values, {merge} per side of a token"


def fixed_size(slot_tokens: int) -> UserError:
    """Return the error for a limit on image tokens that a model with one image size cannot satisfy."""
    return UserError(
        f"every image of this model has {slot_tokens} tokens, whatever its size: unset this limit, or use a model "
        "whose images differ in tokens (InternVL, SmolVLM, Qwen-VL, Gemma)"
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
