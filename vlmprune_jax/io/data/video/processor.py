"""Video processor settings of a model folder, as a `VideoConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.image_processor import ProcessorSteps, Side, check_steps, read_section, sides

# Files with a video processor's settings, and the section of each (None: all of it); the first that exists is used.
VIDEO_FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
_TODO = "restore it from the model's source"
_Count = Annotated[int, Meta(ge=1, le=2**31)] | None
_Rate = Annotated[float, Meta(gt=0, le=1e6)] | None
# Rules of classes that sample unless do_sample_frames is false, and of classes that then take every frame.
_SAMPLES_BY_DEFAULT, _TAKES_ALL_BY_DEFAULT = ("linspace", "starts"), ("steps", "middles")


class _Size(TypedDict, total=False):
    height: Side | None
    width: Side | None
    shortest_edge: _Count
    longest_edge: _Count


class _Sampling(TypedDict, total=False):
    """SmolVLM's section of preprocessor_config.json; transformers 5.24 ignores its `video_size` if `size` is set."""

    fps: _Rate
    max_frames: _Count
    video_size: _Size | None


class VideoFile(ProcessorSteps, total=False):
    """Fields of a video processor's file that are read."""

    fps: _Rate
    num_frames: _Count
    min_frames: _Count
    max_frames: _Count
    do_sample_frames: bool | None
    temporal_patch_size: Annotated[int, Meta(ge=1, le=16)] | None
    patch_size: Annotated[int, Meta(ge=1, le=256)] | None
    merge_size: Annotated[int, Meta(ge=1, le=16)] | None
    pooling_kernel_size: Annotated[int, Meta(ge=1, le=16)] | None
    min_pixels: _Count
    max_pixels: _Count
    max_soft_tokens: _Count
    size: _Size | None
    max_image_size: _Size | None
    video_sampling: _Sampling | None


def load_video_config(folder: Path, default: VideoConfig) -> VideoConfig:
    """Return a model folder's video processor; `default` has the values of the family's class.

    Raises UserError if a field has an unsupported value.
    """
    found = read_section(folder, VIDEO_FILES)
    if found is None:
        return default
    content, location = found
    file: Mapping[str, Any] = checked(content, VideoFile, location, _TODO)
    check_steps(file, location, "videos", normalizes=any(default.mean))
    if file.get("do_sample_frames") is False:
        if default.sampling in _SAMPLES_BY_DEFAULT:
            raise UserError(
                f"{location}: do_sample_frames false (every frame of a clip) is not supported: set it to true"
            )
        if default.sampling in _TAKES_ALL_BY_DEFAULT:
            file = {**file, "fps": None, "num_frames": None}
    sampling = file.get("video_sampling") or {}
    size = {name: value for name, value in (file.get("size") or sampling.get("video_size") or {}).items() if value}
    values: dict[str, Any] = {
        "fps": sampling.get("fps") or file.get("fps"),
        "num_frames": sampling.get("max_frames") or file.get("num_frames"),
        "temporal_patch": file.get("temporal_patch_size"),
        "patch": file.get("patch_size"),
        "merge": file.get("merge_size") or file.get("pooling_kernel_size"),
        "mean": file.get("image_mean") and tuple(file["image_mean"]),
        "std": file.get("image_std") and tuple(file["image_std"]),
        **{name: file.get(name) for name in ("min_frames", "max_frames", "max_soft_tokens", "resample")},
    }
    if default.max_pixels is not None:
        values["min_pixels"] = file.get("min_pixels") or size.get("shortest_edge")
        values["max_pixels"] = file.get("max_pixels") or size.get("longest_edge")
    elif default.longest_edge is not None:
        values["longest_edge"] = size.get("longest_edge")
        side = (file.get("max_image_size") or {}).get("longest_edge")
        values["size"] = side and (side, side)
    elif default.size is not None and size:
        values["size"] = sides(size, location)
    video = dataclasses.replace(default, **{name: value for name, value in values.items() if value is not None})
    if (video.min_pixels or 0) > (video.max_pixels or video.min_pixels or 0) or video.min_frames > video.max_frames:
        raise UserError(f"{location}: the minimum number of frames or pixels is above the maximum: {_TODO}")
    return video
