"""Arrays that are computed once per training record, in ordinary batches, and then read from a cache on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.atomic import check_space
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.processes import from_all
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, rows_of_process
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.inputs import check_batch
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.models.vlm import ENCODED, Model, Params, encode, tower_features
from vlmprune_jax.core.models.vocabulary import chunks
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.losses import gathered_head
from vlmprune_jax.core.recovery.program import batch_sharding, local_rows, place_rows, step_context
from vlmprune_jax.core.recovery.terms import top_k_logprobs
from vlmprune_jax.core.recovery.trainable import assign_groups
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.cached_arrays import FeatureLoader, TeacherRows
from vlmprune_jax.io.data.inputs import TrainingRows
from vlmprune_jax.io.data.records import Record

TOWER = "vision"
_SPREAD = 256  # number of records from which the cache size is estimated

# Batch, and the record of each of its rows (None: padding) -> arrays to cache, by key. An unreadable row has no name.
Compute = Callable[[Batch, Sequence[Record | None]], dict[str, np.ndarray]]


RecordCache = FeatureLoader | TeacherRows  # caches of arrays of training records


def records_to_compute(training: TrainingRows, arrays: RecordCache, size: int) -> list[int]:
    """Return the record numbers in all batches of `size` that are not cached completely, without duplicates.

    Batches thereby do not depend on the content of the cache, so that an interrupted pass ends with the same bytes. If
    sizes are known, rows of similar size (the sum of the cache's `size_columns`) share a batch, and the largest come
    first, to show a lack of memory at once.
    """
    records, sizes = training.records, training.sizes
    order = range(len(records))
    if sizes is not None:
        usable = np.flatnonzero(sizes[:, 0])
        order = usable[np.argsort(-sizes[usable, arrays.size_columns].sum(axis=1), kind="stable")].tolist()
    distinct = [*{tuple(keys): number for number in order if (keys := arrays.keys(records[number]))}.items()]
    batches = [distinct[start : start + size] for start in range(0, len(distinct), size)]
    return [number for batch in batches if not all(arrays.has(keys) for keys, _ in batch) for _, number in batch]


def compute_records(
    arrays: RecordCache,
    training: TrainingRows,
    todo: Sequence[int],
    compute: Compute,
    *,
    size: int,
    threads: int,
    on_error: str,
    mesh: Mesh | None,
    progress: Callable[[int], None],
) -> None:
    """Compute the arrays of the records `todo` in batches of `size` rows, and add them to the cache.

    All processes must call this function together, and each adds the arrays of its rows. Finished arrays are published
    even if `progress`, called with the number of finished batches, stops the pass. Raises UserError if a record cannot
    be read and `on_error` is "stop".
    """
    mine, records = rows_of_process(mesh, size), [training.records[number] for number in todo]
    batches = train_batches(
        records,
        training.encoder,
        batch_size=size,
        mine=mine,
        packs=row_ways(mesh),
        threads=threads,
        sizes=None if training.sizes is None else training.sizes[list(todo)],
        on_error=on_error,
    )
    stream = iter(batches)

    def results() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for number, start in enumerate(range(0, len(records), size), start=1):
            read: list[Batch] = []  # all processes stop at a record that one of them cannot read
            from_all(lambda: read.extend(itertools.islice(stream, 1)))  # noqa: B023
            rows = [records[start + row] if start + row < len(records) else None for row in mine.tolist()]
            yield number, compute(read[0], rows)

    arrays.cache.fill(results(), progress)


def check_room(arrays: RecordCache, training: TrainingRows, todo: Sequence[int]) -> None:
    """Raise UserError if the disk has no room for the arrays of these records, estimated from evenly spaced ones."""
    spread, needed = todo[:: -(-len(todo) // _SPREAD)], 0
    for number in spread:
        with contextlib.suppress(UserError):  # reported or skipped when the record is computed
            needed += arrays.bytes_of(training.records[number], training.encoder.training_tokens)
    check_space(arrays.cache.folder / "*.safetensors", needed * len(todo) // len(spread))


# Features of a frozen vision tower ------------------------------------------------------------------------------------


def check_frozen(cfg: ModelConfig, config: RecoverConfig) -> None:
    """Raise UserError if features are cached for a model without images, or while training changes the vision tower."""
    if cfg.vision is None:
        raise UserError("data.feature_cache: this model has no vision tower: unset feature_cache")
    trained = assign_groups(list(param_shapes(cfg)), config.trainable)
    if any(path.startswith(f"{TOWER}/") for path in trained):
        raise UserError(
            f"data.feature_cache: recover.trainable={config.trainable!r} trains the vision tower, which changes its "
            "features: unset feature_cache, or train decoder, lora or projector"
        )


def feature_identity(
    cfg: ModelConfig, weights: Mapping[str, str], preparation: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """Return all that cached vision features depend on, apart from the image.

    These are the tower's config, its weights (digest and dtype), the selected states, the image preprocessing, and the
    dtype of the computation.
    """
    assert cfg.vision is not None
    assert cfg.projector is not None
    shuffle = {name: getattr(cfg.projector, name) for name in ("kind", "downsample", "shuffle_version")}
    return {
        "holds": "features of a vision tower",
        "weights": dict(weights),
        "tower": dataclasses.asdict(cfg.vision),
        "selection": {"feature_select": cfg.feature_select, **shuffle},
        "images": dict(preparation),
        "dtype": dtype,
    }


def feature_program(tower: Params, cfg: ModelConfig, loader: FeatureLoader, mesh: Mesh | None) -> Compute:
    """Return the computation of the vision features of a batch's images, compiled once per shape.

    `tower`: parameters below "vision", on `mesh`.
    """
    cast = jax.tree.map(lambda x: x.astype(loader.dtype), tower)
    sharding = None if mesh is None else batch_sharding(mesh, 3)
    program = jax.jit(lambda tower, media: tower_features(tower, cfg, media["vision"]), out_shardings=sharding)

    def compute(batch: Batch, records: Sequence[Record | None]) -> dict[str, np.ndarray]:
        images = batch.arrays["media"]["vision"]._replace(times=None)
        with step_context(mesh, loader.dtype.name):
            states = local_rows(program(cast, place_rows({"vision": images}, mesh)))
        features = states.reshape(len(images.values), -1, *loader.shape)  # packed rows first
        each, start, arrays = len(records) // len(features), 0, dict[str, np.ndarray]()
        for number, (name, record) in enumerate(zip(batch.record_ids, records, strict=True)):
            start = 0 if number % each == 0 else start
            if record is not None and not name:
                arrays |= loader.unreadable(record)
            elif record is not None:
                arrays |= loader.arrays(record, features[number // each, start:])
                start += loader.positions(record)
        return arrays

    return compute


# A teacher's likeliest tokens -----------------------------------------------------------------------------------------


def teacher_program(
    teacher: Model, rows: TeacherRows, loss: LossConfig, *, compute_dtype: str, mesh: Mesh | None
) -> Compute:
    """Return the computation of a batch's teacher outputs, which `rows` stores; see `teacher_top_k`."""
    top_k = teacher_top_k(teacher, loss, compute_dtype=compute_dtype, mesh=mesh)

    def compute(batch: Batch, records: Sequence[Record | None]) -> dict[str, np.ndarray]:
        outputs, arrays = top_k(batch.arrays), dict[str, np.ndarray]()
        for row, (name, record) in enumerate(zip(batch.record_ids, records, strict=True)):
            if name and record is not None:
                real = {key: batch.arrays[key][row] for key in ("labels", "attention_mask")}
                arrays |= rows.arrays(record, real, *(output[row] for output in outputs))
        return arrays

    return compute


def teacher_top_k(
    teacher: Model, loss: LossConfig, *, compute_dtype: str, mesh: Mesh | None
) -> Callable[[Mapping[str, Any]], tuple[np.ndarray, np.ndarray]]:
    """Return a function from a batch's arrays to the teacher's top-k token ids and log-probabilities of all positions.

    k is `loss.teacher_top_k`; distributions have the temperature `loss.temperature`. `teacher` is on `mesh`; arrays are
    this process's rows, and all processes must call the function together. Programs are compiled at the first batch of
    a shape. A teacher without its tower takes features. The function raises UserError if the teacher cannot read ids or
    images.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(compute_dtype), teacher.params)

    def compute(arrays: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        inputs = {name: array for name, array in check_batch(teacher.cfg, arrays).items() if name != "labels"}
        with step_context(mesh, compute_dtype):
            ids, logprobs = _top_k(params, teacher.cfg, place_rows(inputs, mesh), loss)
        return local_rows(ids), local_rows(logprobs)

    return compute


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
