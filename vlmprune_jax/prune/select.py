"""From scores to a plan: which layers, heads and neurons go so that the asked share of all parameters is removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.core.budget import budget_of
from vlmprune_jax.core.checks import fraction, one_of, with_defaults
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.export.loads import TARGETS, check_loads, keeps_heads
from vlmprune_jax.models.params import count_params
from vlmprune_jax.prune.cost import least_ratio, make_measure
from vlmprune_jax.prune.fingerprint import shape_digest
from vlmprune_jax.prune.plan import KeptStack, PrunePlan
from vlmprune_jax.prune.scores import Scores
from vlmprune_jax.prune.solver import OutOfReach, layer_costs
from vlmprune_jax.prune.width import Kept, choose_widths, kept_layer, shape_of, unreachable_by

METHODS = ("depth", "width", "hybrid")
ROUNDINGS = ("nearest", "at_least")
_SHARED = {"parameters_total": None, "loads_in": ()}
DEEPSTACK = ("keep", "move")
DEPTH: Mapping[str, Any] = {"protect": (), "rounding": "nearest", "deepstack": "keep"}
WIDTH: Mapping[str, Any] = {
    "attn_layers": "all",
    "mlp_layers": "all",
    "heads_multiple": 1,
    "neurons_multiple": 1,
    "snap_for": None,
    "tensor_parallel": 1,
    "heads": "proportional",
    "selection": "local",
}
OF_ONE_STACK = ("layers_removed", "protect", "attn_layers", "mlp_layers")  # options that name or count its layers
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "depth": {**DEPTH, **_SHARED},
    "width": {**WIDTH, "sparsity": None, "base": None, **_SHARED},
    "hybrid": {**DEPTH, **WIDTH, "depth_share": 0.5, **_SHARED},
}


def make_plan(
    scores: Scores | tuple[Scores, Scores],
    cfg: ModelConfig,
    *,
    method: str,
    ratio: float | None = None,
    layers_removed: int | None = None,
    budget: Mapping[str, Any] | None = None,
    **options: Any,
) -> PrunePlan:
    """Plan the removal of `ratio` of the model's parameters, or down to a budget; no forward pass, seconds at 7B.

    Args:
      scores: of this model, of the stack that is pruned; for "hybrid" the pair (depth scores, width scores).
      method: "depth" (whole layers), "width" (heads and neurons) or "hybrid" (layers, then widths of the rest).
      ratio: share of `parameters_total` to remove, 0 <= ratio < 1.
      layers_removed: number of layers to remove (depth, hybrid) instead of deriving it.
      budget: the most that the pruned model may cost, in place of a ratio, as {"parameters": 1e8} (see `Budget`); the
        least goes that keeps to all of it. What it came to is in the plan's options, as `budget_reached`.
      options:
        parameters_total: what ratios refer to; default all parameters of the computed model. (The reference also
          counts tower blocks that are never run: 12.6 M more, 7,062,902,784, for LLaVA-1.5-7B.)
        protect: layers that depth pruning keeps, original numbers.
        deepstack: whether it keeps the first layers of a decoder to whose outputs features of the tower are added
          ("keep"), or those features may go to the layers that are then first ("move").
        rounding: "nearest" number of layers, or the smallest that removes "at_least" the ratio.
        attn_layers, mlp_layers: "all" or a half-open (start, stop), original numbers.
        heads_multiple, neurons_multiple: snap kept widths to multiples.
        snap_for: to those that suit "tpu", "gguf", "gguf_k" or "int4" (see `BLOCKS`), in layers that lose any.
        tensor_parallel: to those that so many devices share evenly, each with whole blocks of `snap_for`.
        heads: what goes of attention: the same share as of neurons ("proportional", as in the paper), nothing ("keep"),
          or with `ratio` and local selection what costs least by the scores ("auto"); elsewhere auto is proportional.
        selection: "local" (equal widths, lowest of each layer) or "global" (lowest of all layers, unnormalised).
        sparsity: the reference's per-layer sparsity instead of a ratio (width).
        base: config before earlier pruning steps, which ratio and sparsity are relative to (iterative width).
        loads_in: where the pruned model has to load at its true size, of "transformers" (stock), "vllm" and "gguf";
          heads="auto" keeps them where one of these needs them all, and what does not load is refused.
        depth_share: share of the asked removal that layers take in a hybrid plan.

    Raises:
      UserError: scores of another model or of the wrong kind, an unknown option, or a ratio out of reach.
    """
    settings = check_request(method, ratio, layers_removed, budget, options)
    depth, width = _pair(scores, method)
    used = [one for one in (depth, width) if one is not None]
    stack = used[0].stack
    shapes = cfg.stack(stack).layers
    _check_scores(used, cfg, stack)
    before = count_params(cfg)
    unpruned = count_params(settings.get("base") or cfg)
    total = settings["parameters_total"] or unpruned
    targets = settings["loads_in"]
    if settings.get("heads") == "auto" and keeps_heads(cfg, stack, targets):
        settings["heads"] = "keep"
    request = _Request(cfg, depth, width, layers_removed, settings, total, stack)
    share, within = (ratio, {}) if budget is None else request.fit_budget(budget)
    kept, solved = request.decide(share)
    layers = [kept_layer(i, one, shapes[i], request.gqa) for i, one in kept.items()]
    cost = layer_costs(cfg, stack).of
    gone = sum(map(cost, shapes)) - sum(cost(layer.shape) for layer in layers)
    plan = PrunePlan(
        fingerprint=used[0].fingerprint,
        method=method,
        criterion=" + ".join(one.name for one in used),
        stacks={"text": KeptStack.whole(cfg.text.layers), stack: KeptStack(shapes, tuple(layers))},
        parameters_before=before,
        parameters_after=before - gone,
        parameters_total=total,
        # earlier steps from `base` have removed a part of what was asked for
        asked=None if ratio is None else ratio - (unpruned - before) / total,
        options=_recorded({**settings, **solved, **within}, cfg),
    )
    check_loads(plan.apply_to(cfg), targets)
    return plan


def plan_stacks(
    scores: Sequence[Scores | tuple[Scores, Scores]],
    cfg: ModelConfig,
    *,
    method: str,
    ratio: float | None = None,
    budget: Mapping[str, Any] | None = None,
    **options: Any,
) -> PrunePlan:
    """One plan for several stacks, of which each loses the same share of its layers: `make_plan`'s where it is one.

    Args:
      scores: as `make_plan` takes them, of each stack.
      method, ratio, budget, options: as for `make_plan`; with several stacks none that is about layers by number.

    Raises:
      UserError: as `make_plan`; an option that means layers of one stack.
    """
    if len(scores) == 1:
        return make_plan(scores[0], cfg, method=method, ratio=ratio, budget=budget, **options)
    named = [name for name in OF_ONE_STACK if options.get(name)]
    if named:
        raise UserError(f"{', '.join(named)}: means layers of one stack: prune the stacks one after the other")
    total = options.get("parameters_total") or count_params(cfg)
    if budget is not None:
        check_request(method, ratio, None, budget, options)

        def plan_at(share: float) -> PrunePlan:
            return plan_stacks(scores, cfg, method=method, ratio=share, **options)

        limits = budget_of(budget)
        measure = make_measure(cfg, limits)
        ratio, reached = least_ratio(limits, measure, lambda share: plan_at(share).apply_to(cfg), total)
        plan = plan_at(ratio)
        recorded = {**plan.options, "budget": limits.given, "budget_reached": reached}
        return dataclasses.replace(plan, asked=None, options=recorded)
    stacks = [one.stack if isinstance(one, Scores) else one[0].stack for one in scores]
    sizes = {stack: sum(map(layer_costs(cfg, stack).of, cfg.stack(stack).layers)) for stack in stacks}
    plans = {}
    for stack, one in zip(stacks, scores, strict=True):
        share = None if ratio is None else fraction("ratio", ratio) * sizes[stack] / sum(sizes.values())
        plans[stack] = make_plan(one, cfg, method=method, ratio=share, **{**options, "parameters_total": total})
    first, *others = plans.values()
    return dataclasses.replace(
        first,
        criterion=" and ".join(dict.fromkeys(plan.criterion for plan in plans.values())),
        stacks={stack: plan.stacks[stack] for stack, plan in plans.items()},
        parameters_after=first.parameters_after - sum(p.parameters_before - p.parameters_after for p in others),
        asked=ratio,
        options={stack: dict(plan.options) for stack, plan in plans.items()},
    )


@dataclass(frozen=True)
class _Request:
    """Everything that decides what goes, but for the ratio."""

    cfg: ModelConfig
    depth: Scores | None
    width: Scores | None
    layers_removed: int | None
    settings: Mapping[str, Any]
    total: int
    stack: str

    @property
    def gqa(self) -> str:
        """What an attention unit is."""
        return "groups" if self.width is None else self.width.options.get("gqa", "groups")

    def decide(self, ratio: float | None) -> tuple[dict[int, Kept], Mapping[str, Any]]:
        """What stays of each layer that stays, and what the solver found, for the plan's record."""
        cfg, settings, stack, total = self.cfg, self.settings, self.stack, self.total
        removed: tuple[int, ...] = ()
        if self.depth is not None:
            removed = _choose_layers(self.depth, cfg, ratio, self.layers_removed, settings, total, stack)
        shapes = cfg.stack(stack).layers
        alive = [i for i in range(len(shapes)) if i not in removed]
        if self.width is None:
            return {i: (np.arange(shapes[i].kv_heads), np.arange(shapes[i].mlp)) for i in alive}, {}
        return choose_widths(self.width, cfg, alive, ratio, settings, total, stack)

    def fit_budget(self, given: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """The least ratio that keeps to a budget, and the plan's record of both."""
        budget = budget_of(given)
        ratio, reached = least_ratio(budget, make_measure(self.cfg, budget), self.config_at, self.total)
        return ratio, {"budget": budget.given, "budget_reached": reached}

    def config_at(self, ratio: float) -> ModelConfig:
        """The pruned model's config."""
        shapes = self.cfg.stack(self.stack).layers
        kept, _ = self.decide(ratio)
        return self.cfg.with_layers([shape_of(one, shapes[i], self.gqa) for i, one in kept.items()], self.stack)


def _check_scores(used: list[Scores], cfg: ModelConfig, stack: str) -> None:
    if any(not one.fingerprint.startswith(shape_digest(cfg)) for one in used):
        raise UserError("scores of another model: their shapes differ from this config: score this model first")
    shapes = cfg.stack(stack).layers
    for one in used:
        by_group = one.options.get("gqa", "groups") == "groups"
        widths = [(shape.kv_heads if by_group else shape.q_heads, shape.mlp) for shape in shapes]
        layers = len(shapes) if one.importance is None else len(one.importance)
        heads, neurons = ([*map(len, scored or ())] for scored in (one.heads, one.mlp))
        scored = list(zip(heads, neurons, strict=False))
        if layers != len(shapes) or scored not in ([], widths):
            raise UserError(f"{one.criterion} scores are not of the {stack} stack: their layers or widths are others")


def moved_features(plan: PrunePlan, cfg: ModelConfig) -> str | None:
    """What a plan does to features of the tower that enter several decoder layers, if it removes one of those."""
    gone = [layer for layer in plan.removed_layers if layer < cfg.deepstack]
    if not gone:
        return None
    places = list(plan.kept_layers[: cfg.deepstack])
    return (
        f"without layers {', '.join(map(str, gone))} the {cfg.deepstack} deepstack features are added behind layers "
        f"{', '.join(map(str, places))}, as stock transformers adds them to the first that are left"
    )


def _recorded(settings: Mapping[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """What of the settings goes into the plan of a model, as JSON has it."""
    unused = (*(() if cfg.deepstack else ("deepstack",)), *(() if settings["loads_in"] else ("loads_in",)))
    left_out = ("base", "parameters_total", *unused)
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return {name: list(value) if isinstance(value, (tuple, range)) else value for name, value in kept.items()}


def _pair(scores: Any, method: str) -> tuple[Scores | None, Scores | None]:
    """(depth scores, width scores), None where the method does not need them."""
    if method == "hybrid":
        if isinstance(scores, Scores) or len(scores) != 2:
            raise UserError("method 'hybrid' needs a pair (depth scores, width scores)")
        depth, width = scores
        if depth.fingerprint != width.fingerprint:
            raise UserError("the depth scores and the width scores are of different models: score the same model")
        if depth.stack != width.stack:
            raise UserError(f"depth scores of the {depth.stack} stack, width scores of the {width.stack} stack")
    else:
        if not isinstance(scores, Scores):
            raise UserError(f"method {method!r} needs one Scores, got {type(scores).__name__}")
        depth, width = (scores, None) if method == "depth" else (None, scores)
    return depth, width


def check_request(
    method: str,
    ratio: float | None,
    layers_removed: int | None,
    budget: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All options of `make_plan`, those that are not given at their defaults.

    Raises:
      UserError: options that this method does not have, or not exactly one target.
    """
    one_of("method", method, METHODS)
    settings = with_defaults(f"make_plan(method={method!r})", options, DEFAULTS[method])
    if ratio is not None:
        fraction("ratio", ratio)
    for target in settings["loads_in"]:
        one_of("loads_in", target, TARGETS)
    sparsity = settings.get("sparsity")
    targets = (ratio, sparsity, budget, layers_removed if method == "depth" else None)
    given = sum(target is not None for target in targets)
    if method == "width" and layers_removed is not None:
        raise UserError("layers_removed is for method 'depth' or 'hybrid': give a ratio, a sparsity or a budget")
    if method == "width" and given != 1:
        raise UserError(
            "method 'width' needs either ratio= (of all parameters) or sparsity= (of the layers in range) or budget="
        )
    if method == "depth" and given != 1:
        raise UserError("method 'depth' needs either ratio= or layers_removed= or budget=, and the others None")
    if method == "hybrid" and given != 1:
        raise UserError("method 'hybrid' needs ratio= or budget= (and perhaps layers_removed= or depth_share=)")
    return settings


def _choose_layers(
    scores: Scores,
    cfg: ModelConfig,
    ratio: float | None,
    layers_removed: int | None,
    settings: Mapping[str, Any],
    total: int,
    stack: str,
) -> tuple[int, ...]:
    """Original numbers of the layers to remove."""
    one_of("rounding", settings["rounding"], ROUNDINGS)
    one_of("deepstack", settings["deepstack"], DEEPSTACK)
    if stack == "vision" and cfg.deepstack:
        raise UserError(
            f"blocks of this vision tower cannot be removed: features of {cfg.deepstack} of them enter decoder layers "
            '(deepstack): prune its widths (method "width"), or the decoder'
        )
    shapes = cfg.stack(stack).layers
    n_layers = len(shapes)
    protect = set(settings["protect"])
    if not protect <= set(range(n_layers)):
        raise UserError(f"protect={sorted(protect)} names layers that do not exist: there are {n_layers}")
    if stack == "text":
        protect |= {i for i in range(cfg.deepstack) if settings["deepstack"] == "keep"}
    if scores.span is not None:
        return _block(scores, scores.span, protect, ratio, layers_removed)
    order = [int(i) for i in np.argsort(scores.layers, kind="stable") if int(i) not in protect]
    most = min(len(order), n_layers - max(1, cfg.deepstack if stack == "text" else 0))
    if layers_removed is not None:
        if not 0 <= layers_removed <= most:
            raise UserError(
                f"layers_removed={layers_removed} must be between 0 and {most} "
                f"({n_layers} layers, {len(protect)} protected)"
            )
        return tuple(order[:layers_removed])
    assert ratio is not None
    share = fraction("depth_share", settings["depth_share"]) if "depth_share" in settings else 1.0
    costs = layer_costs(cfg, stack)
    sizes = [costs.of(shapes[i]) for i in order[:most]]
    count = _nearest_count(sizes, share * ratio * total, settings["rounding"])
    if count is None:
        raise OutOfReach(
            f"ratio {share * ratio:g} {unreachable_by('depth', stack)}: removing {most} of {n_layers} layers "
            f"({len(protect)} protected) gives at most {sum(sizes) / total:.4f}"
        )
    return tuple(order[:count])


def _nearest_count(sizes: Sequence[int], removal: float, rounding: str) -> int | None:
    """How many of the first layers to remove, or None if all of them are not enough; ties remove fewer."""
    removed = np.concatenate([[0], np.cumsum(sizes)])
    if removal > removed[-1]:
        return None
    if rounding == "at_least":
        return int(np.argmax(removed >= removal))
    return int(np.argmin(np.abs(removed - removal)))


def _block(
    scores: Scores, size: int, protect: set[int], ratio: float | None, layers_removed: int | None
) -> tuple[int, ...]:
    """The `size` consecutive layers that score lowest; their number was fixed when scoring."""
    if ratio is not None or layers_removed not in (None, size):
        raise UserError(
            f"{scores.criterion} scores are for removing {size} consecutive layers: plan with layers_removed={size} or "
            "score again"
        )
    for start in map(int, np.argsort(scores.layers, kind="stable")):
        block = range(start, start + size)
        if np.isfinite(scores.layers[start]) and not protect.intersection(block):
            return tuple(block)
    raise UserError(f"no {size} consecutive layers are free of the protected ones {sorted(protect)}")
