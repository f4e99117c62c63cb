"""The teacher's top-k logits of the training records, computed once into a folder that runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmprune_jax.core.errors import Stopped
from vlmprune_jax.data import inputs
from vlmprune_jax.data.batching import train_batches
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.data.teacher_rows import TeacherRows, record_key
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.experiment.spec import RecoverSpec, affecting
from vlmprune_jax.hf.disk.atomic import check_space
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.objective import check_teacher
from vlmprune_jax.recovery.program import check_mesh
from vlmprune_jax.recovery.teacher_pass import teacher_top_k
from vlmprune_jax.stages.feature_cache import parts_beside
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.content import digest

_SPREAD = 256  # records whose sizes tell that of a pass


def cached_teacher(
    work: Work, data: DataSpec, spec: RecoverSpec, config: RecoverConfig, features: FeatureLoader | None
) -> TeacherRows:
    """Open `recover.teacher_cache`, after computing the training records that it lacks.

    With cached `features`, of the teacher's tower as well, it needs neither its tower nor an image. Records are
    computed in batches that do not depend on what is there: an interrupted pass ends with the same bytes.

    Raises:
      UserError: the folder is of another teacher or other settings, its disk is too small, or training would be
        refused.
      Stopped: SIGTERM; what was computed is kept.
    """
    loss, mesh, cfg = config.losses, work.devices, work.open_model(work.teacher).cfg
    check_teacher(loss, cfg, None)
    if mesh is not None:
        check_mesh(mesh, cfg, config)
    training = inputs.training_rows(work.model, data, cfg, work.reporter.bar, features)
    cache = ArrayCache(Path(spec.teacher_cache or ""), on_process_zero(lambda: _made_from(work, data, spec)))
    rows = TeacherRows(cache, loss.teacher_top_k, loss.kl_positions, np.dtype(config.compute_dtype))
    size = config.batch_size // config.accumulation
    todo = _unfinished(training, rows, size)
    work.say(f"  teacher's top {rows.top_k}: {len(todo):,} of {len(training.records):,} records to compute")
    if not todo:
        return rows
    on_process_zero(
        lambda: check_space(cache.folder / "*.safetensors", _bytes(training, rows, todo, cfg.text.vocab_size))
    )
    teacher = work.load(work.teacher, parts_beside(features))
    batches = train_batches(
        [training.records[number] for number in todo],
        training.encoder,
        batch_size=size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=data.threads,
        sizes=None if training.sizes is None else training.sizes[todo],
        on_error=data.on_error,
    )
    local = size // jax.process_count()
    found = teacher_top_k(teacher, batches, loss, compute_dtype=config.compute_dtype, mesh=mesh)
    try:
        with work.phase("teacher's top-k logits", -(-len(todo) // size)) as progress:
            for done, (batch, ids, logprobs) in enumerate(found, start=1):
                first = (done - 1) * size + jax.process_index() * local
                for place, name in enumerate(batch.record_ids):
                    if name:
                        row = {key: array[place] for key, array in batch.arrays.items()}
                        rows.keep(training.records[todo[first + place]], row, ids[place], logprobs[place])
                progress(done)
    except Stopped:
        cache.publish()
        raise
    cache.publish()
    return rows


def _unfinished(training: inputs.TrainingRows, rows: TeacherRows, size: int) -> list[int]:
    """Numbers of the distinct records in batches of `size` that are not there completely.

    Rows of like length share a batch where lengths are known, the longest first: what does not fit in memory is met at
    once.
    """
    records, sizes = training.records, training.sizes
    order = range(len(records)) if sizes is None else np.argsort(-sizes[:, 0], kind="stable").tolist()
    distinct = {record_key(records[number]): number for number in order if sizes is None or sizes[number, 0]}
    numbers = list(distinct.values())
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [number for batch in batches if not all(rows.has(records[number]) for number in batch) for number in batch]


def _bytes(training: inputs.TrainingRows, rows: TeacherRows, todo: list[int], vocab_size: int) -> int:
    """Bytes that these records will take, as evenly spread ones of them do."""
    spread = todo[:: -(-len(todo) // _SPREAD)]
    labels = (training.encoder.training_tokens(training.records[number])[1] for number in spread)
    return sum(rows.bytes_of(row, vocab_size) for row in labels) * len(todo) // len(spread)


def _made_from(work: Work, data: DataSpec, spec: RecoverSpec) -> dict[str, Any]:
    """Return everything that the logits of a record depend on."""
    settings = affecting("teacher_cache", {"model": work.model, "data": data, "recover": spec})
    losses = settings.pop("recover.losses")
    longest = data.max_length or (data.length_buckets[-1] if data.length_buckets else None)
    return {
        "holds": "a teacher's top-k logits",
        "model.vision_dir": None,
        **{name: digest(folder) for name, folder in work.model_files.items()},
        **settings,
        **{f"recover.losses.{name}": value for name, value in losses.items()},
        "data.max_length": longest,
    }
