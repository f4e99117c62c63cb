"""Preparation of images of any size as patches: near their own size (Qwen-VL, LFM2-VL), or with a budget (Gemma 4)."""

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
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.data.processor_files import crop_grid, normalize, pixel_fields
from vlmprune_jax.io.data.tiling import closest_grid
from vlmprune_jax.io.families.tiles import BILINEAR, MAX_TILES, ImageShape

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

    @property
    def side(self) -> int:
        """Pixels per side of a token."""
        return self.patch * self.merge

    def cells(self, pixels: np.ndarray) -> np.ndarray:
        """Return the patches of pixels [height, width, 3], token by token: [rows, columns, merge, merge, p, p, 3]."""
        m, p = self.merge, self.patch
        rows, columns = (length // self.side for length in pixels.shape[:2])
        return pixels.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)

    def arrange(self, pixels: np.ndarray) -> np.ndarray:
        return self.cells(normalize(pixels, self.mean, self.std)).reshape(-1, *self.shape)

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
        (rows, columns), (least, most), side = rounded, limits, self.side
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
    limits_videos = False  # True if the limits are those of all frames of a video together

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.temporal * self.patch**2,)

    @property
    def image_buckets(self) -> tuple[int, ...]:
        most, least = self.max_pixels / self.side**2, self.min_pixels / self.side**2
        rounded_up = least + math.sqrt(least) * (math.sqrt(_THINNEST) + 1 / math.sqrt(_THINNEST)) + 1
        bound = math.ceil(max(most, math.sqrt(_THINNEST * most), rounded_up))  # with thin images and small ones
        return (*token_buckets(bound)[:-1], bound)

    @property
    def limit_fields(self) -> dict[str, Any]:
        least, most = self.min_pixels, self.max_pixels
        return {"min_pixels": least, "max_pixels": most, "size": {"shortest_edge": least, "longest_edge": most}}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Patching:
        pixels = tokens * self.side**2
        if pixels < self.min_pixels:
            least = -(-self.min_pixels // self.side**2)
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

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        if max(width, height) > _THINNEST * min(width, height):
            raise UserError(
                f"image of {width}x{height} pixels: the long side is more than {_THINNEST} times the short side: "
                "crop it"
            )
        # Python rounds halves to even; a side below half a token becomes 0, and min_pixels enlarges it again
        rounded = round(height / self.side), round(width / self.side)
        limited = (frames, round(frames / self.temporal) * self.temporal) if self.limits_videos else (1, 1)
        rows, columns = self.fitted(width, height, rounded, (self.min_pixels, self.max_pixels), *limited)
        pixels = rows * columns * self.temporal * self.patch**2
        return ImageShape(rows, columns, tokens=rows * columns // self.merge**2, pixels=pixels)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        return self.prepare_frames([image], 1)

    def prepare_frames(self, frames: Iterable[Image.Image], count: int) -> np.ndarray:
        p, t, patches = self.patch, self.temporal, np.empty(0)
        for number, frame in enumerate(frames):
            if number == 0:
                shape = self.plan(*frame.size, frames=count)
                patches = np.empty((-(-count // t), shape.rows * shape.columns, 3, t, p, p), np.float32)
            resized = frame.resize((shape.columns * p, shape.rows * p), self.resample)
            pixels = normalize(np.asarray(resized), self.mean, self.std)
            patch_rows = np.moveaxis(self.cells(pixels), -1, -3).reshape(-1, 3, 1, p, p)
            # the last frame is repeated to fill the last temporal patch
            last = t if number == count - 1 else number % t + 1
            patches[number // t, :, :, number % t : last] = patch_rows
        return patches.reshape(-1, *self.shape)


@dataclass(frozen=True)
class VideoPatching(Patching):
    """Preparation of a video's frames with pixel limits for all frames together (`Qwen3VLVideoProcessor`)."""

    limits_videos = True

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> Patching:
        if not tokens:
            raise UserError("a temporal patch has at least 1 token: use fewer frames")
        fields = {name: value for name, value in vars(self).items() if name not in ("min_pixels", "max_pixels")}
        # limits each temporal patch separately, not all frames together
        return Patching(min_pixels=1, max_pixels=tokens * self.side**2, **fields)

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        if frames < self.temporal:
            raise UserError(
                f"a video of {frames} frame(s) is too short, because the model reads {self.temporal} frames together: "
                "pass an image instead, or set data.video_frames, so that frames are repeated"
            )
        if min(width, height) < self.side:
            scale = max(self.side / height, self.side / width)
            width, height = int(width * scale), int(height * scale)
        return super().plan(width, height, sharing, frames)


def patching_from_processor(config: Mapping[str, Any], location: str) -> Patching:
    """Return the patching of Qwen-VL's image processor.

    Raises UserError if a setting contradicts another or is missing (several models share the class, and its defaults
    suit only one of them).
    """
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

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        factor = math.sqrt(self.tokens * self.side**2 / (height * width))
        rows, columns = (math.floor(factor * length / self.side) for length in (height, width))
        if not rows:
            rows, columns = 1, min(width // height, self.tokens)
        elif not columns:
            rows, columns = min(height // width, self.tokens), 1
        pixels = self.tokens * self.side**2
        return ImageShape(rows * self.merge, columns * self.merge, tokens=rows * columns, pixels=pixels)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        shape = self.plan(*image.size)
        return [image.resize((shape.columns * self.patch, shape.rows * self.patch), self.resample)]

    def arrange(self, pixels: np.ndarray) -> np.ndarray:
        return self.cells(pixels.astype(np.float32) * np.float32(1 / 255)).reshape(-1, *self.shape)


def token_budget_from_processor(config: Mapping[str, Any], location: str) -> TokenBudget:
    """Return the image preparation of Gemma 4's image processor.

    Raises UserError if normalisation is on, or the model was not trained with this number of tokens per image.
    """
    if config.get("do_normalize"):
        raise UserError(
            f"{location}: do_normalize true is not supported for Gemma 4, whose vision tower normalises pixels itself: "
            "set it to false"
        )
    with error_context(location):
        return TokenBudget(
            patch=config.get("patch_size") or 16,
            merge=config.get("pooling_kernel_size") or 3,
            tokens=config.get("max_soft_tokens") or DEFAULT_BUDGET,
            resample=pixel_fields(config)["resample"],
        )


@dataclass(frozen=True)
class NaFlex(Patches):
    """Image preparation of LFM2-VL (reference: transformers' `Lfm2VlImageProcessor`).

    An image is resized to `min_tokens` to `max_tokens` tokens; a token is `merge` x `merge` patches of `patch` x
    `patch` pixels. An image that originally has more than `tolerance` x `max_tokens` tokens is also divided into
    `min_tiles` to `max_tiles` tiles of `size` x `size` pixels, which come before the resized image (`thumbnail`).
    `mean` and `std` normalise pixels. `resample` is PIL's number of the resampling filter.
    """

    patch: int
    merge: int
    size: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    min_tokens: int
    max_tokens: int
    tolerance: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @property
    def _tile_side(self) -> int:
        return self.size // self.side

    @property
    def image_buckets(self) -> tuple[int, ...]:
        tiles = self.max_tiles if self.max_tiles > 1 else 0
        # rounding up small sides may exceed the limit
        return token_buckets(tiles * self._tile_side**2 + max(self.max_tokens, 4 * self.min_tokens))

    @property
    def usual(self) -> tuple[int, ...]:
        most = self.max_tiles + self.thumbnail if self.max_tiles > 1 else 1
        return (*(n for n in (1, 3, 5, 7) if n < most), most)

    @property
    def limit_fields(self) -> dict[str, Any]:
        names = {"min_tiles": self.min_tiles, "max_tiles": self.max_tiles, "max_image_tokens": self.max_tokens}
        return {**names, "do_image_splitting": self.max_tiles > 1}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> NaFlex:
        if tokens < self.min_tokens:
            raise UserError(
                f"tokens per image must be at least {self.min_tokens}, the number of tokens of the smallest image: "
                "raise the limit"
            )
        tiles = min((tokens - self.max_tokens) // self._tile_side**2, self.max_tiles)
        if tiles >= self.min_tiles:
            return dataclasses.replace(self, max_tiles=tiles)
        return dataclasses.replace(self, min_tiles=1, max_tiles=1, max_tokens=min(tokens, self.max_tokens))

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        columns, rows, area = 1, 1, self.side**2
        rounded = [round(length / self.side) for length in (height, width)]
        least = math.prod(max(self.patch, length * self.side) for length in rounded)
        if self.max_tiles > 1 and least > self.max_tokens * area * self.tolerance:
            columns, rows = closest_grid(width, height, self.size, self.min_tiles, self.max_tiles)
        limits = self.min_tokens * area, self.max_tokens * area
        whole = self.fitted(width, height, (max(1, rounded[0]), max(1, rounded[1])), limits)
        side, tiled = self._tile_side * self.merge, rows * columns > 1
        pieces = [(side, side)] * (rows * columns) * tiled + [whole] * (self.thumbnail or not tiled)
        tokens = sum(r * c for r, c in pieces) // self.merge**2
        largest = max(columns * rows * self.size**2, math.prod(whole) * self.patch**2)
        return ImageShape(rows, columns, len(pieces), tokens, tuple(pieces), pixels=largest)

    def cut(self, image: Image.Image, sharing: int) -> list[Image.Image]:
        shape, pieces = self.plan(*image.size), list[Image.Image]()
        if shape.rows * shape.columns > 1:
            tiled = image.resize((shape.columns * self.size, shape.rows * self.size), self.resample)
            pieces = crop_grid(tiled, self.size)
        for rows, columns in shape.pieces[len(pieces) :]:
            pieces.append(image.resize((columns * self.patch, rows * self.patch), self.resample))
        return pieces


def naflex_from_processor(config: Mapping[str, Any], location: str) -> NaFlex:
    """Return the image preparation of LFM2-VL's image processor.

    Raises UserError if tiles are not a whole number of tokens, or a minimum of tiles or tokens is above the maximum.
    """
    values: dict[str, Any] = {
        name: config.get(name) or default
        for name, default in {
            "encoder_patch_size": 16, "downsample_factor": 2, "tile_size": 512, "min_tiles": 2, "max_tiles": 10,
            "min_image_tokens": 64, "max_image_tokens": 256, "max_pixels_tolerance": 2.0,
        }.items()
    }  # fmt: skip
    patch, merge, size, min_tiles, max_tiles, min_tokens, max_tokens, tolerance = values.values()
    if config.get("do_image_splitting") is False:
        min_tiles = max_tiles = 1
    if size % (patch * merge) or not 1 <= min_tiles <= max_tiles <= MAX_TILES or min_tokens > max_tokens:
        raise UserError(
            f"{location}: tile_size {size}, {min_tiles} to {max_tiles} tiles, {min_tokens} to {max_tokens} tokens and "
            f"{merge} x {merge} patches of {patch} pixels per token contradict each other: restore the file from the "
            "model's source"
        )
    limits = (min_tiles, max_tiles, config.get("use_thumbnail") is not False, min_tokens, max_tokens, tolerance)
    return NaFlex(patch, merge, size, *limits, **pixel_fields(config, resample=BILINEAR))
