"""Width pruning in several steps, with scores of the smaller model before each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.params import count_params
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune.plan import PrunePlan, compose
from vlmprune_jax.prune.scores import Scores
from vlmprune_jax.prune.scoring import score
from vlmprune_jax.prune.select import make_plan
from vlmprune_jax.prune.surgery import apply_plan


def prune_iteratively(
    model: Model,
    batches: Callable[[int], Iterable[Any]],
    *,
    steps: int,
    criterion: str,
    scores: Scores | None = None,
    stack: str = "text",
    score_options: Mapping[str, Any] | None = None,
    ratio: float | None = None,
    sparsity: float | None = None,
    budget: Mapping[str, Any] | None = None,
    **plan_options: Any,
) -> tuple[Model, PrunePlan, tuple[Scores, ...]]:
    """Reach a width ratio (or the reference's sparsity, or a budget) in equal steps: score, plan, apply, and again.

    Step k of K aims at k/K of the target, always relative to the model as it came in; of a budget, at k/K of the ratio
    that the first scores lead to, and the last step at the budget itself.

    Args:
      batches: calibration batches of step k = 0, 1, ...
      scores: those of `model`, for the first step, where they are there already.
      stack: whose heads and neurons go, as in `score`.
      score_options, plan_options: as for `score` and `make_plan(method="width")`.

    Returns:
      The pruned model, one plan that leads from `model` to it, and the scores of every step.

    Raises:
      UserError: as `score` and `make_plan`; steps < 1.
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    current, plan, used = model, None, list[Scores]()
    for k in range(1, steps + 1):
        if k > 1 or scores is None:
            scores = score(current, batches(k - 1), criterion=criterion, stack=stack, **(score_options or {}))
        used.append(scores)
        if budget is not None and k == 1:
            ratio = make_plan(scores, model.cfg, method="width", budget=budget, **plan_options).reached
        within = budget if k == steps else None
        now = make_plan(
            scores,
            current.cfg,
            method="width",
            base=model.cfg,
            ratio=None if ratio is None or within is not None else ratio * k / steps,
            budget=within,
            sparsity=None if sparsity is None else sparsity * k / steps,
            **plan_options,
        )
        current = apply_plan(current, now)
        plan = now if plan is None else compose(plan, now)
    assert plan is not None
    options = {**plan_options, **(score_options or {}), "steps": steps, "sparsity": sparsity}
    options |= {name: now.options[name] for name in ("budget", "budget_reached") if name in now.options}
    total = plan_options.get("parameters_total") or count_params(model.cfg)
    asked = ratio if budget is None else None
    return current, dataclasses.replace(plan, asked=asked, parameters_total=total, options=options), tuple(used)
