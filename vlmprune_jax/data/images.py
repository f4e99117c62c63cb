"""Image files to pixel arrays: guarded decoding, LLaVA's square padding, the folder's processor, tiles or patches."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmprune_jax.core.config import ImageShape
from vlmprune_jax.core.errors import UserError, reason
from vlmprune_jax.core.files import IMAGE_FORMATS, open_image, read_json, reading
from vlmprune_jax.data.image_processor import checked_processor, make_processor, processor_settings, sides, way_of
from vlmprune_jax.data.patching import Patching, patching_from_processor
from vlmprune_jax.data.records import StoredImage
from vlmprune_jax.data.splitting import splitting_from_processor
from vlmprune_jax.data.tiling import Tiling, pad_to_square, tiling_from_processor
from vlmprune_jax.families import find

ASPECT_RATIOS = ("pad", "square")
GRIDS = "image_grid_thw"  # of a batch: frames, rows and columns of patches of every slot, 0 of an empty one
_CRISP = 96  # pixels of a side up to which a thumbnail keeps every pixel as it is
# Decoders warn of metadata, which nothing here reads, and of sizes, which `max_pixels` bounds; what hinders them they
# raise as well. Silenced for good, because filters are the process's, not a thread's.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with contextlib.suppress(AttributeError, OSError):  # libtiff prints by itself; not every build has it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class Preparation(Protocol):
    """How a decoded image becomes arrays; `sharing` is the number of images in its record."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of what the vision tower takes, or (values,) of a patch of an image of any size."""

    @property
    def merge(self) -> int:
        """Patches along a side of what becomes one token of an image of any size; 0 where all have one size."""

    @property
    def image_buckets(self) -> tuple[int, ...]:
        """Tokens that a slot of images of any size may be padded to, ascending, the last enough for all; else ()."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the arrays depend on beside the image, as JSON values."""

    @property
    def shares(self) -> bool:
        """Whether what an image becomes depends on how many share its record."""

    @property
    def usual(self) -> tuple[int, ...]:
        """Slots that one image often takes, ascending."""

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return what an image becomes."""

    def most(self, images: int) -> int:
        """Return the most slots of a record with up to `images` images."""

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels in the largest picture on the way."""

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return float32[slots, channels, height, width] of an RGB image, or float32[1, patches, values]."""


class WholeImage:
    """An image as one picture: LLaVA's `image_aspect_ratio`, then the folder's `transformers` processor.

    `aspect_ratio` "pad" centres the image on a square of the colour int(255 * mean), "square" gives it to the processor
    as it is.
    """

    shares, usual, merge, image_buckets = False, (1,), 0, ()

    def __init__(self, config: Mapping[str, Any], *, where: str, aspect_ratio: str) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is unknown; use one of {', '.join(ASPECT_RATIOS)}")
        self._processor = make_processor(config, where)
        self._pad = aspect_ratio == "pad"
        self.settings: dict[str, Any] = {"aspect_ratio": aspect_ratio, "processor": dict(config)}
        crops = getattr(self._processor, "do_center_crop", None)
        if not (crops or self._processor.do_resize):
            raise UserError(f"{where}: images are neither resized nor cropped: restore do_resize or do_center_crop")
        self._resized = sides(self._processor.size, where)
        self._short_side = "shortest_edge" in dict(self._processor.size)
        self.shape = (3, *(sides(self._processor.crop_size, where) if crops else self._resized))

    def image_shape(self, width: int, height: int, sharing: int) -> ImageShape:
        """Return that of a whole image."""
        del width, height, sharing
        return ImageShape()

    def most(self, images: int) -> int:
        """Return `images`."""
        return images

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels after padding, or after the short side is resized: thin images grow enormously there."""
        del sharing
        height_after, width_after = self._resized
        if self._pad:
            return max(max(width, height) ** 2, height_after * width_after)
        if self._short_side:
            return height_after * width_after * max(width, height) // min(width, height)
        return height_after * width_after

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return float32[1, 3, height, width]."""
        del sharing
        if self._pad:
            image = pad_to_square(image, tuple(self._processor.image_mean))
        return np.array(self._processor(image, return_tensors="np")["pixel_values"], np.float32, order="C")


class ImageLoader:
    """Reads and prepares image files; results stay in a bounded LRU cache, because many records share an image.

    `max_pixels` bounds the file's size and the size after padding or resizing. Safe to call from several threads.
    `array` and `dtype`: what it fills in a batch.
    """

    array, dtype = "pixel_values", np.dtype(np.float32)

    def __init__(self, preparation: Preparation, *, max_pixels: int, cache_bytes: int) -> None:
        self.preparation = preparation
        self.shape = preparation.shape
        self._max_pixels = max_pixels
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[Path | StoredImage, int], np.ndarray] = OrderedDict()
        self._sizes: dict[Path | StoredImage, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def load(self, path: Path | StoredImage, record: str, sharing: int = 1) -> np.ndarray:
        """Return read-only float32[slots, 3, height, width] of an image in a record of `sharing` images, or
        float32[1, patches, values].

        Raises UserError naming the file and the record.
        """
        key = (path, sharing)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        with self._open(path, record, sharing) as image:
            pixels = self.preparation.prepare(_to_rgb(image), sharing)
        if pixels.shape[-len(self.shape) :] != self.shape:
            raise UserError(
                f"{path} (record {record}): becomes an image of {pixels.shape[3]}x{pixels.shape[2]} pixels, but the "
                f"vision tower takes {self.shape[2]}x{self.shape[1]}; pad it to a square (data.aspect_ratio)"
            )
        pixels.flags.writeable = False
        with self._lock:
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def arrays(self, slots: int, image_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return shape and dtype of what a row of so many slots holds, each with room for `image_tokens` tokens."""
        merge = self.preparation.merge
        if not merge:
            return {self.array: ((slots, *self.shape), self.dtype)}
        return {
            self.array: ((slots, image_tokens * merge**2, *self.shape), self.dtype),
            GRIDS: ((slots, 3), np.dtype(np.int32)),
        }

    def shapes(self, paths: Sequence[Path | StoredImage], record: str) -> list[ImageShape]:
        """Return what each image of a record becomes; reads their headers only where that depends on their sizes.

        Raises UserError naming the file and the record.
        """
        sizes = [(1, 1)] * len(paths) if isinstance(self.preparation, WholeImage) else []
        for path in paths[len(sizes) :]:
            if path not in self._sizes:
                with self._open(path, record, len(paths)) as image:
                    self._sizes[path] = image.size
            sizes.append(self._sizes[path])
        return [self.preparation.image_shape(width, height, len(paths)) for width, height in sizes]

    @contextlib.contextmanager
    def _open(self, path: Path | StoredImage, record: str, sharing: int) -> Iterator[Image.Image]:
        """An image whose size is checked; what is raised within names it and the record."""
        with _opened(path, record) as image:
            width, height = image.size
            if max(width * height, self.preparation.prepared_pixels(width, height, sharing)) > self._max_pixels:
                raise UserError(
                    f"{path}: image of {width}x{height} pixels is over the limit of {self._max_pixels} pixels once "
                    "prepared; shrink it or raise max_image_pixels"
                )
            yield image


