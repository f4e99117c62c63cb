"""Batches of questions in which an image that several questions share is encoded once.

Benchmarks ask many questions about few images (easy-VQA: 9,673 about 1,000), and most tokens of a prompt are image
tokens (64 of about 80 in easy-VQA, 576 in LLaVA-1.5), so computing the text and image before the question once saves
most of the work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, rows_of_process
from vlmprune_jax.core.models.generate import SharedPrefix
from vlmprune_jax.core.models.media import is_visual
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.data.batching import PREFETCH, Batch, check_memory
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder, Shape, check_length
from vlmprune_jax.io.data.inputs import load_inputs, read_set
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.config import EvaluateSpec, EvaluationSetSpec

_SHORT = 31  # tokens: shorter lengths share a compiled shape


@dataclass(frozen=True)
class QuestionBatch(Batch):
    """Batch of prompts, split into shared beginnings with the images (`prefix`) and left-padded endings (`arrays`).

    `questions`: index and record of the first rows; further rows only fill the batch.
    """

    questions: tuple[tuple[int, Record], ...]
    prefix: SharedPrefix


@dataclass(frozen=True)
class _Question:
    """Index of a record and of the first one with the same beginning, its prompt in two parts, and its row's shape."""

    place: int
    first: int
    beginning: np.ndarray
    rest: np.ndarray
    shape: Shape


@dataclass(frozen=True)
class _Group:
    """Questions of one batch and its padded shape: shared beginnings (length and number), and length of the endings."""

    questions: tuple[_Question, ...]
    shape: Shape
    beginnings: int
    rest_length: int


