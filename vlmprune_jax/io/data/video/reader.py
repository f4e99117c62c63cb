"""Sampled frames of videos, from files, bytes and lists of frame files, prepared for the vision tower."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import open_file
from vlmprune_jax.core.video import LIST_FPS, VideoConfig, frame_indices
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.media import DECODING, Part, StoredImage, Video, image_key, opened_image, to_rgb
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.data.records import VideoSource
from vlmprune_jax.io.data.video.process import Limits, decode, describe
from vlmprune_jax.io.families.tiles import VideoShape


@dataclass(frozen=True)
class ClipInfo:
    """Size, rate and sampled frame indices of one video, which are known without decoding all of its frames."""

    indices: tuple[int, ...]  # numbers of the sampled frames; a frame may occur more than once
    fps: float  # frames per second of the video (24 for a list of frame files)
    total: int  # frames in the video
    used: int  # number of frames in the sampled part of the video
    duration: float  # duration of the sampled part of the video (seconds)
    height: int  # pixels of a frame, before any preparation
    width: int  # pixels of a frame, before any preparation
    key: str  # identity of the video's content and of its decoder, for cache keys


@dataclass(frozen=True)
class Clip(ClipInfo):
    """One video's sampled frames, and facts about the video."""

    frames: np.ndarray  # uint8[frames, height, width, 3], one for each of `indices`


