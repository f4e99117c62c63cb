"""From scores to a plan: layers, heads and neurons whose removal reaches the requested share of all parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import check_loads, keeps_heads
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.plans.kept import TOKENS, KeptLayer, KeptVocabulary
from vlmprune_jax.core.plans.plan import VOCABULARY_ONLY, PrunePlan, keep_everything
from vlmprune_jax.core.prune.config import METHOD_TARGETS, METHODS, PlanConfig
from vlmprune_jax.core.prune.cost import least_ratio, make_measure
from vlmprune_jax.core.prune.depth import check_listed, choose_layers
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.prune.layer_costs import layer_costs
from vlmprune_jax.core.prune.scores import Scores, fits_model
from vlmprune_jax.core.prune.width import Kept, choose_widths, kept_layer, pruned_layer

LISTED = "listed layers"  # in place of a criterion, in plans that remove the layers of `prune.layers`


def plan_without_scores(
    fingerprint: str, cfg: ModelConfig, config: PlanConfig, vocabulary: KeptVocabulary | None
) -> PrunePlan:
    """Return a plan that trims the vocabulary and removes the layers in `config.layers`.

    Raises UserError if one of these layers cannot be removed.
    """
    plan = trimmed_plan(
        cfg, fingerprint, vocabulary, (config.stack,) if config.layers and config.stack != "both" else ()
    )
    if config.loads_in:
        options = {"loads_in": list(config.loads_in), "tensor_parallel": config.tensor_parallel}
        plan = dataclasses.replace(plan, options=options)
    if config.layers:
        if config.stack == "both":
            raise UserError('prune.layers lists layers of one stack: set prune.stack to "text" or "vision"')
        check_listed(cfg, config)
        layers = enumerate(cfg.stack(config.stack).layers)
        plan = plan.keeping(config.stack, [KeptLayer.whole(i, layer) for i, layer in layers if i not in config.layers])
        plan = dataclasses.replace(plan, method=config.method, criterion=LISTED, options=_recorded(config, cfg))
    return _loadable(plan, cfg, config)


def plan_with_scores(
    scores: Scores | Sequence[Scores], cfg: ModelConfig, config: PlanConfig, vocabulary: KeptVocabulary | None
) -> PrunePlan:
    """Return a plan that trims the vocabulary, then removes layers, heads and neurons up to the ratio.

    With scores of several components, the same share of layer parameters is removed from each.
    """
    merged = merge_scores(scores, config.method)
    plan = trimmed_plan(cfg, merged.fingerprint, vocabulary, merged.components)
    share = share_left(plan, config, config.parameters_total or count_params(config.base or cfg))
    return _loadable(plan_units(merged, plan, cfg, config, share, trimmed_config(cfg, vocabulary)), cfg, config)


def share_left(trimmed: PrunePlan, config: PlanConfig, total: int) -> float | None:
    """Return the share of all parameters still to remove after trimming the vocabulary; None without a ratio."""
    if config.ratio is not None:
        return max(config.ratio - (trimmed.parameters_before - trimmed.parameters_after) / total, 0.0)
    return 0.0 if all(getattr(config, name) in (None, ()) for name in METHOD_TARGETS[config.method]) else None


def merge_scores(scores: Scores | Sequence[Scores], method: str) -> Scores:
    """Return the scores by which a method chooses units, as one map: for every component, layers before widths.

    Raises UserError if they are scores of several models, or not the scores that the method needs.
    """
    axes, parts = METHODS[method], [scores] if isinstance(scores, Scores) else [*scores]
    needed = "one Scores object" if len(axes) == 1 else "a pair of scores"
    advice = "the result of vp.score" if len(axes) == 1 else "scores=(depth_scores, width_scores)"
    wrong = UserError(f"method {method!r} needs {needed}, got {type(scores).__name__}: pass {advice} of each stack")
    if not parts or not all(isinstance(part, Scores) for part in parts):
        raise wrong
    if len({part.fingerprint for part in parts}) > 1:
        raise UserError("these scores are for different models: score the same model")
    values, names, options = dict[Key, Any](), list[str](), dict[str, Any]()
    for component in dict.fromkeys(name for part in parts for name in part.components):
        used = [part for part in parts if component in part.components]
        if len(used) != len(axes):
            raise wrong
        for axis, part in zip(axes, used, strict=True):
            part.check_scored(axis)
            of_component = {key: array for key, array in part.values.items() if key.component == component}
            values |= {key: array for key, array in of_component.items() if (key.axis == LAYERS) == (axis == LAYERS)}
            options |= {name: value for name, value in part.options.items() if name != "variant"}
        names.append(" + ".join(part.name for part in used))
    return Scores(" and ".join(dict.fromkeys(names)), parts[0].fingerprint, options, values)


def plan_units(
    scores: Scores,
    trimmed: PrunePlan,
    cfg: ModelConfig,
    config: PlanConfig,
    share: float | None,
    costed: ModelConfig,
) -> PrunePlan:
    """Return a plan that removes `share` of all parameters from the layers of the scored components.

    `scores`: see `merge_scores`. `trimmed`: the plan that removes tokens only. `costed`: the config with the kept
    tokens only; budgets limit the cost of this model.
    """
    _check_scores(scores, cfg)
    unpruned = count_params(config.base or cfg)
    total = config.parameters_total or unpruned
    several = len(scores.components) > 1
    numbered = [
        name for name, about in settings_of(PlanConfig).items() if about.unit == "layers" and getattr(config, name)
    ]
    if several and numbered:
        raise UserError(
            f"{', '.join(numbered)}: cannot be used for both stacks at once: prune decoder and vision tower one after "
            "the other"
        )
    configs = {
        name: dataclasses.replace(config, heads="keep")
        if config.heads == "auto" and keeps_heads(cfg, name, config.loads_in)
        else config
        for name in scores.components
    }
    sizes = {name: sum(map(layer_costs(cfg, name).of, cfg.stack(name).layers)) for name in configs}

    def decide(ratio: float | None) -> dict[str, tuple[Mapping[int, Kept], Mapping[str, Any]]]:
        """Return the kept units of every kept layer at this ratio, and the solver's result, by component."""
        shares = {
            name: ratio * size / sum(sizes.values()) if several and ratio else ratio for name, size in sizes.items()
        }
        return {name: _decide(scores, costed, configs[name], shares[name], total, name) for name in configs}

    def config_at(ratio: float) -> ModelConfig:
        pruned = costed
        for name, (units, _) in decide(ratio).items():
            layers = costed.stack(name).layers
            pruned = pruned.with_layers([pruned_layer(kept, layers[i]) for i, kept in units.items()], name)
        return pruned

    within = dict[str, Any]()
    if config.budget.limits:
        share, cost = least_ratio(config.budget, make_measure(costed, config.budget), config_at, total)
        within = {"budget": config.budget.given, "budget_reached": cost}
    plan, options = trimmed, dict[str, Any]()
    for name, (units, solved) in decide(share).items():
        layers = cfg.stack(name).layers
        plan = plan.keeping(name, [kept_layer(i, kept, layers[i]) for i, kept in units.items()])
        options[name] = {**_recorded(configs[name], cfg), **solved}
    return dataclasses.replace(
        plan,
        method=config.method,
        criterion=scores.name,
        parameters_after=count_params(plan.apply_to(cfg)),
        parameters_total=total,
        # earlier steps from `base` have removed a part of the ratio
        target_ratio=None if config.ratio is None else config.ratio - (unpruned - plan.parameters_before) / total,
        options={**(options if several else options.popitem()[1]), **within},
    )