def thumbnail(
    image: Path | StoredImage, record: str, *, side: int, max_pixels: int
) -> tuple[bytes, str, tuple[int, int]]:
    """Return an image made small for people, as an encoded file: its bytes, "jpeg" or "png", and (width, height).

    Args:
      image: of a record.
      record: named in messages.
      side: pixels of its longer side at most; smaller images are not enlarged.
      max_pixels: larger images are refused.

    Raises UserError naming the file and the record.
    """
    with _opened(image, record) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise UserError(
                f"{image}: image of {width}x{height} pixels is over the limit of {max_pixels} pixels; shrink it or "
                "raise max_image_pixels"
            )
        opened.draft("RGB", (side, side))  # of a JPEG: decode no more than that takes
        small = _to_rgb(opened)
        small.thumbnail((side, side))
    kind = "png" if max(small.size) <= _CRISP else "jpeg"
    written = io.BytesIO()
    small.save(written, kind, **({} if kind == "png" else {"quality": 80}))
    return written.getvalue(), kind, small.size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as a direct conversion, without PIL's warning about transparent palettes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(path: Path | StoredImage, record: str) -> Iterator[Image.Image]:
    """An image, its header read; what is raised within names it and the record."""
    with _readable(path, record), open_image(path if isinstance(path, Path) else path.read_bytes()) as image:
        yield image


@contextlib.contextmanager
def _readable(path: Path | StoredImage, record: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one line that names the file and the record."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} (record {record}): {str(error).removeprefix(f'{path}: ')}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} (record {record}): image is far too large ({error}); shrink it") from error
    except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
        said = f"none of {', '.join(IMAGE_FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{path} (record {record}): not a readable image ({said}); replace the file") from error


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
) -> ImageLoader:
    """Return the ImageLoader that an HF folder describes.

    Args:
      folder: a model or its vision tower. A family's config.json may say how images are cut; otherwise
        `preprocessor_config.json` is read, or the `image_processor` part of `processor_config.json` (transformers 5
        writes only that one).
      aspect_ratio: "pad" or "square", for models that do not cut images (see `WholeImage`).
      max_pixels: largest image.
      cache_bytes: what prepared images may take in memory.
      image_size: side of the images that the vision tower takes; also for a family whose processor the hub's code
        holds instead of a file.
      tiling: fields of `Tiling` to use instead of the folder's, for models that cut images.
      patches: of a tower that takes images of any size, the numbers in a patch, and patches along a side of a token.
      max_image_tokens: images that make more are shrunk, for models that take images of any size.

    Raises:
      UserError: nothing there describes a processor, its type is not known, a field holds what it cannot, or images
        would not be as large as the tower takes; or `tiling` or `max_image_tokens` are given for another model.
    """
    folder = Path(folder)
    preparation, where = _preparation(folder, aspect_ratio, image_size)
    changes = {name: value for name, value in (tiling or {}).items() if value is not None}
    preparation = _changed(preparation, changes, max_image_tokens, folder)
    _check_fits(preparation, where, image_size, patches)
    if isinstance(preparation, WholeImage):
        with reading(where):  # that its settings run together, on hardly an image, is not a matter of records
            preparation.prepare(Image.new("RGB", (8, 8)), 1)
    return ImageLoader(preparation, max_pixels=max_pixels, cache_bytes=cache_bytes)


