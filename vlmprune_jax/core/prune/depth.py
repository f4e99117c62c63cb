"""Choice of the layers that depth pruning removes, such that transformers and other engines can load the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import keep_layers
from vlmprune_jax.core.limits import why_no_class, why_not
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.config import PlanConfig
from vlmprune_jax.core.prune.layer_costs import layer_costs
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.solver import OutOfReach


def choose_layers(
    scores: Scores,
    cfg: ModelConfig,
    ratio: float | None,
    config: PlanConfig,
    total: int,
    stack: str,
) -> tuple[int, ...]:
    """Return the original numbers of the layers to remove, which have the lowest scores."""
    protect, layers_removed = _protected(cfg, config, stack), config.layers_removed
    shapes, n_layers = cfg.stack(stack).layers, len(cfg.stack(stack).layers)
    reason_of = functools.partial(_reason, cfg, stack, config.loads_in)
    importance = scores.values[Key(stack, None, LAYERS)]
    if scores.span is not None:
        if ratio is not None or layers_removed not in (None, scores.span):
            raise UserError(
                f"these {scores.criterion} scores are for removing {scores.span} consecutive layers: use "
                f"layers_removed={scores.span}, or score again"
            )
        return _block(importance, scores.span, protect, reason_of)
    wanted = [int(i) for i in np.argsort(importance, kind="stable") if int(i) not in protect]
    order, reason = _legal(wanted, reason_of)
    most = min(len(order), n_layers - max(1, _features(cfg, stack)))
    kept = f"{len(protect)} protected" + (f"; {reason}" if reason and most == len(order) else "")
    if layers_removed is not None:
        if not 0 <= layers_removed <= most:
            raise UserError(f"layers_removed={layers_removed} must be between 0 and {most} ({n_layers} layers, {kept})")
        return tuple(order[:layers_removed])
    assert ratio is not None
    share = config.depth_share if config.method == "hybrid" else 1.0
    costs = layer_costs(cfg, stack)
    sizes = [costs.of(shapes[i]) for i in order[:most]]
    count = _nearest_count(sizes, share * ratio * total, config.rounding)
    if count is None:
        raise OutOfReach(
            f"ratio {share * ratio:g} cannot be reached by depth pruning of the {stack} stack: "
            f"removing {most} of {n_layers} layers ({kept}) gives at most {sum(sizes) / total:.4f}"
        )
    return tuple(order[:count])


def check_listed(cfg: ModelConfig, config: PlanConfig) -> None:
    """Raise UserError if one of the layers listed in `config.layers` does not exist or cannot be removed."""
    listed, stack = set(config.layers), config.stack
    protect, n_layers = _protected(cfg, config, stack), len(cfg.stack(stack).layers)
    if not listed <= set(range(n_layers)):
        raise UserError(
            f"prune.layers={sorted(listed)} contains layers that do not exist: the {stack} stack has layers 0 to "
            f"{n_layers - 1}"
        )
    if protect & listed:
        raise UserError(
            f"prune.layers={sorted(listed)}: layers {sorted(protect & listed)} must stay (prune.protect, or "
            'prune.deepstack="keep" or prune.producers="keep"): leave them out of the list, or change that setting'
        )
    reason = _reason(cfg, stack, config.loads_in, listed)
    if reason is not None:
        reason = reason or f"at least {max(1, _features(cfg, stack))} must remain"
        raise UserError(f"prune.layers={sorted(listed)}: these layers cannot be removed ({reason}): list others")


def _features(cfg: ModelConfig, stack: str) -> int:
    """Return the number of first layers to whose outputs deepstack features are added."""
    return cfg.deepstack if cfg.stack(stack).causal else 0


def _protected(cfg: ModelConfig, config: PlanConfig, stack: str) -> set[int]:
    """Return the layers that must stay; raise UserError for those that do not exist, or a tower of which all must."""
    stack_cfg = cfg.stack(stack)
    if getattr(stack_cfg, "deepstack", ()):
        raise UserError(
            f"layers of this vision tower cannot be removed, because features of {cfg.deepstack} of them enter decoder "
            'layers (deepstack): use method "width", or prune the decoder'
        )
    protect, n_layers = set(config.protect), len(stack_cfg.layers)
    if not protect <= set(range(n_layers)):
        raise UserError(f"protect={sorted(protect)} contains layers that do not exist: the model has {n_layers} layers")
    if config.deepstack == "keep":
        protect |= set(range(_features(cfg, stack)))
    if config.producers == "keep" and isinstance(stack_cfg, TextConfig):
        protect |= stack_cfg.producers
    return protect


def _reason(cfg: ModelConfig, stack: str, targets: Sequence[str], gone: Collection[int]) -> str | None:
    """Return why transformers or a required engine cannot load a model without these layers; None if all can."""
    layers = cfg.stack(stack).layers
    shapes = keep_layers(layers, [number for number in range(len(layers)) if number not in gone])
    if len(shapes) < max(1, _features(cfg, stack)):
        return ""  # a layer must be left, and one for each level of deepstack features
    left = cfg.with_layers(shapes, stack)
    if why_no_class(cfg) is None and (problem := why_no_class(left)) is not None:
        return problem
    for target in targets:
        if (reason := why_not(left, target)) is not None and why_not(cfg, target) is None:
            return f"loads_in={target!r}: {reason}"
    return None


def _legal(order: Sequence[int], reason_of: Callable[[Collection[int]], str | None]) -> tuple[list[int], str | None]:
    """Return the layers that may be removed, in order of removal, and why the first excluded layer must stay."""
    gone, reasons = list[int](), list[str]()
    for layer in order:
        reason = reason_of({*gone, layer})
        if reason is None:
            gone.append(layer)
        else:
            reasons.append(reason)
    return gone, next(filter(None, reasons), None)


def _nearest_count(sizes: Sequence[int], removal: float, rounding: str) -> int | None:
    """Return how many of these layers to remove to come nearest to the target; None if all are too few."""
    removed = np.concatenate([[0], np.cumsum(sizes)])
    if removal > removed[-1]:
        return None
    if rounding == "at_least":
        return int(np.argmax(removed >= removal))
    return int(np.argmin(np.abs(removed - removal)))


def _block(
    importance: np.ndarray, size: int, protect: set[int], reason_of: Callable[[Collection[int]], str | None]
) -> tuple[int, ...]:
    """Return the block of `size` consecutive layers with the lowest score."""
    reason = None
    for start in map(int, np.argsort(importance, kind="stable")):
        block = range(start, start + size)
        if np.isfinite(importance[start]) and not protect.intersection(block):
            reason = reason_of(block)
            if reason is None:
                return tuple(block)
    raise UserError(
        f"there are no {size} consecutive layers without the protected layers {sorted(protect)}"
        + ("" if reason is None else f" that can be removed: {reason}")
    )
