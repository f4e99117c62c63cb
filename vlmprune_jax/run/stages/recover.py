"""Pruned model + training records -> `recovered/`, perhaps with caches of image features and of a teacher's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, rows_of_process
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import KeptVocabulary, PrunePlan
from vlmprune_jax.core.prune.fingerprints import content_digest
from vlmprune_jax.core.prune.surgery import check_plan_is_for, trim_vocabulary
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.program import Program, make_program
from vlmprune_jax.core.recovery.terms import needs_teacher, terms_of
from vlmprune_jax.core.recovery.trainable import merge_lora, unchanged
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.layout import PARTS
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.feature_loader import FeatureLoader
from vlmprune_jax.io.data.images import ImageLoader
from vlmprune_jax.io.data.record_cache import (
    TOWER,
    Compute,
    RecordCache,
    check_frozen,
    check_room,
    compute_records,
    feature_identity,
    feature_program,
    records_to_compute,
    teacher_program,
)
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.data.teacher_rows import TeacherRows
from vlmprune_jax.io.exports.peft import check_adapters, write_adapter
from vlmprune_jax.run.experiment.arguments import recover_config
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.content import digest, plain
from vlmprune_jax.run.workdir.ledger import Task, remove
from vlmprune_jax.run.workdir.steps import RecoverFacts


def recover_task(task: Task, work: Work, data: DataSpec, spec: RecoverConfig) -> Task:
    """Add the recover stage's extra files: users' loss files, the adapter, cached teacher outputs."""
    losses = recover_config(spec).losses
    loss_files = {f"loss {name}": term.file for name, term in terms_of(losses).items()}
    return task.add(
        inputs={name: path for name, path in loss_files.items() if path is not None},
        outputs=[work.folder / "adapter"] if spec.save_adapter else [],
        settings={"recover.teacher_top_k": losses.teacher_top_k},  # 0 if no teacher is cached
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Recovery:
    """Checked recovery of a pruned model: settings, number of steps, records, and both models (weights in files).

    `program`: training step, whose groups name the trained parameters. `runs_teacher`: True if the loss needs the
    teacher during training.
    """

    work: Work
    data: DataSpec
    spec: RecoverConfig
    config: RecoverConfig
    steps: int
    encoder: Encoder
    records: tuple[Record, ...]
    runs_teacher: bool
    program: Program
    student: Model
    teacher: Model
    plan: PrunePlan


def recover_stage(work: Work, data: DataSpec, spec: RecoverConfig) -> RecoverFacts:
    """Train the pruned or reconstructed model, logging to `training/metrics.jsonl`."""
    recovery = prepare(work, data, spec)
    model, summary = train(recovery)
    work.save(model)
    return msgspec.convert(plain({**summary, "records": len(recovery.records), "recovery": spec.name}), RecoverFacts)


def prepare(work: Work, data: DataSpec, spec: RecoverConfig) -> Recovery:
    """Check a recovery's settings and data before long computations."""
    config, plan, student, teacher = recover_config(spec), work.plan, *map(work.open_model, (work.start, work.teacher))
    cfg = student.cfg
    if spec.save_adapter:
        check_adapters(cfg, spec.lora.targets)
    runs_teacher = needs_teacher(config.losses)
    if runs_teacher or config.losses.teacher_top_k:  # another model would teach without complaint
        with error_context(work.start.with_name("plan.json")):
            check_plan_is_for(teacher, plan)
            _check_teacher_differs(plan, config)
    shared = inputs.load_inputs(work.tokens, data, cfg)
    records = inputs.recovery_records(data, shared.template)
    config = config.fit_records(len(records), row_ways(work.devices))
    if config.batch_size != spec.batch_size:
        work.say(
            f"  batches have {config.batch_size} rows instead of recover.batch_size={spec.batch_size}, because "
            f"there are only {len(records)} training records in {spec.epochs:g} epochs"
        )
    if data.feature_cache is not None:
        check_frozen(cfg, config)
    steps = config.num_steps(len(records))
    program = make_program(
        _trained_cfg(student, data),
        config,
        teacher_cfg=_trained_cfg(trim_vocabulary(teacher, plan.vocabulary), data) if runs_teacher else None,
        kept_layers=plan.kept_layers,
        mesh=work.devices,
        num_steps=steps,
    )
    return Recovery(
        work=work,
        data=data,
        spec=spec,
        config=config,
        steps=steps,
        encoder=shared.training_encoder(cfg),
        records=records,
        runs_teacher=runs_teacher,
        program=program,
        student=student,
        teacher=teacher,
        plan=plan,
    )


