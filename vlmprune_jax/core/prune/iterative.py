"""Width pruning in several steps, with scores of the smaller model before each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.plans.kept import KeptVocabulary
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.select import merge_scores, plan_units, share_left, trimmed_config, trimmed_plan
from vlmprune_jax.core.prune.surgery import apply_plan, plan_since_loading, trim_vocabulary


def prune_in_steps(
    model: Model,
    batches: Callable[[int], Iterable[Any]],
    config: PlanConfig,
    vocabulary: KeptVocabulary | None,
    score: Callable[[Model, Iterable[Any]], Scores],
    scores: Scores | None,
) -> tuple[Model, PrunePlan, tuple[Scores, ...]]:
    """Return the pruned model, one plan for all steps, and the scores of every step.

    Step k of K aims at k/K of the target, always relative to the original model. Under a budget, it aims at k/K of the
    ratio that satisfies the budget with the first scores, and the last step aims at the budget itself. `batches`
    returns the calibration batches of step k = 0, 1, ...; `scores` are those of `model` for the first step, if known.
    """
    steps, total = config.steps, config.parameters_total or count_params(model.cfg)
    ratio = share_left(trimmed_plan(model.cfg, "", vocabulary, ()), config, total)
    current, used = model.replace(plan=None), list[Scores]()
    for k in range(1, steps + 1):
        if k > 1 or scores is None:
            scores = score(current, batches(k - 1))
        used.append(scores)
        merged = merge_scores(scores, config.method)
        whole = trimmed_plan(current.cfg, merged.fingerprint, None, merged.components)
        costed = trimmed_config(current.cfg, vocabulary)
        if config.budget.limits and k == 1:
            ratio = plan_units(merged, whole, current.cfg, config, None, costed).actual_ratio
        last = k == steps and bool(config.budget.limits)
        step = dataclasses.replace(
            config,
            base=model.cfg,
            ratio=None if ratio is None or last else ratio * k / steps,
            budget=config.budget if last else Budget(),
            sparsity=None if config.sparsity is None else config.sparsity * k / steps,
        )
        plan = plan_units(merged, whole, current.cfg, step, step.ratio, costed)
        current = apply_plan(current, plan)
    assert current.plan is not None  # by `apply_plan`
    recorded = {**plan.options, **used[0].options, "steps": steps, "sparsity": config.sparsity}
    plan = dataclasses.replace(current.plan, target_ratio=config.ratio, parameters_total=total, options=recorded)
    plan = plan.trimming(vocabulary)
    plan = dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(model.cfg)))
    pruned = trim_vocabulary(current, vocabulary).replace(plan=plan_since_loading(model, plan))
    return pruned, plan, tuple(used)
