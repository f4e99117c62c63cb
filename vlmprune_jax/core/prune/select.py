"""From scores to a plan: layers, heads and neurons whose removal reaches the requested share of all parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import settings_of
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.limits import check_loads, keeps_heads
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import AXES, LAYERS, Key
from vlmprune_jax.core.plans.kept import TOKENS, KeptVocabulary
from vlmprune_jax.core.plans.plan import VOCABULARY_ONLY, PrunePlan, keep_everything
from vlmprune_jax.core.prune.config import METHODS, PlanConfig
from vlmprune_jax.core.prune.cost import least_ratio, make_measure
from vlmprune_jax.core.prune.depth import choose_layers
from vlmprune_jax.core.prune.fingerprints import shape_digest
from vlmprune_jax.core.prune.scores import Scores, fits_model
from vlmprune_jax.core.prune.solver import Component
from vlmprune_jax.core.prune.surgery import apply_plan, plan_since_loading, trim_vocabulary
from vlmprune_jax.core.prune.width import Kept, choose_units, kept_layer, pruned_layer

LISTED = "listed layers"  # in place of a criterion, in plans that remove the layers of `prune.layers`


def unscored(fingerprint: str) -> Scores:
    """Return what `plan_pruning` takes in place of scores, if no scores decide, for the model of this fingerprint."""
    return Scores(LISTED, fingerprint)


def plan_pruning(
    scores: Scores | Sequence[Scores], cfg: ModelConfig, config: PlanConfig, vocabulary: KeptVocabulary | None
) -> PrunePlan:
    """Return a plan that trims the vocabulary, then removes layers, heads and neurons up to the target.

    With scores of several components, the same share of layer parameters is removed from each. With `unscored`, only
    the tokens and the layers in `config.layers` are removed. Raises UserError for scores of another model, a target
    that cannot be reached, or if an engine in `config.loads_in` could not load the pruned model.
    """
    merged = merge_scores(scores, config.method)
    components = merged.components or ((config.stack,) if config.layers else ())
    if components == ("both",):
        raise UserError('prune.layers lists layers of one stack: set prune.stack to "text" or "vision"')
    plan = _trimmed_plan(cfg, merged.fingerprint, vocabulary, components)
    if components:
        config_left = dataclasses.replace(config, ratio=_share_left(plan, config))
        plan = _plan_units(merged, plan, cfg, config_left, vocabulary)
    elif config.loads_in:
        options = {"loads_in": list(config.loads_in), "tensor_parallel": config.tensor_parallel}
        plan = dataclasses.replace(plan, options=options)
    pruned = plan.apply_to(cfg)
    check_loads(pruned, config.loads_in)
    return dataclasses.replace(plan, target_ratio=config.ratio, parameters_after=count_params(pruned))


def prune_in_steps(
    model: Model,
    batches: Callable[[int], Iterable[Any]],
    config: PlanConfig,
    vocabulary: KeptVocabulary | None,
    score: Callable[[Model, Iterable[Any]], Scores],
    scores: Scores | None,
) -> tuple[Model, PrunePlan, tuple[Scores, ...]]:
    """Prune widths in several steps, with scores of the smaller model before each.

    Returns the pruned model, one plan for all steps, and the scores of every step. Step k of K aims at k/K of the
    target, always relative to the original model. Under a budget, it aims at k/K of the ratio that satisfies the budget
    with the first scores, and the last step aims at the budget itself. `batches` returns the calibration batches of
    step k = 0, 1, ...; `scores` are those of `model` for the first step, if known.
    """
    steps, ratio = config.steps, _share_left(_trimmed_plan(model.cfg, "", vocabulary, ()), config)
    current, used = model.replace(plan=None), list[Scores]()
    for k in range(1, steps + 1):
        if k > 1 or scores is None:
            scores = score(current, batches(k - 1))
        used.append(scores)
        merged = merge_scores(scores, config.method)
        whole = _trimmed_plan(current.cfg, merged.fingerprint, None, merged.components)
        if config.budget.limits and k == 1:
            ratio = _plan_units(merged, whole, current.cfg, config, vocabulary).actual_ratio
        last = k == steps and bool(config.budget.limits)
        step = dataclasses.replace(
            config,
            ratio=None if ratio is None or last else ratio * k / steps,
            budget=config.budget if last else Budget(),
            sparsity=None if config.sparsity is None else config.sparsity * k / steps,
        )
        plan = _plan_units(merged, whole, current.cfg, step, vocabulary, model.cfg)
        current = apply_plan(current, plan)
    assert current.plan is not None  # by `apply_plan`
    options = {**plan.options, **used[0].options, "steps": steps, "sparsity": config.sparsity}
    plan = dataclasses.replace(current.plan, target_ratio=config.ratio, options=options).trimming(vocabulary)
    plan = dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(model.cfg)))
    pruned = trim_vocabulary(current, vocabulary).replace(plan=plan_since_loading(model, plan))
    return pruned, plan, tuple(used)


def merge_scores(scores: Scores | Sequence[Scores], method: str) -> Scores:
    """Return the scores by which a method chooses units, as one map: for every component, layers before widths.

    Raises UserError if they are scores of several models, or not the scores that the method needs.
    """
    axes, parts = METHODS[method].axes, [scores] if isinstance(scores, Scores) else [*scores]
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
    criterion = " and ".join(dict.fromkeys(names)) or parts[0].criterion
    return Scores(criterion, parts[0].fingerprint, options, values)


def _trimmed_plan(
    cfg: ModelConfig, fingerprint: str, vocabulary: KeptVocabulary | None, components: Iterable[str]
) -> PrunePlan:
    """Return the plan that removes nothing but tokens, for the decoder and these components."""
    whole = keep_everything(cfg, fingerprint, count_params(cfg), (TOKENS.component, *components))
    after = count_params(cfg if vocabulary is None else vocabulary.apply_to(cfg))
    return dataclasses.replace(whole.trimming(vocabulary), method=VOCABULARY_ONLY, parameters_after=after)


def _share_left(trimmed: PrunePlan, config: PlanConfig) -> float | None:
    """Return the share of all parameters still to remove after trimming the vocabulary; None without a ratio."""
    if config.ratio is not None:
        return max(config.ratio - trimmed.actual_ratio, 0.0)
    return 0.0 if all(getattr(config, name) in (None, ()) for name in METHODS[config.method].targets) else None


def _plan_units(
    scores: Scores,
    trimmed: PrunePlan,
    cfg: ModelConfig,
    config: PlanConfig,
    vocabulary: KeptVocabulary | None,
    original: ModelConfig | None = None,
) -> PrunePlan:
    """Return a plan that removes `config.ratio` of all parameters from the layers of the scored components.

    `scores`: see `merge_scores`. `trimmed`: plan to which the kept units are added. `vocabulary`: kept tokens; budgets
    limit the cost of the model with these tokens. `original`: config before the first of several steps, to which ratio
    and sparsity refer; None = `cfg`.
    """
    _check_scores(scores, cfg, config)
    costed = cfg if vocabulary is None else vocabulary.apply_to(cfg)
    total, several = count_params(original or cfg), len(scores.components) > 1
    components = dict[str, Component]()
    for name in scores.components or (config.stack,):
        keeps = config.heads == "auto" and keeps_heads(cfg, name, config.loads_in)
        settings = dataclasses.replace(config, heads="keep") if keeps else config
        components[name] = Component(name, costed, original or costed, settings, total)
    parameters = {name: sum(map(part.costs.of, part.layers)) for name, part in components.items()}

    def choose(ratio: float | None) -> dict[str, tuple[Mapping[int, Kept], Mapping[str, Any]]]:
        """Return the kept units of every kept layer at this ratio, and the solver's result, by component."""
        chosen = dict[str, Any]()
        for name, size in parameters.items():
            share = ratio * size / sum(parameters.values()) if several and ratio else ratio
            settings = dataclasses.replace(components[name].config, ratio=share)
            chosen[name] = _choose(scores, dataclasses.replace(components[name], config=settings))
        return chosen

    def config_at(ratio: float) -> ModelConfig:
        pruned = costed
        for name, (units, _) in choose(ratio).items():
            layers = costed.stack(name).layers
            pruned = pruned.with_layers([pruned_layer(kept, layers[i]) for i, kept in units.items()], name)
        return pruned

    ratio, plan, within, options = config.ratio, trimmed, dict[str, Any](), dict[str, Any]()
    if config.budget.limits:
        ratio, cost = least_ratio(config.budget, make_measure(costed, config.budget), config_at, total)
        within = {"budget": config.budget.given, "budget_reached": cost}
    unused = _unused(cfg, config)
    for name, (units, result) in choose(ratio).items():
        layers = cfg.stack(name).layers
        plan = plan.keeping(name, [kept_layer(i, kept, layers[i]) for i, kept in units.items()])
        recorded = {name: value for name, value in components[name].config.recorded().items() if name not in unused}
        options[name] = {**recorded, **result}
    return dataclasses.replace(
        plan,
        method=config.method,
        criterion=scores.name,
        parameters_after=count_params(plan.apply_to(cfg)),
        parameters_total=total,
        options={**(options if several else options.popitem()[1]), **within},
    )


