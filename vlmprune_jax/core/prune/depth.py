"""Choice of the layers that depth pruning removes, such that transformers and other engines can load the rest."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import TextConfig
from vlmprune_jax.core.layer import keep_layers
from vlmprune_jax.core.limits import why_no_class, why_not
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.solver import Component, OutOfReach


def choose_layers(scores: Scores, component: Component) -> set[int]:
    """Return the original numbers of the layers to remove: those of `prune.layers`, or those of the lowest scores.

    Raises UserError if a listed layer does not exist or cannot be removed, or more are to be removed than can be.
    """
    config, stack = component.config, component.name
    protect, n_layers, least = _protected(component), len(component.layers), max(1, _features(component))
    if config.layers:
        _check_listed(component, protect, least)
        return {*config.layers}
    importance = scores.values[Key(stack, None, LAYERS)]
    ascending = [int(i) for i in np.argsort(importance, kind="stable")]
    wanted = config.layers_removed
    if (span := scores.span) is not None:
        if config.ratio is not None or wanted not in (None, span):
            raise UserError(
                f"these {scores.criterion} scores are for removing {span} consecutive layers: use "
                f"layers_removed={span}, or score again"
            )
        blocks = [range(start, start + span) for start in ascending if np.isfinite(importance[start])]
        reason = None
        for block in (block for block in blocks if not protect.intersection(block)):
            reason = _reason(component, block)
            if reason is None:
                return {*block}
        raise UserError(
            f"there are no {span} consecutive layers without the protected layers {sorted(protect)}"
            + ("" if reason is None else f" that can be removed: {reason}")
        )
    order, reasons = list[int](), list[str]()  # layers that can be removed, and why others cannot
    for layer in (layer for layer in ascending if layer not in protect):
        reason = _reason(component, {*order, layer})
        if reason is None:
            order.append(layer)
        else:
            reasons.append(reason)
    most = min(len(order), n_layers - least)
    why = next(filter(None, reasons), None) if most == len(order) else None
    kept = f"{len(protect)} protected" + (f"; {why}" if why else "")
    if wanted is None:
        assert config.ratio is not None
        share = (config.depth_share if config.method == "hybrid" else 1.0) * config.ratio
        removed = np.cumsum([0, *(component.costs.of(component.layers[i]) for i in order[:most])])
        if share * component.total > removed[-1]:
            raise OutOfReach(
                f"ratio {share:g} cannot be reached by depth pruning of the {stack} stack: removing {most} of "
                f"{n_layers} layers ({kept}) gives at most {removed[-1] / component.total:.4f}"
            )
        missing = removed - share * component.total
        wanted = int(np.argmax(missing >= 0) if config.rounding == "at_least" else np.argmin(np.abs(missing)))
    elif wanted > most:
        raise UserError(f"layers_removed={wanted} must be between 0 and {most} ({n_layers} layers, {kept})")
    return {*order[:wanted]}


def _check_listed(component: Component, protect: Collection[int], least: int) -> None:
    """Raise UserError if one of the layers listed in `prune.layers` does not exist or cannot be removed."""
    listed, last = sorted({*component.config.layers}), len(component.layers) - 1
    if listed[-1] > last:
        raise UserError(
            f"prune.layers={listed} contains layers that do not exist: the {component.name} stack has layers 0 to "
            f"{last}"
        )
    if fixed := sorted({*protect} & {*listed}):
        raise UserError(
            f'prune.layers={listed}: layers {fixed} must stay (prune.protect, or prune.deepstack="keep" or '
            'prune.producers="keep"): leave them out of the list, or change that setting'
        )
    if (reason := _reason(component, listed)) is not None:
        why = reason or f"at least {least} must remain"
        raise UserError(f"prune.layers={listed}: these layers cannot be removed ({why}): list others")


def _features(component: Component) -> int:
    """Return the number of first layers to whose outputs deepstack features are added."""
    return component.cfg.deepstack if component.cfg.stack(component.name).causal else 0


def _protected(component: Component) -> set[int]:
    """Return the layers that must stay; raise UserError for those that do not exist, or a tower of which all must."""
    config, stack = component.config, component.cfg.stack(component.name)
    if getattr(stack, "deepstack", ()):
        raise UserError(
            f"layers of this vision tower cannot be removed, because features of {component.cfg.deepstack} of them "
            'enter decoder layers (deepstack): use method "width", or prune the decoder'
        )
    protect, n_layers = {*config.protect}, len(stack.layers)
    if not protect <= {*range(n_layers)}:
        raise UserError(f"protect={sorted(protect)} contains layers that do not exist: the model has {n_layers} layers")
    if config.deepstack == "keep":
        protect |= {*range(_features(component))}
    if config.producers == "keep" and isinstance(stack, TextConfig):
        protect |= stack.producers
    return protect


def _reason(component: Component, gone: Collection[int]) -> str | None:
    """Return why transformers or a required engine cannot load a model without these layers; None if all can."""
    cfg, layers = component.cfg, component.layers
    shapes = keep_layers(layers, [number for number in range(len(layers)) if number not in gone])
    if len(shapes) < max(1, _features(component)):
        return ""  # a layer must be left, and one for each level of deepstack features
    left = cfg.with_layers(shapes, component.name)
    if why_no_class(cfg) is None and (problem := why_no_class(left)) is not None:
        return problem
    for target in component.config.loads_in:
        if (reason := why_not(left, target)) is not None and why_not(cfg, target) is None:
            return f"loads_in={target!r}: {reason}"
    return None