def _trained_cfg(model: Model, data: DataSpec) -> ModelConfig:
    """Return the config of a model as it trains: without its tower if the features are cached."""
    return dataclasses.replace(model.cfg, tower=model.cfg.tower and data.feature_cache is None)


def _check_teacher_differs(plan: PrunePlan, config: RecoverConfig) -> None:
    """Raise UserError if the teacher would compute exactly what the student computes."""
    cut = [name for name, kept in plan.stacks.items() if not kept.is_whole]
    if cut == ["vision"] and config.losses.teacher_inputs == "student":
        raise UserError(
            "the plan prunes only the vision tower, so a teacher with the student's image embeddings equals the "
            'student: set recover.losses.teacher_inputs="own"'
        )


def train(recovery: Recovery) -> tuple[Model, dict[str, Any]]:
    """Train a model; return it with merged adapters, and the run's summary.

    Raises UserError if no weight changed.
    """
    data, config, work, training = recovery.data, recovery.config, recovery.work, recovery.work.folder / "training"
    on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
    rows, features = inputs.training_rows(data, recovery.encoder, recovery.records, work.reporter.bar), None
    if data.feature_cache is not None:
        features = cached_features(recovery, rows)
        rows = dataclasses.replace(rows, encoder=dataclasses.replace(rows.encoder, image_loader=features))
    parts = [part for part in PARTS if features is None or part != TOWER]
    taught = cached_teacher(recovery, rows, parts) if config.losses.teacher_top_k else None
    student = work.load(work.start, parts)
    model, summary = recover(
        student,
        train_batches(
            rows.records,
            rows.encoder,
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=None,
            drop_remainder=True,
            mine=rows_of_process(work.devices, config.batch_size),
            packs=row_ways(work.devices) * config.accumulation,
            threads=data.threads,
            sizes=rows.sizes,
            group_by=data.group_by,
            on_error=data.on_error,
            teacher=taught,
        ),
        config,
        teacher=work.load(work.teacher, parts) if recovery.runs_teacher else None,
        plan=recovery.plan,
        workdir=training,
        mesh=work.devices,
        progress=work.reporter.enabled,
        num_steps=recovery.steps,
        program=recovery.program,
    )
    if summary["skipped_rows"]:
        work.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
    if features is not None:
        tower = recovery.student.params[TOWER]
        model = model.replace(params={**model.params, TOWER: tower}, cfg=dataclasses.replace(model.cfg, tower=True))
    merged = merge_lora(model)
    if unchanged(student, merged, recovery.program.groups):
        raise UserError(
            f"recover: training changed no weight of {work.start.name} ({recovery.steps} steps of "
            f"{config.batch_size} rows, {len(recovery.records)} records, learning rate {config.learning_rate:g}, last "
            f"gradient norm {summary['last'].get('grad_norm', np.nan):g}, {work.model.dtype}): raise "
            "recover.learning_rate, recover.epochs or recover.steps, or train parameters that these records use "
            "(recover.trainable)"
        )
    if recovery.spec.save_adapter:
        write_adapter(model, work.folder / "adapter", base_dir=work.start, trained=recovery.program.groups)
    return merged, summary


def cached_features(recovery: Recovery, rows: inputs.TrainingRows) -> FeatureLoader:
    """Open the vision feature cache, and compute the features of images that are not in the cache yet.

    Training then needs neither the vision tower nor the images.

    Raises:
      UserError: the teacher's tower differs, the cache was made with another tower or is not writable, or an image
        cannot be read.
      Stopped: on SIGTERM; features computed so far stay in the cache.
    """
    data, config, work, images = recovery.data, recovery.config, recovery.work, recovery.encoder.image_loader
    assert isinstance(images, ImageLoader)  # there is a tower
    cfg = recovery.student.cfg
    made_from = {"digest": on_process_zero(lambda: _tower_digest(recovery)), "dtype": work.model.dtype}
    identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
    shape = cfg.feature_shape[1:] if cfg.dynamic_resolution else cfg.feature_shape
    dtype: np.dtype = DTYPES[config.compute_dtype]
    loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache or ""), identity), shape, dtype)

    def program() -> Compute:
        return feature_program(work.load(work.start, (TOWER,)).params[TOWER], cfg, loader, work.devices)

    _compute(recovery, rows, loader, "image features", program)
    return loader


