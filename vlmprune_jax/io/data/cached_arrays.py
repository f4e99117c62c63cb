"""Cached arrays of training records: features of a frozen vision tower, and the likeliest tokens of a teacher."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.media import image_key
from vlmprune_jax.io.data.records import Record, VideoSource, Visual

Row = dict[str, np.ndarray]
Tokenize = Callable[[Record], tuple[np.ndarray, np.ndarray]]  # record -> (ids, labels)


@dataclass(eq=False)
class FeatureLoader:
    """Loader of cached vision features, used in place of an `ImageLoader` of pixels.

    Features are [tiles, tokens, features], or [tokens, features] for images of varying size (cached as one tile). The
    key of an image is its `image_key`, with the number of images in its record if its tiles depend on this number.
    Videos are cached by temporal patch (a frame, or frames that share a patch), so that different samples of a video
    share patches. Images that could not be read when the features were computed have no tiles in the cache.
    """

    images: ImageLoader  # loader of the pixels of the same images
    cache: ArrayCache

    shape: tuple[int, ...]  # (tokens, features) of one tile, or (features,) for images of varying size
    dtype: np.dtype

    size_columns: ClassVar[slice] = slice(1, 3)  # tiles and image tokens (see `records_to_compute`)

    def __post_init__(self) -> None:
        self.preparation, self.videos, self.shapes = self.images.preparation, self.images.videos, self.images.shapes
        self.per_token = int(self.preparation.merge > 0)  # features of an image token; 0 if all images have one size

    def load(self, path: Visual, record: str, sharing: int = 1) -> np.ndarray:
        """Return the cached features of an image or video; raise UserError naming the file and the record."""
        return np.concatenate([self._cached(key, path, record, sharing) for key in self._keys(path, record, sharing)])

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

    def _keys(self, path: Visual, record: str, sharing: int) -> list[str]:
        if isinstance(path, VideoSource):
            return [] if self.videos is None else self.videos.keys(path, record)
        name = image_key(path)
        return [f"{name}:1/{sharing}" if self.preparation.shares else name]

    def keys(self, record: Record) -> list[str]:
        """Return the keys of the features of a record's images, and of the temporal patches of its videos."""
        sharing = len(record.images)
        return [key for visual in record.visuals for key in self._keys(visual, record.id, sharing)]

    def has(self, keys: Sequence[str]) -> bool:
        """Return True if a record's features, with these keys, are cached, or one of its images could not be read."""
        missing = self.cache.missing(keys)
        return not missing or any(not len(self.cache[key]) for key in keys if key not in missing)

    def positions(self, record: Record) -> int:
        """Return the number of tiles or tokens of a record's images."""
        return sum(image.positions(1) for image in self.shapes(record.visuals, record.id))

    def bytes_of(self, record: Record, tokenize: Tokenize) -> int:
        """Return the number of bytes that the cache needs for a record's features."""
        del tokenize
        return self.positions(record) * math.prod(self.shape) * self.dtype.itemsize

    def arrays(self, record: Record, features: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays to cache for one record, by their keys, from features that begin with its images'."""
        arrays, start = dict[str, np.ndarray](), 0
        for visual, image in zip(record.visuals, self.shapes(record.visuals, record.id), strict=True):
            keys, positions = self._keys(visual, record.id, len(record.images)), image.positions(1)
            parts = features[start : start + positions].reshape(len(keys), -1, *self.shape)
            arrays |= zip(keys, parts[:, None] if self.preparation.merge else parts, strict=True)
            start += positions
        return arrays

    def unreadable(self, record: Record) -> dict[str, np.ndarray]:
        """Return arrays without tiles for those of a record's images that cannot be read."""
        arrays = dict[str, np.ndarray]()
        nothing = np.empty((0, *[0] * (2 - len(self.shape)), *self.shape), self.dtype)
        for visual in record.visuals:
            try:
                self.images.load(visual, record.id, len(record.images))
            except UserError:
                with contextlib.suppress(UserError):  # a video without a readable header has no keys
                    arrays |= dict.fromkeys(self._keys(visual, record.id, len(record.images)), nothing)
        return arrays


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """Cache of a teacher's top-k log-probabilities per record, stored only at positions that contribute to the loss.

    The cache adds `teacher_ids` int32[tokens, k] and `teacher_logprobs` [tokens, k + 1] in `dtype` to a row (see
    `recovery.terms.top_k_logprobs`), with zeros at other positions. `positions` is "all" (real tokens) or "labels"
    (tokens before a label). Ids are below `vocab_size`.
    """

    cache: ArrayCache
    top_k: int
    positions: str
    dtype: np.dtype
    vocab_size: int

    size_columns: ClassVar[slice] = slice(1)  # tokens (see `records_to_compute`)

    def keys(self, record: Record) -> tuple[str, str]:
        """Return the keys of a record's token ids and log-probabilities."""
        key = record_key(record)
        return f"{key}.ids", f"{key}.logprobs"

    def has(self, keys: Sequence[str]) -> bool:
        """Return True if the teacher's outputs with these keys are cached."""
        return not self.cache.missing(keys)

    def arrays(self, record: Record, row: Row, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays to cache for one record, by their keys, from the teacher's outputs int, float[tokens, ...].

        Raises UserError if a log-probability is NaN.
        """
        counted = self._counted(row)
        ids, logprobs = ids[counted], logprobs[counted].astype(self.dtype)
        if np.isnan(logprobs).any():
            raise UserError(
                f"record {record.id}: the teacher's logits are not finite: check its weights, or compute in float32"
            )
        return dict(zip(self.keys(record), (ids.astype(_narrow(ids.max(initial=0))), logprobs), strict=True))

    def bytes_of(self, record: Record, tokenize: Tokenize) -> int:
        """Return the number of bytes that the cache needs for a record."""
        _, labels = tokenize(record)
        counted = self._counted({"attention_mask": np.ones_like(labels), "labels": labels}).sum()
        per_position = self.top_k * _narrow(self.vocab_size - 1).itemsize + (self.top_k + 1) * self.dtype.itemsize
        return int(counted) * per_position

    def fill(self, row: Row, record: Record | None) -> None:
        """Add the cached teacher outputs of a record to its batch arrays; a padding row (record None) gets zeros.

        Raises UserError if the record is not in the cache, or has changed.
        """
        tokens = len(row["labels"])
        row["teacher_ids"] = np.zeros((tokens, self.top_k), np.int32)
        row["teacher_logprobs"] = np.zeros((tokens, self.top_k + 1), self.dtype)
        if record is None:
            return
        counted, (ids, logprobs) = self._counted(row), (self.cache[key] for key in self.keys(record))
        problem = ""
        if ids.shape[1:] != (self.top_k,) or logprobs.shape != (len(ids), self.top_k + 1) or ids.dtype.kind not in "iu":
            problem = f"does not have the teacher's top {self.top_k} tokens"
        elif ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            found = f"token ids from {ids.min()} to {ids.max()}"
            problem = f"has {found}, but the vocabulary has 0 to {self.vocab_size - 1}"
        elif len(ids) != counted.sum():
            problem = f"has {len(ids)} positions, expected {counted.sum()}"
        if problem:
            raise UserError(
                f"record {record.id}: the cache {self.cache.folder} {problem}: remove that folder, or use another "
                "recover.teacher_cache"
            )
        row["teacher_ids"][counted], row["teacher_logprobs"][counted] = ids, logprobs

    def _counted(self, row: Row) -> np.ndarray:
        """Return bool[tokens], True at positions that contribute to the loss (position t predicts label t + 1)."""
        if self.positions == "all":
            return row["attention_mask"] == 1
        return np.append(row["labels"][1:] != IGNORED, False)


def _narrow(largest: int) -> np.dtype:
    return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.int32)


def record_key(record: Record) -> str:
    """Return a hash of a record's content (32 hex digits); ids are not unique in LLaVA's data mix."""
    visuals = list[Any]()
    for visual in record.visuals:
        if isinstance(visual, VideoSource):
            files = visual.source if isinstance(visual.source, tuple) else (visual.source,)
            visuals.append([*map(image_key, files), *(visual.part or ())])
        else:
            visuals.append(image_key(visual))
    return hashlib.sha256(json.dumps([record.id, record.turns, visuals]).encode()).hexdigest()[:32]
