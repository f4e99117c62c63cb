"""Pruned model + training records -> `recovered/`, perhaps with caches of image features and of a teacher's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from vlmprune_jax.core.errors import Stopped, UserError, error_context
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.data import inputs
from vlmprune_jax.data.batching import train_batches
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.encoding import Encoder
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.data.images import ImageLoader
from vlmprune_jax.data.records import Record
from vlmprune_jax.data.teacher_rows import TeacherRows
from vlmprune_jax.distributed.mesh import on_process_zero, row_ways
from vlmprune_jax.experiment.arguments import recover_config
from vlmprune_jax.experiment.spec import RecoverSpec, affecting
from vlmprune_jax.hf.disk.atomic import check_space
from vlmprune_jax.hf.layout import PARTS
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import KeptStack, PrunePlan
from vlmprune_jax.prune.fingerprint import content_digest
from vlmprune_jax.prune.surgery import check_plan_is_for, trim_vocabulary
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.feature_pass import TOWER, check_frozen, compute_features, feature_identity
from vlmprune_jax.recovery.loop import recover
from vlmprune_jax.recovery.objective import needs_teacher, weighted_terms
from vlmprune_jax.recovery.peft import write_adapter
from vlmprune_jax.recovery.program import make_program
from vlmprune_jax.recovery.teacher_pass import bytes_of_rows, records_to_compute, teacher_top_k
from vlmprune_jax.recovery.trainable import merge_lora, unchanged
from vlmprune_jax.stages.stage import Files
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.content import digest, plain
from vlmprune_jax.workdir.ledger import remove


class RecoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a training run. `terms`: {loss term: its label}; `last`: metrics of the last step."""

    steps: Count
    resumed_from: Count
    records: Count
    recovery: str
    terms: dict[str, str]
    trained_parameters: Count
    frozen_parameters: Count
    skipped_rows: Count
    tokens: Finite
    compile_seconds: Finite
    last: dict[str, float | None]


def recover_files(work: Work, data: DataSpec, spec: RecoverSpec) -> Files:
    """Return the stage's extra files: users' loss files, the saved adapter, and cached teacher outputs."""
    losses = recover_config(spec).losses
    own = {f"loss {name}": term.file for name, term in weighted_terms(losses).items()}
    return Files(
        inputs={name: path for name, path in own.items() if path is not None},
        outputs=[work.folder / "adapter"] if spec.save_adapter else [],
        settings={"recover.teacher_top_k": losses.teacher_top_k},  # 0 if no teacher is cached
    )


def recover_stage(work: Work, data: DataSpec, spec: RecoverSpec) -> RecoverFacts:
    """Train the pruned or reconstructed model; metrics go to `training/metrics.jsonl`."""
    plan, mesh, training = work.plan, work.devices, work.folder / "training"
    on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
    ready = prepare(work, data, spec)
    config = ready.config
    features = None if data.feature_cache is None else cached_features(work, data, ready)
    rows = inputs.training_rows(data, ready.encoder, ready.records, work.reporter.bar, features)
    parts = [part for part in PARTS if features is None or part != TOWER]
    taught = cached_teacher(work, data, spec, ready, rows, parts) if config.losses.teacher_top_k else None
    student = work.load(work.start, parts)
    model, summary = recover(
        student,
        inputs.recovery_batches(rows, data, batch_size=config.batch_size, seed=config.seed, teacher=taught),
        config,
        teacher=work.load(work.teacher, parts) if ready.runs_teacher else None,
        plan=plan,
        workdir=training,
        mesh=mesh,
        progress=work.reporter.enabled,
        num_steps=ready.steps,
    )
    if summary["skipped_rows"]:
        work.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
    if features is not None:
        model = Model({**model.params, TOWER: ready.student.params[TOWER]}, dataclasses.replace(model.cfg, tower=True))
    merged = merge_lora(model)
    if unchanged(student, merged, ready.trained):
        raise UserError(
            f"recover: training changed no weight of {work.start.name} ({ready.steps} steps of {config.batch_size} "
            f"rows, {len(ready.records)} records, learning rate {config.learning_rate:g}, last gradient norm "
            f"{summary['last'].get('grad_norm', np.nan):g}, {work.model.dtype}): raise recover.learning_rate, "
            "recover.epochs or recover.steps, or choose parameters that the records reach (recover.trainable)"
        )
    if spec.save_adapter:
        write_adapter(model, work.folder / "adapter", base_dir=work.start, trained=ready.trained)
    work.save(merged)
    return msgspec.convert(plain({**summary, "records": len(ready.records), "recovery": spec.name}), RecoverFacts)


class Ready(NamedTuple):
    """A checked recovery: student and teacher with weights still in files, and the paths of `trained` parameters."""

    config: RecoverConfig
    steps: int
    encoder: Encoder
    records: tuple[Record, ...]
    student: Model
    teacher: Model
    runs_teacher: bool
    trained: tuple[str, ...]