@dataclass(frozen=True, eq=False)
class ArrangedQuestions:
    """Questions sorted into batches whose prompts share beginnings; all evaluated models read the same batches."""

    records: Sequence[Record]
    encoder: Encoder
    batch_size: int
    groups: tuple[_Group, ...]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.groups)

    def __iter__(self) -> Iterator[QuestionBatch]:
        """Iterate over all batches; threads (as many as `data.threads` by default) prepare batches ahead."""
        return iter(self.batches(threads=DataSpec().threads, prefetch=PREFETCH))

    @property
    def longest(self) -> int:
        """Length of the longest prompt in tokens, image tokens included."""
        questions = (question for group in self.groups for question in group.questions)
        return max(len(question.beginning) + len(question.rest) for question in questions)

    def batches(self, *, threads: int, prefetch: int, mesh: Mesh | None = None) -> grain.IterDataset[QuestionBatch]:
        """Return an iterator over all batches; `threads` threads prepare batches ahead.

        `mesh`: device mesh of the model; a process opens only the images of its own rows (None = all images).
        """
        for group in self.groups:
            check_memory(group.beginnings, group.shape, self.encoder, prefetch, group.beginnings)
        rows = grain.MapDataset.range(len(self.groups)).map(lambda number: self._load(self.groups[number], mesh))
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))

    def _load(self, group: _Group, mesh: Mesh | None) -> QuestionBatch:
        shared = [*{question.first: question for question in group.questions}.values()]
        slots = {question.first: slot for slot, question in enumerate(shared)}
        padding = self.batch_size - len(group.questions)
        rows = [*group.questions, *group.questions[:1] * padding]
        ids, mask = _left_padded([question.rest for question in rows], group.rest_length)
        shared += shared[:1] * (group.beginnings - len(shared))
        prefix_ids, prefix_mask = _left_padded([question.beginning for question in shared], group.shape.tokens)
        mine, encoder = set(rows_of_process(mesh, len(shared)).tolist()), self.encoder
        images = [encoder.images(self.records[question.first], read=row in mine) for row, question in enumerate(shared)]
        packed = mesh is not None or encoder.image_buckets is not None
        media = encoder.packed(images, group.shape, row_ways(mesh) if packed else len(shared))
        questions = tuple((question.place, self.records[question.place]) for question in group.questions)
        return QuestionBatch(
            arrays={"input_ids": ids, "attention_mask": mask, "media": media},
            record_ids=(*(record.id for _, record in questions), *[""] * padding),
            questions=questions,
            prefix=SharedPrefix(prefix_ids, prefix_mask, np.array([slots[question.first] for question in rows])),
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
    """Tokenise all prompts and sort them so that questions about the same image share a batch.

    Args:
      records: conversations; the prompt ends before the last turn of gpt.
      encoder: tokenizer, template and images; `encoder.max_length` is the longest allowed prompt (0 = any length).
      batch_size: rows of every batch.
      multiple: number of which the shared beginnings per batch are a multiple (the devices that share a batch).
      prompt_suffix: text after every last question, such as "\\nAnswer the question using a single word or phrase."
      by_length: group questions of similar length, one shape for every doubling; for sets with very unequal lengths.

    Raises UserError if there is no record, a prompt is too long, or a record has more images than the model takes.
    """
    if not records or batch_size < 1:
        raise UserError(f"evaluation of {len(records)} questions in batches of {batch_size}: both must be at least 1")
    members: dict[tuple[bytes, tuple[str, ...]], list[_Question]] = {}
    for place, record in enumerate(records):
        ids = encoder.prompt_ids(_with_suffix(record, prompt_suffix))
        if encoder.max_length:
            check_length(len(ids), record, encoder.max_length, "evaluate.max_length")
        marks = np.flatnonzero(is_visual(ids, encoder.visual_tokens)) if record.visuals else np.empty(0, int)
        cut = min(int(marks[-1]) + 1 if len(marks) else 1, len(ids) - 1)
        same = members.setdefault((ids[:cut].tobytes(), tuple(map(str, record.visuals))), [])
        first, shape = (same[0].place, same[0].shape) if same else (place, encoder.shape_of([record]))
        same.append(_Question(place, first, ids[:cut], ids[cut:], shape))
    groups = tuple(_groups([*members.values()], batch_size, multiple, by_length))
    return ArrangedQuestions(records, encoder, batch_size, groups)


def _groups(
    members: Sequence[Sequence[_Question]], batch_size: int, multiple: int, by_length: bool
) -> Iterator[_Group]:
    """Group similar questions into batches; all batches of a length bucket have the same padded shape.

    A batch holds only beginnings with the same number of image slots, so a small image is not padded to twelve tiles.
    Batches of equal shape follow each other, so each program is compiled once. `members`: the questions of each
    beginning.
    """
    buckets: dict[tuple[Shape, *tuple[int, ...]], list[Sequence[_Question]]] = {}
    for same in members:
        longest = (len(same[0].beginning), max(len(question.rest) for question in same))
        doublings = tuple(max(length, _SHORT).bit_length() for length in longest) if by_length else ()
        buckets.setdefault((same[0].shape, *doublings), []).append(same)
    for (shape, *_), mine in sorted(buckets.items()):
        ordered = [question for same in mine for question in same]
        per_batch = min(-(-batch_size * len(mine) // len(ordered)) + 1, batch_size)
        most, padded = -(-per_batch // multiple) * multiple, max(len(question.rest) for question in ordered)
        shape = shape._replace(tokens=max(len(same[0].beginning) for same in mine))
        current, seen = list[_Question](), set[int]()
        for question in ordered:
            if len(current) == batch_size or len(seen | {question.first}) > most:
                yield _Group(tuple(current), shape, most, padded)
                current, seen = [], set()
            current.append(question)
            seen.add(question.first)
        yield _Group(tuple(current), shape, most, padded)


def _left_padded(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad token rows at the left; return (ids, mask), int32[rows, length] each, with 0 for padding."""
    ids, mask = (np.zeros((len(rows), length), np.int32) for _ in range(2))
    for row, values in enumerate(rows):
        ids[row, length - len(values) :] = values
        mask[row, length - len(values) :] = 1
    return ids, mask


def _with_suffix(record: Record, suffix: str) -> Record:
    """Return the record with `suffix` appended to the text of its last question."""
    if not suffix or not record.turns:
        return record
    last = max(place for place, (speaker, _) in enumerate(record.turns) if speaker == "human")
    turns = list(record.turns)
    turns[last] = ("human", turns[last][1] + suffix)
    return dataclasses.replace(record, turns=tuple(turns))


_arranged = functools.lru_cache(maxsize=16)(arrange_questions)  # all models of an experiment read the same batches


def evaluation_records(eval_set: EvaluationSetSpec, *, image_lead: bool) -> tuple[Record, ...]:
    """Return the questions of an evaluation set, at most as many as its setting `questions`."""
    return tuple(read_set(eval_set.data, eval_set.images, "data.eval", image_lead, "stop")[: eval_set.questions])


def arranged_questions(
    model: ModelSpec,
    data: DataSpec,
    evaluate: EvaluateSpec,
    eval_set: EvaluationSetSpec,
    cfg: ModelConfig,
    *,
    multiple: int,
) -> ArrangedQuestions:
    """Return an evaluation set's questions in batches that are the same for every model of an experiment.

    `multiple`: number of devices that share a batch; `evaluate.batch_size` is rounded up to a multiple of this number.
    """
    inputs = load_inputs(model, data, cfg)
    records = evaluation_records(eval_set, image_lead=inputs.template.image_lead)
    cfg.check_row("evaluate.max_length", evaluate.max_length or 0)
    encoder = inputs.encoder(cfg, evaluate.max_length or 0)
    rows = -(-evaluate.batch_size // multiple) * multiple
    suffix = eval_set.prompt_suffix or ""
    return _arranged(records, encoder, batch_size=rows, multiple=multiple, prompt_suffix=suffix)
