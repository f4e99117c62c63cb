"""Width pruning in several steps, with scores of the smaller model before each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.select import Trim, plan_layers
from vlmprune_jax.core.prune.surgery import apply_plan, plan_since_loading, trim_vocabulary


def prune_in_steps(
    model: Model,
    batches: Callable[[int], Iterable[Any]],
    config: PlanConfig,
    trim: Trim,
    score: Callable[[Model, Iterable[Any]], Scores],
    scores: Scores | None,
) -> tuple[Model, PrunePlan, tuple[Scores, ...]]:
    """Return the pruned model, one plan for all steps, and the scores of every step.

    Step k of K aims at k/K of the target, always relative to the original model. Under a budget, it aims at k/K of the
    ratio that satisfies the budget with the first scores, and the last step aims at the budget itself. `batches`
    returns the calibration batches of step k = 0, 1, ...; `scores` are those of `model` for the first step, if known.
    """
    steps = config.steps
    total = config.parameters_total or count_params(model.cfg)
    ratio = trim.share_left(config, total)
    current, used = model.replace(plan=None), list[Scores]()
    for k in range(1, steps + 1):
        if k > 1 or scores is None:
            scores = score(current, batches(k - 1))
        used.append(scores)
        if config.budget.limits and k == 1:
            ratio = plan_layers(scores, model.cfg, config, None, trim.cfg).actual_ratio
        step = _step_of(config, ratio, k, steps, model.cfg)
        costed = current.cfg if trim.vocabulary is None else trim.vocabulary.apply_to(current.cfg)
        now = plan_layers(scores, current.cfg, step, step.ratio, costed)
        current = apply_plan(current, now)
    recorded = {**now.options, **used[0].options, "steps": steps, "sparsity": config.sparsity}
    steps_plan = current.plan
    assert steps_plan is not None  # by `apply_plan`
    plan = trim.attach(
        dataclasses.replace(steps_plan, target_ratio=config.ratio, parameters_total=total, options=recorded)
    )
    pruned = trim_vocabulary(current, trim.vocabulary).replace(plan=plan_since_loading(model, plan))
    return pruned, plan, tuple(used)


def _step_of(config: PlanConfig, ratio: float | None, k: int, steps: int, unpruned: ModelConfig) -> PlanConfig:
    """Return the settings of step k, whose target is k/steps of the final target."""
    last = k == steps and bool(config.budget.limits)
    return dataclasses.replace(
        config,
        base=unpruned,
        ratio=None if ratio is None or last else ratio * k / steps,
        budget=config.budget if last else Budget(),
        sparsity=None if config.sparsity is None else config.sparsity * k / steps,
    )
