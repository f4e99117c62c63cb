"""Image files to pixel arrays: LLaVA's square padding, the image processor of a model folder, tiles or patches."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import read_json, reading
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.config import TILE_SETTINGS, DataSpec
from vlmprune_jax.io.data.media import DECODING, StoredImage, opened_image, to_rgb
from vlmprune_jax.io.data.patching import naflex_from_processor, patching_from_processor, token_budget_from_processor
from vlmprune_jax.io.data.preparation import Preparation, described_patches, fixed_size
from vlmprune_jax.io.data.processor_files import (
    PROCESSOR_FILES,
    check_steps,
    checked_processor,
    make_processor,
    processor_settings,
    sides,
    way_of,
)
from vlmprune_jax.io.data.records import VideoSource, Visual
from vlmprune_jax.io.data.tiling import (
    Tiling,
    cropping_from_processor,
    pad_to_square,
    splitting_from_processor,
    tiling_from_processor,
)
from vlmprune_jax.io.data.video.reader import VideoReader, video_reader
from vlmprune_jax.io.families import find
from vlmprune_jax.io.families.tiles import ImageShape


class WholeImage(Preparation):
    """Preparation of an image as a single tile: LLaVA's `image_aspect_ratio`, then the folder's image processor.

    `pad` centres the image on a square of the colour int(255 * mean), as LLaVA's "pad".
    """

    merge = 0

    def __init__(self, config: Mapping[str, Any], *, location: str, pad: bool) -> None:
        self._processor, self._pad = make_processor(config, location), pad
        self._settings = {"aspect_ratio": "pad" if pad else "square", "processor": dict(config)}
        crops = getattr(self._processor, "do_center_crop", None)
        if not (crops or self._processor.do_resize):
            raise UserError(f"{location}: do_resize and do_center_crop are off, so images differ in size: restore one")
        self._resized = sides(self._processor.size, location)
        self._short_side = "shortest_edge" in dict(self._processor.size)
        self._shape = (3, *(sides(self._processor.crop_size, location) if crops else self._resized))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def settings(self) -> dict[str, Any]:
        return self._settings

    def plan(self, width: int, height: int, sharing: int = 1, frames: int = 1) -> ImageShape:
        pixels = math.prod(self._resized)
        if self._pad:
            pixels = max(max(width, height) ** 2, pixels)
        elif self._short_side:
            pixels = pixels * max(width, height) // min(width, height)
        return ImageShape(pixels=pixels)

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        if self._pad:
            image = pad_to_square(image, tuple(self._processor.image_mean))
        return np.array(self._processor(image, return_tensors="np")["pixel_values"], np.float32, order="C")


class ImageLoader:
    """Loader of prepared image pixels with a bounded LRU cache, since many records share images.

    `max_pixels` limits the size of the image in the file and its size after padding or resizing. `dtype`: of the
    pixels. The loader is thread-safe.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, preparation: Preparation, *, max_pixels: int, cache_bytes: int, videos: VideoReader | None = None
    ) -> None:
        self.preparation, self.videos, self.shape = preparation, videos, preparation.shape
        self.per_token = preparation.merge**2  # patches of an image token; 0 if all images have one size
        self._max_pixels = max_pixels
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[Visual, int], np.ndarray] = OrderedDict()
        self._sizes: dict[Path | StoredImage, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def load(self, path: Visual, record: str, sharing: int = 1) -> np.ndarray:
        """Load the pixels of an image or a video (read-only); `sharing` is the number of images in its record.

        The result is float32[tiles or frames, 3, height, width], or float32[patches, values] for images of varying
        size. Raises UserError naming the file and the record.
        """
        key = (path, sharing)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if isinstance(path, VideoSource):
            pixels = self._videos(record).load(path, record)
        else:
            with self._open(path, record, sharing) as (image, memory), DECODING.reserve(memory):
                pixels = self.preparation.prepare(to_rgb(image), sharing)
        if pixels.shape[-len(self.shape) :] != self.shape:
            raise UserError(
                f"{path} (record {record}): prepared size is {pixels.shape[3]}x{pixels.shape[2]} pixels, but the "
                f"vision tower takes {self.shape[2]}x{self.shape[1]}: pad it to a square (data.aspect_ratio)"
            )
        pixels.flags.writeable = False
        with self._lock:
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def shapes(self, paths: Sequence[Visual], record: str) -> list[ImageShape]:
        """Return the tile or patch grid of each image or video of a record; files are opened only if grids need it.

        Raises UserError naming the file and the record.
        """
        sharing, shapes = sum(not isinstance(path, VideoSource) for path in paths), list[ImageShape]()
        for path in paths:
            if isinstance(path, VideoSource):
                shapes.append(self._videos(record).shape(path, record))
            elif isinstance(self.preparation, WholeImage):
                shapes.append(ImageShape())
            else:
                if path not in self._sizes:
                    with self._open(path, record, sharing) as (image, _):
                        self._sizes[path] = image.size
                shapes.append(self.preparation.plan(*self._sizes[path], sharing))
        return shapes

    def _videos(self, record: str) -> VideoReader:
        if self.videos is None:
            raise UserError(
                f"record {record}: has a video, but this model takes images only: pass frames as images "
                "(data.max_images)"
            )
        return self.videos

    @contextlib.contextmanager
    def _open(self, path: Path | StoredImage, record: str, sharing: int) -> Iterator[tuple[Image.Image, int]]:
        """Context that opens an image and checks its size; also yields the bytes that decoding and preparing it takes.

        Errors inside the context name the file and the record.
        """
        with opened_image(path, record) as image:
            width, height = image.size
            prepared = self.preparation.plan(width, height, sharing).pixels
            if max(width * height, prepared) > self._max_pixels:
                raise UserError(
                    f"{path}: image of {width}x{height} pixels exceeds the limit of {self._max_pixels} pixels after "
                    "preparation: shrink it or raise data.max_image_pixels"
                )
            yield image, 6 * width * height + 24 * prepared  # two copies in uint8, two in float32


def load_image_processor(
    folder: Path,
    data: DataSpec,
    *,
    image_size: int | None = None,
    patches: tuple[int, int] | None = None,
    slot_tokens: int = 0,
    video: VideoConfig | None = None,
) -> ImageLoader:
    """Return the `ImageLoader` for the image processor described in a Hugging Face folder.

    Args:
      folder: a model or its vision tower (see `processor_settings`; for some families config.json has the tiling).
      data: limits of images and videos, and changes to the folder's settings; `aspect_ratio` "auto" means "square".
      image_size: pixels per side of the vision tower's input; also determines the settings for families whose processor
        is in the hub's code instead of a file.
      patches: (values per patch, patches per side of a token) of a tower with dynamic resolution.
      slot_tokens: tokens of a tile (see `Preparation.with_most_tokens`).
      video: the model's video processor (None: the model takes no videos).

    Raises:
      UserError: the folder does not describe a processor, its type is unknown, a field is invalid, prepared images are
        not of the tower's input size, or the model cannot have these tiles or `max_image_tokens`.
    """
    folder = Path(folder)
    preparation, location = _preparation(folder, data.aspect_ratio == "pad", image_size)
    changes = {name: value for name in TILE_SETTINGS if (value := getattr(data, name)) is not None}
    if changes and not isinstance(preparation, Tiling):
        raise UserError(
            f"{folder}: this model does not cut images into tiles by their aspect ratio: unset "
            f"data.{', data.'.join(changes)}"
        )
    preparation = dataclasses.replace(preparation, **changes) if isinstance(preparation, Tiling) else preparation
    if data.max_image_tokens is not None:
        with error_context(f"{folder}: data.max_image_tokens={data.max_image_tokens}"):
            preparation = preparation.with_most_tokens(data.max_image_tokens, slot_tokens)
    takes = f"{image_size} x {image_size} pixels" if patches is None else described_patches(*patches)
    if (patches or image_size) and preparation.described != takes:
        raise UserError(
            f"{location}: the image processor returns {preparation.described}, but the vision tower takes {takes}: "
            "use the model's processor"
        )
    if isinstance(preparation, WholeImage):
        with reading(location):  # try the settings on a small image, so that errors name this file and not a record
            preparation.prepare(Image.new("RGB", (8, 8)), 1)
    with error_context(folder):
        videos = video_reader(data, video, slot_tokens, preparation)
    cache_bytes = data.cache_megabytes << 20
    return ImageLoader(preparation, max_pixels=data.max_image_pixels, cache_bytes=cache_bytes, videos=videos)


def limited_files(folder: Path, most: int, slot_tokens: int) -> dict[str, dict[str, Any]]:
    """Return {file name: new content} of a folder's JSON files after limiting images to `most` tokens.

    `slot_tokens`: see `load_image_processor`. Raises UserError if the model cannot have this limit.
    """
    config = read_json(folder / "config.json")
    family = find(config)
    if family is not None and family.images == "whole":  # its processor may lie in the tower's folder
        raise fixed_size(slot_tokens)
    preparation, _ = _preparation(folder, True, None)
    processor, own_videos = folder / "processor_config.json", folder / "video_preprocessor_config.json"
    described = read_json(processor).get("video_processor") if os.path.lexists(processor) else None
    videos_read_images = family is not None and family.video is not None and described is None
    fields, changed = preparation.with_most_tokens(most, slot_tokens).limit_fields, {}
    if family is not None and family.tiling is not None:
        return {"config.json": config | {family.tile_limit: fields["max_patches"]}}
    for name, section in PROCESSOR_FILES:
        content = read_json(folder / name) if os.path.lexists(folder / name) else {}
        settings = content if section is None else content.get(section)
        if settings:
            changed[name] = {**content, **(fields if section is None else {section: {**settings, **fields}})}
            if section is None and videos_read_images and not os.path.lexists(own_videos):
                changed[own_videos.name] = content  # videos have read this file and keep its limits
    return changed


def _preparation(folder: Path, pad: bool, image_size: int | None) -> tuple[Preparation, str]:
    """Return the image preparation described in a model folder, and the name of the file that describes it."""
    model_path = folder / "config.json"
    model = read_json(model_path) if os.path.lexists(model_path) else {}
    family = find(model)
    if family is not None and family.tiling is not None:
        return Tiling(**vars(family.tiling(model, str(model_path)))), str(model_path)
    settings = processor_settings(folder)
    if settings is not None:
        config, location = settings
        if way_of(config) != "whole":
            return cut_preparation(config, location), location
        return WholeImage(config, location=location, pad=pad), location
    if image_size is not None and family is not None and family.pixels is not None:
        config = checked_processor(family.pixels(image_size), str(model_path))
        return WholeImage(config, location=str(model_path), pad=pad), str(model_path)
    raise UserError(
        f"{folder}: has neither {' nor '.join(dict(PROCESSOR_FILES))}: copy it from the model or its vision tower"
    )


def cut_preparation(config: Mapping[str, Any], location: str) -> Any:
    """Return the preparation of images that are cut or keep their size, for checked settings of an image processor.

    Raises UserError if resizing, rescaling or normalisation is off, or a setting is unsupported.
    """
    way = way_of(config)
    images, make = _PREPARATIONS[way]
    check_steps(config, location, images, normalizes=way != "budget")
    return make(config, location)


# `Family.images` -> images in messages, and the function that returns their preparation.
_PREPARATIONS: dict[str, tuple[str, Callable[[Mapping[str, Any], str], Preparation]]] = {
    "tiles": ("InternVL tiles", tiling_from_processor),
    "splits": ("split images (SmolVLM)", splitting_from_processor),
    "crops": ("Gemma 3", cropping_from_processor),
    "budget": ("Gemma 4", token_budget_from_processor),
    "patches": ("images of any size (Qwen-VL)", patching_from_processor),
    "naflex": ("images in tiles before an overview", naflex_from_processor),
}
