"""One record as one row of a batch: token ids, labels and image slots, in a fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.config import IGNORED, ImageShape
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.data.images import ImageLoader, augment_flip_shift
from vlmprune_jax.data.prompts import tokenize_prompt, tokenize_training
from vlmprune_jax.data.records import Record
from vlmprune_jax.errors import UserError
from vlmprune_jax.families.templates import Template


class Shape(NamedTuple):
    """What the rows of a batch are padded to."""

    tokens: int
    slots: int


@dataclass(frozen=True)
class Encoder:
    """How one record becomes one row of tokens, at most `max_length`, and of image slots.

    Every image, or every tile of one, takes `tokens_per_image` positions that hold `image_token_id`, and one slot.
    `image_loader` is None for a model without a vision tower; it may read cached features instead of images. `truncate`
    cuts longer training rows at the right, as the reference does; without it they are refused. A record has at most
    `max_images` images. With `tile_buckets` (ascending) a batch has as many slots as the smallest of them that holds
    each of its rows, so that there are as many compiled programs as buckets; None = always `max_images` slots.
    `length_buckets` (ascending, up to `max_length`) are the same for the tokens of measured training batches; None =
    always `max_length`. `longest`: rows of more tokens are refused where nothing cuts them
    (`ModelConfig.longest_row`; 0 = any). `words`: of the model's vocabulary, beyond which ids are refused (0 = any).
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
    longest: int = 0
    words: int = 0

    def training_row(
        self, record: Record, augment_seed: tuple[int, ...] | None, shape: Shape | None = None
    ) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a Batch, padded at the right. Raises UserError naming the record."""
        ids, labels = self.training_tokens(record)
        row = self._empty_row(Shape(self.max_length, self.slots([record])) if shape is None else shape)
        row["input_ids"][: len(ids)] = ids
        row["attention_mask"][: len(ids)] = 1
        row["labels"][: len(ids)] = labels
        self._fill_images(row, record, augment_seed)
        return row

    def generation_row(self, record: Record, slots: int | None = None) -> dict[str, np.ndarray]:
        """Return the unbatched arrays of a GenerationBatch, padded at the left. Raises UserError naming the record."""
        ids = self.prompt_ids(record)
        check_length(len(ids), record, self.max_length)
        row = self._empty_row(Shape(self.max_length, self.slots([record]) if slots is None else slots))
        del row["labels"]
        row["input_ids"][self.max_length - len(ids) :] = ids
        row["attention_mask"][self.max_length - len(ids) :] = 1
        self._fill_images(row, record, None)
        return row

    def padding_row(self, shape: Shape) -> dict[str, np.ndarray]:
        """Return a row that counts nowhere."""
        return self._empty_row(shape)

    def prompt_ids(self, record: Record) -> np.ndarray:
        """Return int32[tokens] of the prompt, images expanded. Raises UserError naming the record."""
        ids = tokenize_prompt(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            images=self.shapes(record),
        )
        self._check_ids(ids, record)
        self._check_longest(ids, record)
        return ids

    def images(self, record: Record, slots: int) -> np.ndarray:
        """Return float32[slots, 3, height, width]: the record's images or tiles in order, then zeros."""
        row = self._empty_row(Shape(0, slots))
        self._fill_images(row, record, None)
        return row["pixel_values"]

    def shapes(self, record: Record) -> list[ImageShape]:
        """Return what each image of a record becomes; none for text. Raises UserError naming the record."""
        if record.problem is not None:
            raise UserError(record.problem)
        if not record.images:
            return []
        if self.image_loader is None:
            raise UserError(f"record {record.id}: has an image but the model has no vision tower; drop it")
        if len(record.images) > self.max_images:
            raise UserError(
                f"record {record.id}: {len(record.images)} images, over max_images {self.max_images}; raise max_images"
            )
        return self.image_loader.shapes(record.images, record.id)

    def slots(self, records: Sequence[Record]) -> int:
        """Return the image slots of a batch of these records. Raises UserError naming a record with too many tiles."""
        if self.tile_buckets is None or self.image_loader is None:
            return self.max_images
        most = self.tile_buckets[0]
        for record in records:
            needed = slots_of(self.shapes(record))
            if needed > self.tile_buckets[-1]:
                raise UserError(
                    f"record {record.id}: its images make {needed} tiles, over the largest bucket of "
                    f"{self.tile_buckets[-1]}; raise data.tile_buckets or lower data.max_tiles"
                )
            most = max(most, _smallest(self.tile_buckets, needed))
        return most

    def shape(self, sizes: np.ndarray) -> Shape:
        """Return the shape of a training batch of records with these sizes, int[rows, 2] (see `measure.measure`)."""
        tokens, slots = sizes.max(0, initial=0).tolist()
        return Shape(
            self.max_length if self.length_buckets is None else _smallest(self.length_buckets, tokens),
            self.max_images if self.tile_buckets is None else _smallest(self.tile_buckets, slots),
        )

    def image_positions(self, images: Sequence[ImageShape]) -> int:
        """Return the tokens that images of these shapes add to those of the text with its marks."""
        marks = 0 if self.template.image_tokens is None else sum(map(self.template.marks, images))
        return self.tokens_per_image * slots_of(images) - marks

    def training_tokens(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, labels) of at most `max_length` (0 = any). Raises UserError naming the record."""
        limit = self.max_length or None
        ids, labels = tokenize_training(
            record,
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            tokens_per_image=self.tokens_per_image,
            cut_text_at=limit if self.truncate else None,
            images=self.shapes(record),
        )
        self._check_ids(ids, record)
        if limit is None:
            self._check_longest(ids, record)
        elif len(ids) > limit:
            if not self.truncate:
                check_length(len(ids), record, limit)
            if record.images and self._cuts_image(ids):
                raise UserError(f"record {record.id}: an image lies beyond max_length {limit}; raise it")
        return ids[:limit], labels[:limit]

    def problem(self, record: Record) -> str | None:
        """Return why a record cannot be a training row, None where it can."""
        try:
            self.training_tokens(record)
            self.slots([record])  # refuses what no bucket holds
            self._fill_images(self._empty_row(Shape(0, slots_of(self.shapes(record)))), record, None)
        except UserError as error:
            return str(error)
        return None

    def _check_ids(self, ids: np.ndarray, record: Record) -> None:
        if self.words and (ids[ids != self.image_token_id] >= self.words).any():
            raise UserError(
                f"record {record.id}: the tokenizer gives id {ids.max()}, but the vocabulary of the model has "
                f"{self.words} words: use the model's own tokenizer"
            )

    def _check_longest(self, ids: np.ndarray, record: Record) -> None:
        if 0 < self.longest < len(ids):
            raise UserError(
                f"record {record.id}: {len(ids)} tokens with its images, more than the {self.longest} that a row of "
                "this model may have; drop the record, or set data.max_length, which cuts it in training"
            )

    def _cuts_image(self, ids: np.ndarray) -> bool:
        """Whether `max_length` falls before the last position of an image, or before the mark that closes it."""
        last_is_image = bool(ids[self.max_length - 1] == self.image_token_id)
        closed = self.template.image_tokens is not None
        return bool(np.any(ids[self.max_length :] == self.image_token_id)) or (closed and last_is_image)

    def _empty_row(self, shape: Shape) -> dict[str, np.ndarray]:
        # Which id pads is immaterial under the mask, but it must be one the embedding has.
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        row = {
            "input_ids": np.full(shape.tokens, pad, np.int32),
            "attention_mask": np.zeros(shape.tokens, np.int32),
            "labels": np.full(shape.tokens, IGNORED, np.int32),
        }
        if self.image_loader is not None:
            loader = self.image_loader
            row[loader.array] = np.zeros((shape.slots, *loader.shape), loader.dtype)
        return row

    def _fill_images(self, row: dict[str, np.ndarray], record: Record, augment_seed: tuple[int, ...] | None) -> None:
        slot = 0
        for path in record.images:
            assert self.image_loader is not None  # the prompt was tokenised, which checks it
            for pixels in self.image_loader.load(path, record.id, len(record.images)):
                if slot == len(row[self.image_loader.array]):
                    raise UserError(f"record {record.id}: its images make more tiles than when they were counted")
                row[self.image_loader.array][slot] = (
                    pixels if augment_seed is None else augment_flip_shift(pixels, (*augment_seed, slot))
                )
                slot += 1


def slots_of(images: Sequence[ImageShape]) -> int:
    """Return the slots of a row with these images."""
    return sum(image.slots for image in images)


def _smallest(buckets: Sequence[int], needed: int) -> int:
    return next(bucket for bucket in buckets if bucket >= needed)


def check_length(length: int, record: Record, limit: int) -> None:
    """Raise UserError naming the record where its tokens exceed a limit."""
    if length > limit:
        raise UserError(
            f"record {record.id}: {length} tokens with its images, over max_length {limit}; "
            "raise max_length or drop the record"
        )
