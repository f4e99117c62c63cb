"""The image processor that a folder's file describes: every field checked, then the `transformers` class made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import checked, read_json, reading
from vlmprune_jax.families import FAMILIES
from vlmprune_jax.families.tiles import MAX_SIDE

# Ways of families that cut images, or leave them their size: the classes here are not used for them.
_CUT = ("tiles", "splits", "patches")
_SUFFIXES = ("ImageProcessor", "ImageProcessorPil", "ImageProcessorFast", "FeatureExtractor")
_TODO = "restore it from the model's source"

_Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
_Sides = Annotated[list[_Side], Meta(min_length=2, max_length=2)]
# Also of values that are not rescaled to 0..1 first.
_Means = Annotated[list[Annotated[float, Meta(ge=-255, le=255)]], Meta(min_length=3, max_length=3)]
_Deviations = Annotated[list[Annotated[float, Meta(ge=1e-6, le=255)]], Meta(min_length=3, max_length=3)]
_Count = Annotated[int, Meta(ge=1)] | None
_Area = Annotated[int, Meta(ge=1, le=MAX_SIDE**2 * 64)] | None  # in pixels, far above any model's (4096 x 4096)


class _Size(TypedDict, total=False):
    height: _Side | None
    width: _Side | None
    shortest_edge: _Side | None
    longest_edge: _Side | None


_AnySize = _Side | _Sides | _Size | None


class ProcessorFile(TypedDict, total=False):
    """What a preprocessor_config.json says that matters here; of other fields, nothing is used."""

    image_processor_type: str | None
    feature_extractor_type: str | None
    do_resize: bool | None
    size: _AnySize
    resample: Annotated[int, Meta(ge=0, le=5)] | None
    do_center_crop: bool | None
    crop_size: _AnySize
    do_rescale: bool | None
    rescale_factor: Annotated[float, Meta(gt=0, le=1)] | None
    do_normalize: bool | None
    image_mean: _Means | None
    image_std: _Deviations | None
    default_to_square: bool | None
    crop_to_patches: bool | None
    do_image_splitting: bool | None
    max_image_size: _AnySize
    min_patches: _Count
    max_patches: _Count


class _Areas(TypedDict, total=False):
    shortest_edge: _Area
    longest_edge: _Area


class PatchFile(TypedDict, total=False):
    """The same of a model that takes images of any size: `size` is two areas, which older files name by themselves."""

    image_processor_type: str | None
    feature_extractor_type: str | None
    do_resize: bool | None
    size: _Areas | None
    min_pixels: _Area
    max_pixels: _Area
    resample: Annotated[int, Meta(ge=0, le=5)] | None
    do_rescale: bool | None
    rescale_factor: Annotated[float, Meta(gt=0, le=1)] | None
    do_normalize: bool | None
    image_mean: _Means | None
    image_std: _Deviations | None
    patch_size: Annotated[int, Meta(ge=1, le=256)] | None
    temporal_patch_size: Annotated[int, Meta(ge=1, le=16)] | None
    merge_size: Annotated[int, Meta(ge=1, le=16)] | None


class _Named(TypedDict, total=False):
    image_processor_type: str | None
    feature_extractor_type: str | None


# What our classes take of it. They pad no image: the reference does that before, whatever the processor would do.
_TAKEN = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "default_to_square",
)  # fmt: skip


def checked_processor(config: Any, where: str) -> dict[str, Any]:
    """The settings of an image processor, if they can be those of one.

    Raises:
      UserError: they cannot; the field is named.
    """
    way = way_of(checked(config, _Named, where, _TODO))
    return checked(config, PatchFile if way == "patches" else ProcessorFile, where, _TODO)


def processor_settings(folder: Path) -> tuple[Any, str] | None:
    """What a folder's file says of its image processor, as it stands there, and that file; None where there is none.

    `preprocessor_config.json`, or the part of `processor_config.json`: transformers 5 writes only that one.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        config = read_json(path) if os.path.lexists(path) else None
        config = config if key is None or config is None else config.get(key)
        if config is not None:
            return config, str(path)
    return None


def way_of(config: Mapping[str, Any]) -> str:
    """How the processor of these settings prepares images (`Family.images`); "whole" where its type is not known."""
    return next((way for way in _CUT if _type_of(config) in _processors(way)), "whole")


def make_processor(config: Mapping[str, Any], where: str) -> Any:
    """The processor of these settings (`checked_processor`); nothing has run yet.

    Only NumPy/PIL classes: their values are the reference's, while the torchvision ones of transformers 5 differ in the
    last bits and need torch.

    Raises:
      UserError: its type is not known, or it does not take them.
    """
    import transformers

    name, classes = _type_of(config), _processors("whole")
    if name not in classes:
        known = ", ".join(sorted({*classes, *(name for way in _CUT for name in _processors(way))}))
        raise UserError(f"{where}: image processor {name!r} is not supported; known: {known}")
    for class_name in classes[name]:
        try:
            processor_class = getattr(transformers, class_name)
        except (AttributeError, ImportError):  # transformers 4 has no *Pil name: its plain name is the NumPy one
            continue
        with reading(where, _TODO):
            return processor_class.from_dict({field: config[field] for field in _TAKEN if field in config})
    raise UserError(f"transformers {transformers.__version__} has no image processor {classes[name]}; use >= 4.57")


def sides(size: Any, where: str) -> tuple[int, int]:
    """(height, width) that a square image is resized or cropped to, by a processor's `size` or `crop_size`.

    Raises:
      UserError: it says neither both nor the shortest edge.
    """
    if isinstance(size, int | list):
        height, width = [size] * 2 if isinstance(size, int) else size
        return height, width
    size = {name: value for name, value in dict(size or {}).items() if value is not None}
    if "shortest_edge" in size:
        side = min(size["shortest_edge"], size.get("longest_edge", size["shortest_edge"]))
        return side, side
    if "height" not in size or "width" not in size:
        raise UserError(f"{where}: size {size} gives neither height and width nor the shortest edge; {_TODO}")
    return size["height"], size["width"]


def _processors(way: str) -> dict[str, tuple[str, str]]:
    """image_processor_type (or the older feature_extractor_type) -> classes to try, of families that prepare so."""
    kinds = [kind for one in FAMILIES.values() if one.images == way for kind in one.image_processors]
    suffixes = _SUFFIXES if way == "whole" else _SUFFIXES[:3]
    return {f"{k}{suffix}": (f"{k}ImageProcessorPil", f"{k}ImageProcessor") for k in kinds for suffix in suffixes}


def _type_of(config: Mapping[str, Any]) -> str | None:
    return config.get("image_processor_type") or config.get("feature_extractor_type")