def prepare(work: Work, data: DataSpec, spec: RecoverSpec) -> Ready:
    """Refuse, before long computations, what training would refuse; adapt the batch size to the number of records."""
    config, plan, mesh = recover_config(spec), work.plan, work.devices
    runs_teacher = needs_teacher(config.losses)
    student, teacher = work.open_model(work.start), work.open_model(work.teacher)
    if runs_teacher or config.losses.teacher_top_k:  # another model would teach without complaint
        with error_context(work.variant / "plan.json"):
            check_plan_is_for(teacher, plan)
            _check_teacher_differs(plan, config)
    teacher = trim_vocabulary(teacher, plan.vocabulary)
    shared = inputs.load_inputs(work.tokens, data, student.cfg)
    records = inputs.recovery_records(data, shared.template)
    config = config.fit_records(len(records), row_ways(mesh))
    if config.batch_size != spec.batch_size:
        work.say(
            f"  batches of {config.batch_size} rows instead of recover.batch_size={spec.batch_size}: there are "
            f"{len(records)} training records, in {spec.epochs:g} epochs"
        )
    if data.feature_cache is not None:
        check_frozen(student.cfg, config)
    steps = config.num_steps(len(records))
    program = make_program(
        student.cfg,
        config,
        teacher_cfg=teacher.cfg if runs_teacher else None,
        kept_layers=plan.kept_layers,
        mesh=mesh,
        num_steps=steps,
    )
    encoder = shared.training_encoder(student.cfg)
    return Ready(config, steps, encoder, records, student, teacher, runs_teacher, tuple(program.groups))


def _check_teacher_differs(plan: PrunePlan, config: RecoverConfig) -> None:
    """Refuse a teacher that computes the same as the student: unpruned decoder and the student's image embeddings."""
    cut = [name for name, kept in plan.stacks.items() if kept != KeptStack.whole(kept.layers_before)]
    if cut == ["vision"] and config.losses.teacher_inputs == "student":
        raise UserError(
            "the plan cuts only the vision tower, so a teacher that sees the student's image embeddings equals the "
            'student: set recover.losses.teacher_inputs="own"'
        )


def cached_features(work: Work, data: DataSpec, ready: Ready) -> FeatureLoader:
    """Open the cache `data.feature_cache`, and compute missing features of the records' images.

    Training then needs neither the tower nor an image. Raises UserError if the teacher has another tower, the folder is
    of another tower or cannot be written, or an image cannot be read; Stopped on SIGTERM, and what is computed stays.
    """
    cfg, config, images = ready.student.cfg, ready.config, ready.encoder.image_loader
    assert isinstance(images, ImageLoader)  # there is a tower
    made_from = {"digest": on_process_zero(lambda: _tower_digest(work, ready)), "dtype": work.model.dtype}
    identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
    shape = cfg.feature_shape[1:] if cfg.any_size else cfg.feature_shape
    dtype: np.dtype = DTYPES[config.compute_dtype]
    loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache or ""), identity), shape, dtype)
    missing = loader.missing(ready.records)
    if missing:
        with work.phase("features", len(missing)) as progress:
            compute_features(
                work.load(work.start, (TOWER,)).params[TOWER],
                cfg,
                loader,
                missing,
                batch_size=config.batch_size // config.accumulation,
                on_error=data.on_error,
                threads=data.threads,
                mesh=work.devices,
                progress=progress,
            )
    work.say(f"  {data.feature_cache} holds the features of all images ({len(missing):,} computed now)")
    return loader


def _tower_digest(work: Work, ready: Ready) -> str:
    """Return the digest of the student's tower; refuse a teacher with another tower if it encodes images itself."""
    losses, student = ready.config.losses, content_digest(ready.student, f"{TOWER}/")
    looks = losses.teacher_inputs == "own" and (ready.runs_teacher or losses.teacher_top_k)
    if looks and content_digest(ready.teacher, f"{TOWER}/") != student:
        raise UserError(
            f"data.feature_cache: {work.teacher} and {work.start} have different vision towers: leave feature_cache "
            'out, or use losses.teacher_inputs="student"'
        )
    return student


def cached_teacher(
    work: Work, data: DataSpec, spec: RecoverSpec, ready: Ready, training: inputs.TrainingRows, parts: Sequence[str]
) -> TeacherRows:
    """Open the cache `recover.teacher_cache`, and compute missing records by running these parts of the teacher.

    Records are computed in batches that do not depend on what is there: an interrupted pass ends with the same bytes.
    Raises UserError if the folder is of another teacher or other settings, or its disk is too small; Stopped on
    SIGTERM, and what was computed stays.
    """
    config, loss = ready.config, ready.config.losses
    cache = ArrayCache(Path(spec.teacher_cache or ""), on_process_zero(lambda: _made_from(work, data, spec)))
    dtype, vocab_size = np.dtype(config.compute_dtype), ready.teacher.cfg.text.vocab_size
    rows = TeacherRows(cache, loss.teacher_top_k, loss.kl_positions, dtype, vocab_size)
    size = config.batch_size // config.accumulation
    todo = records_to_compute(training, rows, size)
    work.say(f"  teacher's top {rows.top_k}: {len(todo):,} of {len(training.records):,} records to compute")
    if not todo:
        return rows
    on_process_zero(lambda: check_space(cache.folder / "*.safetensors", bytes_of_rows(training, rows, todo)))
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
    local, teacher = size // jax.process_count(), trim_vocabulary(work.load(work.teacher, parts), work.plan.vocabulary)
    found = teacher_top_k(teacher, batches, loss, compute_dtype=config.compute_dtype, mesh=work.devices)
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


def _made_from(work: Work, data: DataSpec, spec: RecoverSpec) -> dict[str, Any]:
    """Return everything that cached logits depend on besides the record."""
    settings = affecting("teacher_cache", {"model": work.model, "data": data, "recover": spec})
    losses, kept = settings.pop("recover.losses"), work.plan.vocabulary
    longest = data.max_length or (data.length_buckets[-1] if data.length_buckets else None)
    return {
        "holds": "a teacher's top-k logits",
        "model.vision_dir": None,
        **({} if kept is None else {"prune.vocabulary": kept.digest}),
        **{name: digest(folder) for name, folder in work.model_files.items()},
        **settings,
        **{f"recover.losses.{name}": value for name, value in losses.items()},
        "data.max_length": longest,
    }
