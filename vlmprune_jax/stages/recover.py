"""Pruned model + training records -> `recovered/`."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict

from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.files import Count
from vlmprune_jax.data import inputs
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.experiment.arguments import recover_config
from vlmprune_jax.experiment.spec import Experiment, affecting
from vlmprune_jax.models.params import flatten
from vlmprune_jax.prune import KeptStack, PrunePlan
from vlmprune_jax.prune.surgery import check_plan_is_for
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.loop import recover
from vlmprune_jax.recovery.objective import needs_teacher, weighted_terms
from vlmprune_jax.recovery.peft import write_adapter
from vlmprune_jax.recovery.trainable import assign_groups, merge_lora
from vlmprune_jax.stages.context import (
    Context,
    mesh_of,
    model_inputs,
    open_folder,
    save_model,
    teacher_folder,
)
from vlmprune_jax.stages.feature_cache import cached_features, load_for_training, with_tower
from vlmprune_jax.stages.reconstruct import cut_folder
from vlmprune_jax.stages.teacher_cache import cached_teacher
from vlmprune_jax.workdir.ledger import Json, remove


class _Facts(TypedDict):
    """Of what `recover` sums up those that a result tells; `terms` are not there in records of older versions."""

    steps: Count
    records: Count
    recovery: str
    terms: NotRequired[dict[str, str]]


def recover_stage(experiment: Experiment, prune_folder: Path, folder: Path, context: Context) -> Json:
    """Pruned model + training records -> `recovered/`; curves stay in `training/metrics.jsonl`."""
    pruned, training = cut_folder(experiment, prune_folder), folder / "training"
    if not pruned.is_dir():
        before = "prune" if pruned.name == "pruned" else "reconstruct"
        raise UserError(f"{pruned}: no such folder: run `vlmprune {before}` (or `vlmprune run`) first")
    model_spec, data, spec = experiment.model, experiment.data, experiment.recover
    config = recover_config(spec)
    settings = affecting("recover", experiment)
    settings["recover.teacher_top_k"] = config.losses.teacher_top_k  # 0 where no teacher is cached
    files = {f"loss {name}": term.file for name, term in weighted_terms(config.losses).items()}
    own = {name: path for name, path in files.items() if path is not None}
    stage = context.stage(
        "recover",
        folder,
        "recover",
        settings=settings,
        inputs=model_inputs(model_spec, pruned=pruned, **inputs.record_files(data, "train"), **own),
        outputs=[folder / "recovered", *([folder / "adapter"] if spec.save_adapter else [])],
        scratch=[training / "checkpoints"],
        facts=_Facts,
    )

    def body() -> Json:
        on_process_zero(lambda: None if (training / "checkpoints").exists() else remove(training))
        plan = PrunePlan.from_json(prune_folder / "plan.json")
        if needs_teacher(config.losses) or config.losses.teacher_top_k:  # another model would teach without complaint
            with error_context(prune_folder / "plan.json"):
                check_plan_is_for(open_folder(model_spec, teacher_folder(model_spec)), plan)
                _check_teacher_differs(plan, config)
        features = cached_features(model_spec, data, experiment.mesh, config, plan, pruned, context)
        taught = cached_teacher(experiment, config, context, features) if config.losses.teacher_top_k else None
        student, teacher = load_for_training(model_spec, experiment.mesh, config, pruned, features)
        batches, n_records = inputs.recovery_batches(
            model_spec,
            data,
            student.cfg,
            context.reporter.bar,
            batch_size=config.batch_size,
            seed=config.seed,
            features=features,
            teacher=taught,
        )
        model, summary = recover(
            student,
            batches,
            config,
            teacher=teacher,
            plan=plan,
            workdir=training,
            mesh=mesh_of(experiment.mesh),
            progress=context.reporter.enabled,
            num_steps=config.num_steps(n_records),
        )
        if summary["skipped_rows"]:
            context.reporter.say(f"  {summary['skipped_rows']:,} rows skipped, listed in {training}/skipped-*.jsonl")
        model = with_tower(model, model_spec, pruned)
        if spec.save_adapter:
            trained = assign_groups(list(flatten(model.params)), config.trainable)
            write_adapter(model, folder / "adapter", base_dir=pruned, trained=trained)
            model = merge_lora(model)
        solved = experiment.reconstruct.method != "none"
        save_model(model, folder / "recovered", model_spec, pruned, plan, reconstructed=solved)
        return {**summary, "records": n_records, "recovery": spec.name}

    return context.run(stage, body)


def _check_teacher_differs(plan: PrunePlan, config: RecoverConfig) -> None:
    """Refuse a teacher that is the student's own decoder, fed with the student's own images: it has nothing to teach.

    Raises:
      UserError: it is.
    """
    cut = [name for name, kept in plan.stacks.items() if kept != KeptStack.whole(kept.layers_before)]
    if cut == ["vision"] and config.losses.teacher_inputs == "student":
        raise UserError(
            "the plan cuts nothing but the vision tower, so a teacher that sees the student's embeddings is the "
            'student: set recover.losses.teacher_inputs="own"'
        )
