"""One pass of the teacher over training batches, instead of one in every step, for `LossConfig.teacher_top_k`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.vlm import ENCODED, Model, Params, encode
from vlmprune_jax.core.models.vocabulary import chunks
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.losses import gathered_head
from vlmprune_jax.core.recovery.program import local_rows, place_rows, step_context
from vlmprune_jax.core.recovery.terms import top_k_logprobs
from vlmprune_jax.io.data.inputs import TrainingRows
from vlmprune_jax.io.data.teacher_rows import TeacherRows, record_key

_SPREAD = 256  # number of records from which the cache size is estimated


def records_to_compute(training: TrainingRows, rows: TeacherRows, size: int) -> list[int]:
    """Return the record numbers in all batches of `size` that are not cached completely, without duplicates.

    If lengths are known, rows of similar length share a batch, and the longest come first, to show a lack of memory at
    once.
    """
    records, sizes = training.records, training.sizes
    order = range(len(records)) if sizes is None else np.argsort(-sizes[:, 0], kind="stable").tolist()
    distinct = {record_key(records[number]): number for number in order if sizes is None or sizes[number, 0]}
    numbers = list(distinct.values())
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [number for batch in batches if not all(rows.has(records[number]) for number in batch) for number in batch]


def bytes_of_rows(training: TrainingRows, rows: TeacherRows, todo: Sequence[int]) -> int:
    """Estimate the bytes that the teacher cache will need, from evenly spaced records."""
    spread = todo[:: -(-len(todo) // _SPREAD)]
    labels = (training.encoder.training_tokens(training.records[number])[1] for number in spread)
    return sum(rows.bytes_of(row) for row in labels) * len(todo) // len(spread)


def teacher_top_k(
    teacher: Model, batches: Iterable[Any], loss: LossConfig, *, compute_dtype: str, mesh: Mesh | None
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Yield each batch with the teacher's top-k token ids and log-probabilities at every position.

    k is `loss.teacher_top_k`; distributions have the temperature `loss.temperature`. `teacher` is on `mesh`; `batches`
    are this process's rows (`Batch`), and all processes must iterate together. Programs are compiled at the first batch
    of a shape. A teacher without its tower takes features. Raises UserError if the teacher cannot read ids or
    images.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(compute_dtype), teacher.params)
    for batch in batches:
        inputs = {name: array for name, array in check_batch(teacher.cfg, batch.arrays).items() if name != "labels"}
        with step_context(mesh, compute_dtype):
            ids, logprobs = _top_k(params, teacher.cfg, place_rows(inputs, mesh), loss)
        yield batch, local_rows(ids), local_rows(logprobs)


@functools.partial(jax.jit, static_argnames=("cfg", "loss"))
def _top_k(params: Params, cfg: ModelConfig, batch: dict[str, Any], loss: LossConfig) -> tuple[jax.Array, jax.Array]:
    ids, head = batch["input_ids"], gathered_head(params, cfg)
    inputs: dict[str, Any] = {name: batch.get(name) for name in ENCODED}
    final, _ = encode(params, cfg, ids, **inputs)

    def body(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return top_k_logprobs(head(hidden), loss.temperature, loss.teacher_top_k)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(len(ids), -1, x.shape[-1])[:, : ids.shape[1]]
        return constrain(x, ("batch", None, None))

    top_ids, logprobs = jax.lax.map(body, chunks(final, loss.chunk, 0))
    return join(top_ids), join(logprobs)
