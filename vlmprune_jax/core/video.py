"""Description of a family's video processor, and the frames that its sampling rule takes from a clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LIST_FPS = 24.0  # frames per second assumed for a list of frame files, as in transformers
DEFAULT_FRAMES = 32  # frames of a longer clip, if neither a setting nor the model folder has a number or rate


@dataclass(frozen=True)
class VideoConfig:
    """Configuration of a video processor: the sampling of frames, and their preparation for the vision tower."""

    sampling: str
    """Name of the rule that chooses frames (a key of `SAMPLING`)."""

    fps: float | None = None
    """Sampled frames per second, unless `data.video_fps` is set; None if the rule has no rate."""

    num_frames: int | None = None
    """Sampled frames per clip ("trimmed": the maximum), unless `data.video_frames` is set."""

    min_frames: int = 1
    """Minimum number of frames sampled by rate."""

    max_frames: int = 2**31
    """Maximum number of frames sampled by rate."""

    temporal_patch: int = 1
    """Frames in one patch of the vision tower."""

    patch: int | None = None
    """Pixels per side of a patch (None = the image processor's)."""

    merge: int | None = None
    """Patches per side of a token (None = the image processor's)."""

    min_pixels: int | None = None
    """Minimum pixels after resizing: of all frames together ("linspace") or of each ("steps")."""

    max_pixels: int | None = None
    """Maximum pixels after resizing: of all frames together ("linspace") or of each ("steps")."""

    max_soft_tokens: int | None = None
    """Maximum number of tokens per frame, for models that limit them."""

    longest_edge: int | None = None
    """Pixels of the longer side after the first of two resizings."""

    size: tuple[int, int] | None = None
    """(height, width) of a prepared frame, for models whose frames have one size."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of each channel, subtracted from values in 0..1."""

    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel, by which values are divided."""

    resample: int = 3
    """Pillow's number of the resizing filter (1 Lanczos, 3 bicubic)."""


class _Request(NamedTuple):
    """Length of a clip and requested sampling, from which the frames to decode are chosen."""

    total: int
    fps: float
    duration: float  # seconds
    rate: float | None  # frames per second to sample
    wanted: int | None  # frames to sample


def frame_indices(
    video: VideoConfig,
    total: int,
    fps: float,
    *,
    duration: float | None = None,
    video_fps: float | None = None,
    video_frames: int | None = None,
) -> list[int]:
    """Return the indices of the frames that the family's stock video processor takes from a clip.

    For a clip with fewer frames than requested, or less than one frame at the requested rate, the stock processor
    raises an error; this function returns all frames. Reference: `sample_frames` in transformers 5.24.

    Args:
      video: the sampling rule and the model folder's values.
      total: number of frames in the clip.
      fps: frames per second of the clip.
      duration: length of the clip in seconds (None = total / fps).
      video_fps, video_frames: the settings `data.video_fps` and `data.video_frames` (None = the model folder's values).
    """
    seconds = total / fps if duration is None else duration
    return SAMPLING[video.sampling](video, _Request(total, fps, seconds, video_fps, video_frames))


def _linspace(video: VideoConfig, request: _Request) -> list[int]:
    """Choose frames from the first to the last in equal steps; a requested count repeats frames of short clips."""
    count, rate = request.wanted, video.fps if request.rate is None else request.rate
    if count is None:
        by_rate = request.total if rate is None else int(request.total / request.fps * rate)
        count = min(max(by_rate, video.min_frames), video.max_frames, request.total)
    return np.linspace(0, request.total - 1, count).round().astype(int).tolist()


def _steps(video: VideoConfig, request: _Request) -> list[int]:
    """Choose frames in equal steps from the first, as many as fill whole temporal patches."""
    patch, (rate, count) = video.temporal_patch, _or_default(video, request)
    if count is not None:
        count = max(round(count / patch), 1) * patch
    elif rate is not None:
        most = min(video.max_frames, request.total) // patch * patch
        by_rate = min(max(request.total / request.fps * rate, video.min_frames), most, request.total)
        count = math.floor(by_rate / patch) * patch
    return _arange(request.total, count, 0.0)


def _middles(video: VideoConfig, request: _Request) -> list[int]:
    """Choose the middle frame of equal segments; a count has priority over a rate."""
    rate, count = _or_default(video, request)
    if count is None and rate is not None:
        count = int(request.total / request.fps * rate)
    return _arange(request.total, count, 0.5)


def _starts(video: VideoConfig, request: _Request) -> list[int]:
    """Choose the first frame of equal segments; the stock processor has no rate."""
    count = video.num_frames if request.wanted is None else request.wanted
    if request.rate is not None:
        count = max(1, int(request.total / request.fps * request.rate))
    if count is None or count > request.total:
        return list(range(request.total))
    return [number * request.total // count for number in range(count)]


def _trimmed(video: VideoConfig, request: _Request) -> list[int]:
    """Choose frames from the first to the last by rate up to a maximum, without a second at both ends of long clips."""
    rate = (video.fps if request.rate is None else request.rate) or 1.0
    most = (video.num_frames if request.wanted is None else request.wanted) or DEFAULT_FRAMES
    count = max(min(round(rate * request.duration), most), 1)
    first, last = 0, request.total - 1
    if request.duration - 2 > most * rate:
        first, last = int(request.fps), min(int(request.total - request.fps), last)
    if first >= last:
        first, last = 0, request.total - 1
    # more steps than frames would reach every frame as well
    return np.unique(np.linspace(first, last, min(count, last - first + 1), dtype=int)).tolist()


def _or_default(video: VideoConfig, request: _Request) -> tuple[float | None, int | None]:
    """Return the (rate, count) to sample: settings, else the folder's, else a count for long clips (None, None: all).

    The stock processors of these rules take every frame unless they are asked for fewer.
    """
    if request.rate is not None or request.wanted is not None:
        return request.rate, request.wanted
    if video.num_frames is not None or video.fps is not None:
        return video.fps, video.num_frames
    return None, DEFAULT_FRAMES if request.total > DEFAULT_FRAMES else None


def _arange(total: int, count: int | None, shift: float) -> list[int]:
    """Return torch.arange(shift * step, total, step).int() with step = total / count, or all frames.

    The float32 rounding of torch changes some indices. An index equal to `total`, which it may add at the end, is left
    out.
    """
    if not count or count > total:
        return list(range(total))
    step = total / count
    indices = [int(np.float32(shift * step + number * step)) for number in range(count)]
    return [index for index in indices if index < total]


# Rules of the families' video processors: (config, request) -> indices.
SAMPLING: dict[str, Callable[[VideoConfig, _Request], list[int]]] = {
    "linspace": _linspace,
    "steps": _steps,
    "middles": _middles,
    "starts": _starts,
    "trimmed": _trimmed,
}
