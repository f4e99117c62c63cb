"""Pruned model + records -> `reconstructed/` without training; + training -> `recovered/`, perhaps with caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.files import Count, Finite
from vlmprune_jax.base.processes import on_process_zero
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways, rows_of_process
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune import KeptVocabulary
from vlmprune_jax.core.prune.fingerprints import content_digest
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.reconstruction import layers_to_solve, reconstruct
from vlmprune_jax.core.prune.surgery import check_plan_is_for, trim_vocabulary
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.loop import recover
from vlmprune_jax.core.recovery.program import make_program
from vlmprune_jax.core.recovery.terms import needs_teacher, terms_of
from vlmprune_jax.core.recovery.trainable import merge_lora, unchanged
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.layout import PARTS
from vlmprune_jax.io.data import inputs
from vlmprune_jax.io.data.batching import train_batches
from vlmprune_jax.io.data.cached_arrays import FeatureLoader, TeacherRows
from vlmprune_jax.io.data.config import DataSpec
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
from vlmprune_jax.io.exports.peft import check_adapters, write_adapter
from vlmprune_jax.run.experiment.arguments import recover_config
from vlmprune_jax.run.experiment.spec import affecting
from vlmprune_jax.run.stages.work import Work
from vlmprune_jax.run.workdir.content import digest, plain
from vlmprune_jax.run.workdir.ledger import Task, remove
from vlmprune_jax.run.workdir.steps import RecoverFacts


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """Repair of one weight: its error and ridge penalty (None = left unchanged, 0 = trained)."""

    stack: str
    layer: Count
    module: str
    ridge: Finite | None
    error_before: Finite
    error_after: Finite
    tokens: Count
    unknowns: Count


class ReconstructFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Result of the reconstruct stage: number of calibration records, and a report per weight."""

    samples: Count
    modules: list[Repaired]


def reconstruct_stage(work: Work, data: DataSpec, spec: ReconstructConfig) -> ReconstructFacts:
    """Repair the pruned weights layer by layer; an interrupted run resumes at the next layer."""
    plan = work.plan
    batches = inputs.calibration_batches(work.tokens, data, spec, work.config(work.start), seed=spec.seed)
    settings = affecting("reconstruct", {"model": work.model, "data": data, "reconstruct": spec})
    with work.phase("reconstruct", layers_to_solve(plan)) as progress:
        model, reports = reconstruct(
            work.load(work.start, by_layer=True),
            plan,
            work.load(work.teacher, by_layer=True),
            batches,
            spec,
            progress=progress,
            cache=ArrayCache(work.folder / ".reconstructed.parts", {"settings": settings}),
        )
    work.save(model)
    modules = msgspec.convert(reports, list[Repaired])
    changed = [module for module in modules if module.ridge is not None]
    if changed:
        before, after = (
            sum(getattr(module, f"error_{when}") for module in changed) / len(changed) for when in ("before", "after")
        )
        work.say(
            f"  {len(changed)} of {len(modules)} weights repaired; mean error of the residual stream on held-out "
            f"records: {before:.3f} before the repair, {after:.3f} after it"
        )
    else:
        work.say(f"  none of {len(modules)} weights was changed: no change reduces the error on held-out records")
    scarce = [module for module in modules if module.tokens < module.unknowns]
    if scarce:
        work.say(
            f"  {scarce[0].tokens:,} calibration tokens are few for {len(scarce)} weights with "
            f"{scarce[0].unknowns:,} inputs: raise reconstruct.samples for a better repair"
        )
    return ReconstructFacts(samples=spec.samples, modules=modules)


def recover_task(task: Task, work: Work, data: DataSpec, spec: RecoverConfig) -> Task:
    """Add the recover stage's extra files: users' loss files, the adapter, cached teacher outputs."""
    losses = recover_config(spec).losses
    loss_files = {f"loss {name}": term.file for name, term in terms_of(losses).items()}
    return task.add(
        inputs={name: path for name, path in loss_files.items() if path is not None},
        outputs=[work.folder / "adapter"] if spec.save_adapter else [],
        settings={"recover.teacher_top_k": losses.teacher_top_k},  # 0 if no teacher is cached
    )


