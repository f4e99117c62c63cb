"""Features of a frozen vision tower, read from a cache in place of pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.images import GRIDS, ImageLoader
from vlmprune_jax.data.media import StoredImage, image_key
from vlmprune_jax.data.preparation import Preparation
from vlmprune_jax.data.records import Record
from vlmprune_jax.families.tiles import ImageShape


class Picture(NamedTuple):
    """One image of a record; `place` is its index among the record's images."""

    record: Record
    place: int

    @property
    def image(self) -> Path | StoredImage:
        """Path of the image file, or the image stored inside a data set."""
        return self.record.images[self.place]


class FeatureLoader:
    """Loader of cached vision features, used in place of an `ImageLoader` of pixels.

    Features are [tiles, tokens, features], or [tokens, features] of an image of any size (cached as one tile). The key
    of an image is its `image_key`, with the number of images in its record if its tiles depend on that. Images that
    could not be read when the features were computed have no tiles in the cache.

    Args:
      images: loader of the pixels of the same images.
      cache: cache of the features.
      shape: (tokens, features) of one tile, or (features,) for images of any size.
      dtype: dtype of the features.
    """

    array = "vision_features"

    def __init__(self, images: ImageLoader, cache: ArrayCache, shape: tuple[int, ...], dtype: np.dtype):
        self.images, self.cache, self.shape, self.dtype = images, cache, shape, dtype

    @property
    def preparation(self) -> Preparation:
        """Image preparation (resizing, tiling) that was used when the features were computed."""
        return self.images.preparation

    def arrays(self, slots: int, image_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return {name: (shape, dtype)} of a record's image arrays; see `ImageLoader.arrays`."""
        if not self.preparation.merge:
            return {self.array: ((slots, *self.shape), self.dtype)}
        return {self.array: ((image_tokens, *self.shape), self.dtype), GRIDS: ((slots, 3), np.dtype(np.int32))}

    def shapes(self, paths: Sequence[Path | StoredImage], record: str) -> list[ImageShape]:
        """Return the tile or patch grid of each image of a record; see `ImageLoader.shapes`."""
        return self.images.shapes(paths, record)

    def load(self, path: Path | StoredImage, record: str, sharing: int = 1) -> np.ndarray:
        """Return the cached features of an image; raise UserError naming the file and the record."""
        features = self.cache[self.key(path, sharing)]
        open_axes = ("tiles", "tokens") if self.preparation.merge else ("tiles",)
        sizes = features.shape[len(open_axes) :]
        if (sizes, features.dtype) != (self.shape, self.dtype):
            raise UserError(
                f"{path} (record {record}): the cache {self.cache.folder} has {features.dtype}{list(features.shape)}, "
                f"expected {self.dtype}[{', '.join(map(str, (*open_axes, *self.shape)))}]: remove that folder"
            )
        if len(features):
            return features[0] if self.preparation.merge else features
        self.images.load(path, record, sharing)  # normally raises the error that occurred when features were computed
        raise UserError(
            f"{path} (record {record}): could not be read when its features were cached, but is readable now: "
            f"remove {self.cache.folder}"
        )

    def key(self, path: Path | StoredImage, sharing: int) -> str:
        """Return the key under which an image's features are cached."""
        name = image_key(path)
        return f"{name}:1/{sharing}" if self.preparation.shares else name

    def missing(self, records: Iterable[Record]) -> dict[str, Picture]:
        """Return the images of these records whose features are not cached, without duplicates and in order."""
        pictures: dict[str, Picture] = {}
        for record in records:
            for place, image in enumerate(record.images):
                pictures.setdefault(self.key(image, len(record.images)), Picture(record, place))
        return {key: pictures[key] for key in self.cache.missing(pictures)}

    def pixels(self, picture: Picture) -> np.ndarray:
        """Load an image's pixels, as `ImageLoader.load` does; raise UserError naming the file and the record."""
        return self.images.load(picture.image, picture.record.id, len(picture.record.images))

    def shape_of(self, picture: Picture) -> ImageShape:
        """Return the tile or patch grid of one image; raise UserError naming the file and the record."""
        return self.images.shapes(picture.record.images, picture.record.id)[picture.place]

    def count(self, picture: Picture) -> int:
        """Return the number of tiles or tokens of one image; raise UserError naming the file and the record."""
        return self.shape_of(picture).positions(1)
