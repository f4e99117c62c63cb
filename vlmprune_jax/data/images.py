"""Image files to pixel arrays: guarded decoding, LLaVA's square padding, the folder's processor or its tiles."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmprune_jax.checked_files import read_json
from vlmprune_jax.data.records import StoredImage
from vlmprune_jax.data.tiling import Tiling, pad_to_square, tiling_from_processor
from vlmprune_jax.errors import UserError, reason
from vlmprune_jax.families import FAMILIES, find

ASPECT_RATIOS = ("pad", "square")
_SUFFIXES = ("ImageProcessor", "ImageProcessorPil", "ImageProcessorFast", "FeatureExtractor")


class Preparation(Protocol):
    """How a decoded image becomes arrays; `sharing` is the number of images in its record."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of what the vision tower takes."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the arrays depend on beside the image, as JSON values."""

    def count(self, width: int, height: int, sharing: int) -> int:
        """Return the number of tiles of an image (1 where images are not cut)."""

    def most(self, images: int) -> int:
        """Return the largest number of tiles of a record with up to `images` images."""

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels in the largest picture on the way."""

    def prepare(self, image: Image.Image, sharing: int) -> np.ndarray:
        """Return float32[tiles, channels, height, width] of an RGB image."""


class WholeImage:
    """An image as one picture: LLaVA's `image_aspect_ratio`, then the folder's `transformers` processor.

    `aspect_ratio` "pad" centres the image on a square of the colour int(255 * mean), "square" gives it to the processor
    as it is.
    """

    def __init__(self, config: Mapping[str, Any], *, where: str, aspect_ratio: str) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is unknown; use one of {', '.join(ASPECT_RATIOS)}")
        # The reference pads, whatever the processor would do; a LlavaImageProcessor must not pad a second time.
        self._processor = _make_processor({**config, "do_pad": False} if "do_pad" in config else config, where)
        self._pad = aspect_ratio == "pad"
        self.settings: dict[str, Any] = {"aspect_ratio": aspect_ratio, "processor": dict(config)}
        self._short_side = "shortest_edge" in dict(self._processor.size)
        self.shape: tuple[int, ...] = self.prepare(Image.new("RGB", (8, 8)), 1).shape[1:]

    def count(self, width: int, height: int, sharing: int) -> int:
        """Return 1."""
        del width, height, sharing
        return 1

    def most(self, images: int) -> int:
        """Return `images`."""
        return images

    def prepared_pixels(self, width: int, height: int, sharing: int) -> int:
        """Return the pixels after padding, or after the short side is resized: thin images grow enormously there."""
        del sharing
        if self._pad:
            return max(width, height) ** 2
        if self._short_side:
            return min(self.shape[1:]) ** 2 * max(width, height) // min(width, height)
        return self.shape[1] * self.shape[2]

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
        """Return read-only float32[tiles, 3, height, width] of an image in a record of `sharing` images.

        Raises UserError naming the file and the record.
        """
        key = (path, sharing)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        with _readable(path, record), self._open(path, record, sharing) as image:
            rgb = _to_rgb(image)
        pixels = self.preparation.prepare(rgb, sharing)
        pixels.flags.writeable = False
        with self._lock:
            if key not in self._cache:
                self._cache[key] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def tiles(self, paths: Sequence[Path | StoredImage], record: str) -> list[int]:
        """Return how many tiles each image of a record gives; reads their headers only where images are cut.

        Raises UserError naming the file and the record.
        """
        sizes = [(1, 1)] * len(paths) if isinstance(self.preparation, WholeImage) else []
        for path in paths[len(sizes) :]:
            if path not in self._sizes:
                with _readable(path, record), self._open(path, record, len(paths)) as image:
                    self._sizes[path] = image.size
            sizes.append(self._sizes[path])
        return [self.preparation.count(width, height, len(paths)) for width, height in sizes]

    def _open(self, path: Path | StoredImage, record: str, sharing: int) -> Image.Image:
        image = Image.open(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))
        width, height = image.size
        if max(width * height, self.preparation.prepared_pixels(width, height, sharing)) > self._max_pixels:
            image.close()
            raise UserError(
                f"{path} (record {record}): image of {width}x{height} pixels is over the limit of "
                f"{self._max_pixels} pixels once prepared; shrink it or raise max_image_pixels"
            )
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as a direct conversion, without PIL's warning about transparent palettes.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


