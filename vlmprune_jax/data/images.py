"""Image files to pixel arrays: guarded decoding, LLaVA's square padding, the folder's `transformers` processor."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmprune_jax.errors import UserError

ASPECT_RATIOS = ("pad", "square")
# image_processor_type (or the older feature_extractor_type) -> classes to try in order. Only NumPy/PIL ones: their
# values are the reference's, while the torchvision ones of transformers 5 differ in the last bits and need torch.
_PROCESSORS = {
    **dict.fromkeys(
        ("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
        ("CLIPImageProcessorPil", "CLIPImageProcessor"),
    )
}


class ImageLoader:
    """Reads and processes image files; results stay in a bounded LRU cache, because many records share an image.

    `aspect_ratio` is LLaVA's `image_aspect_ratio`: "pad" centres the image on a square of the colour int(255 * mean),
    "square" gives it to the processor as it is. `max_pixels` bounds the file's size and the size after padding or
    resizing. Safe to call from several threads.
    """

    def __init__(
        self, config: Mapping[str, Any], *, where: str, aspect_ratio: str, max_pixels: int, cache_bytes: int
    ) -> None:
        if aspect_ratio not in ASPECT_RATIOS:
            raise UserError(f"image_aspect_ratio {aspect_ratio!r} is unknown; use one of {', '.join(ASPECT_RATIOS)}")
        self._processor = _make_processor(config, where)
        self._pad = aspect_ratio == "pad"
        self._background = tuple(int(255 * mean) for mean in self._processor.image_mean)
        self._max_pixels = max_pixels
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self.shape: tuple[int, ...] = self._process(Image.new("RGB", (8, 8))).shape

    def load(self, path: Path, record: str) -> np.ndarray:
        """Return read-only float32[3, height, width]. Raises UserError naming the file and the record."""
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        pixels = self._process(self._pad_to_square(self._decode(path, record)))
        pixels.flags.writeable = False
        with self._lock:
            if path not in self._cache:
                self._cache[path] = pixels
                self._cached_bytes += pixels.nbytes
            while self._cached_bytes > self._cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def _decode(self, path: Path, record: str) -> Image.Image:
        try:
            with Image.open(path) as image:
                width, height = image.size
                if max(width * height, self._prepared_pixels(width, height)) > self._max_pixels:
                    raise UserError(
                        f"{path} (record {record}): image of {width}x{height} pixels is over the limit of "
                        f"{self._max_pixels} pixels once prepared; shrink it or raise max_image_pixels"
                    )
                if image.mode == "P" and "transparency" in image.info:
                    # The same colours as a direct conversion, without PIL's warning about transparent palettes.
                    return image.convert("RGBA").convert("RGB")
                return image.convert("RGB")
        except UserError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"{path} (record {record}): image is far too large ({error}); shrink it") from error
        except Exception as error:  # PIL decoders raise OSError, ValueError, SyntaxError, struct.error, ... by format
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "unknown format" if unknown else " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{path} (record {record}): not a readable image ({reason}); replace the file") from error

    def _prepared_pixels(self, width: int, height: int) -> int:
        """Return the pixels after padding, or after the short side is resized: thin images grow enormously there."""
        if self._pad:
            return max(width, height) ** 2
        return min(self.shape[1:]) ** 2 * max(width, height) // min(width, height)

    def _pad_to_square(self, image: Image.Image) -> Image.Image:
        """Centre on a square, offset rounded down (reference: LLaVA mm_utils.py `expand2square`)."""
        width, height = image.size
        if not self._pad or width == height:
            return image
        side = max(width, height)
        square = Image.new("RGB", (side, side), self._background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square

    def _process(self, image: Image.Image) -> np.ndarray:
        pixels = self._processor(image, return_tensors="np")["pixel_values"][0]
        return np.array(pixels, np.float32, order="C")


def load_image_processor(folder: Path, *, aspect_ratio: str, max_pixels: int, cache_bytes: int) -> ImageLoader:
    """Return the ImageLoader that an HF folder describes.

    Reads `preprocessor_config.json`, or the `image_processor` part of `processor_config.json` (transformers 5 writes
    only that one). Raises UserError where neither is there or the processor type is not known.
    """
    folder = Path(folder)
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); restore it from the model's source") from error
        config = config if key is None else config.get(key)
        if config is not None:
            return ImageLoader(
                config, where=str(path), aspect_ratio=aspect_ratio, max_pixels=max_pixels, cache_bytes=cache_bytes
            )
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


def _make_processor(config: Mapping[str, Any], where: str) -> Any:
    import transformers

    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if name not in _PROCESSORS:
        raise UserError(f"{where}: image processor {name!r} is not supported; known: {', '.join(sorted(_PROCESSORS))}")
    for class_name in _PROCESSORS[name]:
        try:
            processor_class = getattr(transformers, class_name)
        except (AttributeError, ImportError):  # transformers 4 has no *Pil name: its plain name is the NumPy one
            continue
        return processor_class.from_dict(dict(config))
    raise UserError(f"transformers {transformers.__version__} has no image processor {_PROCESSORS[name]}; use >= 4.57")
