"""From an experiment's sections to the typed arguments of library functions."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmprune_jax.errors import UserError
from vlmprune_jax.experiment.spec import PruneSpec, RecoverSpec
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.losses import check_losses, needs_teacher


def plan_options(spec: PruneSpec) -> dict[str, Any]:
    """`make_plan` keywords: only what differs from the defaults, so that it can refuse what a method does not have."""
    default = PruneSpec()
    skipped = ("method", "ratio", "layers_removed", "steps")
    changed = {k: v for k, v in vars(spec).items() if k not in skipped and v != getattr(default, k)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def recover_config(spec: RecoverSpec) -> RecoverConfig:
    """The training loop's settings, with those of the library alone that the others decide.

    Raises:
      UserError: `save_adapter` without adapters, losses that do not exist or cannot be had from a cached teacher.
    """
    if spec.save_adapter and spec.adapters is None:
        raise UserError(
            f'recover.save_adapter: recover.trainable={spec.trainable!r} trains no adapter: set it to "lora", or leave '
            "save_adapter out"
        )
    losses = spec.losses
    if spec.teacher_cache is not None and needs_teacher(losses):
        losses = dataclasses.replace(losses, teacher_top_k=spec.teacher_top_k)
    check_losses(losses)
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(RecoverConfig)}
    return RecoverConfig(**{**values, "losses": losses, "merge_lora": not spec.save_adapter})
