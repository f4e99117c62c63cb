"""Preparation of images of any size as patches: near their own size (Qwen-VL), or with a budget of tokens (Gemma 4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.models.media import padded_tokens
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.image_processor import check_steps, normalize, pixel_fields
from vlmprune_jax.io.data.preparation import Plan, Preparation
from vlmprune_jax.io.families.tiles import BICUBIC, ImageShape

_THINNEST = 200  # maximum ratio of long to short side, as in the reference
_SMALLEST_BUCKET = 64  # tokens; smaller buckets save no time
BUDGETS = (70, 140, 280, 560, 1120)  # tokens per image that Gemma 4 was trained with
DEFAULT_BUDGET = 280


class Patches(Preparation):
    """Preparation that resizes an image to whole tokens; `merge` x `merge` patches of `patch` x `patch` pixels each."""

    patch: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.patch**2,)

    def cells(self, pixels: np.ndarray) -> np.ndarray:
        """Return the patches of pixels [height, width, 3], token by token: [rows, columns, merge, merge, p, p, 3]."""
        side, m, p = self.merge * self.patch, self.merge, self.patch
        rows, columns = (length // side for length in pixels.shape[:2])
        return pixels.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)

    def fitted(
        self,
        width: int,
        height: int,
        rounded: tuple[int, int],
        limits: tuple[int, int],
        frames: int = 1,
        whole: int = 1,
    ) -> tuple[int, int]:
        """Return an image's (rows, columns) in patches: `rounded` tokens, or as many as the limits of its area allow.

        `limits`: pixels of all `frames` frames together, which become `whole` frames.
        """
        (rows, columns), (least, most), side = rounded, limits, self.patch * self.merge
        if whole * rows * columns * side**2 > most:
            shrink = math.sqrt(frames * height * width / most)
            rows, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
        elif whole * rows * columns * side**2 < least:
            grow = math.sqrt(least / (frames * height * width))
            rows, columns = (math.ceil(length * grow / side) for length in (height, width))
        return rows * self.merge, columns * self.merge


def token_buckets(most: int) -> tuple[int, ...]:
    """Return numbers of tokens, 64, 96, 128, 192, 256, ..., up to the first that holds `most`."""
    buckets = [_SMALLEST_BUCKET]
    while buckets[-1] < most:
        buckets.append(padded_tokens(buckets[-1] + 1))
    return tuple(buckets)


@dataclass(frozen=True)
class Patching(Patches):
    """Image preparation that makes patches of `patch` x `patch` pixels; `merge` x `merge` patches become one token.

    The image is resized so that its sides are whole tokens and its area is between `min_pixels` and `max_pixels`. A
    patch has `temporal` frames of each channel (an image is repeated). `mean` and `std` normalise pixels. `resample` is
    PIL's number of the resampling filter (reference: transformers' `Qwen2VLImageProcessor`).
    """

    patch: int
    temporal: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    turns = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.temporal * self.patch**2,)

    @property
    def image_buckets(self) -> tuple[int, ...]:
        return (*token_buckets(self._most_tokens)[:-1], self._most_tokens)

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
        pixels = tokens * (self.patch * self.merge) ** 2
        if pixels < self.min_pixels:
            least = -(-self.min_pixels // (self.patch * self.merge) ** 2)
            raise UserError(
                f"tokens per image must be at least {least}, the number of tokens of the smallest image "
                f"that the model reads ({self.min_pixels} pixels): raise the limit"
            )
        return dataclasses.replace(self, max_pixels=min(pixels, self.max_pixels))

    def for_video(self, video: VideoConfig) -> Patching | None:
        if video.min_pixels is None or video.max_pixels is None:
            return None
        names = ("min_pixels", "max_pixels", "mean", "std", "resample")
        fields: dict[str, Any] = {name: getattr(video, name) for name in names}
        kind = VideoPatching if video.sampling == "linspace" else Patching
        patch, merge = video.patch or self.patch, video.merge or self.merge
        return kind(patch=patch, temporal=video.temporal_patch, merge=merge, **fields)

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> Plan:
        rows, columns = self._grid(width, height, frames)
        shape = ImageShape(rows, columns, tokens=rows * columns // self.merge**2)
        return Plan(shape, rows * columns * self.temporal * self.patch**2)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        return self.prepare_frames([image], 1)

    def prepare_frames(self, frames: Iterable[Image.Image], count: int) -> np.ndarray:
        p, t, patches = self.patch, self.temporal, np.empty(0)
        for number, frame in enumerate(frames):
            if number == 0:
                rows, columns = self._grid(*frame.size, count)
                patches = np.empty((-(-count // t), rows * columns, 3, t, p, p), np.float32)
            resized = frame.resize((columns * p, rows * p), self.resample)
            pixels = normalize(np.asarray(resized), self.mean, self.std)
            patch_rows = np.moveaxis(self.cells(pixels), -1, -3).reshape(rows * columns, 3, 1, p, p)
            # the last frame is repeated to fill the last temporal patch
            last = t if number == count - 1 else number % t + 1
            patches[number // t, :, :, number % t : last] = patch_rows
        return patches.reshape(-1, *self.shape)

    def _grid(self, width: int, height: int, frames: int = 1) -> tuple[int, int]:
        """Return the (rows, columns) of an image or frame in patches, both multiples of `merge`."""
        return self._limited(width, height)

    def _limited(self, width: int, height: int, frames: int = 1, whole: int = 1) -> tuple[int, int]:
        """Return (rows, columns) in patches; the limits are for `frames` frames, which become `whole` frames."""
        if max(width, height) > _THINNEST * min(width, height):
            raise UserError(
                f"image of {width}x{height} pixels: the long side is more than {_THINNEST} times the short side: "
                "crop it"
            )
        # Python rounds halves to even; a side below half a token becomes 0, and min_pixels enlarges it again
        side = self.patch * self.merge
        rounded = round(height / side), round(width / side)
        return self.fitted(width, height, rounded, (self.min_pixels, self.max_pixels), frames, whole)


@dataclass(frozen=True)
class VideoPatching(Patching):
    """Preparation of a video's frames with pixel limits for all frames together (`Qwen3VLVideoProcessor`)."""

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Patching:
        if not tokens:
            raise UserError("a temporal patch has at least 1 token: use fewer frames")
        fields = {name: value for name, value in vars(self).items() if name not in ("min_pixels", "max_pixels")}
        # limits each temporal patch separately, not all frames together
        return Patching(min_pixels=1, max_pixels=tokens * (self.patch * self.merge) ** 2, **fields)

    def _grid(self, width: int, height: int, frames: int = 1) -> tuple[int, int]:
        side = self.patch * self.merge
        if frames < self.temporal:
            raise UserError(
                f"a video of {frames} frame(s) is too short, because the model reads {self.temporal} frames together: "
                "pass an image instead, or set data.video_frames, so that frames are repeated"
            )
        if min(width, height) < side:
            scale = max(side / height, side / width)
            width, height = int(width * scale), int(height * scale)
        return self._limited(width, height, frames, round(frames / self.temporal) * self.temporal)