def _decide(
    scores: Scores, cfg: ModelConfig, config: PlanConfig, ratio: float | None, total: int, component: str
) -> tuple[Mapping[int, Kept], Mapping[str, Any]]:
    """Prune the method's axes in order: return the kept units of every kept layer, and the width solver's result."""
    alive = [*range(len(cfg.stack(component).layers))]
    for axis in METHODS[config.method]:
        if axis != LAYERS:
            return choose_widths(scores, cfg, alive, ratio, config, total, component)
        removed = choose_layers(scores, cfg, ratio, config, total, component)
        alive = [i for i in alive if i not in removed]
    return {i: {} for i in alive}, {}


def trimmed_plan(
    cfg: ModelConfig, fingerprint: str, vocabulary: KeptVocabulary | None, components: Iterable[str]
) -> PrunePlan:
    """Return the plan that removes nothing but tokens, for the decoder and these components."""
    whole = keep_everything(cfg, fingerprint, count_params(cfg), (TOKENS.component, *components))
    plan = dataclasses.replace(whole.trimming(vocabulary), method=VOCABULARY_ONLY)
    return dataclasses.replace(plan, parameters_after=count_params(trimmed_config(cfg, vocabulary)))


def trimmed_config(cfg: ModelConfig, vocabulary: KeptVocabulary | None) -> ModelConfig:
    """Return the config of a model with these tokens only; None = all tokens."""
    return cfg if vocabulary is None else vocabulary.apply_to(cfg)


def _loadable(plan: PrunePlan, cfg: ModelConfig, config: PlanConfig) -> PrunePlan:
    """Return the plan with its number of parameters; raise UserError if an engine could not load the pruned model."""
    pruned = plan.apply_to(cfg)
    check_loads(pruned, config.loads_in)
    return dataclasses.replace(plan, parameters_after=count_params(pruned))


def _check_scores(scores: Scores, cfg: ModelConfig) -> None:
    if not scores.fingerprint.startswith(shape_digest(cfg)):
        raise UserError("these scores are for another model (their shapes do not match this config): score this model")
    for name in scores.components:
        if not fits_model({key: array for key, array in scores.values.items() if key.component == name}, cfg):
            raise UserError(f"{scores.criterion} scores do not match the {name} stack of this model: score this model")


def moved_features(plan: PrunePlan, cfg: ModelConfig) -> str | None:
    """Return a notice if a plan removes decoder layers that receive DeepStack features; None otherwise."""
    gone = [layer for layer in plan.removed_layers if layer < cfg.deepstack]
    if not gone:
        return None
    receivers = list(plan.kept_layers[: cfg.deepstack])
    return (
        f"without layers {', '.join(map(str, gone))} the {cfg.deepstack} deepstack features are added behind layers "
        f"{', '.join(map(str, receivers))}, because stock transformers adds them to the first remaining layers"
    )


def _recorded(config: PlanConfig, cfg: ModelConfig) -> dict[str, Any]:
    """Return the settings that a plan records, as JSON values."""
    unused = (
        *(() if cfg.text.producers else ("producers",)),
        *(() if cfg.deepstack else ("deepstack",)),
        *(() if config.loads_in else ("loads_in",)),
        *(axis.multiple for name, axis in AXES.items() if not any(name in layer.sizes for layer in cfg.text.layers)),
    )
    kept = {name: getattr(config, name) for name in config.recorded() if name not in unused}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}
