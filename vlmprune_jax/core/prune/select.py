"""From scores to a plan: layers, heads and neurons whose removal reaches the requested share of all parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import check_loads, keeps_heads
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.kept import KeptStack, KeptVocabulary
from vlmprune_jax.core.plans.plan import VOCABULARY_ONLY, PrunePlan, keep_everything
from vlmprune_jax.core.prune.config import METHOD_TARGETS, PlanConfig, VocabularyConfig
from vlmprune_jax.core.prune.cost import least_ratio, make_measure
from vlmprune_jax.core.prune.depth import check_listed, choose_layers
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.prune.layer_costs import layer_costs
from vlmprune_jax.core.prune.scores import Scores, fits_model
from vlmprune_jax.core.prune.width import Kept, choose_widths, kept_layer, pruned_layer

LISTED = "listed layers"  # in place of a criterion, in plans that remove the layers of `prune.layers`
# Settings with layer numbers or counts, which fit one stack only.
OF_ONE_STACK = ("layers_removed", "layers", "protect", "attn_layers", "mlp_layers")


def plan_without_scores(trim: Trim, fingerprint: str, cfg: ModelConfig, config: PlanConfig) -> PrunePlan:
    """Return a plan that trims the vocabulary and removes the layers in `config.layers`.

    Raises UserError if one of these layers cannot be removed.
    """
    plan, stacks = keep_everything(cfg, fingerprint, count_params(cfg)), {"text": KeptStack.whole(cfg.text.layers)}
    engines = {"loads_in": list(config.loads_in), "tensor_parallel": config.tensor_parallel} if config.loads_in else {}
    plan = dataclasses.replace(plan, method=VOCABULARY_ONLY, stacks=stacks, options=engines)
    if config.layers:
        if config.stack == "both":
            raise UserError('prune.layers lists layers of one stack: set prune.stack to "text" or "vision"')
        check_listed(cfg, config)
        layers = cfg.stack(config.stack).layers
        kept = tuple(kept_layer(i, {}, layer) for i, layer in enumerate(layers) if i not in config.layers)
        stacks = {**stacks, config.stack: KeptStack(tuple(layer.sizes for layer in layers), kept)}
        options = _recorded(config, cfg)
        plan = dataclasses.replace(plan, method=config.method, criterion=LISTED, stacks=stacks, options=options)
        plan = dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(cfg)))
    plan = trim.attach(plan)
    check_loads(plan.apply_to(cfg), config.loads_in)
    return plan


def plan_beside(trim: Trim, scores: Scores | tuple[Scores, Scores], cfg: ModelConfig, config: PlanConfig) -> PrunePlan:
    """Return a plan that trims the vocabulary, then removes layers, heads and neurons up to the ratio."""
    share = trim.share_left(config, config.parameters_total or count_params(config.base or cfg))
    plan = trim.attach(plan_layers(scores, cfg, config, share, trim.cfg))
    check_loads(plan.apply_to(cfg), config.loads_in)
    return plan


def plan_layers(
    scores: Scores | tuple[Scores, Scores],
    cfg: ModelConfig,
    config: PlanConfig,
    share: float | None,
    costed: ModelConfig,
) -> PrunePlan:
    """Return a plan that removes `share` of all parameters from layers, heads and neurons.

    `costed`: the config with the kept tokens only; budgets limit the cost of this model.
    """
    depth, width = _pair(scores, config.method)
    used = [method_scores for method_scores in (depth, width) if method_scores is not None]
    stack = used[0].components[0]
    layers = cfg.stack(stack).layers
    _check_scores(used, cfg, stack)
    before = count_params(cfg)
    unpruned = count_params(config.base or cfg)
    total = config.parameters_total or unpruned
    if config.heads == "auto" and keeps_heads(cfg, stack, config.loads_in):
        config = dataclasses.replace(config, heads="keep")
    request = _Request(costed, depth, width, config, total, stack)
    share, within = request.fit_budget() if config.budget.limits else (share, {})
    kept, solved = request.decide(share)
    pruned = KeptStack(
        tuple(layer.sizes for layer in layers), tuple(kept_layer(i, units, layers[i]) for i, units in kept.items())
    )
    cost = layer_costs(cfg, stack).of
    gone = sum(map(cost, layers)) - sum(map(cost, pruned.of(layers)))
    return PrunePlan(
        fingerprint=used[0].fingerprint,
        method=config.method,
        criterion=" + ".join(method_scores.name for method_scores in used),
        stacks={"text": KeptStack.whole(cfg.text.layers), stack: pruned},
        parameters_before=before,
        parameters_after=before - gone,
        parameters_total=total,
        # earlier steps from `base` have removed a part of the ratio
        target_ratio=None if config.ratio is None else config.ratio - (unpruned - before) / total,
        options={**_recorded(config, cfg), **solved, **within},
    )


@dataclass(frozen=True)
class Trim:
    """Kept vocabulary, the model config after trimming, and the number of parameters that trimming removes."""

    vocabulary: KeptVocabulary | None
    cfg: ModelConfig
    parameters: int

    @classmethod
    def of(cls, vocabulary: KeptVocabulary | None, cfg: ModelConfig) -> Trim:
        """Return the trimming of the vocabulary to the kept tokens; for None, the trimming that keeps all tokens."""
        trimmed = cfg if vocabulary is None else vocabulary.apply_to(cfg)
        return cls(vocabulary, trimmed, count_params(cfg) - count_params(trimmed))

    def share_left(self, config: PlanConfig, total: int) -> float | None:
        """Return the share of all parameters still to remove from layers, heads and neurons; None without a ratio."""
        if config.ratio is not None:
            return config.ratio if self.vocabulary is None else max(config.ratio - self.parameters / total, 0.0)
        return 0.0 if all(getattr(config, name) in (None, ()) for name in METHOD_TARGETS[config.method]) else None

    def attach(self, plan: PrunePlan) -> PrunePlan:
        """Return the plan with the kept vocabulary added to it."""
        # not a sum: a removed layer of Gemma 4 has a part of every row
        after = plan.parameters_after if self.vocabulary is None else count_params(plan.apply_to(self.cfg))
        return dataclasses.replace(plan, vocabulary=self.vocabulary, parameters_after=after)


def plan_stacks(
    scores: Sequence[Scores | tuple[Scores, Scores]], cfg: ModelConfig, config: PlanConfig, trim: Trim
) -> PrunePlan:
    """Return a plan for several stacks at once, which removes the same share of layer parameters from each.

    Raises UserError for a setting with layer numbers.
    """
    named = [name for name in OF_ONE_STACK if getattr(config, name)]
    if named:
        raise UserError(
            f"{', '.join(named)}: cannot be used for both stacks at once: prune decoder and vision tower one after "
            "the other"
        )
    config.check()
    total = config.parameters_total or count_params(cfg)

    def plan_at(share: float | None) -> PrunePlan:
        """Return the plan that removes this share of all parameters from the stacks together."""
        alone = dataclasses.replace(config, ratio=share, budget=Budget(), vocabulary=VocabularyConfig())
        return dataclasses.replace(trim.attach(_plan_each(scores, cfg, alone, total)), target_ratio=config.ratio)

    if not config.budget.limits:
        return plan_at(trim.share_left(config, total))
    limits = config.budget
    measure = make_measure(trim.cfg, limits)
    ratio, reached = least_ratio(limits, measure, lambda share: plan_at(share).apply_to(cfg), total)
    plan = plan_at(ratio)
    return dataclasses.replace(plan, options={**plan.options, "budget": limits.given, "budget_reached": reached})


def _plan_each(
    scores: Sequence[Scores | tuple[Scores, Scores]], cfg: ModelConfig, config: PlanConfig, total: int
) -> PrunePlan:
    """Return one plan that removes the same share of layer parameters from each of several stacks."""
    stacks = [
        stack_scores.components[0] if isinstance(stack_scores, Scores) else stack_scores[0].components[0]
        for stack_scores in scores
    ]
    sizes = {stack: sum(map(layer_costs(cfg, stack).of, cfg.stack(stack).layers)) for stack in stacks}
    plans = {}
    for stack, stack_scores in zip(stacks, scores, strict=True):
        share = None if config.ratio is None else config.ratio * sizes[stack] / sum(sizes.values())
        of_stack = dataclasses.replace(config, ratio=share, parameters_total=total)
        plans[stack] = plan_beside(Trim.of(None, cfg), stack_scores, cfg, of_stack)
    first, *others = plans.values()
    return dataclasses.replace(
        first,
        criterion=" and ".join(dict.fromkeys(plan.criterion for plan in plans.values())),
        stacks={stack: plan.stacks[stack] for stack, plan in plans.items()},
        parameters_after=first.parameters_after - sum(p.parameters_before - p.parameters_after for p in others),
        options={stack: dict(plan.options) for stack, plan in plans.items()},
    )


@dataclass(frozen=True)
class _Request:
    """Inputs of a plan except the ratio: scores, model config and settings."""

    cfg: ModelConfig
    depth: Scores | None
    width: Scores | None
    config: PlanConfig
    total: int
    stack: str

    def decide(self, ratio: float | None) -> tuple[dict[int, Kept], Mapping[str, Any]]:
        """Return the kept units of every kept layer at this ratio, and the width solver's result."""
        cfg, config, stack, total = self.cfg, self.config, self.stack, self.total
        removed: tuple[int, ...] = ()
        if self.depth is not None:
            removed = choose_layers(self.depth, cfg, ratio, config, total, stack)
        alive = [i for i in range(len(cfg.stack(stack).layers)) if i not in removed]
        if self.width is None:
            return {i: {} for i in alive}, {}
        return choose_widths(self.width, cfg, alive, ratio, config, total, stack)

    def fit_budget(self) -> tuple[float, dict[str, Any]]:
        """Return the smallest ratio that satisfies the budget, and the plan's options `budget` and `budget_reached`."""
        budget = self.config.budget
        ratio, reached = least_ratio(budget, make_measure(self.cfg, budget), self.config_at, self.total)
        return ratio, {"budget": budget.given, "budget_reached": reached}

    def config_at(self, ratio: float) -> ModelConfig:
        """Return the config of the model pruned at this ratio."""
        layers = self.cfg.stack(self.stack).layers
        kept, _ = self.decide(ratio)
        return self.cfg.with_layers([pruned_layer(units, layers[i]) for i, units in kept.items()], self.stack)


