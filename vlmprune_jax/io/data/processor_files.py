"""Image and video processor settings of a model folder: every field is checked before a processor is made."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta
from PIL import Image

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked, read_json, reading
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.families import FAMILIES
from vlmprune_jax.io.families.tiles import BICUBIC, MAX_SIDE

_SUFFIXES = ("ImageProcessor", "ImageProcessorPil", "ImageProcessorFast", "FeatureExtractor")
# Files with an image processor's settings, and the section of each (None: all of it), in the order of reading.
PROCESSOR_FILES = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
# Files with a video processor's settings, and the section of each (None: all of it); the first that exists is used.
VIDEO_FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that many classes have by default
_TODO = "restore it from the model's source"

Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
_Sides = Annotated[list[Side], Meta(min_length=2, max_length=2)]
# The range also allows values that are not rescaled to 0..1.
_Means = Annotated[list[Annotated[float, Meta(ge=-255, le=255)]], Meta(min_length=3, max_length=3)]
_Deviations = Annotated[list[Annotated[float, Meta(ge=1e-6, le=255)]], Meta(min_length=3, max_length=3)]
_Count = Annotated[int, Meta(ge=1)] | None
_Limit = Annotated[int, Meta(ge=1, le=2**31)] | None  # frames, or pixels: far above any model's maximum
_Rate = Annotated[float, Meta(gt=0, le=1e6)] | None


class _Size(TypedDict, total=False):
    height: Side | None
    width: Side | None
    shortest_edge: Side | None
    longest_edge: Side | None


_AnySize = Side | _Sides | _Size | None


class ProcessorSteps(TypedDict, total=False):
    """Fields of preprocessor_config.json that are checked for every type of image processor."""

    image_processor_type: str | None
    feature_extractor_type: str | None
    do_resize: bool | None
    resample: Annotated[int, Meta(ge=0, le=5)] | None
    do_rescale: bool | None
    rescale_factor: Annotated[float, Meta(gt=0, le=1)] | None
    do_normalize: bool | None
    image_mean: _Means | None
    image_std: _Deviations | None


class ProcessorFile(ProcessorSteps, total=False):
    """Fields of preprocessor_config.json that are read for images of one size; for others, see `PatchFile`."""

    size: _AnySize
    do_center_crop: bool | None
    crop_size: _AnySize
    default_to_square: bool | None
    crop_to_patches: bool | None
    do_image_splitting: bool | None
    max_image_size: _AnySize
    min_patches: _Count
    max_patches: _Count
    do_pan_and_scan: bool | None
    pan_and_scan_min_crop_size: _Count
    pan_and_scan_max_num_crops: Annotated[int, Meta(ge=2, le=100)] | None
    pan_and_scan_min_ratio_to_activate: Annotated[float, Meta(ge=1, le=1000)] | None
    patch_size: Annotated[int, Meta(ge=1, le=256)] | None
    pooling_kernel_size: Annotated[int, Meta(ge=1, le=16)] | None
    max_soft_tokens: _Count
    encoder_patch_size: Annotated[int, Meta(ge=1, le=256)] | None
    downsample_factor: Annotated[int, Meta(ge=1, le=16)] | None
    tile_size: Side | None
    min_tiles: _Count
    max_tiles: _Count
    use_thumbnail: bool | None
    min_image_tokens: _Count
    max_image_tokens: Annotated[int, Meta(ge=1, le=MAX_SIDE**2)] | None
    max_pixels_tolerance: Annotated[float, Meta(gt=0, le=1000)] | None


class _Areas(TypedDict, total=False):
    height: Side | None
    width: Side | None
    shortest_edge: _Limit
    longest_edge: _Limit


class PatchFile(ProcessorSteps, total=False):
    """Fields of preprocessor_config.json that are read for images of varying size; `size` has both area limits."""

    size: _Areas | None
    min_pixels: _Limit
    max_pixels: _Limit
    patch_size: Annotated[int, Meta(ge=1, le=256)] | None
    temporal_patch_size: Annotated[int, Meta(ge=1, le=16)] | None
    merge_size: Annotated[int, Meta(ge=1, le=16)] | None


class _Sampling(TypedDict, total=False):
    """SmolVLM's section of preprocessor_config.json; transformers 5.24 ignores its `video_size` if `size` is set."""

    fps: _Rate
    max_frames: _Limit
    video_size: _Areas | None


class VideoFile(PatchFile, total=False):
    """Fields of a video processor's file that are read."""

    fps: _Rate
    num_frames: _Limit
    min_frames: _Limit
    max_frames: _Limit
    do_sample_frames: bool | None
    pooling_kernel_size: Annotated[int, Meta(ge=1, le=16)] | None
    max_soft_tokens: _Limit
    max_image_size: _Areas | None
    video_sampling: _Sampling | None


# Fields passed to the processor classes. Padding is not among them, since the reference pads images before.
_USED_FIELDS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "default_to_square",
)  # fmt: skip


def checked_processor(config: Any, location: str) -> dict[str, Any]:
    """Return an image processor's settings; raise UserError if they are unsupported."""
    way = way_of(checked(config, ProcessorSteps, location, _TODO))
    return checked(config, PatchFile if way == "patches" else ProcessorFile, location, _TODO)


