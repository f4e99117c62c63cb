"""Choice of heads, neurons and experts: equal widths layer by layer, or one pool over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import Layer, keep_layers
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.prune.config import EXPERTS, METHODS, WIDTHS
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.solver import (
    Component,
    OutOfReach,
    Units,
    Widths,
    apart,
    most_removable,
    multiples,
    solve_widths,
    units_of,
    widths_at,
)

Kept = Mapping[str, np.ndarray]  # {pruned axis: sorted original indices} of one layer
Values = Mapping[tuple[int, str], np.ndarray]  # {(layer, axis): scores}
Chosen = tuple[dict[int, Kept], dict[str, Any]]  # kept units by layer, and results of the solver for the plan


def choose_units(scores: Scores, component: Component, alive: Sequence[int]) -> Chosen:
    """Return the kept units of every remaining layer, and the solver's result for the plan.

    If `prune.experts` is set, experts are removed before heads and neurons. Raises UserError for ranges or multiples
    that the layers cannot satisfy, or a target that pruning cannot reach.
    """
    config, costs, gqa = component.config, component.costs, scores.options.get("gqa", "groups")
    original = component.original.stack(component.name).layers
    current = {i: component.layers[i] for i in alive}
    layers, before = {i: original[i] for i in alive}, sum(map(costs.of, original))
    of_component = {key: array for key, array in scores.values.items() if key.component == component.name}
    values = {(i, axis): array for (_, i, axis), array in of_component.items() if i is not None and i in layers}
    if gqa == "groups":
        values |= _tied(values, original, alive)
    numbers = {key: np.arange(len(array)) for key, array in values.items()}
    snapped, result = multiples(component, gqa), dict[str, Any]()
    kept: dict[int, dict[str, np.ndarray]] = {i: {} for i in alive}
    last = METHODS[config.method].axes[-1]
    stages = (EXPERTS, WIDTHS) if config.experts is not None and last == WIDTHS else (last,)
    for wanted in stages:
        axes = _scored_axes(scores, values, wanted)
        units = units_of(component, layers, axes, snapped)
        if wanted == EXPERTS and config.experts is not None:
            chosen, result = _highest(values, units, _of_count(units, config.experts))
        else:
            if config.selection == "global" and (any(AXES[x].parent for x in axes) or max(snapped.values()) > 1):
                raise UserError(
                    'selection="global" needs gqa="groups", a model without experts and no multiples, because every '
                    "layer gets its own width"
                )
            removed = before - sum(map(costs.of, layers.values()))
            after = " after removing layers" * (len(alive) < len(original)) + " after removing experts" * (
                stages[0] != last
            )
            chosen, result = _to_target(values, units, component, removed, after)
        for i, axis in values:
            left = _remaining(axis, chosen[i], current[i])
            values[i, axis], numbers[i, axis] = values[i, axis][left], numbers[i, axis][left]
        for i in alive:
            kept[i] |= {axis: numbers[i, axis] for axis in chosen[i]}
            layers[i], current[i] = (pruned_layer(chosen[i], layer) for layer in (layers[i], current[i]))
        values = {(i, axis): array for (i, axis), array in values.items() if axis not in axes}
    for i, layer in current.items():
        for axis, size in layer.sizes.items():
            if size % config.tensor_parallel:
                raise UserError(
                    f"layer {i} keeps {size} {AXES[axis].title}, which tensor_parallel={config.tensor_parallel} does "
                    "not divide: choose a number that divides them, or prune this layer too (attn_layers, mlp_layers, "
                    "heads)"
                )
    return {**kept}, {**result, **snapped}


def _to_target(values: Values, units: Mapping[int, Units], component: Component, removed: int, after: str) -> Chosen:
    """Return the units that a ratio or sparsity keeps.

    `removed`: number of parameters that are removed already. `after`: what has been removed, for messages.
    """
    config, total, ratio = component.config, component.total, component.config.ratio
    removal = None if ratio is None else max(ratio * total - removed, 0)
    most = most_removable(units.values())
    if removal is not None and removal > most:
        raise OutOfReach(
            f"ratio {ratio:g} cannot be reached by width pruning of the {component.name} stack within "
            f"attn_layers={config.attn_layers or 'all'}, mlp_layers={config.mlp_layers or 'all'}"
            f"{', heads kept' if config.heads == 'keep' else ''}{after}: the most is {(removed + most) / total:.4f}"
        )
    if config.selection == "global":
        kept, count, gone = _global(values, units, removal, config.sparsity)
        prices = [
            layer.removed({**layer.whole, axis.axis: axis.size - 1})
            for layer in units.values()
            for axis in layer.axes
            if axis.prune
        ]
        if removal is not None and removal - gone > max(prices, default=0):
            raise OutOfReach(
                f"ratio {ratio:g} cannot be reached by global selection, which never empties a layer (it reaches "
                f'{(removed + gone) / total:.4f}): use selection="local" or a smaller ratio'
            )
        return kept, {"units_removed": count}
    layers = [*units.values()]
    if removal is None:
        assert config.sparsity is not None
        return _highest(values, units, [widths_at(layers, config.sparsity)])
    candidates = [solve_widths(layers, removal), *(apart(layers, removal) if config.heads == "auto" else ())]
    # candidates about as near to the target as the first one: a difference of one neuron per layer is immaterial
    fewer = [{axis.axis: axis.size - (axis.fine and axis.prune) for axis in layer.axes} for layer in layers]
    price = sum(int(layer.removed(counts)) for layer, counts in zip(layers, fewer, strict=True))
    gap = max(abs(candidates[0].removed - removal), price)
    return _highest(values, units, [widths for widths in candidates if abs(widths.removed - removal) <= gap])


def _highest(values: Values, units: Mapping[int, Units], candidates: Sequence[Widths]) -> Chosen:
    """Return the highest-scoring units of every layer, of equal scores the later ones.

    Of several candidate widths, those are used whose removed scores have the smallest sum, which assumes that scores of
    heads and neurons are comparable.
    """
    rows = {
        (i, axis.axis): values[i, axis.axis].reshape(axis.parents, -1)
        for i, layer in units.items()
        for axis in layer.axes
    }
    order = {key: np.argsort(scores, axis=1, kind="stable") for key, scores in rows.items()}
    lost = {key: np.pad(np.sort(scores, axis=1), ((0, 0), (1, 0))).cumsum(axis=1) for key, scores in rows.items()}

    def starts(widths: Widths) -> dict[tuple[int, str], int]:
        """Return the rank of the first kept unit; all are kept if earlier steps left fewer than the widths."""
        counts = {(i, axis): n for i, layer in units.items() for axis, n in widths.counts[layer].items()}
        return {key: max(order[key].shape[1] - n, 0) for key, n in counts.items()}

    def loss(widths: Widths) -> float:
        return sum(sum(lost[key][:, start].tolist()) for key, start in starts(widths).items())

    best = min(candidates, key=loss) if len(candidates) > 1 else candidates[0]
    kept: dict[int, dict[str, np.ndarray]] = {i: {} for i in units}
    for (i, axis), start in starts(best).items():
        parents, size = order[i, axis].shape
        highest = np.sort(order[i, axis][:, start:], axis=1)
        kept[i][axis] = (np.arange(parents)[:, None] * size + highest).reshape(-1)
    return {**kept}, {"sparsity": best.sparsity}


def _of_count(units: Mapping[int, Units], count: int) -> list[Widths]:
    """Return the layer widths with this number of experts; raise UserError if a layer has fewer, or needs more."""
    for i, axis in ((i, axis) for i, layer in units.items() for axis in layer.axes):
        if not axis.least <= count <= axis.size:
            raise UserError(
                f"{axis.axis}={count} must be from {axis.least} to {axis.size}, the number of {AXES[axis.axis].title} "
                f"in layer {i}: change it"
            )
    sparsity = max((1 - count / axis.size for layer in units.values() for axis in layer.axes), default=0.0)
    return [Widths({layer: {axis.axis: count for axis in layer.axes} for layer in units.values()}, sparsity, 0)]


def _global(
    values: Values, units: Mapping[int, Units], removal: float | None, sparsity: float | None
) -> tuple[dict[int, Kept], int, int]:
    """Remove the lowest-scoring units, compared over all layers and axes; return the kept ones.

    Also return the number of units up to the threshold, and of parameters removed. As in the reference, scores are not
    normalised (heads, sums over many channels, are rarely removed), and a group that would lose everything stays whole.
    All units up to the n-th smallest score are removed, where n = pool - int(initial units * (1 - sparsity)), or the n
    that comes nearest to the ratio.
    """
    in_range = [values[i, axis.axis] for i, layer in units.items() for axis in layer.axes if axis.prune]
    pool = np.sort(np.concatenate([*in_range, np.empty(0)]))

    def keep(count: int) -> dict[int, Kept]:
        threshold = pool[count - 1] if count > 0 else -np.inf
        kept = dict[int, Kept]()
        for i, layer in units.items():
            above = {axis.axis: values[i, axis.axis] > (threshold if axis.prune else -np.inf) for axis in layer.axes}
            kept[i] = {axis: np.flatnonzero(left if left.any() else ~left) for axis, left in above.items()}
        return kept

    def removed(count: int) -> int:
        kept = keep(count)
        return sum(int(units[i].removed({axis: len(left) for axis, left in kept[i].items()})) for i in units)

    if removal is None:
        assert sparsity is not None
        initial = sum(axis.prune * axis.size for layer in units.values() for axis in layer.axes)
        count = max(len(pool) - int(initial * (1 - sparsity)), 0)
    else:
        low, high = 0, len(pool)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if removed(middle) <= removal else (low, middle)
        count = min((low, high), key=lambda count: abs(removed(count) - removal))
    return keep(count), count, removed(count)


def _scored_axes(scores: Scores, values: Values, wanted: str) -> tuple[str, ...]:
    """Return the scored axes to prune: those without scored children, or an axis by name; raise UserError for none."""
    scored = dict.fromkeys(axis for _, axis in values)
    parents = {AXES[axis].parent for axis in scored}
    axes = tuple(axis for axis in scored if (axis not in parents if wanted == WIDTHS else axis == wanted))
    if not axes and wanted != WIDTHS:
        title = AXES[wanted].title
        raise UserError(
            f"{scores.criterion} has no scores of {title}, which method {wanted!r} removes: use a model with {title} "
            f"and a criterion that scores {title}"
        )
    return axes


def _remaining(axis: str, kept: Kept, layer: Layer) -> np.ndarray:
    """Return the indices left along an axis: the kept ones, those of the kept units of its parent axis, or all."""
    parent = AXES[axis].parent
    if axis in kept or parent not in kept:
        return kept.get(axis, np.arange(layer.sizes[axis]))
    group = layer.sizes[axis] // layer.sizes[parent]
    return (kept[parent][:, None] * group + np.arange(group)[None]).reshape(-1)


def pruned_layer(kept: Kept, layer: Layer) -> Layer:
    """Return a layer after pruning its scored axes to the kept units."""
    return layer.resized(layer.completed({axis: len(indices) for axis, indices in kept.items()}))


def kept_layer(index: int, kept: Kept, layer: Layer) -> KeptLayer:
    """Return a layer's entry in the prune plan; children of a scored axis are kept with their parents."""
    return KeptLayer(index, {axis: tuple(_remaining(axis, kept, layer).tolist()) for axis in layer.sizes})


def _tied(values: Values, layers: Sequence[Layer], alive: Sequence[int]) -> Values:
    """Return summed head scores of layers that share keys and values, so that these layers lose the same heads."""
    users = dict[int, list[int]]()
    for i, layer in zip(alive, keep_layers(layers, alive), strict=True):
        if layer.mixer.source not in (None, NO_LAYER):
            users.setdefault(alive[layer.mixer.source], []).append(i)
    tied = dict[tuple[int, str], np.ndarray]()
    for producer, sharing in users.items():
        keys = [(i, "kv_heads") for i in (*sharing, producer)]
        if keys[0] in values:
            tied |= dict.fromkeys(keys, np.sum([values[key] for key in keys], axis=0))
    return tied
