"""Image files to pixel arrays: safe decoding, LLaVA's square padding, the folder's processor, tiles or patches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import logging
import math
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmprune_jax.base.errors import UserError, error_context, reason
from vlmprune_jax.base.files import IMAGE_FORMATS, open_image, read_json, reading
from vlmprune_jax.core.video import VideoConfig
from vlmprune_jax.io.data.config import ASPECT_RATIOS
from vlmprune_jax.io.data.image_processor import (
    PROCESSOR_FILES,
    checked_processor,
    make_processor,
    processor_settings,
    sides,
    way_of,
)
from vlmprune_jax.io.data.media import DECODING, StoredImage
from vlmprune_jax.io.data.naflex import naflex_from_processor
from vlmprune_jax.io.data.patching import patching_from_processor, token_budget_from_processor
from vlmprune_jax.io.data.preparation import Preparation, Videos, fixed_size
from vlmprune_jax.io.data.records import VideoSource, Visual
from vlmprune_jax.io.data.tiling import (
    Tiling,
    cropping_from_processor,
    pad_to_square,
    splitting_from_processor,
    tiling_from_processor,
)
from vlmprune_jax.io.families import find
from vlmprune_jax.io.families.tiles import ImageShape

_CRISP = 96  # pixels per side up to which thumbnails are stored without loss
# Decoders warn of metadata, which is not used, and of sizes, which `max_pixels` limits; real problems raise errors.
# Silenced for the whole process, because warning filters are not per thread.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # libtiff prints to stderr; not every build has it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class WholeImage:
    """Preparation of an image as a single tile: LLaVA's `image_aspect_ratio`, then the folder's image processor.

    `aspect_ratio` "pad" centres the image on a square of the colour int(255 * mean); "square" does nothing.
    """

    shares, usual, merge, image_buckets, turns = False, (1,), 0, (), False

    def __init__(self, config: Mapping[str, Any], *, location: str, aspect_ratio: str) -> None:
        if aspect_ratio not in ASPECT_RATIOS[1:]:
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is unknown: use one of pad, square")
        self._processor = make_processor(config, location)
        self._pad = aspect_ratio == "pad"
        self.limit_fields: dict[str, Any] = {}
        self.settings: dict[str, Any] = {"aspect_ratio": aspect_ratio, "processor": dict(config)}
        crops = getattr(self._processor, "do_center_crop", None)
        if not (crops or self._processor.do_resize):
            raise UserError(f"{location}: do_resize and do_center_crop are off, so images differ in size: restore one")
        self._resized = sides(self._processor.size, location)
        self._short_side = "shortest_edge" in dict(self._processor.size)
        self.shape = (3, *(sides(self._processor.crop_size, location) if crops else self._resized))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        return ImageShape()

    def most(self, images: int) -> int:
        return images

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        height_after, width_after = self._resized
        if self._pad:
            return max(max(width, height) ** 2, height_after * width_after)
        if self._short_side:
            return height_after * width_after * max(width, height) // min(width, height)
        return height_after * width_after

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        if self._pad:
            image = pad_to_square(image, tuple(self._processor.image_mean))
        return np.array(self._processor(image, return_tensors="np")["pixel_values"], np.float32, order="C")

    def for_video(self, video: VideoConfig) -> None:
        return None

    def with_most_tokens(self, tokens: int, slot_tokens: int) -> WholeImage:
        raise fixed_size(slot_tokens)


class ImageLoader:
    """Loader of prepared image pixels with a bounded LRU cache, since many records share images.

    `max_pixels` limits the size of the image in the file and its size after padding or resizing. `dtype`: of the
    pixels. The loader is thread-safe.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, preparation: Preparation, *, max_pixels: int, cache_bytes: int, videos: Videos | None = None
    ) -> None:
        self.preparation = preparation
        self.videos = videos
        self.shape = preparation.shape
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
            with self._open(path, record, sharing) as image, DECODING.reserve(self._memory(image.size, sharing)):
                pixels = self.preparation.prepare(_to_rgb(image), sharing)
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

    def room(self, slots: int, image_tokens: int) -> int:
        """Return the number of tiles or patches that a packed row holds.

        `slots`: images or tiles in the row. `image_tokens`: their total tokens, used only for images of varying size.
        """
        merge = self.preparation.merge
        return image_tokens * merge**2 if merge else slots

    def shapes(self, paths: Sequence[Visual], record: str) -> list[ImageShape]:
        """Return the tile or patch grid of each image or video of a record; files are opened only if grids need it.

        Raises UserError naming the file and the record.
        """
        images = sum(not isinstance(path, VideoSource) for path in paths)
        return [self._shape(path, record, images) for path in paths]

    def _shape(self, path: Visual, record: str, sharing: int) -> ImageShape:
        if isinstance(path, VideoSource):
            return self._videos(record).shape(path, record)
        if isinstance(self.preparation, WholeImage):
            return ImageShape()
        if path not in self._sizes:
            with self._open(path, record, sharing) as image:
                self._sizes[path] = image.size
        return self.preparation.image_shape(*self._sizes[path], sharing)

    def _memory(self, size: tuple[int, int], sharing: int) -> int:
        """Return the bytes that decoding and preparing an image takes: two copies in uint8, two in float32."""
        return 6 * math.prod(size) + 24 * self.preparation.prepared_pixels(*size, sharing)

    def _videos(self, record: str) -> Videos:
        if self.videos is None:
            raise UserError(
                f"record {record}: has a video, but this model takes images only: pass frames as images "
                "(data.max_images)"
            )
        return self.videos

    @contextlib.contextmanager
    def _open(self, path: Path | StoredImage, record: str, sharing: int) -> Iterator[Image.Image]:
        """Context that opens an image and checks its size; errors inside it name the file and the record."""
        with _opened(path, record) as image:
            width, height = image.size
            if max(width * height, self.preparation.prepared_pixels(width, height, sharing)) > self._max_pixels:
                raise UserError(
                    f"{path}: image of {width}x{height} pixels exceeds the limit of {self._max_pixels} pixels after "
                    "preparation: shrink it or raise data.max_image_pixels"
                )
            yield image