def recover_stage(work: Work, data: DataSpec, spec: RecoverConfig) -> RecoverFacts:
    """Train the pruned or reconstructed model, logging to `training/metrics.jsonl`."""
    recovery = Recovery(work, data, spec)
    model, summary = recovery.train()
    work.save(model)
    return msgspec.convert(plain({**summary, "records": len(recovery.records), "recovery": spec.name}), RecoverFacts)


class Recovery:
    """Recovery of a pruned model, whose settings and data are checked before long computations.

    `student`, `teacher`: both models, with weights in files. `program`: training step, whose groups name the trained
    parameters. `runs_teacher`: True if the loss needs the teacher during training.
    """

    def __init__(self, work: Work, data: DataSpec, spec: RecoverConfig):
        config, self.work, self.data, self.spec, self.plan = recover_config(spec), work, data, spec, work.plan
        self.student, self.teacher = map(work.open_model, (work.start, work.teacher))
        cfg = self.student.cfg
        if spec.save_adapter:
            check_adapters(cfg, spec.lora.targets)
        self.runs_teacher = needs_teacher(config.losses)
        if self.runs_teacher or config.losses.teacher_top_k:  # another model would teach without complaint
            with error_context(work.start.with_name("plan.json")):
                check_plan_is_for(self.teacher, self.plan)
                cut = [name for name, kept in self.plan.stacks.items() if not kept.is_whole]
                if cut == ["vision"] and config.losses.teacher_inputs == "student":
                    raise UserError(
                        "the plan prunes only the vision tower, so a teacher with the student's image embeddings "
                        'equals the student: set recover.losses.teacher_inputs="own"'
                    )
        shared = inputs.load_inputs(work.tokens, data, cfg)
        self.encoder, self.records = shared.training_encoder(cfg), inputs.recovery_records(data, shared.template)
        self.config = config = config.fit_records(len(self.records), row_ways(work.devices))
        if config.batch_size != spec.batch_size:
            work.say(
                f"  batches have {config.batch_size} rows instead of recover.batch_size={spec.batch_size}, because "
                f"there are only {len(self.records)} training records in {spec.epochs:g} epochs"
            )
        if data.feature_cache is not None:
            check_frozen(cfg, config)
        self.steps = config.num_steps(len(self.records))
        taught = trim_vocabulary(self.teacher, self.plan.vocabulary) if self.runs_teacher else None
        self.program = make_program(
            self._trained_cfg(self.student),
            config,
            teacher_cfg=None if taught is None else self._trained_cfg(taught),
            kept_layers=self.plan.kept_layers,
            mesh=work.devices,
            num_steps=self.steps,
        )

    def _trained_cfg(self, model: Model) -> ModelConfig:
        """Return the config of a model as it trains: without its tower if the features are cached."""
        return dataclasses.replace(model.cfg, tower=model.cfg.tower and self.data.feature_cache is None)

    def train(self) -> tuple[Model, dict[str, Any]]:
        """Train a model; return it with merged adapters, and the run's summary.

        Raises UserError if no weight changed.
        """
        data, config, work, training = self.data, self.config, self.work, self.work.folder / "training"
        on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
        rows, features = inputs.training_rows(data, self.encoder, self.records, work.reporter.bar), None
        if data.feature_cache is not None:
            features = self.cached_features(rows)
            rows = dataclasses.replace(rows, encoder=dataclasses.replace(rows.encoder, image_loader=features))
        parts = [part for part in PARTS if features is None or part != TOWER]
        taught = self.cached_teacher(rows, parts) if config.losses.teacher_top_k else None
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
            teacher=work.load(work.teacher, parts) if self.runs_teacher else None,
            plan=self.plan,
            workdir=training,
            mesh=work.devices,
            progress=work.reporter.enabled,
            num_steps=self.steps,
            program=self.program,
        )
        if summary["skipped_rows"]:
            work.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
        if features is not None:
            tower = self.student.params[TOWER]
            model = model.replace(params={**model.params, TOWER: tower}, cfg=dataclasses.replace(model.cfg, tower=True))
        merged = merge_lora(model)
        if unchanged(student, merged, self.program.groups):
            raise UserError(
                f"recover: training changed no weight of {work.start.name} ({self.steps} steps of "
                f"{config.batch_size} rows, {len(self.records)} records, learning rate {config.learning_rate:g}, last "
                f"gradient norm {summary['last'].get('grad_norm', np.nan):g}, {work.model.dtype}): raise "
                "recover.learning_rate, recover.epochs or recover.steps, or train parameters that these records use "
                "(recover.trainable)"
            )
        if self.spec.save_adapter:
            write_adapter(model, work.folder / "adapter", base_dir=work.start, trained=self.program.groups)
        return merged, summary

    def cached_features(self, rows: inputs.TrainingRows) -> FeatureLoader:
        """Open the vision feature cache, and compute the features of images that are not in the cache yet.

        Training then needs neither the vision tower nor the images.

        Raises:
          UserError: the teacher's tower differs, the cache was made with another tower or is not writable, or an image
            cannot be read.
          Stopped: on SIGTERM; features computed so far stay in the cache.
        """
        data, config, work, images = self.data, self.config, self.work, self.encoder.image_loader
        assert isinstance(images, ImageLoader)  # there is a tower
        cfg = self.student.cfg
        made_from = {"digest": on_process_zero(self._tower_digest), "dtype": work.model.dtype}
        identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
        shape = cfg.feature_shape[1:] if cfg.dynamic_resolution else cfg.feature_shape
        dtype: np.dtype = DTYPES[config.compute_dtype]
        loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache or ""), identity), shape, dtype)

        def program() -> Compute:
            return feature_program(work.load(work.start, (TOWER,)).params[TOWER], cfg, loader, work.devices)

        self._fill(loader, rows, "image features", program)
        return loader

    def _fill(self, arrays: RecordCache, rows: inputs.TrainingRows, what: str, program: Callable[[], Compute]) -> None:
        """Compute the arrays of records that are not cached yet; `program` loads the model that computes them."""
        size, work = self.config.batch_size // self.config.accumulation, self.work
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
                threads=self.data.threads,
                on_error=self.data.on_error,
                mesh=work.devices,
                progress=progress,
            )

    def _tower_digest(self) -> str:
        """Return a digest of the vision tower that produces cached features."""
        losses, work = self.config.losses, self.work
        digest_of_student = content_digest(self.student, f"{TOWER}/")
        looks = losses.teacher_inputs == "own" and (self.runs_teacher or losses.teacher_top_k)
        if looks and content_digest(self.teacher, f"{TOWER}/") != digest_of_student:
            raise UserError(
                f"data.feature_cache: {work.teacher} and {work.start} have different vision towers: unset it "
                'or use losses.teacher_inputs="student"'
            )
        return digest_of_student

    def cached_teacher(self, training: inputs.TrainingRows, parts: Sequence[str]) -> TeacherRows:
        """Open the teacher cache, and compute teacher outputs for records that are not in the cache yet.

        The batches do not depend on the cache's content, so that an interrupted pass ends with the same bytes.

        Raises:
          UserError: the cache was made with another teacher or other settings, or the disk is too small.
          Stopped: on SIGTERM; outputs computed so far stay in the cache.
        """
        data, config, loss, work = self.data, self.config, self.config.losses, self.work
        cache = ArrayCache(
            Path(self.spec.teacher_cache or ""),
            on_process_zero(lambda: _made_from(work.model, data, self.spec, self.plan.vocabulary)),
        )
        dtype, vocab_size = np.dtype(config.compute_dtype), self.student.cfg.text.vocab_size
        rows = TeacherRows(cache, loss.teacher_top_k, loss.kl_positions, dtype, vocab_size)

        def program() -> Compute:
            teacher = trim_vocabulary(work.load(work.teacher, parts), self.plan.vocabulary)
            return teacher_program(teacher, rows, loss, compute_dtype=config.compute_dtype, mesh=work.devices)

        self._fill(rows, training, f"teacher's top-{rows.top_k} logits", program)
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
