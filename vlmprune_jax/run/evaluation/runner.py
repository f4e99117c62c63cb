"""Evaluation of a model: greedy answers to questions or log-likelihoods of text, and the metric's values."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count
from vlmprune_jax.base.journal import Journal, continued, is_of
from vlmprune_jax.core.mesh.mesh import mesh_of, place_batch, row_ways, use_mesh
from vlmprune_jax.core.models.generate import generate, on_decoding_mesh
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model, text_loss
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation.metrics import Metric, metric_named
from vlmprune_jax.run.evaluation.metrics.texts import PERPLEXITY
from vlmprune_jax.run.evaluation.questions import ArrangedQuestions, QuestionBatch

Progress = Callable[[int], None]
Answers = list[tuple[str, Count]]  # texts and token counts in a journal
_Windows = tuple[np.ndarray, np.ndarray]  # ids and mask, int32[batch, window]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model's answer to one question, as in `eval/*.answers.jsonl`.

    `tokens` is the number of generated tokens, including the end token. `scores`: {} before a metric scores the answer.
    """

    id: str
    prediction: str
    references: tuple[str, ...]
    tokens: Count
    scores: dict[str, float] = {}


@dataclass(frozen=True)
class Evaluation:
    """Metric values of one model over all questions; `seconds` includes the time to compile.

    `values`: values of the metric. `groups`: {group: {questions, **values}} if the metric defines groups.
    """

    values: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    questions: int
    parameters: int
    seconds: float
    mean_generated_tokens: float
    answers: tuple[Answer, ...]

    @property
    def accuracy(self) -> float:
        """Value of the metric "accuracy"; raise KeyError if the metric does not define it."""
        return self.values["accuracy"]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text: exp of the mean negative log-likelihood per predicted token."""

    perplexity: float
    tokens: int
    parameters: int
    seconds: float


def evaluate(
    model: Model,
    batches: Iterable[QuestionBatch],
    *,
    tokenizer: Any = None,
    max_new_tokens: int,
    metric: Metric | str = "exact_match",
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Evaluation:
    """Generate a model's greedy answers and score them with a metric (default: exact match with a reference answer).

    Args:
      model, batches, max_new_tokens, progress, journal: see `ask`.
      tokenizer: see `ask`; None = the tokenizer of `vp.questions`.
      metric: a metric, or the name of a metric in `vp.metrics`.

    Raises UserError if there is no question, a question has no reference answer, or the metric is unknown or fails.
    """
    start = time.perf_counter()
    metric = metric_named(metric) if isinstance(metric, str) else metric
    tokenizer = batches.encoder.tokenizer if tokenizer is None and isinstance(batches, ArrangedQuestions) else tokenizer
    asked = list[tuple[int, Record]]()

    def checked() -> Iterator[QuestionBatch]:
        for batch in batches:
            if not isinstance(batch, QuestionBatch):
                raise UserError(
                    f"evaluate: a batch must be a QuestionBatch, got {type(batch).__name__}: use vp.questions"
                )
            check_answered(record for _, record in batch.questions)
            asked.extend(batch.questions)
            yield batch

    answers = ask(
        on_decoding_mesh(model),
        checked(),
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        progress=progress,
        journal=journal,
    )
    records = [record for _, record in sorted(asked, key=lambda pair: pair[0])]
    scores = metric.score_all([answer.prediction for answer in answers], records)
    return Evaluation(
        values=metric.values(scores, records),
        groups=metric.values_of_groups(scores, records),
        questions=len(answers),
        parameters=count_params(model.cfg),
        seconds=round(time.perf_counter() - start, 3),
        mean_generated_tokens=sum(answer.tokens for answer in answers) / len(answers),
        answers=tuple(replace(answer, scores=score) for answer, score in zip(answers, scores, strict=True)),
    )


def ask(
    model: Model,
    batches: Iterable[QuestionBatch],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[Answer]:
    """Generate the greedy answers to all questions; return them in the records' order.

    Args:
      model: the model; sharded parameters split every batch over their mesh (see `on_decoding_mesh`).
      batches: padded prompts with their records, from `arrange_questions(...).batches(...)`, which encodes a shared
        image once.
      tokenizer: tokenizer that decodes the answers.
      max_new_tokens: maximum length of an answer in tokens; longer answers are truncated and usually wrong.
      progress: called with the number of batches done.
      journal: stores the answers of each batch, to continue after an interruption (`seconds` then counts the time
        since the restart).

    Raises UserError if there is no question.
    """

    def answer(batch: QuestionBatch) -> list[tuple[str, int]]:
        tokens = generate(
            model,
            batch.arrays["input_ids"],
            media=batch.arrays["media"],
            attention_mask=batch.arrays["attention_mask"],
            max_new_tokens=max_new_tokens,
            prefix=batch.prefix,
        )
        is_end = np.isin(tokens, model.cfg.eos_token_ids)
        lengths = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, tokens.shape[1]).tolist()
        ids = [tokens[row, : lengths[row]].tolist() for row in range(len(batch.questions))]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [(text.strip(), length) for text, length in zip(texts, lengths, strict=False)]

    def answers_all(batch: QuestionBatch, entry: Any) -> bool:
        return is_of(Answers, entry) and len(entry) == len(batch.questions)

    answers = list[tuple[int, Answer]]()  # with the record's index
    batches, beside = itertools.tee(batches)
    for replied, batch in zip(continued(answer, batches, journal, answers_all, progress), beside, strict=True):
        for (place, record), (text, tokens) in zip(batch.questions, replied, strict=True):
            reply = Answer(id=record.id, prediction=text, references=record.references, tokens=tokens)
            answers.append((place, reply))
    if not answers:
        raise UserError("evaluation: no questions found: check the evaluation records")
    return [reply for _, reply in sorted(answers, key=lambda pair: pair[0])]


def check_answered(records: Iterable[Record]) -> None:
    """Raise UserError if a question has no reference answer."""
    for record in records:
        if not any(text.strip() for text in record.references):
            raise UserError(
                f"record {record.id}: has no reference answer (the last turn is not from gpt): add an answer, or "
                "drop the record"
            )


def perplexity(
    model: Model,
    token_ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Perplexity:
    """Compute a model's perplexity on a text.

    Arguments and errors: see `log_likelihoods`.
    """
    start = time.perf_counter()
    scores = log_likelihoods(model, token_ids, window=window, batch_size=batch_size, progress=progress)
    value = PERPLEXITY.values(scores, ())["perplexity"]
    tokens = int(sum(score["tokens"] for score in scores))
    return Perplexity(value, tokens, count_params(model.cfg), round(time.perf_counter() - start, 3))


def log_likelihoods(
    model: Model,
    token_ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    batch_size: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> list[dict[str, float]]:
    """Return {"nll": nats, "tokens": predicted tokens} per batch of non-overlapping windows of a text.

    The first token of each window is not predicted.

    Args:
      token_ids: int[tokens], the whole text.
      window: length of a window in tokens; the last window may be shorter.
      batch_size: maximum number of windows per forward pass.
      progress: called with the number of batches done.
      journal: stores the values of each batch, to continue after an interruption.

    Raises UserError if there are fewer than two tokens, or the window or batch size is too small.
    """
    if isinstance(token_ids, str):
        raise UserError("token_ids: must be the ids of a text's tokens, got a text: tokenize it")
    ids = np.asarray(token_ids, np.int32).reshape(-1)
    if len(ids) < 2 or window < 2 or batch_size < 1:
        raise UserError(
            f"perplexity needs at least 2 tokens, a window of 2 and a batch size of 1 (got {len(ids)}, {window} and "
            f"{batch_size})"
        )
    if ids.min() < 0 or ids.max() >= model.cfg.text.vocab_size:
        raise UserError(
            f"perplexity: token ids from {ids.min()} to {ids.max()} for a vocabulary of {model.cfg.text.vocab_size}: "
            "use the tokenizer of this model"
        )

    mesh = mesh_of(model.params)

    def measure(batch: _Windows) -> dict[str, float]:
        arrays = place_batch(dict(zip(("ids", "mask"), batch, strict=True)), mesh)
        with use_mesh(mesh):
            nll = float(text_loss(model.params, model.cfg, arrays["ids"], arrays["mask"]))
        return {"nll": nll, "tokens": int(batch[1][:, 1:].sum())}

    def measures(batch: _Windows, entry: Any) -> bool:
        known = is_of(dict[str, float], entry) and entry.keys() == {"nll", "tokens"}
        return known and entry["tokens"] == int(batch[1][:, 1:].sum())

    windows = _windows(ids, window, batch_size, row_ways(mesh))
    return list(continued(measure, windows, journal, measures, progress))


def _windows(ids: np.ndarray, window: int, batch_size: int, ways: int) -> Iterable[_Windows]:
    """Cut a text into windows; return batches (ids, mask), int32[batch, window] each, padded at the right.

    Uses as few batches as `batch_size` allows, of rows that split evenly into `ways`.
    """
    rows = -(-len(ids) // window)
    even = -(-rows // -(-rows // batch_size))
    batch_size = min(batch_size, -(-even // ways) * ways)
    padded = -(-rows // batch_size) * batch_size * window
    mask = (np.arange(padded) < len(ids)).astype(np.int32).reshape(-1, batch_size, window)
    return zip(np.pad(ids, (0, padded - len(ids))).reshape(-1, batch_size, window), mask, strict=True)
