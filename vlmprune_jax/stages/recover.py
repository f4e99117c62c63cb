"""Pruned model + training records -> `recovered/`, perhaps with caches of image features and of a teacher's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from vlmprune_jax.core.errors import Stopped, UserError, error_context
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.core.sections import ModelSpec
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
from vlmprune_jax.distributed.mesh import on_process_zero, row_ways, rows_of_process
from vlmprune_jax.experiment.arguments import recover_config
from vlmprune_jax.experiment.spec import RecoverSpec, affecting
from vlmprune_jax.hf.disk.atomic import check_space
from vlmprune_jax.hf.layout import PARTS
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import KeptVocabulary, PrunePlan
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
from vlmprune_jax.stages.work import Context, Pair, Work
from vlmprune_jax.workdir.content import digest, plain
from vlmprune_jax.workdir.ledger import remove


class RecoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a training run: labels of its loss terms, and the metrics of its last step."""

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
    """Return the recover stage's extra files: users' loss files, the adapter, cached teacher outputs."""
    losses = recover_config(spec).losses
    loss_files = {f"loss {name}": term.file for name, term in weighted_terms(losses).items()}
    return Files(
        inputs={name: path for name, path in loss_files.items() if path is not None},
        outputs=[work.folder / "adapter"] if spec.save_adapter else [],
        settings={"recover.teacher_top_k": losses.teacher_top_k},  # 0 if no teacher is cached
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Recovery(Pair):
    """Recovery of a pruned model: settings, teacher, and the folder for checkpoints and metrics."""

    data: DataSpec
    spec: RecoverSpec
    model: ModelSpec
    folder: Path
    context: Context


def recover_stage(work: Work, data: DataSpec, spec: RecoverSpec) -> RecoverFacts:
    """Train the pruned or reconstructed model, logging to `training/metrics.jsonl`."""
    recovery = Recovery(
        data=data,
        spec=spec,
        model=work.model,
        tokens=work.tokens,
        student=work.open_folder(work.start),
        teacher=work.open_folder(work.teacher),
        plan=work.plan,
        mesh=work.devices,
        folder=work.folder,
        context=work,
    )
    ready = prepare(recovery)
    model, summary = train(recovery, ready)
    work.save(model)
    return msgspec.convert(plain({**summary, "records": len(ready.records), "recovery": spec.name}), RecoverFacts)


class Ready(NamedTuple):
    """Checked recovery: settings, number of steps, encoder, records, and paths of trained parameters."""

    config: RecoverConfig
    steps: int
    encoder: Encoder
    records: tuple[Record, ...]
    runs_teacher: bool
    trained: tuple[str, ...]


def prepare(recovery: Recovery) -> Ready:
    """Check a recovery's settings and data before long computations."""
    data, spec, plan, cfg = recovery.data, recovery.spec, recovery.plan, recovery.student.model.cfg
    config, teacher = recover_config(spec), recovery.teacher.model
    runs_teacher = needs_teacher(config.losses)
    if runs_teacher or config.losses.teacher_top_k:  # another model would teach without complaint
        with error_context(recovery.student.path.with_name("plan.json")):
            check_plan_is_for(teacher, plan)
            _check_teacher_differs(plan, config)
    shared = inputs.load_inputs(recovery.tokens, data, cfg)
    records = inputs.recovery_records(data, shared.template)
    config = config.fit_records(len(records), row_ways(recovery.mesh))
    if config.batch_size != spec.batch_size:
        recovery.context.say(
            f"  batches have {config.batch_size} rows instead of recover.batch_size={spec.batch_size}, because "
            f"there are only {len(records)} training records in {spec.epochs:g} epochs"
        )
    if data.feature_cache is not None:
        check_frozen(cfg, config)
    steps = config.num_steps(len(records))
    program = make_program(
        cfg,
        config,
        teacher_cfg=trim_vocabulary(teacher, plan.vocabulary).cfg if runs_teacher else None,
        kept_layers=plan.kept_layers,
        mesh=recovery.mesh,
        num_steps=steps,
    )
    return Ready(config, steps, shared.training_encoder(cfg), records, runs_teacher, tuple(program.groups))


def _check_teacher_differs(plan: PrunePlan, config: RecoverConfig) -> None:
    """Raise UserError if the teacher would compute exactly what the student computes."""
    cut = [name for name, kept in plan.stacks.items() if not kept.is_whole]
    if cut == ["vision"] and config.losses.teacher_inputs == "student":
        raise UserError(
            "the plan prunes only the vision tower, so a teacher with the student's image embeddings equals the "
            'student: set recover.losses.teacher_inputs="own"'
        )


def train(recovery: Recovery, ready: Ready) -> tuple[Model, dict[str, Any]]:
    """Train a model; return it with merged adapters, and the run's summary.

    Raises UserError if no weight changed.
    """
    data, config, context, training = recovery.data, ready.config, recovery.context, recovery.folder / "training"
    on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
    features = None if data.feature_cache is None else cached_features(recovery, ready)
    rows = inputs.training_rows(data, ready.encoder, ready.records, context.reporter.bar, features)
    parts = [part for part in PARTS if features is None or part != TOWER]
    taught = cached_teacher(recovery, ready, rows, parts) if config.losses.teacher_top_k else None
    student = recovery.student.load(parts)
    model, summary = recover(
        student,
        inputs.recovery_batches(
            rows,
            data,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            seed=config.seed,
            teacher=taught,
            mesh=recovery.mesh,
        ),
        config,
        teacher=recovery.teacher.load(parts) if ready.runs_teacher else None,
        plan=recovery.plan,
        workdir=training,
        mesh=recovery.mesh,
        progress=context.reporter.enabled,
        num_steps=ready.steps,
    )
    if summary["skipped_rows"]:
        context.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
    if features is not None:
        tower = recovery.student.model.params[TOWER]
        model = model.replace(params={**model.params, TOWER: tower}, cfg=dataclasses.replace(model.cfg, tower=True))
    merged = merge_lora(model)
    if unchanged(student, merged, ready.trained):
        raise UserError(
            f"recover: training changed no weight of {recovery.student.path.name} ({ready.steps} steps of "
            f"{config.batch_size} rows, {len(ready.records)} records, learning rate {config.learning_rate:g}, last "
            f"gradient norm {summary['last'].get('grad_norm', np.nan):g}, {recovery.model.dtype}): raise "
            "recover.learning_rate, recover.epochs or recover.steps, or train parameters that these records use "
            "(recover.trainable)"
        )
    if recovery.spec.save_adapter:
        write_adapter(model, recovery.folder / "adapter", base_dir=recovery.student.path, trained=ready.trained)
    return merged, summary


def cached_features(recovery: Recovery, ready: Ready) -> FeatureLoader:
    """Open the vision feature cache, and compute features of images that it lacks.

    Training then needs neither the tower nor an image. Raises UserError if the teacher has another tower, the folder is
    of another tower or cannot be written, or an image cannot be read; Stopped on SIGTERM, and what is computed stays.
    """
    data, config, student, images = recovery.data, ready.config, recovery.student, ready.encoder.image_loader
    assert isinstance(images, ImageLoader)  # there is a tower
    cfg = student.model.cfg
    made_from = {"digest": on_process_zero(lambda: _tower_digest(recovery, ready)), "dtype": recovery.model.dtype}
    identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
    shape = cfg.feature_shape[1:] if cfg.any_size else cfg.feature_shape
    dtype: np.dtype = DTYPES[config.compute_dtype]
    loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache or ""), identity), shape, dtype)
    missing = loader.missing(ready.records)
    if missing:
        with recovery.context.phase("features", len(missing)) as progress:
            compute_features(
                student.load((TOWER,)).params[TOWER],
                cfg,
                loader,
                missing,
                batch_size=config.batch_size // config.accumulation,
                on_error=data.on_error,
                threads=data.threads,
                mesh=recovery.mesh,
                progress=progress,
            )
    recovery.context.say(f"  {data.feature_cache} holds the features of all images ({len(missing):,} computed now)")
    return loader


