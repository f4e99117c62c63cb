"""Sampled frames of videos, from video files, bytes and lists of frame files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import open_file
from vlmprune_jax.core.video import LIST_FPS, VideoConfig, frame_indices
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import read_rgb
from vlmprune_jax.io.data.media import Part, StoredImage, Video, image_key
from vlmprune_jax.io.data.video.process import Limits, decode, describe


@dataclass(frozen=True)
class ClipInfo:
    """Size, rate and sampled frame indices of one video, which are known without decoding all of its frames."""

    indices: tuple[int, ...]
    """Numbers of the sampled frames; a frame may occur more than once."""

    fps: float
    """Frames per second of the video (24 for a list of frame files)."""

    total: int
    """Frames in the video."""

    used: int
    """Number of frames in the sampled part of the video."""

    duration: float
    """Duration of the sampled part of the video (seconds)."""

    height: int
    """Pixels of a frame, before any preparation."""

    width: int
    """Pixels of a frame, before any preparation."""

    key: str
    """Identity of the video's content and of its decoder, for cache keys."""


@dataclass(frozen=True)
class Clip(ClipInfo):
    """One video's sampled frames, and facts about the video."""

    frames: np.ndarray
    """uint8[frames, height, width, 3], one for each of `indices`."""


class VideoReader:
    """Reader of sampled frames; `ImageLoader` caches what is made of them. Thread-safe.

    `video_fps` and `video_frames` are the settings of these names; None: the values of the model folder.
    """

    def __init__(
        self,
        video: VideoConfig,
        limits: Limits,
        *,
        video_fps: float | None = None,
        video_frames: int | None = None,
    ) -> None:
        self.video = video
        self._limits = limits
        self._video_fps, self._video_frames = video_fps, video_frames
        self._described: dict[tuple[Video, Part], ClipInfo] = {}

    @property
    def max_pixels(self) -> int:
        """Maximum number of pixels in all sampled frames of a video (`data.max_video_pixels`)."""
        return self._limits.kept_pixels

    @classmethod
    def from_settings(cls, video: VideoConfig, data: DataSpec) -> VideoReader:
        """Return a reader with the settings of the section `data`."""
        limits = Limits(
            file_bytes=data.max_video_megabytes << 20,
            frames=data.max_video_frames,
            seconds=data.max_video_seconds,
            pixels=data.max_image_pixels,
            kept_pixels=data.max_video_pixels,
            wall=data.video_timeout,
        )
        return cls(video, limits, video_fps=data.video_fps, video_frames=data.video_frames)

    def describe(self, source: Video, record: str, part: Part = None) -> ClipInfo:
        """Return the sampled indices, rate and size of a video; only its first frame is decoded.

        Raises UserError that names the file and the record.
        """
        if (source, part) not in self._described:
            self._described[source, part] = self._describe(source, part, record)
        return self._described[source, part]

    def read(self, source: Video, record: str, part: Part = None) -> Clip:
        """Return the sampled frames of a video; raise UserError that names the file and the record."""
        info = self.describe(source, record, part)
        return Clip(**vars(info), frames=self._frames(source, record, info))

    def _describe(self, source: Video, part: Part, record: str) -> ClipInfo:
        if isinstance(source, tuple):
            if not 0 < len(source) <= self._limits.frames:
                raise UserError(
                    f"record {record}: lists {len(source):,} frames as one video, expected 1 to "
                    f"data.max_video_frames={self._limits.frames:,}: sample them"
                )
            width, height = read_rgb(source[0], record, self._limits.pixels).size
            key = " ".join(map(image_key, source))
            total = len(source)
            return ClipInfo(tuple(range(total)), LIST_FPS, total, total, total / LIST_FPS, height, width, key)
        with _opened(source) as file:
            video = describe(file, _named(source, record), self._limits)
        first, used, seconds = 0, video.total, video.duration
        if part is not None:  # frames as in qwen-vl-utils' calculate_video_frame_range
            first, end = math.ceil(part[0] * video.fps), min(part[1] * video.fps, video.total - 1)
            used = math.floor(end) - first + 1
            seconds = used / video.fps
        if used < 1:
            raise UserError(
                f"{_named(source, record)}: lasts {video.duration:.2f} s and has no frame from 'start' to 'end' "
                f"{part}: correct them"
            )
        rate, count = self._video_fps, self._video_frames
        sampled = frame_indices(self.video, used, video.fps, duration=seconds, video_fps=rate, video_frames=count)
        indices, size = tuple(first + index for index in sampled), (video.height, video.width)
        return ClipInfo(indices, video.fps, video.total, used, seconds, *size, _key(source))

    def _frames(self, source: Video, record: str, info: ClipInfo) -> np.ndarray:
        pixels = len(info.indices) * info.height * info.width
        if pixels > self._limits.kept_pixels:
            raise UserError(
                f"record {record}: the {len(info.indices):,} frames of a video have {pixels:,} pixels, more than "
                f"data.max_video_pixels={self._limits.kept_pixels:,}: raise it, or lower data.video_frames or "
                "data.video_fps"
            )
        if not isinstance(source, tuple):
            with _opened(source) as file:
                name = _named(source, record)
                return decode(file, name, self._limits, info.indices, info.total, (info.height, info.width))
        frames = np.empty((len(source), info.height, info.width, 3), np.uint8)
        for frame, image in zip(frames, source, strict=True):
            values = np.asarray(read_rgb(image, record, self._limits.pixels))
            if values.shape != frame.shape:
                raise UserError(
                    f"{image} (record {record}): has {values.shape[1]}x{values.shape[0]} pixels, but the first frame "
                    f"of this video has {info.width}x{info.height}: give all frames one size"
                )
            frame[:] = values
        return frames


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


def _named(source: Path | StoredImage, record: str) -> str:
    return f"{source} (record {record})"


def _key(source: Path | StoredImage) -> str:
    changed = source.stat().st_mtime_ns if isinstance(source, Path) else ""
    return f"{image_key(source)}:{changed}:av {importlib.metadata.version('av')}"
