"""Pruned model + training records -> `recovered/`."""

from __future__ import annotations

import msgspec

from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.files import Count, Finite
from vlmprune_jax.data import inputs
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.experiment.arguments import recover_config
from vlmprune_jax.experiment.spec import RecoverSpec
from vlmprune_jax.models.params import flatten
from vlmprune_jax.prune import KeptStack, PrunePlan
from vlmprune_jax.prune.surgery import check_plan_is_for
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.loop import recover
from vlmprune_jax.recovery.objective import needs_teacher, weighted_terms
from vlmprune_jax.recovery.peft import write_adapter
from vlmprune_jax.recovery.trainable import assign_groups, merge_lora
from vlmprune_jax.stages.feature_cache import cached_features, load_for_training, with_tower
from vlmprune_jax.stages.stage import Files
from vlmprune_jax.stages.teacher_cache import cached_teacher
from vlmprune_jax.stages.work import Work
from vlmprune_jax.workdir.content import plain
from vlmprune_jax.workdir.ledger import remove


class RecoverFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of a training. `terms`: {loss term: its label}; `last`: metrics of the last step."""

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
    """The files of the user's own losses, the adapter if it is saved, and what is cached of the teacher."""
    losses = recover_config(spec).losses
    own = {f"loss {name}": term.file for name, term in weighted_terms(losses).items()}
    return Files(
        inputs={name: path for name, path in own.items() if path is not None},
        outputs=[work.folder / "adapter"] if spec.save_adapter else [],
        settings={"recover.teacher_top_k": losses.teacher_top_k},  # 0 if no teacher is cached
    )


def recover_stage(work: Work, data: DataSpec, spec: RecoverSpec) -> RecoverFacts:
    """Train the model that pruning or reconstruction left; metrics stay in `training/metrics.jsonl`."""
    config, plan, training = recover_config(spec), work.plan, work.folder / "training"
    on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
    if needs_teacher(config.losses) or config.losses.teacher_top_k:  # another model would teach without complaint
        with error_context(work.variant / "plan.json"):
            check_plan_is_for(work.open_model(work.teacher), plan)
            _check_teacher_differs(plan, config)
    features = cached_features(work, data, config, plan)
    rows = cached_teacher(work, data, spec, config, features) if config.losses.teacher_top_k else None
    student, teacher = load_for_training(work, config, features)
    batches, n_records = inputs.recovery_batches(
        work.model,
        data,
        student.cfg,
        work.reporter.bar,
        batch_size=config.batch_size,
        seed=config.seed,
        features=features,
        teacher=rows,
    )
    model, summary = recover(
        student,
        batches,
        config,
        teacher=teacher,
        plan=plan,
        workdir=training,
        mesh=work.devices,
        progress=work.reporter.enabled,
        num_steps=config.num_steps(n_records),
    )
    if summary["skipped_rows"]:
        work.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
    model = with_tower(model, work)
    if spec.save_adapter:
        trained = assign_groups(list(flatten(model.params)), config.trainable)
        write_adapter(model, work.folder / "adapter", base_dir=work.start, trained=trained)
        model = merge_lora(model)
    work.save(model)
    return msgspec.convert(plain({**summary, "records": n_records, "recovery": spec.name}), RecoverFacts)


def _check_teacher_differs(plan: PrunePlan, config: RecoverConfig) -> None:
    """Refuse a teacher that equals the student: the decoder is unpruned and sees the student's own image embeddings.

    Raises:
      UserError: it does.
    """
    cut = [name for name, kept in plan.stacks.items() if kept != KeptStack.whole(kept.layers_before)]
    if cut == ["vision"] and config.losses.teacher_inputs == "student":
        raise UserError(
            "the plan cuts only the vision tower, so a teacher that sees the student's image embeddings equals the "
            'student: set recover.losses.teacher_inputs="own"'
        )
