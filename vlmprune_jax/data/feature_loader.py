"""Features of a frozen vision tower, read from a cache where a batch would hold pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmprune_jax.core.config import ImageShape
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.images import GRIDS, ImageLoader, Preparation
from vlmprune_jax.data.records import Record, StoredImage, image_key


class Picture(NamedTuple):
    """An image as a record has it: `place` among the record's images."""

    record: Record
    place: int

    @property
    def image(self) -> Path | StoredImage:
        """The image itself."""
        return self.record.images[self.place]


class FeatureLoader:
    """What an `ImageLoader` is to pixels: features [tiles, tokens, features] of images, which are not decoded.

    One of any size has one tile, of as many tokens as it makes. An image is known by its `image_key`, where tiles
    depend on them also by how many images its record has. One that could not be read when features were computed has no
    tiles in the cache.

    Args:
      images: loads the pixels of the same images.
      cache: holds the features.
      shape: (tokens, features) of one tile, or (features,) where images are of any size.
      dtype: of the features.
    """

    array = "vision_features"

    def __init__(self, images: ImageLoader, cache: ArrayCache, shape: tuple[int, ...], dtype: np.dtype):
        self.images, self.cache, self.shape, self.dtype = images, cache, shape, dtype

    @property
    def preparation(self) -> Preparation:
        """How images became arrays."""
        return self.images.preparation

    def arrays(self, slots: int, image_tokens: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """See `ImageLoader.arrays`."""
        if not self.preparation.merge:
            return {self.array: ((slots, *self.shape), self.dtype)}
        return {
            self.array: ((slots, image_tokens, *self.shape), self.dtype),
            GRIDS: ((slots, 3), np.dtype(np.int32)),
        }

    def shapes(self, paths: Sequence[Path | StoredImage], record: str) -> list[ImageShape]:
        """See `ImageLoader.shapes`."""
        return self.images.shapes(paths, record)

    def load(self, path: Path | StoredImage, record: str, sharing: int = 1) -> np.ndarray:
        """Return an image's features. Raises UserError naming the file and the record."""
        features = self.cache[self.key(path, sharing)]
        open_axes = ("tiles", "tokens") if self.preparation.merge else ("tiles",)
        sizes = features.shape[len(open_axes) :]
        if (sizes, features.dtype) != (self.shape, self.dtype):
            raise UserError(
                f"{path} (record {record}): {self.cache.folder} holds {features.dtype}{list(features.shape)} for it, "
                f"not {self.dtype}[{', '.join(map(str, (*open_axes, *self.shape)))}]: remove that folder"
            )
        if len(features):
            return features
        self.images.load(path, record, sharing)  # raises what it raised when the features were computed
        raise UserError(
            f"{path} (record {record}): could not be read when its features were cached, and now it can: "
            f"remove {self.cache.folder}"
        )

    def key(self, path: Path | StoredImage, sharing: int) -> str:
        """Return the name of an image's features."""
        name = image_key(path)
        return f"{name}:1/{sharing}" if self.preparation.shares else name

    def missing(self, records: Iterable[Record]) -> dict[str, Picture]:
        """Return the pictures of these records whose features are not there, each once, in order."""
        found = (Picture(record, place) for record in records for place in range(len(record.images)))
        pictures: dict[str, Picture] = {}
        for picture in found:
            pictures.setdefault(self.key(picture.image, len(picture.record.images)), picture)
        return {key: pictures[key] for key in self.cache.missing(pictures)}

    def pixels(self, picture: Picture) -> np.ndarray:
        """Return a picture's pixels as `ImageLoader.load` does. Raises UserError naming file and record."""
        return self.images.load(picture.image, picture.record.id, len(picture.record.images))

    def shape_of(self, picture: Picture) -> ImageShape:
        """Return what a picture becomes. Raises UserError naming file and record."""
        return self.images.shapes(picture.record.images, picture.record.id)[picture.place]

    def count(self, picture: Picture) -> int:
        """Return how many of `shape` a picture takes: tiles or tokens. Raises UserError naming file and record."""
        return self.shape_of(picture).positions(1)