def processor_settings(folder: Path) -> tuple[dict[str, Any], str] | None:
    """Read a folder's image processor settings; return (settings, file name), or None if it has none.

    Reads `preprocessor_config.json`, or a section of `processor_config.json`, the only file that transformers 5 writes.
    Raises UserError for settings that `checked_processor` refuses.
    """
    found = read_section(folder, PROCESSOR_FILES)
    return None if found is None else (checked_processor(*found), found[1])


def read_section(folder: Path, files: Iterable[tuple[str, str | None]]) -> tuple[Any, str] | None:
    """Return the first of the `files` (name, section; None: all of it) that a folder has, and the file's path."""
    for name, section in files:
        path = folder / name
        content = read_json(path) if os.path.lexists(path) else None
        content = content if section is None or content is None else content.get(section)
        if content is not None:
            return content, str(path)
    return None


def check_steps(config: Mapping[str, Any], location: str, images: str, *, normalizes: bool = True) -> None:
    """Raise UserError if an image processor skips resizing, rescaling by 1/255 or (`normalizes`) normalisation."""
    for step in ("do_resize", "do_rescale", *(("do_normalize",) if normalizes else ())):
        if config.get(step) is False:
            raise UserError(f"{location}: {step} false is not supported for {images}: set it to true")
    if abs(float(config.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-9:
        raise UserError(
            f"{location}: rescale_factor {config['rescale_factor']} is not supported for {images}: set 1/255"
        )


def pixel_fields(
    config: Mapping[str, Any], mean: Sequence[float] = HALF, std: Sequence[float] = HALF, resample: int = BICUBIC
) -> dict[str, Any]:
    """Return an image processor's mean, standard deviation and resampling filter; the arguments are the defaults."""
    chosen = config.get("resample")
    return {
        "mean": tuple(config.get("image_mean") or mean),
        "std": tuple(config.get("image_std") or std),
        "resample": resample if chosen is None else chosen,
    }


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalise uint8[..., 3] pixels to float32: divide by 255, subtract mean, divide by std."""
    values = pixels.astype(np.float32)
    values /= np.float32(255)
    values -= np.array(mean, np.float32)
    values /= np.array(std, np.float32)
    return values


def crop_grid(image: Image.Image, size: int) -> list[Image.Image]:
    """Cut an image into tiles of `size` x `size` pixels, row by row; `size` must divide its sides."""
    places = [(left, top) for top in range(0, image.height, size) for left in range(0, image.width, size)]
    return [image.crop((left, top, left + size, top + size)) for left, top in places]


def way_of(config: Mapping[str, Any]) -> str:
    """Return the kind of image preparation (see `Family.images`) that an image processor's settings imply."""
    return _processors().get(_type_of(config), ("whole",))[0]


def make_processor(config: Mapping[str, Any], location: str) -> Any:
    """Return the transformers image processor object for checked settings.

    Only NumPy/PIL classes are used: their values equal the reference's, while transformers 5's torchvision classes
    differ in the last bits and need torch. Raises UserError if the type is unknown, or rejects the settings.
    """
    import transformers

    name, known = _type_of(config), _processors()
    if name not in known:
        raise UserError(
            f"{location}: image processor {name!r} is not supported (supported: {', '.join(sorted(known))})"
        )
    _, *classes = known[name]
    for class_name in classes:
        try:
            processor_class = getattr(transformers, class_name)
        except (AttributeError, ImportError):  # transformers 4: the name without Pil is the NumPy class
            continue
        with reading(location, _TODO):
            return processor_class.from_dict({field: config[field] for field in _USED_FIELDS if field in config})
    raise UserError(f"transformers {transformers.__version__} has no image processor {tuple(classes)}: use >= 4.57")


def sides(size: Any, location: str) -> tuple[int, int]:
    """Return the (height, width) in an image processor's `size` or `crop_size`.

    Raises UserError if neither height and width nor the shortest edge is set.
    """
    if isinstance(size, int | list):
        height, width = [size] * 2 if isinstance(size, int) else size
        return height, width
    size = {name: value for name, value in dict(size or {}).items() if value is not None}
    if "shortest_edge" in size:
        side = min(size["shortest_edge"], size.get("longest_edge", size["shortest_edge"]))
        return side, side
    if "height" not in size or "width" not in size:
        raise UserError(f"{location}: size {size} must have height and width, or shortest_edge: {_TODO}")
    return size["height"], size["width"]


def _processors() -> dict[str, tuple[str, str, str]]:
    """Return {type in a processor's file: (`Family.images`, class names of transformers in the order of trying)}."""
    known: dict[str, tuple[str, str, str]] = {}
    for family in sorted(FAMILIES.values(), key=lambda family: family.images != "whole"):
        suffixes = _SUFFIXES if family.images == "whole" else _SUFFIXES[:3]
        for kind, suffix in itertools.product(family.image_processors, suffixes):
            known[f"{kind}{suffix}"] = family.images, f"{kind}ImageProcessorPil", f"{kind}ImageProcessor"
    return known


def _type_of(config: Mapping[str, Any]) -> Any:
    return config.get("image_processor_type") or config.get("feature_extractor_type")


# Rules of classes that sample unless do_sample_frames is false, and of classes that then take every frame.
_SAMPLES_BY_DEFAULT, _TAKES_ALL_BY_DEFAULT = ("linspace", "starts"), ("steps", "middles")


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