def thumbnail(
    image: Path | StoredImage, record: str, *, side: int, max_pixels: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return (encoded JPEG or PNG, format, (width, height)) of an image reduced to sides of at most `side` pixels.

    Raises UserError naming the file and the record; also for an image of more than `max_pixels`.
    """
    with _opened(image, record, max_pixels) as opened:
        opened.draft("RGB", (side, side))  # decodes a JPEG at reduced size
        small = _to_rgb(opened)
        small.thumbnail((side, side))
    kind = "png" if max(small.size) <= _CRISP else "jpeg"
    encoded = io.BytesIO()
    small.save(encoded, kind, **({} if kind == "png" else {"quality": 80}))
    return encoded.getvalue(), kind, small.size


def read_rgb(image: Path | StoredImage, record: str, max_pixels: int) -> Image.Image:
    """Return a decoded image in RGB; raise UserError naming the file and the record, also above `max_pixels`."""
    with _opened(image, record, max_pixels) as opened:
        return _to_rgb(opened)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        # same colours as a direct conversion, without PIL's warning about transparent palettes
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: Path | StoredImage, record: str, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Context that opens an image and reads its header; errors inside it name the file and the record."""
    try:
        with open_image(path if isinstance(path, Path) else path.read_bytes()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise UserError(
                    f"{path}: image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels: "
                    "shrink it or raise data.max_image_pixels"
                )
            yield image
    except UserError as error:
        raise UserError(f"{path} (record {record}): {str(error).removeprefix(f'{path}: ')}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} (record {record}): image is far too large ({error}): shrink it") from error
    except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
        problem = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{path} (record {record}): not a readable image ({problem}): replace the file") from error


def load_image_processor(
    folder: Path,
    *,
    aspect_ratio: str,
    max_pixels: int,
    cache_bytes: int,
    image_size: int | None = None,
    tiling: Mapping[str, Any] | None = None,
    patches: tuple[int, int] | None = None,
    max_image_tokens: int | None = None,
    slot_tokens: int = 0,
    videos: Callable[[Preparation], Videos | None] = lambda preparation: None,
) -> ImageLoader:
    """Return the `ImageLoader` for the image processor described in a Hugging Face folder.

    Args:
      folder: a model or its vision tower (see `processor_settings`; for some families config.json has the tiling).
      aspect_ratio: "pad" or "square", for models without tiling (see `WholeImage`).
      max_pixels: maximum size of an image.
      cache_bytes: memory for prepared images.
      image_size: pixels per side of the vision tower's input; also determines the settings for families whose processor
        is in the hub's code instead of a file.
      tiling: fields of `Tiling` that replace the folder's fields, for models with tiling.
      patches: (values per patch, patches per side of a token) of a tower with dynamic resolution.
      max_image_tokens: maximum number of tokens per image; see `Preparation.with_most_tokens`.
      slot_tokens: tokens per image or tile, needed with `max_image_tokens` (`ModelConfig.tokens_per_image`).
      videos: returns the loader of videos for the preparation of images.

    Raises:
      UserError: the folder does not describe a processor, its type is unknown, a field is invalid, prepared images are
        not of the tower's input size, or the model cannot have this `tiling` or `max_image_tokens`.
    """
    folder = Path(folder)
    preparation, location = _preparation(folder, aspect_ratio, image_size)
    changes = {name: value for name, value in (tiling or {}).items() if value is not None}
    if changes and not isinstance(preparation, Tiling):
        raise UserError(
            f"{folder}: this model does not cut images into tiles by their aspect ratio: unset "
            f"data.{', data.'.join(changes)}"
        )
    preparation = dataclasses.replace(preparation, **changes) if isinstance(preparation, Tiling) else preparation
    if max_image_tokens is not None:
        with error_context(f"{folder}: data.max_image_tokens={max_image_tokens}"):
            preparation = preparation.with_most_tokens(max_image_tokens, slot_tokens)
    _check_fits(preparation, location, image_size, patches)
    if isinstance(preparation, WholeImage):
        with reading(location):  # try the settings on a small image, so that errors name this file and not a record
            preparation.prepare(Image.new("RGB", (8, 8)), 1)
    with error_context(folder):
        frames = videos(preparation)
    return ImageLoader(preparation, max_pixels=max_pixels, cache_bytes=cache_bytes, videos=frames)


def _check_fits(
    preparation: Preparation, location: str, image_size: int | None, patches: tuple[int, int] | None
) -> None:
    """Raise UserError if the vision tower does not accept the shape that an image preparation produces."""

    def described(first: int | None, second: int | None, in_patches: bool) -> str:
        return (
            f"patches of {first} values, {second} per side of a token" if in_patches else f"{first} x {second} pixels"
        )

    if patches is None and image_size is None:
        return
    in_patches = preparation.merge > 0
    first, second = (*preparation.shape, preparation.merge) if in_patches else preparation.shape[1:]
    makes = described(first, second, in_patches)
    takes = described(*(patches or (image_size, image_size)), patches is not None)
    if makes != takes:
        raise UserError(
            f"{location}: the image processor returns {makes}, but the vision tower takes {takes}: use the model's "
            "processor"
        )


def limited_files(folder: Path, most: int, slot_tokens: int) -> dict[str, dict[str, Any]]:
    """Return {file name: new content} of a folder's JSON files after limiting images to `most` tokens.

    `slot_tokens`: see `load_image_processor`. Raises UserError if the model cannot have this limit.
    """
    config = read_json(folder / "config.json")
    family = find(config)
    if family is not None and family.images == "whole":  # its processor may lie in the tower's folder
        raise fixed_size(slot_tokens)
    preparation, _ = _preparation(folder, ASPECT_RATIOS[1], None)
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


def _preparation(folder: Path, aspect_ratio: str, image_size: int | None) -> tuple[Preparation, str]:
    """Return the image preparation described in a model folder, and the name of the file that describes it."""
    model_path = folder / "config.json"
    model = read_json(model_path) if os.path.lexists(model_path) else {}
    family = find(model)
    if family is not None and family.tiling is not None:
        return Tiling(**vars(family.tiling(model, str(model_path)))), str(model_path)
    settings = processor_settings(folder)
    if settings is not None:
        config, location = settings
        way = way_of(config)
        if way != "whole":
            return _PREPARATIONS[way](config, location), location
        return WholeImage(config, location=location, aspect_ratio=aspect_ratio), location
    if image_size is not None and family is not None and family.pixels is not None:
        config = checked_processor(family.pixels(image_size), str(model_path))
        return WholeImage(config, location=str(model_path), aspect_ratio=aspect_ratio), str(model_path)
    raise UserError(
        f"{folder}: has neither {' nor '.join(dict(PROCESSOR_FILES))}: copy it from the model or its vision tower"
    )


# `Family.images` -> preparation, for images that are cut or keep their size.
_PREPARATIONS: dict[str, Callable[[Mapping[str, Any], str], Preparation]] = {
    "tiles": tiling_from_processor,
    "splits": splitting_from_processor,
    "crops": cropping_from_processor,
    "budget": token_budget_from_processor,
    "patches": patching_from_processor,
    "naflex": naflex_from_processor,
}