def _check_fits(preparation: Preparation, where: str, image_size: int | None, patches: tuple[int, int] | None) -> None:
    """Refuse what the vision tower does not take, where that is known (see `load_image_processor`)."""
    if patches is None and image_size is None:
        return
    makes_patches = isinstance(preparation, Patching)
    made = (*preparation.shape, preparation.merge) if makes_patches else preparation.shape[1:]
    taken = (image_size, image_size) if patches is None else patches
    if (made, makes_patches) != (taken, patches is not None):
        raise UserError(
            f"{where}: the image processor makes {_sides_of(made, makes_patches)}, but the vision tower takes "
            f"{_sides_of(taken, patches is not None)}: is it another model's?"
        )


def _sides_of(sizes: Sequence[int | None], in_patches: bool) -> str:
    first, second = sizes
    return f"patches of {first} numbers, {second} a side for a token" if in_patches else f"{first} x {second} pixels"


def _changed(preparation: Preparation, changes: dict[str, Any], most: int | None, folder: Path) -> Preparation:
    """The preparation with settings of the user. Raises UserError where they are of other models."""
    if changes and not isinstance(preparation, Tiling):
        raise UserError(
            f"{folder}: data.{', data.'.join(changes)} given, but this model does not cut images into tiles that fit "
            "them best"
        )
    if isinstance(preparation, Tiling):
        preparation = dataclasses.replace(preparation, **changes)
    if most is None:
        return preparation
    if not isinstance(preparation, Patching):
        raise UserError(f"{folder}: data.max_image_tokens given, but this model does not take images of any size")
    return preparation.with_most_tokens(most)


def _preparation(folder: Path, aspect_ratio: str, image_size: int | None) -> tuple[Preparation, str]:
    """How a folder has images prepared, and the file that says so; nothing has run yet."""
    model_path = folder / "config.json"
    model = read_json(model_path) if os.path.lexists(model_path) else {}
    family = find(model)
    if family is not None and family.tiling is not None:
        return Tiling(**vars(family.tiling(model, str(model_path)))), str(model_path)
    found = processor_settings(folder)
    if found is not None:
        config, where = checked_processor(*found), found[1]
        way = way_of(config)
        if way != "whole":
            return _CUTTING[way](config, where), where
        return WholeImage(config, where=where, aspect_ratio=aspect_ratio), where
    if image_size is not None and family is not None and family.pixels is not None:
        config = checked_processor(family.pixels(image_size), str(model_path))
        return WholeImage(config, where=str(model_path), aspect_ratio=aspect_ratio), str(model_path)
    raise UserError(f"{folder}: has no preprocessor_config.json; copy it from the model or its vision tower")


# How images that a family cuts, or leaves their size, are prepared (`Family.images`).
_CUTTING: dict[str, Callable[[Mapping[str, Any], str], Preparation]] = {
    "tiles": tiling_from_processor,
    "splits": splitting_from_processor,
    "patches": patching_from_processor,
}


def augment_flip_shift(pixels: np.ndarray, seed: tuple[int, ...], max_shift: int = 4) -> np.ndarray:
    """Return float[3, height, width] flipped at random along both axes and moved by up to `max_shift` pixels.

    Each flip has probability 1/2; both offsets are uniform in -max_shift..max_shift and the edge pixels fill the gap.
    Only pretraining uses it, for images whose meaning does not change when mirrored. `seed` names the example: equal
    seeds give equal results.
    """
    generator = np.random.default_rng(seed)
    flip_rows, flip_columns = generator.integers(2, size=2)
    down, right = generator.integers(0, 2 * max_shift + 1, size=2)
    height, width = pixels.shape[1:]
    pixels = pixels[:, :: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    padded = np.pad(pixels, ((0, 0), (max_shift, max_shift), (max_shift, max_shift)), mode="edge")
    return padded[:, down : down + height, right : right + width]