@contextlib.contextmanager
def _readable(path: Path | StoredImage, record: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one line that names the file and the record."""
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} (record {record}): image is far too large ({error}); shrink it") from error
    except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
        unknown = isinstance(error, UnidentifiedImageError)
        said = "unknown format" if unknown else reason(error)
        raise UserError(f"{path} (record {record}): not a readable image ({said}); replace the file") from error


def load_image_processor(
    folder: Path,
    *,
    aspect_ratio: str,
    max_pixels: int,
    cache_bytes: int,
    image_size: int | None = None,
    tiling: Mapping[str, Any] | None = None,
) -> ImageLoader:
    """Return the ImageLoader that an HF folder describes.

    Args:
      folder: a model or its vision tower. A family's config.json may say how images are cut; otherwise
        `preprocessor_config.json` is read, or the `image_processor` part of `processor_config.json` (transformers 5
        writes only that one).
      aspect_ratio: "pad" or "square", for models that do not cut images (see `WholeImage`).
      max_pixels: largest image.
      cache_bytes: what prepared images may take in memory.
      image_size: side of the images, for a family whose processor the hub's code holds instead of a file.
      tiling: fields of `Tiling` to use instead of the folder's, for models that cut images.

    Raises:
      UserError: nothing there describes a processor, its type is not known, or `tiling` is given for another model.
    """
    folder = Path(folder)
    changes = {name: value for name, value in (tiling or {}).items() if value is not None}
    preparation = _preparation(folder, aspect_ratio, image_size)
    if changes and not isinstance(preparation, Tiling):
        raise UserError(
            f"{folder}: data.{', data.'.join(changes)} given, but this model does not cut images into tiles"
        )
    if isinstance(preparation, Tiling):
        preparation = dataclasses.replace(preparation, **changes)
    return ImageLoader(preparation, max_pixels=max_pixels, cache_bytes=cache_bytes)


def _preparation(folder: Path, aspect_ratio: str, image_size: int | None) -> Preparation:
    model_path = folder / "config.json"
    model = read_json(model_path) if model_path.is_file() else {}
    family = find(model)
    if family is not None and family.tiling is not None:
        return Tiling(**vars(family.tiling(model, str(model_path))))
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        config = read_json(path) if path.is_file() else None
        config = config if key is None or config is None else config.get(key)
        if config is None:
            continue
        try:
            if _type_of(config) in _processors(cut=True):
                return tiling_from_processor(config, str(path))
            return WholeImage(config, where=str(path), aspect_ratio=aspect_ratio)
        except UserError:
            raise
        except Exception as error:  # processors raise ValueError, TypeError, AttributeError, ... for odd settings
            raise UserError(f"{path}: its image processor does not run ({reason(error)}); restore it") from error
    if image_size is not None and family is not None and family.pixels is not None:
        return WholeImage(family.pixels(image_size), where=str(model_path), aspect_ratio=aspect_ratio)
    raise UserError(f"{folder}: has no preprocessor_config.json; copy it from the model or its vision tower")


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


def _processors(*, cut: bool) -> dict[str, tuple[str, str]]:
    """image_processor_type (or the older feature_extractor_type) -> classes to try in order, of all families.

    Only NumPy/PIL ones: their values are the reference's, while the torchvision ones of transformers 5 differ in the
    last bits and need torch.
    """
    kinds = [kind for one in FAMILIES.values() if one.cuts_images == cut for kind in one.image_processors]
    suffixes = _SUFFIXES[:3] if cut else _SUFFIXES
    return {f"{k}{suffix}": (f"{k}ImageProcessorPil", f"{k}ImageProcessor") for k in kinds for suffix in suffixes}


def _make_processor(config: Mapping[str, Any], where: str) -> Any:
    import transformers

    name, classes = _type_of(config), _processors(cut=False)
    if name not in classes:
        known = ", ".join(sorted({*classes, *_processors(cut=True)}))
        raise UserError(f"{where}: image processor {name!r} is not supported; known: {known}")
    for class_name in classes[name]:
        try:
            processor_class = getattr(transformers, class_name)
        except (AttributeError, ImportError):  # transformers 4 has no *Pil name: its plain name is the NumPy one
            continue
        return processor_class.from_dict(dict(config))
    raise UserError(f"transformers {transformers.__version__} has no image processor {classes[name]}; use >= 4.57")


def _type_of(config: Mapping[str, Any]) -> Any:
    return config.get("image_processor_type") or config.get("feature_extractor_type")