def _tower_digest(recovery: Recovery, ready: Ready) -> str:
    """Return a digest of the vision tower that produces cached features."""
    losses, student, teacher = ready.config.losses, recovery.student, recovery.teacher
    digest_of_student = content_digest(student.model, f"{TOWER}/")
    looks = losses.teacher_inputs == "own" and (ready.runs_teacher or losses.teacher_top_k)
    if looks and content_digest(teacher.model, f"{TOWER}/") != digest_of_student:
        raise UserError(
            f"data.feature_cache: {teacher.path} and {student.path} have different vision towers: unset feature_cache "
            'or use losses.teacher_inputs="student"'
        )
    return digest_of_student


def cached_teacher(
    recovery: Recovery, ready: Ready, training: inputs.TrainingRows, parts: Sequence[str]
) -> TeacherRows:
    """Open the teacher cache, and compute teacher outputs for records that it lacks.

    Records are computed in batches that do not depend on what is there: an interrupted pass ends with the same bytes.
    Raises UserError if the folder is of another teacher or other settings, or its disk is too small; Stopped on
    SIGTERM, and what was computed stays.
    """
    data, config, loss = recovery.data, ready.config, ready.config.losses
    cache = ArrayCache(
        Path(recovery.spec.teacher_cache or ""),
        on_process_zero(lambda: _made_from(recovery.model, data, recovery.spec, recovery.plan.vocabulary)),
    )
    dtype, vocab_size = np.dtype(config.compute_dtype), recovery.student.model.cfg.text.vocab_size
    rows = TeacherRows(cache, loss.teacher_top_k, loss.kl_positions, dtype, vocab_size)
    size = config.batch_size // config.accumulation
    todo = records_to_compute(training, rows, size)
    recovery.context.say(f"  teacher's top {rows.top_k}: {len(todo):,} of {len(training.records):,} records to compute")
    if not todo:
        return rows
    on_process_zero(lambda: check_space(cache.folder / "*.safetensors", bytes_of_rows(training, rows, todo)))
    mine = rows_of_process(recovery.mesh, size)
    batches = train_batches(
        [training.records[number] for number in todo],
        training.encoder,
        batch_size=size,
        mine=mine,
        packs=row_ways(recovery.mesh),
        threads=data.threads,
        sizes=None if training.sizes is None else training.sizes[todo],
        on_error=data.on_error,
    )
    teacher = trim_vocabulary(recovery.teacher.load(parts), recovery.plan.vocabulary)
    outputs = teacher_top_k(teacher, batches, loss, compute_dtype=config.compute_dtype, mesh=recovery.mesh)
    try:
        with recovery.context.phase("teacher's top-k logits", -(-len(todo) // size)) as progress:
            for done, (batch, ids, logprobs) in enumerate(outputs, start=1):
                first = (done - 1) * size
                for place, name in enumerate(batch.record_ids):
                    if name:
                        row = {key: batch.arrays[key][place] for key in ("labels", "attention_mask")}
                        rows.keep(training.records[todo[first + mine[place]]], row, ids[place], logprobs[place])
                progress(done)
    except Stopped:
        cache.publish()
        raise
    cache.publish()
    return rows


def _made_from(model: ModelSpec, data: DataSpec, spec: RecoverSpec, kept: KeptVocabulary | None) -> dict[str, Any]:
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