@dataclass(eq=False)
class VideoReader:
    """Reader of the sampled frames of videos, prepared for the vision tower; thread-safe. Errors name the record."""

    video: VideoConfig
    limits: Limits

    preparation: Preparation  # conversion of frames to arrays
    mismatch: str = ""
    """Why the vision tower does not accept these arrays, as text; "" if it does."""

    fps: float | None = None  # setting `data.video_fps` (None = the model folder's value)
    count: int | None = None  # setting `data.video_frames` (None = the model folder's value)
    max_tokens: int | None = None  # maximum number of tokens per video (None = as many as the preparation gives)
    slot_tokens: int = 0  # tokens of a frame, for models whose images have one size
    _described: dict[tuple[Video, Part], ClipInfo] = dataclasses.field(default_factory=dict, init=False)

    def shape(self, video: VideoSource, record: str) -> VideoShape:
        """Return the grid of a video's frames, and the times of the frames."""
        return self._prepared(video, record)[2]

    def load(self, video: VideoSource, record: str) -> np.ndarray:
        """Return a video's frames as float32[frames, 3, height, width], or float32[patches, values]."""
        info, preparation, shape = self._prepared(video, record)
        decoded = 3 * len(info.indices) * info.height * info.width
        with DECODING.reserve(decoded + 4 * _values(preparation, shape)):
            clip = self.read(video.source, record, video.part)
            return preparation.prepare_frames(map(Image.fromarray, clip.frames), len(clip.frames))

    def keys(self, video: VideoSource, record: str) -> list[str]:
        """Return a key for each temporal patch: the video's content, the numbers of its frames, and its grid."""
        (info, _, shape), patch = self._prepared(video, record), self.video.temporal_patch
        digest = hashlib.sha256(json.dumps(self.preparation.settings).encode()).hexdigest()[:16]
        frames = _padded(info.indices, patch)
        numbers = ["+".join(map(str, frames[at : at + patch])) for at in range(0, len(frames), patch)]
        return [f"{info.key}:frame {number} as {shape.rows}x{shape.columns} by {digest}" for number in numbers]

    def describe(self, source: Video, record: str, part: Part = None) -> ClipInfo:
        """Return the sampled indices, rate and size of a video; of a file, only the first frame is decoded.

        Raises UserError that names the file and the record.
        """
        if (source, part) not in self._described:
            self._described[source, part] = self._describe(source, part, record)
        return self._described[source, part]

    def read(self, source: Video, record: str, part: Part = None) -> Clip:
        """Return the sampled frames of a video; raise UserError that names the file and the record."""
        info = self.describe(source, record, part)
        pixels = len(info.indices) * info.height * info.width
        if pixels > self.limits.kept_pixels:
            raise UserError(
                f"record {record}: the {len(info.indices):,} frames of a video have {pixels:,} pixels, more than "
                f"data.max_video_pixels={self.limits.kept_pixels:,}: raise it, or lower data.video_frames or "
                "data.video_fps"
            )
        if not isinstance(source, tuple):
            with _opened(source) as file:
                size, name = (info.height, info.width), f"{source} (record {record})"
                return Clip(**vars(info), frames=decode(file, name, self.limits, info.indices, info.total, size))
        frames = np.empty((len(source), info.height, info.width, 3), np.uint8)
        for frame, image in zip(frames, source, strict=True):
            with opened_image(image, record, self.limits.pixels) as opened:
                values = np.asarray(to_rgb(opened))
            if values.shape != frame.shape:
                raise UserError(
                    f"{image} (record {record}): has {values.shape[1]}x{values.shape[0]} pixels, but the first frame "
                    f"of this video has {info.width}x{info.height}: give all frames one size"
                )
            frame[:] = values
        return Clip(**vars(info), frames=frames)

    def _describe(self, source: Video, part: Part, record: str) -> ClipInfo:
        if isinstance(source, tuple):
            if not 0 < len(source) <= self.limits.frames:
                raise UserError(
                    f"record {record}: lists {len(source):,} frames as one video, expected 1 to "
                    f"data.max_video_frames={self.limits.frames:,}: sample them"
                )
            with opened_image(source[0], record, self.limits.pixels) as image:
                width, height = image.size
            key = " ".join(map(image_key, source))
            total = len(source)
            return ClipInfo(tuple(range(total)), LIST_FPS, total, total, total / LIST_FPS, height, width, key)
        name = f"{source} (record {record})"
        with _opened(source) as file:
            video = describe(file, name, self.limits)
        first, used, seconds = 0, video.total, video.duration
        if part is not None:  # frames as in qwen-vl-utils' calculate_video_frame_range
            first, end = math.ceil(part[0] * video.fps), min(part[1] * video.fps, video.total - 1)
            used = math.floor(end) - first + 1
            seconds = used / video.fps
        if used < 1:
            raise UserError(
                f"{name}: lasts {video.duration:.2f} s and has no frame from 'start' to 'end' {part}: correct them"
            )
        sampled = frame_indices(
            self.video, used, video.fps, duration=seconds, video_fps=self.fps, video_frames=self.count
        )
        indices, size = tuple(first + index for index in sampled), (video.height, video.width)
        changed = source.stat().st_mtime_ns if isinstance(source, Path) else ""
        key = f"{image_key(source)}:{changed}:av {importlib.metadata.version('av')}"
        return ClipInfo(indices, video.fps, video.total, used, seconds, *size, key)

    def _prepared(self, video: VideoSource, record: str) -> tuple[ClipInfo, Preparation, VideoShape]:
        info = self.describe(video.source, record, video.part)
        patch, frames = self.video.temporal_patch, len(info.indices)
        seconds = [index / info.fps for index in _padded(info.indices, patch)]
        times = tuple((seconds[at] + seconds[at + patch - 1]) / 2 for at in range(0, len(seconds), patch))
        preparation = self.preparation
        with error_context(f"record {record}: its video"):
            if self.mismatch:
                raise UserError(self.mismatch)
            frame = preparation.plan(info.width, info.height, frames=frames)
            needed = frame.positions(self.slot_tokens) * len(times)
            if self.max_tokens is not None and needed > self.max_tokens:
                try:
                    preparation = preparation.with_most_tokens(self.max_tokens // len(times), self.slot_tokens)
                except UserError:
                    raise UserError(
                        f"{frames} frames have {needed} tokens, more than data.video_tokens={self.max_tokens}: raise "
                        "it, or lower data.video_frames or data.video_fps"
                    ) from None
                frame = preparation.plan(info.width, info.height, frames=frames)
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
        pixels, most = _values(preparation, shape) // 3, self.limits.kept_pixels // 4  # float32 instead of uint8
        if pixels > most:
            raise UserError(
                f"record {record}: its video: {frames:,} frames have {pixels:,} pixels after resizing, more than a "
                f"quarter of data.max_video_pixels={self.limits.kept_pixels:,}: raise it, or lower data.video_tokens"
            )
        return info, preparation, shape


def video_reader(
    data: DataSpec, video: VideoConfig | None, slot_tokens: int, preparation: Preparation
) -> VideoReader | None:
    """Return the reader of a model's videos, or None if it takes none; `preparation` is that of its images."""
    frames = None if video is None else preparation.for_video(video)
    if video is None or frames is None:
        return None
    limits = Limits(
        file_bytes=data.max_video_megabytes << 20,
        frames=data.max_video_frames,
        seconds=data.max_video_seconds,
        pixels=data.max_image_pixels,
        kept_pixels=data.max_video_pixels,
        wall=data.video_timeout,
    )
    mismatch = ""
    if (frames.shape, frames.merge) != (preparation.shape, preparation.merge):
        mismatch = (
            f"the video processor returns {frames.described}, but the vision tower takes {preparation.described}: "
            "restore the video processor's settings from the model's source"
        )
    return VideoReader(
        video, limits, frames, mismatch, data.video_fps, data.video_frames, data.video_tokens, slot_tokens
    )


@contextlib.contextmanager
def _opened(source: Path | StoredImage) -> Iterator[BinaryIO]:
    """Context that opens a video as a file of the operating system, which can be passed to another process."""
    if isinstance(source, Path):
        with open_file(source) as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        file.write(source.read_bytes())
        file.flush()
        yield file


def _values(preparation: Preparation, shape: VideoShape) -> int:
    return (shape.tokens * preparation.merge**2 or shape.slots) * math.prod(preparation.shape)


def _padded(indices: tuple[int, ...], patch: int) -> list[int]:
    """Return the frame numbers, with the last one repeated until they fill whole temporal patches."""
    return [*indices, *[indices[-1]] * (-len(indices) % patch)]
