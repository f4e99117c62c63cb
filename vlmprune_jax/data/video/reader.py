"""Sampled frames of videos, from video files, bytes and lists of frame files, with a cache of decoded frames."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import open_file
from vlmprune_jax.core.video import LIST_FPS, VideoConfig, frame_indices
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.images import read_rgb
from vlmprune_jax.data.media import StoredImage, Video, image_key
from vlmprune_jax.data.video.process import Limits, decode, describe


@dataclass(frozen=True)
class ClipInfo:
    """Facts about one video and its sampled frames, which are known without decoding all of them."""

    indices: tuple[int, ...]
    """Numbers of the sampled frames; a frame may occur more than once."""

    fps: float
    """Frames per second of the video (24 for a list of frame files)."""

    total: int
    """Frames in the video."""

    duration: float
    """Length of the video (seconds)."""

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
    """uint8[frames, height, width, 3] (read-only), one for each of `indices`."""


class VideoReader:
    """Reader of sampled frames with a bounded LRU cache, since records and epochs share videos. Thread-safe.

    `video_fps` and `video_frames` are the settings of these names; None: the values of the model folder.
    """

    def __init__(
        self,
        video: VideoConfig,
        limits: Limits,
        *,
        video_fps: float | None = None,
        video_frames: int | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.video = video
        self._limits = limits
        self._video_fps, self._video_frames = video_fps, video_frames
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], np.ndarray] = OrderedDict()
        self._described: dict[Video, ClipInfo] = {}
        self._lock = threading.Lock()

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
        rate, count = data.video_fps, data.video_frames
        return cls(video, limits, video_fps=rate, video_frames=count, cache_bytes=data.cache_megabytes << 20)

    def describe(self, source: Video, record: str) -> ClipInfo:
        """Return the sampled indices, rate and size of a video; only its first frame is decoded.

        Raises UserError that names the file and the record.
        """
        if source not in self._described:
            self._described[source] = self._describe(source, record)
        return self._described[source]

    def read(self, source: Video, record: str) -> Clip:
        """Return the sampled frames of a video; raise UserError that names the file and the record."""
        info = self.describe(source, record)
        key = (info.key, info.indices)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return Clip(**vars(info), frames=self._cache[key])
        frames = self._frames(source, record, info)
        frames.flags.writeable = False
        with self._lock:
            self._cache[key] = frames
            while sum(cached.nbytes for cached in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        return Clip(**vars(info), frames=frames)

    def _describe(self, source: Video, record: str) -> ClipInfo:
        if isinstance(source, tuple):
            if not 0 < len(source) <= self._limits.frames:
                raise UserError(
                    f"record {record}: lists {len(source):,} frames as one video, expected 1 to "
                    f"data.max_video_frames={self._limits.frames:,}: sample them"
                )
            width, height = read_rgb(source[0], record, self._limits.pixels).size
            key = " ".join(map(image_key, source))
            every = tuple(range(len(source)))
            return ClipInfo(every, LIST_FPS, len(source), len(source) / LIST_FPS, height, width, key)
        with _opened(source) as file:
            video = describe(file, _named(source, record), self._limits)
        indices = frame_indices(
            self.video,
            video.total,
            video.fps,
            duration=video.duration,
            video_fps=self._video_fps,
            video_frames=self._video_frames,
        )
        return ClipInfo(tuple(indices), video.fps, video.total, video.duration, video.height, video.width, _key(source))

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
