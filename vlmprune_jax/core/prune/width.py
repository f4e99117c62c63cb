"""Choice of heads and neurons: equal widths layer by layer, or one pool over all layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import layer_range
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, keep_layers
from vlmprune_jax.core.mixers import NO_LAYER
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.prune.config import METHODS, WIDTHS, PlanConfig
from vlmprune_jax.core.prune.layer_costs import Costs, layer_costs
from vlmprune_jax.core.prune.scores import Scores
from vlmprune_jax.core.prune.solver import (
    OutOfReach,
    Units,
    Widths,
    apart,
    check_divides,
    most_removable,
    multiples,
    reason_of,
    solve_widths,
    units_of,
    widths_at,
)

Kept = Mapping[str, np.ndarray]  # {pruned axis: sorted original indices} of one layer
Values = Mapping[tuple[int, str], np.ndarray]  # {(layer, axis): scores}


@dataclass(frozen=True)
class Target:
    """Target of width pruning: a number of parameters to remove, a sparsity, or counts of units by axis."""

    removal: float | None = None
    sparsity: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


def choose_widths(
    scores: Scores,
    cfg: ModelConfig,
    alive: Sequence[int],
    ratio: float | None,
    config: PlanConfig,
    total: int,
    component: str,
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the kept units of every remaining layer, and the solver's result for the plan.

    If `config` sets a number of experts, they are removed before heads and neurons. With a `base`, ratio and sparsity
    are relative to this wider config, as in the reference's iterative pruning. Raises UserError for ranges or multiples
    that the layers cannot satisfy, or a target that pruning cannot reach.
    """
    stack, base = cfg.stack(component), (config.base or cfg).stack(component)
    if len(base.layers) != len(stack.layers):
        raise UserError(
            f"base has {len(base.layers)} layers, but the model has {len(stack.layers)}: only heads and neurons may "
            "differ"
        )
    costs, gqa = layer_costs(cfg, component), scores.options.get("gqa", "groups")
    counts = {axis: count for axis in AXES if (count := getattr(config, axis, None)) is not None}
    by_count = counts if METHODS[config.method][-1] == WIDTHS else {}
    snapped = multiples(config, stack if by_count else base, gqa)
    layers = {i: base.layers[i] for i in alive}
    removed = sum(map(costs.of, base.layers)) - sum(map(costs.of, layers.values()))
    values = {(k.layer, k.axis): x for k, x in scores.values.items() if k.component == component and k.layer in layers}
    first, numbers = dict[int, Kept](), dict[tuple[int, str], np.ndarray]()
    if by_count:
        axes = _pruned_axes(scores, values, "experts")
        units = _units({i: stack.layers[i] for i in alive}, costs, axes, config, snapped, len(stack.layers))
        first, _ = _local(values, units, Target(counts=by_count), trade=False)
        numbers = {(i, axis): _remaining(axis, first[i], stack.layers[i]) for i, axis in values if axis not in axes}
        values = {place: values[place][left] for place, left in numbers.items()}
        narrowed = {i: pruned_layer(first[i], layer) for i, layer in layers.items()}
        by_experts = sum(map(costs.of, layers.values())) - sum(map(costs.of, narrowed.values()))
        layers, removed = narrowed, removed + by_experts
    axes = _pruned_axes(scores, values, config.method)
    units = _units(layers, costs, axes, config, snapped, len(stack.layers))
    removal = None if ratio is None else max(ratio * total - removed, 0)
    target = Target(removal, config.sparsity, {} if by_count else counts)
    if ratio is not None and removal is not None and removal > most_removable([*units.values()]):
        raise OutOfReach(
            f"ratio {ratio:g} cannot be reached by width pruning of the {component} stack "
            f"within attn_layers={config.attn_layers or 'all'}, "
            f"mlp_layers={config.mlp_layers or 'all'}{', heads kept' if config.heads == 'keep' else ''}"
            f"{' after removing layers' if len(alive) < len(stack.layers) else ''}"
            f"{' after removing experts' if by_count else ''}: the most is "
            f"{(removed + most_removable([*units.values()])) / total:.4f}"
        )
    if gqa == "groups":
        values = {**values, **_tied(values, base.layers, alive)}
    if config.selection == "global":
        if any(AXES[axis].parent for axis in axes) or max(snapped.values()) > 1:
            raise UserError(
                'selection="global" needs gqa="groups", a model without experts and no multiples, because every layer '
                "gets its own width"
            )
        kept, solved, gone = _global(values, units, target)
        if removal is not None and removal - gone > max(map(_coarsest_price, units.values())):
            raise OutOfReach(
                f"ratio {ratio:g} cannot be reached by global selection, which never empties a layer (it reaches "
                f'{(removed + gone) / total:.4f}): use selection="local" or a smaller ratio'
            )
    else:
        kept, solved = _local(values, units, target, trade=config.heads == "auto")
    if by_count:
        kept = {i: {**first[i], **{axis: numbers[i, axis][own] for axis, own in kept[i].items()}} for i in alive}
    check_divides(((i, pruned_layer(kept[i], stack.layers[i])) for i in alive), config.tensor_parallel)
    return kept, {**solved, **snapped}


