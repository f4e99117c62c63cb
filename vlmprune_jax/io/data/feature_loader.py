"""Features of a frozen vision tower, read from a cache in place of pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.media import image_key
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.data.records import Record, VideoSource, Visual
from vlmprune_jax.io.data.video.reader import VideoReader
from vlmprune_jax.io.families.tiles import ImageShape, VideoShape


class Picture(NamedTuple):
    """One image of a record, or one temporal patch of a video; `place` is its index among the record's visuals."""

    record: Record
    place: int
    patch: int = 0

    @property
    def image(self) -> Visual:
        """Image file, image stored inside a data set, or video."""
        return self.record.visuals[self.place]


class FeatureLoader:
    """Loader of cached vision features, used in place of an `ImageLoader` of pixels.

    Features are [tiles, tokens, features], or [tokens, features] for images of varying size (cached as one tile). The
    key of an image is its `image_key`, with the number of images in its record if its tiles depend on this number.
    Videos are cached by temporal patch (a frame, or frames that share a patch), so that different samples of a video
    share patches. Images that could not be read when the features were computed have no tiles in the cache.

    Args:
      images: loader of the pixels of the same images.
      cache: cache of the features.
      shape: (tokens, features) of one tile, or (features,) for images of varying size.
      dtype: dtype of the features.
    """

    def __init__(self, images: ImageLoader, cache: ArrayCache, shape: tuple[int, ...], dtype: np.dtype):
        self.images, self.cache, self.shape, self.dtype = images, cache, shape, dtype

    @property
    def preparation(self) -> Preparation:
        """Image preparation (resizing, tiling) that was used when the features were computed."""
        return self.images.preparation

    def room(self, slots: int, image_tokens: int) -> int:
        """Return the number of tiles or tokens whose features a packed row holds, see `ImageLoader.room`."""
        return image_tokens if self.preparation.merge else slots

    @property
    def videos(self) -> VideoReader | None:
        """Loader of the frames of videos; None if the model takes images only."""
        return self.images.videos

    def shapes(self, paths: Sequence[Visual], record: str) -> list[ImageShape]:
        """Return the tile or patch grid of each image or video of a record."""
        return self.images.shapes(paths, record)

    def load(self, path: Visual, record: str, sharing: int = 1) -> np.ndarray:
        """Return the cached features of an image or video; raise UserError naming the file and the record."""
        return np.concatenate([self._cached(key, path, record, sharing) for key in self.keys(path, record, sharing)])

    def _cached(self, key: str, path: Visual, record: str, sharing: int) -> np.ndarray:
        features = self.cache[key]
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

    def keys(self, path: Visual, record: str, sharing: int) -> list[str]:
        """Return the keys under which the features of an image, or of a video's temporal patches, are cached."""
        if isinstance(path, VideoSource):
            return [] if self.videos is None else self.videos.keys(path, record)
        name = image_key(path)
        return [f"{name}:1/{sharing}" if self.preparation.shares else name]

    def missing(self, records: Iterable[Record]) -> dict[str, Picture]:
        """Return the images of these records whose features are not cached, without duplicates and in order."""
        pictures: dict[str, Picture] = {}
        for record in records:
            for place, image in enumerate(record.visuals):
                for patch, key in enumerate(self.keys(image, record.id, len(record.images))):
                    pictures.setdefault(key, Picture(record, place, patch))
        return {key: pictures[key] for key in self.cache.missing(pictures)}

    def pixels(self, picture: Picture) -> np.ndarray:
        """Load a picture's pixels, as `ImageLoader.load` does; raise UserError naming the file and the record."""
        pixels = self.images.load(picture.image, picture.record.id, len(picture.record.images))
        if not isinstance(picture.image, VideoSource):
            return pixels
        patches = len(self.keys(picture.image, picture.record.id, 1))
        return pixels.reshape(patches, -1, *pixels.shape[1:])[picture.patch]

    def shape_of(self, picture: Picture) -> ImageShape:
        """Return the tile or patch grid of one picture; raise UserError naming the file and the record."""
        shape = self.images.shapes(picture.record.visuals, picture.record.id)[picture.place]
        return shape.patch_shape if isinstance(shape, VideoShape) else shape

    def count(self, picture: Picture) -> int:
        """Return the number of tiles or tokens of one image; raise UserError naming the file and the record."""
        return self.shape_of(picture).positions(1)