def _choose(scores: Scores, component: Component) -> tuple[Mapping[int, Kept], Mapping[str, Any]]:
    """Return the kept units of every kept layer of a component, and the solver's result for the plan."""
    alive, chosen = [*range(len(component.layers))], (dict[int, Kept](), dict[str, Any]())
    for axis in METHODS[component.config.method].axes:
        if axis == LAYERS:
            removed = choose_layers(scores, component)
            alive = [i for i in alive if i not in removed]
            chosen = {i: {} for i in alive}, {}
        else:
            chosen = choose_units(scores, component, alive)
    return chosen


def _unused(cfg: ModelConfig, config: PlanConfig) -> list[str]:
    """Return the settings that mean nothing for a model, which plans do not record."""
    conditions = {"producers": cfg.text.producers, "deepstack": cfg.deepstack, "loads_in": config.loads_in}
    sizes = [layer.sizes for layer in cfg.text.layers]
    multiples = [axis.multiple for name, axis in AXES.items() if not any(name in of_layer for of_layer in sizes)]
    return [*(name for name, applies in conditions.items() if not applies), *multiples]


def _check_scores(scores: Scores, cfg: ModelConfig, config: PlanConfig) -> None:
    """Raise UserError for scores of another model, or settings that number layers with scores of both stacks."""
    if not scores.fingerprint.startswith(shape_digest(cfg)):
        raise UserError("these scores are for another model (their shapes do not match this config): score this model")
    for name in scores.components:
        if not fits_model({key: array for key, array in scores.values.items() if key.component == name}, cfg):
            raise UserError(f"{scores.criterion} scores do not match the {name} stack of this model: score this model")
    numbered = [
        name for name, about in settings_of(PlanConfig).items() if about.unit == "layers" and getattr(config, name)
    ]
    if len(scores.components) > 1 and numbered:
        raise UserError(
            f"{', '.join(numbered)}: cannot be used for both stacks at once: prune decoder and vision tower one after "
            "the other"
        )


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
