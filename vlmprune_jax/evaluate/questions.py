"""Questions as batches of equal shapes in which an image that several questions share is encoded once.

Benchmarks ask many questions about few images (easy-VQA: 9,673 about 1,000), and the image is most of a prompt (64 of
about 80 positions there, 576 in LLaVA-1.5), so computing what precedes the question once saves most of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from vlmprune_jax.data.batching import Encoder, GenerationBatch
from vlmprune_jax.data.prompts import tokenize_prompt
from vlmprune_jax.data.records import Record
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.generate import SharedPrefix


@dataclass(frozen=True)
class QuestionBatch(GenerationBatch):
    """Left-padded question ends in `arrays`, and the beginnings they continue, with all images, in `prefix`.

    `places`: int[batch], each row's place among the records.
    """

    prefix: SharedPrefix
    places: np.ndarray


@dataclass(frozen=True)
class _Question:
    place: int
    beginning: int
    rest: np.ndarray


@dataclass(frozen=True)
class _Beginning:
    ids: np.ndarray
    record: Record


@dataclass(frozen=True, eq=False)
class QuestionPlan:
    """Which questions share a batch and a beginning; made once, then read as often as models are evaluated."""

    records: Sequence[Record]
    encoder: Encoder
    batch_size: int
    groups: tuple[tuple[_Question, ...], ...]
    beginnings: tuple[_Beginning, ...]
    beginnings_per_batch: int
    beginning_length: int
    rest_length: int

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.groups)

    def batches(self, *, threads: int, prefetch: int) -> grain.IterDataset[QuestionBatch]:
        """All batches, read ahead in threads."""
        rows = grain.MapDataset.range(len(self.groups)).map(lambda number: self._load(self.groups[number]))
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))

    def _load(self, group: Sequence[_Question]) -> QuestionBatch:
        numbers = sorted({question.beginning for question in group})
        slots = {number: slot for slot, number in enumerate(numbers)}
        padding = self.batch_size - len(group)
        rows = [*group, *[group[0]] * padding]
        ids, mask = _left_padded([question.rest for question in rows], self.rest_length)
        arrays = {"input_ids": ids, "attention_mask": mask}
        shared = [self.beginnings[number] for number in numbers]
        shared += [shared[0]] * (self.beginnings_per_batch - len(shared))
        prefix_ids, prefix_mask = _left_padded([beginning.ids for beginning in shared], self.beginning_length)
        if self.encoder.image_loader is not None:
            arrays["pixel_values"] = np.stack([self._images(beginning.record) for beginning in shared])
        names = [self.records[question.place].id for question in group]
        references = [reference(self.records[question.place]) for question in group]
        return QuestionBatch(
            arrays=arrays,
            record_ids=(*names, *[""] * padding),
            references=(*references, *[""] * padding),
            valid=np.arange(self.batch_size) < len(group),
            prefix=SharedPrefix(prefix_ids, prefix_mask, np.array([slots[question.beginning] for question in rows])),
            places=np.array([question.place for question in rows]),
        )

    def _images(self, record: Record) -> np.ndarray:
        loader = self.encoder.image_loader
        assert loader is not None
        pixels = np.zeros((self.encoder.max_images, *loader.shape), np.float32)
        for slot, path in enumerate(record.images):
            pixels[slot] = loader.load(path, record.id)
        return pixels


def plan_questions(records: Sequence[Record], encoder: Encoder, *, batch_size: int, multiple: int = 1) -> QuestionPlan:
    """Tokenise all prompts and arrange them so that questions about one image are neighbours.

    Args:
      records: the last answer of each is the reference.
      encoder: tokenizer, template and images; its `max_length` is the longest prompt allowed (0 = any).
      batch_size: rows of every batch.
      multiple: number of beginnings per batch is a multiple of this (devices that share a batch).

    Raises:
      UserError: no record; a prompt that is too long, has an image that the model cannot see, or too many images.
    """
    if not records or batch_size < 1:
        raise UserError(f"{len(records)} questions in batches of {batch_size}: both must be at least 1")
    known: dict[tuple[bytes, tuple[str, ...]], int] = {}
    beginnings: list[_Beginning] = []
    members: list[list[_Question]] = []
    for place, record in enumerate(records):
        ids = _prompt(record, encoder)
        marks = np.flatnonzero(ids == encoder.image_token_id) if record.images else np.empty(0, int)
        cut = min(int(marks[-1]) + 1 if len(marks) else 1, len(ids) - 1)
        key = (ids[:cut].tobytes(), tuple(map(str, record.images)))
        if key not in known:
            known[key] = len(beginnings)
            beginnings.append(_Beginning(ids[:cut], record))
            members.append([])
        members[known[key]].append(_Question(place, known[key], ids[cut:]))
    ordered = [question for group in members for question in group]
    per_batch = min(-(-batch_size * len(beginnings) // len(ordered)) + 1, batch_size)
    per_batch = -(-per_batch // multiple) * multiple
    return QuestionPlan(
        records=records,
        encoder=encoder,
        batch_size=batch_size,
        groups=tuple(_groups(ordered, batch_size, per_batch)),
        beginnings=tuple(beginnings),
        beginnings_per_batch=per_batch,
        beginning_length=max(len(beginning.ids) for beginning in beginnings),
        rest_length=max(len(question.rest) for question in ordered),
    )


def _prompt(record: Record, encoder: Encoder) -> np.ndarray:
    if record.images and encoder.image_loader is None:
        raise UserError(f"record {record.id}: has an image but the model has no vision tower; use text-only records")
    if len(record.images) > encoder.max_images:
        raise UserError(
            f"record {record.id}: {len(record.images)} images, over max_images {encoder.max_images}; raise it"
        )
    ids = tokenize_prompt(
        record,
        encoder.tokenizer,
        encoder.template,
        image_token_id=encoder.image_token_id,
        tokens_per_image=encoder.tokens_per_image,
    )
    if encoder.max_length and len(ids) > encoder.max_length:
        raise UserError(
            f"record {record.id}: {len(ids)} tokens with its images, over {encoder.max_length}; raise the limit"
        )
    return ids


def _groups(ordered: Sequence[_Question], batch_size: int, per_batch: int) -> list[tuple[_Question, ...]]:
    """Neighbours together until a batch has all its rows, or as many beginnings as fit."""
    groups: list[tuple[_Question, ...]] = []
    current: list[_Question] = []
    seen: set[int] = set()
    for question in ordered:
        if len(current) == batch_size or len(seen | {question.beginning}) > per_batch:
            groups.append(tuple(current))
            current, seen = [], set()
        current.append(question)
        seen.add(question.beginning)
    return [*groups, tuple(current)]


def _left_padded(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) int32[rows, length]; padding holds id 0, which the mask hides."""
    ids, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for row, values in enumerate(rows):
        ids[row, length - len(values) :] = values
        mask[row, length - len(values) :] = 1
    return ids, mask


def reference(record: Record) -> str:
    """The answer that ends a record, or "" where it ends with a question."""
    speaker, text = record.turns[-1]
    return text if speaker == "gpt" else ""
