"""From an experiment's sections to the typed arguments of library functions."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmprune_jax.config import LoraConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.experiment.spec import PruneSpec, RecoverSpec
from vlmprune_jax.recovery import LossConfig, RecoverConfig


def plan_options(spec: PruneSpec) -> dict[str, Any]:
    """`make_plan` keywords: only what differs from the defaults, so that it can refuse what a method does not have."""
    default = PruneSpec()
    skipped = ("method", "ratio", "layers_removed", "steps")
    changed = {k: v for k, v in vars(spec).items() if k not in skipped and v != getattr(default, k)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def recover_config(spec: RecoverSpec) -> RecoverConfig:
    """The training loop's settings; adapters only where "lora" trains.

    Raises:
      UserError: `save_adapter` without adapters, losses that cannot be had from a cached teacher.
    """
    if spec.save_adapter and spec.trainable != "lora":
        raise UserError(
            f'recover.save_adapter: recover.trainable={spec.trainable!r} trains no adapter: set it to "lora", or leave '
            "save_adapter out"
        )
    skipped = ("name", "lora", "losses", "epochs", "save_adapter", "teacher_cache", "teacher_top_k")
    values = {k: v for k, v in vars(spec).items() if k not in skipped}
    lora = LoraConfig(**vars(spec.lora)) if spec.trainable == "lora" else None
    epochs = spec.epochs if spec.steps is None else None
    losses = LossConfig(**vars(spec.losses))
    if spec.teacher_cache is not None and losses.needs_teacher:
        losses = dataclasses.replace(losses, teacher_top_k=spec.teacher_top_k)
    return RecoverConfig(**values, epochs=epochs, lora=lora, losses=losses, merge_lora=not spec.save_adapter)