def _pruned_axes(scores: Scores, values: Values, method: str) -> tuple[str, ...]:
    """Return the scored axes that a method (or an axis of that name) prunes; raise UserError if there are none."""
    scored = dict.fromkeys(axis for _, axis in values)
    parents = {AXES[axis].parent for axis in scored}
    wanted = METHODS[method][-1]
    axes = tuple(axis for axis in scored if (axis not in parents if wanted == WIDTHS else axis == wanted))
    if not axes and wanted != WIDTHS:
        title = AXES[wanted].title
        raise UserError(
            f"{scores.criterion} has no scores of {title}, which method {method!r} removes: use a model with {title} "
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
    return KeptLayer(index, {axis: tuple(map(int, _remaining(axis, kept, layer))) for axis in layer.sizes})


def _tied(values: Values, layers: Sequence[Layer], alive: Sequence[int]) -> Values:
    """Return summed head scores of layers that share keys and values, so that these layers lose the same heads."""
    users = dict[int, list[int]]()
    for i, layer in zip(alive, keep_layers(layers, alive), strict=True):
        if layer.mixer.source not in (None, NO_LAYER):
            users.setdefault(alive[layer.mixer.source], []).append(i)
    tied = dict[tuple[int, str], np.ndarray]()
    for producer, sharing in users.items():
        places = [(i, "kv_heads") for i in (*sharing, producer)]
        if places[0] in values:
            tied |= dict.fromkeys(places, np.sum([values[place] for place in places], axis=0))
    return tied


def _units(
    layers: Mapping[int, Layer],
    costs: Costs,
    axes: Collection[str],
    config: PlanConfig,
    snapped: Mapping[str, int],
    n_layers: int,
) -> dict[int, Units]:
    """Return the prunable units of the layers, within the ranges of the settings."""
    attention = layer_range("attn_layers", config.attn_layers, n_layers)
    ranges = {
        "attn_layers": () if config.heads == "keep" else attention,
        "mlp_layers": layer_range("mlp_layers", config.mlp_layers, n_layers),
    }
    reason = reason_of(config)
    with error_context(reason) if reason else contextlib.nullcontext():
        return units_of(layers, costs, axes, ranges=ranges, multiples=snapped)


def _local(
    values: Values, units: Mapping[int, Units], target: Target, *, trade: bool
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the highest-scoring units of every layer; all layers keep equally many.

    Heads and neurons lose the same share. With `trade`, they lose the shares whose removed scores have the smallest
    sum, which assumes that scores of heads and neurons are comparable.
    """
    layers = [*units.values()]
    pools = {
        (i, axis.axis): [
            _Pool.of(row, n * len(row)) for n, row in enumerate(values[i, axis.axis].reshape(axis.parents, -1))
        ]
        for i, layer in units.items()
        for axis in layer.axes
    }

    def lost(widths: Widths) -> float:
        """Return the sum of the scores of all units that these widths remove."""
        total = 0.0
        for i, counts in zip(units, widths.counts, strict=True):
            for axis, count in counts.items():
                total += sum(float(pool.lost[max(len(pool.order) - count, 0)]) for pool in pools[i, axis])
        return total

    if target.counts:
        widths = _widths_of(units, target.counts)
    elif target.removal is None:
        assert target.sparsity is not None
        widths = widths_at(layers, target.sparsity)
    else:
        candidates = [solve_widths(layers, target.removal)]
        if trade:
            candidates += apart(layers, target.removal)
        # candidates about as near to the target as the first one: a difference of one neuron per layer is immaterial
        price = sum(map(_fine_price, layers))
        gap = max(abs(candidates[0].removed - target.removal), price)
        near = [widths for widths in candidates if abs(widths.removed - target.removal) <= gap]
        widths = min(near, key=lost)
    kept: dict[int, Kept] = {
        i: {axis: np.concatenate([pool.highest(count) for pool in pools[i, axis]]) for axis, count in counts.items()}
        for i, counts in zip(units, widths.counts, strict=True)
    }
    return kept, {"sparsity": widths.sparsity}


def _widths_of(units: Mapping[int, Units], counts: Mapping[str, int]) -> Widths:
    """Return the layer widths with these numbers of units by axis; other axes stay whole.

    Raises UserError if a layer has fewer units, or needs more.
    """
    kept, shares = [], [0.0]
    for i, layer in units.items():
        for axis in layer.axes:
            if not axis.least <= counts.get(axis.axis, axis.size) <= axis.size:
                raise UserError(
                    f"{axis.axis}={counts[axis.axis]} must be from {axis.least} to {axis.size}, the "
                    f"number of {AXES[axis.axis].title} in layer {i}: change it"
                )
        kept.append({axis.axis: counts.get(axis.axis, axis.size) for axis in layer.axes})
        shares += [1 - kept[-1][axis] / layer.whole[axis] for axis in counts]
    removed = sum(int(layer.removed(numbers)) for layer, numbers in zip(units.values(), kept, strict=True))
    return Widths(tuple(kept), max(shares), removed)


def _fine_price(layer: Units) -> int:
    """Return the number of parameters of a layer's smallest removal: one neuron along every fine axis in range."""
    fewer = {axis.axis: axis.size - (axis.fine and axis.prune) for axis in layer.axes}
    return int(layer.removed(fewer))


@dataclass(frozen=True, eq=False)
class _Pool:
    """Ranking of units that compete with each other: indices by ascending score, and cumulative scores."""

    order: np.ndarray
    lost: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, first: int) -> _Pool:
        """Rank units by score (of equal scores the earlier unit ranks lower); `first` is the first unit's index."""
        order = np.argsort(values, kind="stable")
        return cls(first + order, np.concatenate([[0.0], np.cumsum(values[order])]))

    def highest(self, count: int) -> np.ndarray:
        """Return the sorted indices of the `count` highest-scoring units."""
        return np.sort(self.order[max(len(self.order) - count, 0) :])


def _global(values: Values, units: Mapping[int, Units], target: Target) -> tuple[dict[int, Kept], dict[str, Any], int]:
    """Remove the lowest-scoring units, compared over all layers and axes; also return the parameters removed.

    As in the reference, scores are not normalised (heads, sums over many channels, are rarely removed), and a group
    that would lose everything stays whole. All units up to the n-th smallest score are removed, where n = pool -
    int(initial units * (1 - sparsity)), or the n that comes nearest to the ratio.
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

    if target.removal is None:
        assert target.sparsity is not None
        if not 0 <= target.sparsity < 1:
            raise UserError(f"sparsity {target.sparsity:g} must be at least 0 and below 1")
        initial = sum(axis.prune * axis.size for layer in units.values() for axis in layer.axes)
        count = max(len(pool) - int(initial * (1 - target.sparsity)), 0)
    else:
        count = _nearest_count(removed, len(pool), target.removal)
    return keep(count), {"units_removed": count}, removed(count)


def _coarsest_price(layer: Units) -> int:
    """Return the parameters of the largest single unit in range."""
    fewer = [{**layer.whole, axis.axis: axis.size - 1} for axis in layer.axes if axis.prune]
    return max((int(layer.removed(counts)) for counts in fewer), default=0)


def _nearest_count(removed: Callable[[int], int], most: int, removal: float) -> int:
    """Return the count, up to `most`, whose `removed(count)` comes nearest to `removal`."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(middle) <= removal else (low, middle)
    return min((low, high), key=lambda count: abs(removed(count) - removal))
