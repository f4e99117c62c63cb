"""Gemma 4's image preparation: images of any aspect are resized to a budget of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.image_processor import check_steps
from vlmprune_jax.io.data.preparation import FramePreparation
from vlmprune_jax.io.families.tiles import BICUBIC, ImageShape

BUDGETS = (70, 140, 280, 560, 1120)  # tokens per image that the model was trained with
DEFAULT_BUDGET = 280


@dataclass(frozen=True)
class TokenBudget(FramePreparation):
    """Image preparation that resizes an image to at most `tokens` tokens of `merge` x `merge` patches (Gemma 4).

    Small images are enlarged, sides are rounded down to whole tokens, and pixels are in 0..1 (reference: transformers'
    `Gemma4ImageProcessor`). `resample` is PIL's number of the resampling filter.
    """

    patch: int
    merge: int
    tokens: int
    resample: int

    shares = False

    def __post_init__(self) -> None:
        if self.tokens not in BUDGETS:
            budgets = ", ".join(map(str, BUDGETS))
            raise UserError(f"max_soft_tokens {self.tokens} is not one of {budgets}: restore the file")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.patch**2,)

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Token counts to which images are padded: only the maximum, because most images nearly reach it."""
        return (self.tokens,)

    @property
    def limit_fields(self) -> dict[str, Any]:
        return {"max_soft_tokens": self.tokens}

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> TokenBudget:
        """Return a copy with this token limit per image; raise UserError if the model was not trained with it."""
        if tokens not in BUDGETS:
            raise UserError(
                f"tokens per image must be one of {', '.join(map(str, BUDGETS))}, with which the model was trained"
            )
        return dataclasses.replace(self, tokens=tokens)

    def for_video(self, video: VideoConfig) -> TokenBudget | None:
        if video.max_soft_tokens is None:
            return None
        return TokenBudget(
            patch=video.patch or self.patch,
            merge=video.merge or self.merge,
            tokens=video.max_soft_tokens,
            resample=video.resample,
        )

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        rows, columns = self._cells(width, height)
        return ImageShape(rows * self.merge, columns * self.merge, tokens=rows * columns)

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        return self.tokens * (self.merge * self.patch) ** 2

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        (rows, columns), m, p = self._cells(*image.size), self.merge, self.patch
        size = (columns * m * p, rows * m * p)
        resized = image if image.size == size else image.resize(size, self.resample)
        pixels = np.asarray(resized).astype(np.float32) * np.float32(1 / 255)
        cells = pixels.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 2, 5, 6)
        return np.ascontiguousarray(cells.reshape(rows * columns * m * m, -1))

    def _cells(self, width: int, height: int) -> tuple[int, int]:
        """Return an image's numbers of token rows and token columns."""
        side = self.merge * self.patch
        factor = math.sqrt(self.tokens * side**2 / (height * width))
        rows, columns = (math.floor(factor * length / side) for length in (height, width))
        if not rows:
            return 1, min(width // height, self.tokens)
        return (rows, columns) if columns else (min(height // width, self.tokens), 1)


def token_budget_from_processor(config: Mapping[str, Any], location: str) -> TokenBudget:
    """Return the image preparation that a Gemma 4 folder's image processor describes.

    `config`: result of `image_processor.checked_processor`. Raises UserError if resizing or rescaling is off,
    normalisation is on, or the model was not trained with this number of tokens per image.
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
