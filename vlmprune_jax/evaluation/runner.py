"""Running a model over questions (greedy generation, exact match) or over text (perplexity)."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.data.batching import GenerationBatch
from vlmprune_jax.distributed.journal import Journal, continued
from vlmprune_jax.errors import UserError
from vlmprune_jax.evaluation.questions import QuestionBatch
from vlmprune_jax.evaluation.scorers import accuracy, accuracy_by_answer, is_exact_match
from vlmprune_jax.models.generate import generate
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model, encode, mesh_of, place_batch, unembed
from vlmprune_jax.recovery.config import LossConfig
from vlmprune_jax.recovery.losses import vocabulary_sums

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Answer:
    """One question's outcome: the generated text as decoded, and how many tokens it took (the end token included)."""

    id: str
    prediction: str
    reference: str
    correct: bool
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one model over all questions; `seconds` includes compilation."""

    accuracy: float
    questions: int
    correct: int
    parameters: int
    seconds: float
    mean_generated_tokens: float
    by_answer: dict[str, dict[str, float]]
    answers: tuple[Answer, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single answers, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "answers"}


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token."""

    perplexity: float
    tokens: int
    parameters: int
    seconds: float


def evaluate(
    model: Model,
    batches: Iterable[GenerationBatch],
    *,
    tokenizer: Any,
    max_new_tokens: int,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Evaluation:
    """Exact-match accuracy of greedy answers (see `scorers.normalise` for what counts as equal).

    Args:
      model: the model; sharded parameters split every batch over the mesh.
      batches: prompts of equal shapes with the expected answers (`plan_questions(...).batches(...)`, which computes a
        shared image once, or `data.batching.generation_batches`); rows with `valid` False are not counted.
      tokenizer: decodes the answers.
      max_new_tokens: longest answer; a longer one is cut and, as a rule, wrong.
      progress: called with the number of batches done.
      journal: where the answers of each batch are kept, to continue after an interruption (`seconds` are then of the
        last part).

    Raises:
      UserError: there is no question, or a question has no reference answer.
    """
    start, found = time.perf_counter(), list[tuple[int | None, Answer]]()

    def ask(batch: GenerationBatch) -> list[tuple[int | None, dict[str, Any]]]:
        _check_answered(batch)
        tokens = generate(
            model,
            batch.arrays["input_ids"],
            pixel_values=batch.arrays.get("pixel_values"),
            attention_mask=batch.arrays["attention_mask"],
            max_new_tokens=max_new_tokens,
            prefix=batch.prefix if isinstance(batch, QuestionBatch) else None,
        )
        answers = _score(batch, tokens, tokenizer, model.cfg)
        places = batch.places[batch.valid].tolist() if isinstance(batch, QuestionBatch) else [None] * len(answers)
        return [(place, vars(answer)) for place, answer in zip(places, answers, strict=True)]

    for done, answered in enumerate(continued(ask, batches, journal), start=1):
        found += [(place, Answer(**answer)) for place, answer in answered]
        if progress is not None:
            progress(done)
    if not found:
        raise UserError("there is no question to evaluate: check the evaluation records")
    placed = [(number if place is None else place, answer) for number, (place, answer) in enumerate(found)]
    answers = [answer for _, answer in sorted(placed, key=lambda pair: pair[0])]
    hits = [answer.correct for answer in answers]
    return Evaluation(
        accuracy=accuracy(hits),
        questions=len(answers),
        correct=sum(hits),
        parameters=count_params(model.cfg),
        seconds=round(time.perf_counter() - start, 3),
        mean_generated_tokens=sum(answer.tokens for answer in answers) / len(answers),
        by_answer=accuracy_by_answer([a.prediction for a in answers], [a.reference for a in answers]),
        answers=tuple(answers),
    )


def _score(batch: GenerationBatch, tokens: np.ndarray, tokenizer: Any, cfg: ModelConfig) -> list[Answer]:
    is_end = np.isin(tokens, cfg.eos_token_ids)
    lengths = np.where(is_end.any(axis=1), is_end.argmax(axis=1) + 1, tokens.shape[1])
    rows = [row for row in range(len(tokens)) if batch.valid[row]]
    texts = tokenizer.batch_decode([tokens[row, : lengths[row]].tolist() for row in rows], skip_special_tokens=True)
    answers = []
    for row, text in zip(rows, texts, strict=True):
        name, reference = batch.record_ids[row], batch.references[row]
        answers.append(Answer(name, text.strip(), reference, is_exact_match(text, reference), int(lengths[row])))
    return answers


def _check_answered(batch: GenerationBatch) -> None:
    for name, reference, valid in zip(batch.record_ids, batch.references, batch.valid, strict=True):
        if valid and not reference.strip():
            raise UserError(f"record {name}: its last turn is no answer, so there is nothing to compare with; drop it")


def perplexity(
    model: Model,
    token_ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of text, cut into windows of `window` tokens that do not overlap (the first of each is not predicted).

    Args:
      token_ids: int[tokens] of the whole text.
      window: tokens per forward pass; the last window may be shorter.
      batch_size: windows per forward pass.
      progress: called with the number of batches done.

    Raises:
      UserError: fewer than two tokens, or a window or batch size that is too small.
    """
    ids = np.asarray(token_ids, np.int32).reshape(-1)
    if len(ids) < 2 or window < 2 or batch_size < 1:
        raise UserError(
            f"perplexity of {len(ids)} tokens with window {window}, batch size {batch_size}: needs 2, 2 and 1"
        )
    if ids.min() < 0 or ids.max() >= model.cfg.text.vocab_size:
        raise UserError(
            f"text has token id {ids.max()} but the vocabulary has {model.cfg.text.vocab_size}: other tokenizer?"
        )
    start, total, count = time.perf_counter(), 0.0, 0
    for done, (rows, mask) in enumerate(_windows(ids, window, batch_size), start=1):
        total += _negative_log_likelihood(model, rows, mask)
        count += int(mask[:, 1:].sum())
        if progress is not None:
            progress(done)
    mean = total / count
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, count, count_params(model.cfg), round(time.perf_counter() - start, 3))


def _windows(ids: np.ndarray, window: int, batch_size: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) int32[batch_size, window] pairs, padded at the right and with empty rows at the end."""
    rows = -(-len(ids) // window)
    padded = -(-rows // batch_size) * batch_size * window
    mask = (np.arange(padded) < len(ids)).astype(np.int32).reshape(-1, batch_size, window)
    return zip(np.pad(ids, (0, padded - len(ids))).reshape(-1, batch_size, window), mask, strict=True)


def _negative_log_likelihood(model: Model, ids: np.ndarray, mask: np.ndarray) -> float:
    mesh = mesh_of(model.params)
    arrays = place_batch({"ids": ids, "mask": mask}, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return float(_nll(model.params, model.cfg, arrays["ids"], arrays["mask"]))


@functools.partial(jax.jit, static_argnames=("cfg",))
def _nll(params: Any, cfg: ModelConfig, ids: jax.Array, mask: jax.Array) -> jax.Array:
    final, _ = encode(params, cfg, ids, attention_mask=mask)
    labels = jnp.where(mask > 0, ids, -100)

    def head(hidden: jax.Array) -> jax.Array:
        return unembed(params, cfg, hidden).astype(jnp.float32)

    return vocabulary_sums(final, head, labels, mask, LossConfig(), None, None)["ce"]