def _check_scores(used: list[Scores], cfg: ModelConfig, stack: str) -> None:
    if any(not method_scores.fingerprint.startswith(shape_digest(cfg)) for method_scores in used):
        raise UserError("these scores are for another model (their shapes do not match this config): score this model")
    for scores in used:
        if not fits_model(scores.values, cfg):
            raise UserError(f"{scores.criterion} scores do not match the {stack} stack of this model: score this model")


def moved_features(plan: PrunePlan, cfg: ModelConfig) -> str | None:
    """Return a notice if a plan removes decoder layers that receive DeepStack features; None otherwise."""
    gone = [layer for layer in plan.removed_layers if layer < cfg.deepstack]
    if not gone:
        return None
    places = list(plan.kept_layers[: cfg.deepstack])
    return (
        f"without layers {', '.join(map(str, gone))} the {cfg.deepstack} deepstack features are added behind layers "
        f"{', '.join(map(str, places))}, because stock transformers adds them to the first remaining layers"
    )


def _recorded(config: PlanConfig, cfg: ModelConfig) -> dict[str, Any]:
    """Return the settings that a plan records, as JSON values."""
    shares = bool(cfg.text.producers)
    unused = (
        *(() if shares else ("producers",)),
        *(() if cfg.deepstack else ("deepstack",)),
        *(() if config.loads_in else ("loads_in",)),
        *(axis.multiple for name, axis in AXES.items() if not any(name in layer.sizes for layer in cfg.text.layers)),
    )
    kept = {name: getattr(config, name) for name in config.recorded() if name not in unused}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _pair(scores: Any, method: str) -> tuple[Scores | None, Scores | None]:
    """Return (depth scores, width scores); a score that the pruning method does not use is None."""
    if method == "hybrid":
        if isinstance(scores, Scores) or len(scores) != 2:
            raise UserError("method 'hybrid' needs a pair of scores: pass scores=(depth_scores, width_scores)")
        depth, width = scores
        if depth.fingerprint != width.fingerprint:
            raise UserError("the depth scores and the width scores are for different models: score the same model")
        if depth.components != width.components:
            raise UserError(
                f"the depth scores are for the {depth.components[0]} stack, the width scores for the "
                f"{width.components[0]} stack: score the same stack"
            )
    else:
        if not isinstance(scores, Scores):
            raise UserError(
                f"method {method!r} needs one Scores object, got {type(scores).__name__}: pass the result of vp.score"
            )
        depth, width = (scores, None) if method == "depth" else (None, scores)
    return depth, width