def patching_from_processor(config: Mapping[str, Any], location: str) -> Patching:
    """Return the patching of checked settings of Qwen-VL's image processor.

    Raises UserError if resizing, rescaling or normalisation is off, or a setting contradicts another or is missing
    (several models share the class, and its defaults suit only one of them).
    """
    check_steps(config, location, "images of any size (Qwen-VL)")
    size = config.get("size") or {}
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    fields: dict[str, Any] = {
        "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
        **{name: config.get(name) for name in names},
    }
    missing = [name for name, value in fields.items() if value is None]
    if missing:
        raise UserError(f"{location}: has no {', '.join(missing)}: restore the file from the model's source")
    least, most, patch, temporal, merge, *_ = fields.values()
    if least > most:
        raise UserError(
            f"{location}: min_pixels {least} is above max_pixels {most}: restore the file from the model's source"
        )
    return Patching(patch, temporal, merge, least, most, **pixel_fields(config))


@dataclass(frozen=True)
class TokenBudget(Patches):
    """Image preparation that resizes an image to at most `tokens` tokens of `merge` x `merge` patches (Gemma 4).

    Small images are enlarged, sides are rounded down to whole tokens, and pixels are in 0..1 (reference: transformers'
    `Gemma4ImageProcessor`). `resample` is PIL's number of the resampling filter.
    """

    patch: int
    merge: int
    tokens: int
    resample: int

    def __post_init__(self) -> None:
        if self.tokens not in BUDGETS:
            budgets = ", ".join(map(str, BUDGETS))
            raise UserError(f"max_soft_tokens {self.tokens} is not one of {budgets}: restore the file")

    @property
    def image_buckets(self) -> tuple[int, ...]:
        return (self.tokens,)  # because most images nearly reach it

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"max_soft_tokens": self.tokens}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> TokenBudget:
        if tokens not in BUDGETS:
            raise UserError(
                f"tokens per image must be one of {', '.join(map(str, BUDGETS))}, with which the model was trained"
            )
        return dataclasses.replace(self, tokens=tokens)

    def for_video(self, video: VideoConfig) -> TokenBudget | None:
        if video.max_soft_tokens is None:
            return None
        patch, merge = video.patch or self.patch, video.merge or self.merge
        return TokenBudget(patch, merge, video.max_soft_tokens, video.resample)

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> Plan:
        rows, columns = self._tokens(width, height)
        shape = ImageShape(rows * self.merge, columns * self.merge, tokens=rows * columns)
        return Plan(shape, self.tokens * (self.merge * self.patch) ** 2)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        (rows, columns), side = self._tokens(*image.size), self.merge * self.patch
        size = (columns * side, rows * side)
        resized = image if image.size == size else image.resize(size, self.resample)
        pixels = np.asarray(resized).astype(np.float32) * np.float32(1 / 255)
        return np.ascontiguousarray(self.cells(pixels).reshape(-1, *self.shape))

    def _tokens(self, width: int, height: int) -> tuple[int, int]:
        side = self.merge * self.patch
        factor = math.sqrt(self.tokens * side**2 / (height * width))
        rows, columns = (math.floor(factor * length / side) for length in (height, width))
        if not rows:
            return 1, min(width // height, self.tokens)
        return (rows, columns) if columns else (min(height // width, self.tokens), 1)


def token_budget_from_processor(config: Mapping[str, Any], location: str) -> TokenBudget:
    """Return the image preparation of checked settings of Gemma 4's image processor.

    Raises UserError if resizing or rescaling is off, normalisation is on, or the model was not trained with this number
    of tokens per image.
    """
    check_steps(config, location, "Gemma 4", normalizes=False)
    if config.get("do_normalize"):
        raise UserError(
            f"{location}: do_normalize true is not supported for Gemma 4, whose vision tower normalises pixels itself: "
            "set it to false"
        )
    resample = config.get("resample")
    with error_context(location):
        return TokenBudget(
            patch=config.get("patch_size") or 16,
            merge=config.get("pooling_kernel_size") or 3,
            tokens=config.get("max_soft_tokens") or DEFAULT_BUDGET,
            resample=BICUBIC if resample is None else resample,
        )
