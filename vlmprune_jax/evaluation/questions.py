"""Questions as batches of equal shapes in which an image that several questions share is encoded once.

Benchmarks ask many questions about few images (easy-VQA: 9,673 about 1,000), and the image is most of a prompt (64 of
about 80 positions there, 576 in LLaVA-1.5), so computing what precedes the question once saves most of the work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.batching import GenerationBatch, check_memory
from vlmprune_jax.data.encoding import Encoder, Room, Shape, check_length
from vlmprune_jax.data.records import Record
from vlmprune_jax.models.generate import SharedPrefix

_SHORT = 31  # tokens that are not worth a shape of their own


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
    room: Room


@dataclass(frozen=True)
class _Group:
    """The questions of one batch, and its shapes: room for images, beginnings, lengths of these and of rests."""

    questions: tuple[_Question, ...]
    room: Room
    beginnings: int
    beginning_length: int
    rest_length: int


@dataclass(frozen=True, eq=False)
class ArrangedQuestions:
    """Which questions share a batch and a beginning; made once, then read as often as models are evaluated."""

    records: Sequence[Record]
    encoder: Encoder
    batch_size: int
    groups: tuple[_Group, ...]
    beginnings: tuple[_Beginning, ...]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.groups)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, images included."""
        questions = (question for group in self.groups for question in group.questions)
        return max(len(self.beginnings[question.beginning].ids) + len(question.rest) for question in questions)

    def batches(self, *, threads: int, prefetch: int) -> grain.IterDataset[QuestionBatch]:
        """All batches, read ahead in threads; as many different shapes as there are rooms for images.

        Raises UserError where they would not fit in memory.
        """
        for group in self.groups:
            check_memory(group.beginnings, Shape(group.beginning_length, *group.room), self.encoder, prefetch)
        rows = grain.MapDataset.range(len(self.groups)).map(lambda number: self._load(self.groups[number]))
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))

    def _load(self, group: _Group) -> QuestionBatch:
        questions = group.questions
        numbers = sorted({question.beginning for question in questions})
        slots = {number: slot for slot, number in enumerate(numbers)}
        padding = self.batch_size - len(questions)
        rows = [*questions, *[questions[0]] * padding]
        ids, mask = _left_padded([question.rest for question in rows], group.rest_length)
        arrays = {"input_ids": ids, "attention_mask": mask}
        shared = [self.beginnings[number] for number in numbers]
        shared += [shared[0]] * (group.beginnings - len(shared))
        prefix_ids, prefix_mask = _left_padded([beginning.ids for beginning in shared], group.beginning_length)
        images = [self.encoder.images(beginning.record, group.room) for beginning in shared]
        arrays |= {name: np.stack([row[name] for row in images]) for name in images[0]}
        names = [self.records[question.place].id for question in questions]
        return QuestionBatch(
            arrays=arrays,
            record_ids=(*names, *[""] * padding),
            records=tuple(self.records[question.place] for question in rows),
            valid=np.arange(self.batch_size) < len(questions),
            prefix=SharedPrefix(prefix_ids, prefix_mask, np.array([slots[question.beginning] for question in rows])),
            places=np.array([question.place for question in rows]),
        )


def arrange_questions(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    batch_size: int,
    multiple: int = 1,
    prompt_suffix: str = "",
    by_length: bool = False,
) -> ArrangedQuestions:
    """Tokenise all prompts and arrange them so that questions about one image are neighbours.

    Args:
      records: conversations; each is asked up to its last turn of gpt.
      encoder: tokenizer, template and images; its `max_length` is the longest prompt allowed (0 = any).
      batch_size: rows of every batch.
      multiple: number of beginnings per batch is a multiple of this (devices that share a batch).
      prompt_suffix: what follows every last question, such as "\\nAnswer the question using a single word or phrase."
      by_length: batches are of like lengths, for questions that differ much in them; a shape for every doubling.

    Raises:
      UserError: no record; a prompt that is too long, an image that the model cannot see, too many images or tiles.
    """
    if not records or batch_size < 1:
        raise UserError(f"{len(records)} questions in batches of {batch_size}: both must be at least 1")
    known: dict[tuple[bytes, tuple[str, ...]], int] = {}
    beginnings: list[_Beginning] = []
    members: list[list[_Question]] = []
    for place, record in enumerate(records):
        ids = encoder.prompt_ids(_with_suffix(record, prompt_suffix))
        if encoder.max_length:
            check_length(len(ids), record, encoder.max_length)
        marks = np.flatnonzero(ids == encoder.image_token_id) if record.images else np.empty(0, int)
        cut = min(int(marks[-1]) + 1 if len(marks) else 1, len(ids) - 1)
        key = (ids[:cut].tobytes(), tuple(map(str, record.images)))
        if key not in known:
            known[key] = len(beginnings)
            beginnings.append(_Beginning(ids[:cut], record, encoder.room([record])))
            members.append([])
        members[known[key]].append(_Question(place, known[key], ids[cut:]))
    return ArrangedQuestions(
        records=records,
        encoder=encoder,
        batch_size=batch_size,
        groups=_groups(members, beginnings, batch_size, multiple, by_length),
        beginnings=tuple(beginnings),
    )


def _groups(
    members: Sequence[Sequence[_Question]],
    beginnings: Sequence[_Beginning],
    batch_size: int,
    multiple: int,
    by_length: bool,
) -> tuple[_Group, ...]:
    """Neighbours together until a batch has all its rows, or as many beginnings as fit; one group of shapes a bucket.

    A batch holds only beginnings of one room for images, so a thumbnail does not wait for twelve tiles. A group's
    batches follow each other: its program is compiled once, when the group's turn comes, and nothing runs beside it.
    """
    groups: list[_Group] = []
    buckets: dict[tuple[Room, *tuple[int, ...]], list[int]] = {}
    for number, beginning in enumerate(beginnings):
        longest = (len(beginning.ids), max(len(question.rest) for question in members[number]))
        doublings = tuple(max(length, _SHORT).bit_length() for length in longest) if by_length else ()
        buckets.setdefault((beginning.room, *doublings), []).append(number)
    for (room, *_), mine in sorted(buckets.items()):
        ordered = [question for number in mine for question in members[number]]
        per_batch = min(-(-batch_size * len(mine) // len(ordered)) + 1, batch_size)
        group = functools.partial(
            _Group,
            room=room,
            beginnings=(most := -(-per_batch // multiple) * multiple),
            beginning_length=max(len(beginnings[number].ids) for number in mine),
            rest_length=max(len(question.rest) for question in ordered),
        )
        current: list[_Question] = []
        seen: set[int] = set()
        for question in ordered:
            if len(current) == batch_size or len(seen | {question.beginning}) > most:
                groups.append(group(tuple(current)))
                current, seen = [], set()
            current.append(question)
            seen.add(question.beginning)
        groups.append(group(tuple(current)))
    return tuple(groups)


def _left_padded(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) int32[rows, length]; padding holds id 0, which the mask hides."""
    ids, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for row, values in enumerate(rows):
        ids[row, length - len(values) :] = values
        mask[row, length - len(values) :] = 1
    return ids, mask


def _with_suffix(record: Record, suffix: str) -> Record:
    """The record with its last question continued."""
    if not suffix or not record.turns:
        return record
    last = max(place for place, (speaker, _) in enumerate(record.turns) if speaker == "human")
    turns = list(record.turns)
    turns[last] = ("human", turns[last][1] + suffix)
    return dataclasses.replace(record, turns=tuple(turns))
