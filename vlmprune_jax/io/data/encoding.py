"""Encoding of records as rows of a batch (token ids, labels) and packed rows of images, and the sizes of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.media import AXES, Packed, is_visual, mrope_positions
from vlmprune_jax.io.data.cached_arrays import FeatureLoader
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.prompts import count_tokens, render_record, tokenize_prompt, tokenize_training
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families.templates import Template
from vlmprune_jax.io.families.tiles import ImageShape

_CHANGED = "image files have changed since this command started: run it again"
_CHUNK = 4096  # records whose texts are tokenised in one call, which spreads them over all cores


class Shape(NamedTuple):
    """Padded shape of a batch, per record: tokens, images or tiles, and image tokens (0 if all images have one size).

    A packed row with the images of n records has room for n times as many images.
    """

    tokens: int
    slots: int
    image_tokens: int = 0


@dataclass(frozen=True)
class Encoder:
    """Converter of records to arrays: token ids, labels, images and videos.

    Every image or tile has `tokens_per_image` positions with the id `image_token_id`; frames have `video_token_id`, if
    the model has this token. `tokens_per_second`: see `ModelConfig`. A record has at most `max_images` images and
    videos. `image_loader` is None without a vision tower; it may read cached features.

    Length: rows have `max_length` tokens. With `truncate`, longer training rows are truncated at the right, as in the
    reference; otherwise they are refused. Without truncation, rows over `longest` tokens (`ModelConfig.longest_row`;
    0 = no limit) are refused. `words` is the size of the model's vocabulary; larger ids are refused (0 = no limit).

    Buckets (ascending) limit the number of compiled programs: a batch has the smallest bucket that holds all its rows;
    for records with videos, the largest bucket is doubled as needed. `tile_buckets`: tiles per record (None: always
    `max_images`). `image_buckets`: image tokens per record for images of varying size (else None). Both are averages
    over a packed row. `length_buckets`: sequence lengths of measured training batches (None: always `max_length`).
    """

    tokenizer: Any
    template: Template
    max_length: int
    image_loader: ImageLoader | FeatureLoader | None
    image_token_id: int
    tokens_per_image: int
    max_images: int
    truncate: bool
    tile_buckets: tuple[int, ...] | None = None
    length_buckets: tuple[int, ...] | None = None
    image_buckets: tuple[int, ...] | None = None
    longest: int = 0
    words: int = 0
    video_token_id: int | None = None
    tokens_per_second: float = 0.0

    def training_row(self, record: Record, length: int | None = None) -> dict[str, np.ndarray]:
        """Return one record's training arrays except its images, padded at the right to `length` tokens.

        Raises UserError, with the record's id, if the record cannot be used.
        """
        ids, labels = self.training_tokens(record)
        row = self.padding_row(self.max_length if length is None else length)
        for name, values in (("input_ids", ids), ("attention_mask", 1), ("labels", labels)):
            row[name][: len(ids)] = values
        if self.image_loader is not None and self.image_loader.preparation.turns:
            shapes = self.shapes(record)
            row["position_ids"] = mrope_positions(
                row["input_ids"][None],
                row["attention_mask"][None],
                np.array([grid for shape in shapes for grid in shape.grids]).reshape(1, -1, AXES),
                np.array([[shape.interval for shape in shapes]], np.float32),
                tokens=self.visual_tokens,
                merge=self.image_loader.preparation.merge,
                tokens_per_second=self.tokens_per_second,
            )[0][0]
        return row

    def padding_row(self, length: int) -> dict[str, np.ndarray]:
        """Return the arrays of a row of padding only, used to fill up a batch."""
        # any id of the vocabulary will do, since padding is masked
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        row = {
            "input_ids": np.full(length, pad, np.int32),
            "attention_mask": np.zeros(length, np.int32),
            "labels": np.full(length, IGNORED, np.int32),
        }
        if self.image_loader is not None and self.image_loader.preparation.turns:
            row["position_ids"] = np.zeros((AXES, length), np.int32)
        return row

    def prompt_ids(self, record: Record) -> np.ndarray:
        """Return the token ids int32[tokens] of a record's prompt, with image placeholders expanded."""
        ids = tokenize_prompt(record, self.tokenizer, self.template, **self._placeholders(record))
        self._check_ids(ids, record, self.longest)
        return ids

    def images(self, record: Record, *, read: bool = True) -> list[tuple[np.ndarray, ImageShape]]:
        """Return pixels [tiles or patches, ...] (or features) and shape of each image and video of a record.

        If `read` is False, pixels are zeros, for rows whose images another process computes.
        """
        loader, images = self.image_loader, list[tuple[np.ndarray, ImageShape]]()
        if loader is None or not record.visuals:
            return images
        for path, image in zip(record.visuals, self.shapes(record), strict=True):
            zeros = np.broadcast_to(
                np.zeros((), loader.dtype), (_room(loader, image.slots, image.tokens), *loader.shape)
            )
            pixels = loader.load(path, record.id, len(record.images)) if read else zeros
            if len(pixels) != len(zeros):
                raise UserError(f"record {record.id}: {_CHANGED}")
            images.append((pixels, image))
        return images

    def packed(
        self, rows: Sequence[Sequence[tuple[np.ndarray, ImageShape]]], shape: Shape, packs: int
    ) -> dict[str, Packed]:
        """Return the images of a batch, given the images of every row, as `packs` packed rows.

        Each packed row has the images or tiles (or their patches) of equally many neighbouring rows in order, then
        zeros. The result is {} for models without images.
        """
        size, shapes = len(rows) // packs, self.packed_shapes(shape, len(rows), packs)
        media: dict[str, Packed] = jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), shapes)
        for packed in media.values():
            for pack in range(packs):
                images = [image for row in rows[pack * size : (pack + 1) * size] for image in row]
                count = sum(len(pixels) for pixels, _ in images)
                if count > packed.values.shape[1]:
                    raise UserError(f"a batch of records: {_CHANGED}")
                if images:
                    np.concatenate([pixels for pixels, _ in images], out=packed.values[pack, :count])
                if packed.grid is not None:
                    grids = [grid for _, image in images for grid in image.grids]
                    packed.grid[pack, : len(grids)] = np.reshape(grids, (-1, AXES))
                if packed.times is not None:
                    packed.times[pack, : len(images)] = [image.interval for _, image in images]
        return media

    def packed_shapes(self, shape: Shape, rows: int, packs: int) -> dict[str, Packed]:
        """Return shapes and dtypes of a batch's images in `packs` packed rows, each of `rows // packs` rows."""
        loader, each = self.image_loader, rows // packs
        if loader is None:
            return {}
        slots, tokens = shape.slots * each, shape.image_tokens * each
        values = jax.ShapeDtypeStruct((packs, _room(loader, slots, tokens), *loader.shape), loader.dtype)
        grid = jax.ShapeDtypeStruct((packs, slots, AXES), np.int32) if loader.preparation.merge else None
        times = jax.ShapeDtypeStruct((packs, slots), np.float32) if self.tokens_per_second else None
        return {"vision": Packed(values, grid, times=times)}

    def shapes(self, record: Record) -> list[ImageShape]:
        """Return grid and number of tiles of each image of a record; raise UserError (with its id) if unusable."""
        if record.problem is not None:
            raise UserError(record.problem)
        visuals = record.visuals
        if not visuals:
            return []
        if self.image_loader is None:
            raise UserError(f"record {record.id}: has an image but the model has no vision tower: drop the record")
        if len(visuals) > self.max_images:
            what = "images and videos" if record.videos else "images"
            raise UserError(
                f"record {record.id}: has {len(visuals)} {what}, more than data.max_images={self.max_images}: raise it"
            )
        return self.image_loader.shapes(visuals, record.id)

    def shape_of(self, records: Sequence[Record | None], packs: int | None = None) -> Shape:
        """Return the padded shape of a batch of these records, with sequences of `max_length` tokens.

        `records`: None is a row of padding. `packs`: see `shape`. Raises UserError naming a record above all buckets.
        """
        sizes = np.zeros((len(records), 3), np.int32)
        for row, record in zip(sizes, records, strict=True):
            row[1:] = (0, 0) if record is None else self.image_sizes(record, self.shapes(record))
        return self.shape(sizes, packs)._replace(tokens=self.max_length)

    def shape(self, sizes: np.ndarray, packs: int | None = None) -> Shape:
        """Return the padded shape of a training batch, given its records' sizes int[rows, 3] (see `measure`).

        `packs`: number of packed rows that hold the batch's images (None: one for each row).
        """
        tokens, each = sizes[:, 0].max(initial=0), max(len(sizes) // (packs or max(len(sizes), 1)), 1)
        slots, images = (-(-sizes[:, 1:].reshape(-1, each, 2).sum(axis=1).max(axis=0, initial=0) // each)).tolist()
        return Shape(
            self.max_length if self.length_buckets is None else smallest(self.length_buckets, tokens),
            smallest(self.tile_buckets or (self.max_images,), slots),
            0 if self.image_buckets is None else smallest(self.image_buckets, images),
        )

    def count_shapes(self, sizes: np.ndarray) -> int:
        """Return an upper bound on the number of distinct batch shapes for training records with these sizes."""
        least, most = self.shape(sizes.min(0)[None]), self.shape(sizes)
        buckets = (self.length_buckets, self.tile_buckets, self.image_buckets)
        return math.prod(
            sum(low <= bucket <= high for bucket in _doubled(sizes_of_axis or (high,), high))
            for sizes_of_axis, low, high in zip(buckets, least, most, strict=True)
        )

    @property
    def images_decide(self) -> bool:
        """True if batches with equal sequence lengths may still differ in shape because of their images."""
        several = any(len(buckets or ()) > 1 for buckets in (self.tile_buckets, self.image_buckets))
        return self.image_loader is not None and (several or self.image_loader.videos is not None)

    @property
    def least_shape(self) -> Shape:
        """Smallest padded shape that a batch can have."""
        return self.shape(np.zeros((0, 3), np.int32))

    def image_sizes(self, record: Record, images: Sequence[ImageShape]) -> tuple[int, int]:
        """Return a record's numbers of images or tiles, and of image tokens (0 if all images have one size).

        Raises UserError naming the record if they are above all buckets; for records with videos, buckets are doubled.
        """
        slots, tokens = sum(image.slots for image in images), sum(image.tokens for image in images)
        for needed, buckets, name, limit in (
            (slots, self.tile_buckets, "tile", "max_tiles"),
            (tokens, self.image_buckets, "image", "max_image_tokens"),
        ):
            if buckets is not None and needed > buckets[-1] and not record.videos:
                raise UserError(
                    f"record {record.id}: needs {needed} image {limit.split('_')[-1]}, more than the largest bucket "
                    f"({buckets[-1]}): raise data.{name}_buckets or lower data.{limit}"
                )
        return slots, tokens

    def training_tokens(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of a training record, cut at `max_length` tokens (0 = no limit)."""
        limit = self.max_length or None
        cut = limit if self.truncate else None
        ids, labels = tokenize_training(
            record, self.tokenizer, self.template, cut_text_at=cut, **self._placeholders(record)
        )
        self._check_ids(ids, record, 0 if limit else self.longest)
        if limit is not None and len(ids) > limit:
            if not self.truncate:
                check_length(len(ids), record, limit)
            visual, closed = is_visual(ids, self.visual_tokens), self.template.image_tokens is not None
            # an image would be cut, or split from its end token
            if record.visuals and (visual[limit:].any() or (closed and visual[limit - 1])):
                last = int(np.flatnonzero(visual)[-1])
                what = "an image or video" if record.videos else "an image"
                raise UserError(
                    f"record {record.id}: {what} ends at token {last + 1}, beyond the maximum length "
                    f"{limit}: raise data.max_length, or shrink the images"
                )
        return ids[:limit], labels[:limit]

    def _placeholders(self, record: Record) -> dict[str, Any]:
        sizes = {"image_token_id": self.image_token_id, "tokens_per_image": self.tokens_per_image}
        return {**sizes, "images": self.shapes(record)}

    def problem(self, record: Record) -> str | None:
        """Return why a record cannot be used for training, as text; None if it can."""
        try:
            self.training_tokens(record)
            self.image_sizes(record, self.shapes(record))
            self.images(record)
        except UserError as error:
            return str(error)
        return None

    def _check_ids(self, ids: np.ndarray, record: Record, longest: int) -> None:
        if self.words and (ids[ids != self.image_token_id] >= self.words).any():
            raise UserError(
                f"record {record.id}: token id {ids.max()} is outside the model's vocabulary of {self.words}: use the "
                "model's own tokenizer"
            )
        if 0 < longest < len(ids):
            raise UserError(
                f"record {record.id}: has {len(ids)} tokens with its images, more than the model's maximum of "
                f"{longest}: drop the record, or set data.max_length to truncate it in training"
            )

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Token ids that stand for image and video features in a prompt."""
        return (self.image_token_id,) if self.video_token_id is None else (self.image_token_id, self.video_token_id)


def _room(loader: ImageLoader | FeatureLoader, slots: int, image_tokens: int) -> int:
    """Return the number of tiles, patches or feature vectors of images that have so many tiles or tokens."""
    return image_tokens * loader.per_token if loader.per_token else slots


def _doubled(buckets: Sequence[int], needed: int) -> list[int]:
    more = [*buckets]
    while more[-1] < needed:
        more.append(2 * more[-1])
    return more


def smallest(buckets: Sequence[int], needed: int) -> int:
    """Return the smallest bucket that holds `needed`, doubling the last one if necessary."""
    return next(bucket for bucket in _doubled(buckets, needed) if bucket >= needed)


def check_length(length: int, record: Record, limit: int, setting: str = "data.max_length") -> None:
    """Raise UserError naming the record and the setting if the record has more than `limit` tokens."""
    if length > limit:
        raise UserError(
            f"record {record.id}: has {length} tokens with its images, more than the maximum length {limit}: raise "
            f"{setting}, or drop the record"
        )


def measure(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    on_error: str,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return int32[records, 3]: tokens, image tiles, and image tokens of each training record.

    Tokens are at most `encoder.max_length` (0 = no limit); image tokens are 0 if images have one size. With `on_error`
    "skip" an unusable record has zeros; with "stop" it raises UserError naming the record. Images are not decoded;
    `threads` threads read the headers of images with tiles. `progress` is called with the number of records done.
    """

    def attempt(compute: Callable[[Record], Any], record: Record) -> Any:
        try:
            return compute(record)
        except UserError:
            if on_error == "stop":
                raise
            return None

    def parts(record: Record) -> tuple[tuple[int, int], list[ImageShape], list[str]]:
        images = encoder.shapes(record)
        return encoder.image_sizes(record, images), images, render_record(record, encoder.template, images).pieces

    sizes = np.zeros((len(records), 3), np.int32)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(records), _CHUNK):
            chunk = records[start : start + _CHUNK]
            parsed = list(pool.map(lambda record: attempt(parts, record), chunk))
            text_tokens = iter(
                count_tokens([pieces for *_, pieces in filter(None, parsed)], encoder.tokenizer).tolist()
            )
            for place, (record, part) in enumerate(zip(chunk, parsed, strict=True), start):
                if part is None:
                    continue
                of_images, images, _ = part
                tokens = next(text_tokens) + sum(image.positions(encoder.tokens_per_image) for image in images)
                if encoder.template.image_tokens is not None:  # are tokens of the text already
                    tokens -= sum(map(encoder.template.context_tokens, images))
                if 0 < (encoder.max_length or encoder.longest) < tokens:
                    cut = attempt(encoder.training_tokens, record)
                    tokens = 0 if cut is None else len(cut[0])
                if tokens:
                    sizes[place] = tokens, *of_images
            if progress is not None:
                progress(start + len(chunk))
    return sizes
