"""Sampled frames of videos, prepared for the vision tower, with the shapes from which prompts are written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import overload

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.media import DECODING
from vlmprune_jax.io.data.preparation import FramePreparation, Preparation
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.data.video.reader import ClipInfo, VideoReader
from vlmprune_jax.io.families.tiles import VideoShape


class FrameLoader:
    """Loader of the prepared frames of videos (see `Videos`).

    Args:
      reader: reads sampled frames.
      preparation: converts frames to arrays for the vision tower.
      mismatch: why the vision tower does not accept these arrays, as text; "" if it does.
      max_tokens: maximum number of tokens per video (None: as many as the preparation gives).
      slot_tokens: tokens of a frame, for models whose images have one size.
    """

    def __init__(
        self,
        reader: VideoReader,
        preparation: FramePreparation,
        max_tokens: int | None,
        slot_tokens: int,
        mismatch: str = "",
    ) -> None:
        self.reader, self.preparation, self._mismatch = reader, preparation, mismatch
        self._max_tokens, self._slot_tokens = max_tokens, slot_tokens
        self._digest = hashlib.sha256(json.dumps(preparation.settings).encode()).hexdigest()[:16]

    def shape(self, video: VideoSource, record: str) -> VideoShape:
        return self._prepared(video, self.reader.describe(video.source, record, video.part), record)[1]

    def load(self, video: VideoSource, record: str) -> np.ndarray:
        info = self.reader.describe(video.source, record, video.part)
        preparation, shape = self._prepared(video, info, record)
        decoded = 3 * len(info.indices) * info.height * info.width
        with DECODING.reserve(decoded + 4 * _values(preparation, shape)):
            clip = self.reader.read(video.source, record, video.part)
            return preparation.prepare_frames(_Images(clip.frames))

    def keys(self, video: VideoSource, record: str) -> list[str]:
        info = self.reader.describe(video.source, record, video.part)
        shape, patch = self._prepared(video, info, record)[1], self.reader.video.temporal_patch
        frames = _padded(info.indices, patch)
        numbers = ["+".join(map(str, frames[at : at + patch])) for at in range(0, len(frames), patch)]
        return [f"{info.key}:frame {number} as {shape.rows}x{shape.columns} by {self._digest}" for number in numbers]

    def _prepared(self, video: VideoSource, info: ClipInfo, record: str) -> tuple[FramePreparation, VideoShape]:
        patch, frames = self.reader.video.temporal_patch, len(info.indices)
        seconds = [index / info.fps for index in _padded(info.indices, patch)]
        times = tuple((seconds[at] + seconds[at + patch - 1]) / 2 for at in range(0, len(seconds), patch))
        preparation = self.preparation
        with error_context(f"record {record}: its video"):
            if self._mismatch:
                raise UserError(self._mismatch)
            frame = preparation.frame_shape(frames, info.width, info.height)
            needed = frame.positions(self._slot_tokens) * len(times)
            if self._max_tokens is not None and needed > self._max_tokens:
                try:
                    preparation = preparation.with_most_tokens(self._max_tokens // len(times), self._slot_tokens)
                except UserError:
                    raise UserError(
                        f"{frames} frames have {needed} tokens, more than data.video_tokens={self._max_tokens}: raise "
                        "it, or lower data.video_frames or data.video_fps"
                    ) from None
                frame = preparation.frame_shape(frames, info.width, info.height)
        shape = VideoShape(
            frame.rows,
            frame.columns,
            slots=1 if frame.tokens else frame.slots * len(times),
            tokens=frame.tokens * len(times),
            times=times,
            # a list of frame files has no duration in the reference
            duration=times[-1] if isinstance(video.source, tuple) else info.duration,
            interval=patch / (frames / info.used * info.fps),
        )
        pixels, most = _values(preparation, shape) // 3, self.reader.max_pixels // 4  # float32 instead of uint8
        if pixels > most:
            raise UserError(
                f"record {record}: its video: {frames:,} frames have {pixels:,} pixels after resizing, more than a "
                f"quarter of data.max_video_pixels={self.reader.max_pixels:,}: raise it, or lower data.video_tokens"
            )
        return preparation, shape


def frame_loader(
    data: DataSpec, video: VideoConfig | None, slot_tokens: int, preparation: Preparation
) -> FrameLoader | None:
    """Return the loader of a model's videos, or None if it takes none; `preparation` is that of its images."""
    frames = None if video is None else preparation.for_video(video)
    if video is None or frames is None:
        return None
    reader, mismatch = VideoReader.from_settings(video, data), ""
    if (frames.shape, frames.merge) != (preparation.shape, preparation.merge):
        mismatch = (
            f"the video processor returns {_described(frames)}, but the vision tower takes {_described(preparation)}: "
            "restore the video processor's settings from the model's source"
        )
    return FrameLoader(reader, frames, data.video_tokens, slot_tokens, mismatch)


def _described(preparation: Preparation) -> str:
    if preparation.merge:
        return f"patches of {preparation.shape[0]} values, {preparation.merge} per side of a token"
    return f"{preparation.shape[2]} x {preparation.shape[1]} pixels"


def _values(preparation: FramePreparation, shape: VideoShape) -> int:
    """Return the size of a video's prepared array."""
    return (shape.tokens * preparation.merge**2 or shape.slots) * math.prod(preparation.shape)


class _Images(Sequence[Image.Image]):
    """Frames uint8[frames, height, width, 3] as images, each made when it is used: Pillow copies pixels."""

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    @overload
    def __getitem__(self, number: int) -> Image.Image: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Image.Image]: ...

    def __getitem__(self, number: int | slice) -> Image.Image | Sequence[Image.Image]:
        return _Images(self._frames[number]) if isinstance(number, slice) else Image.fromarray(self._frames[number])


def _padded(indices: tuple[int, ...], patch: int) -> list[int]:
    """Return the frame numbers, with the last one repeated until they fill whole temporal patches."""
    return [*indices, *[indices[-1]] * (-len(indices) % patch)]