def _compute(
    recovery: Recovery,
    rows: inputs.TrainingRows,
    arrays: RecordCache,
    what: str,
    program: Callable[[], Compute],
) -> None:
    """Compute the arrays of records that are not cached yet; `program` loads the model that computes them."""
    config, work = recovery.config, recovery.work
    size = config.batch_size // config.accumulation
    todo = records_to_compute(rows, arrays, size)
    work.say(f"  {what}: {len(todo):,} of {len(rows.records):,} records to compute")
    if not todo:
        return
    on_process_zero(lambda: check_room(arrays, rows, todo))
    with work.phase(what, -(-len(todo) // size)) as progress:
        compute_records(
            arrays,
            rows,
            todo,
            program(),
            size=size,
            threads=recovery.data.threads,
            on_error=recovery.data.on_error,
            mesh=work.devices,
            progress=progress,
        )


def _tower_digest(recovery: Recovery) -> str:
    """Return a digest of the vision tower that produces cached features."""
    losses, work = recovery.config.losses, recovery.work
    digest_of_student = content_digest(recovery.student, f"{TOWER}/")
    looks = losses.teacher_inputs == "own" and (recovery.runs_teacher or losses.teacher_top_k)
    if looks and content_digest(recovery.teacher, f"{TOWER}/") != digest_of_student:
        raise UserError(
            f"data.feature_cache: {work.teacher} and {work.start} have different vision towers: unset feature_cache "
            'or use losses.teacher_inputs="student"'
        )
    return digest_of_student


def cached_teacher(recovery: Recovery, training: inputs.TrainingRows, parts: Sequence[str]) -> TeacherRows:
    """Open the teacher cache, and compute teacher outputs for records that are not in the cache yet.

    The batches do not depend on the cache's content, so that an interrupted pass ends with the same bytes.

    Raises:
      UserError: the cache was made with another teacher or other settings, or the disk is too small.
      Stopped: on SIGTERM; outputs computed so far stay in the cache.
    """
    data, config, loss, work = recovery.data, recovery.config, recovery.config.losses, recovery.work
    cache = ArrayCache(
        Path(recovery.spec.teacher_cache or ""),
        on_process_zero(lambda: _made_from(work.model, data, recovery.spec, recovery.plan.vocabulary)),
    )
    dtype, vocab_size = np.dtype(config.compute_dtype), recovery.student.cfg.text.vocab_size
    rows = TeacherRows(cache, loss.teacher_top_k, loss.kl_positions, dtype, vocab_size)

    def program() -> Compute:
        teacher = trim_vocabulary(work.load(work.teacher, parts), recovery.plan.vocabulary)
        return teacher_program(teacher, rows, loss, compute_dtype=config.compute_dtype, mesh=work.devices)

    _compute(recovery, training, rows, f"teacher's top-{rows.top_k} logits", program)
    return rows


def _made_from(model: ModelSpec, data: DataSpec, spec: RecoverConfig, kept: KeptVocabulary | None) -> dict[str, Any]:
    """Return everything except the record on which cached teacher logits depend."""
    settings = affecting("teacher_cache", {"model": model, "data": data, "recover": spec})
    losses = settings.pop("recover.losses")
    longest = data.max_length or (data.length_buckets[-1] if data.length_buckets else None)
    folders = {"model.hf_dir": model.hf_dir, "model.vision_dir": model.vision_dir}
    return {
        "holds": "a teacher's top-k logits",
        **({} if kept is None else {"prune.vocabulary": kept.digest}),
        **{name: None if folder is None else digest(Path(folder)) for name, folder in folders.items()},
        **settings,
        **{f"recover.losses.{name}": value for name, value in losses.items()},
        "data.max_length": longest,
    }
