"""Choice of heads and neurons: equal widths layer by layer, or one pool over all layers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import layer_range
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.layer import Layer, keep_layers
from vlmprune_jax.core.part import AXES, Key
from vlmprune_jax.core.plans.kept import KeptLayer
from vlmprune_jax.core.prune.config import METHOD_AXES, PlanConfig
from vlmprune_jax.core.prune.criteria import scoring
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
from vlmprune_jax.core.stack import Stack

Kept = Mapping[str, np.ndarray]  # {scored axis: sorted original indices}


@dataclass(frozen=True)
class Target:
    """Target of width pruning: a number of parameters to remove, a sparsity, or counts of units by axis.

    `asked`: the ratio that the user set; `total`: the number of parameters to which this ratio refers (for messages).
    """

    removal: float | None
    sparsity: float | None
    counts: Mapping[str, int]
    asked: float | None
    total: int
    by_depth: int


def choose_widths(
    scores: Scores,
    cfg: ModelConfig,
    alive: Sequence[int],
    ratio: float | None,
    config: PlanConfig,
    total: int,
    stack: str = "text",
    by_count: int | None = None,
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the kept units of every remaining layer, and the solver's result for the plan.

    If `config` sets a number of experts, they are removed before heads and neurons; `by_count` is the number of
    parameters that were removed with them. With a `base`, ratio and sparsity are relative to this wider config, as in
    the reference's iterative pruning. Raises UserError for ranges or multiples that the layers cannot satisfy, or a
    target that pruning cannot reach.
    """
    counts = {axis: count for axis in AXES if (count := getattr(config, axis, None)) is not None}
    if counts and config.method not in METHOD_AXES:
        return _after_counts(scores, cfg, alive, ratio, config, total, stack)
    scores = _scores_for(scores, config.method) if by_count is None else scores
    base_cfg, gqa = config.base or cfg, scores.options.get("gqa", "groups")
    base, n_layers = base_cfg.stack(stack), len(cfg.stack(stack).layers)
    if len(base.layers) != n_layers:
        raise UserError(
            f"base has {len(base.layers)} layers, but the model has {n_layers}: only heads and neurons may differ"
        )
    if gqa == "groups" and isinstance(base, TextConfig) and base.producers:
        scores = _tied(scores, base, alive, stack)
    costs, snapped = layer_costs(cfg, stack), multiples(config, base, gqa)
    units = _units(base, costs, scores.axes, alive, config, snapped)
    by_depth = sum(costs.of(shape) for i, shape in enumerate(base.layers) if i not in alive) + (by_count or 0)
    removal = None if ratio is None else max(ratio * total - by_depth, 0)
    target = Target(removal, config.sparsity, counts, ratio, total, by_depth)
    if removal is not None and removal > most_removable(units):
        raise OutOfReach(
            f"ratio {ratio:g} cannot be reached by width pruning of the {stack} stack "
            f"within attn_layers={config.attn_layers or 'all'}, "
            f"mlp_layers={config.mlp_layers or 'all'}{', heads kept' if config.heads == 'keep' else ''}"
            f"{' after removing layers' if len(alive) < n_layers else ''}"
            f"{' after removing experts' if by_count else ''}: the most is "
            f"{(by_depth + most_removable(units)) / total:.4f}"
        )
    if config.selection == "global":
        if any(AXES[axis].parent for axis in scores.axes) or max(snapped.values()) > 1:
            raise UserError(
                'selection="global" needs gqa="groups", a model without experts and no multiples, because every layer '
                "gets its own width"
            )
        kept, solved = _global(scores, units, alive, target)
    else:
        kept, solved = _local(scores, base, units, alive, target, trade=config.heads == "auto")
    layers = cfg.stack(stack).layers
    check_divides(((i, pruned_layer(kept[i], layers[i])) for i in alive), config.tensor_parallel)
    return kept, {**solved, **snapped}


def _after_counts(
    scores: Scores,
    cfg: ModelConfig,
    alive: Sequence[int],
    ratio: float | None,
    config: PlanConfig,
    total: int,
    stack: str,
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the kept units after removing experts down to a set number, then heads and neurons up to the ratio."""
    method, axes = next(iter(METHOD_AXES.items()))
    alone = dataclasses.replace(config, method=method, sparsity=None, selection="local", base=None)
    first, solved = choose_widths(scores, cfg, alive, None, alone, total, stack)

    def smaller(whole: ModelConfig) -> ModelConfig:
        layers = whole.stack(stack).layers
        return whole.with_layers([pruned_layer(first.get(i, {}), layer) for i, layer in enumerate(layers)], stack)

    units, numbers = dict[Key, np.ndarray](), dict[tuple[int, str], np.ndarray]()
    for key, values in scores.values.items():
        i, axis = key.layer, key.axis
        if i is not None and axis not in axes:
            parents, layer = first.get(i, {}).get(AXES[axis].parent), cfg.stack(stack).layers[i]
            numbers[i, axis] = np.arange(len(values)) if parents is None else _children(axis, parents, layer)
            units[key] = values[numbers[i, axis]]
    base, costs = config.base or cfg, layer_costs(cfg, stack).of
    gone = sum(map(costs, base.stack(stack).layers)) - sum(map(costs, smaller(base).stack(stack).layers))
    rest = dataclasses.replace(config, base=smaller(base), experts=None)
    others, widths = choose_widths(
        dataclasses.replace(scores, values=units, by_token_type={}),
        smaller(cfg),
        alive,
        ratio,
        rest,
        total,
        stack,
        by_count=gone,
    )
    kept = {i: {axis: numbers[i, axis][indices] for axis, indices in others[i].items()} for i in alive}
    steps = {name: value for name, value in solved.items() if name != "sparsity"}
    return {i: {**first[i], **kept[i]} for i in alive}, {**widths, **steps}


def _children(axis: str, parents: np.ndarray, layer: Layer) -> np.ndarray:
    """Return the indices along an axis (such as query heads) that belong to these units of the parent axis."""
    group = layer.sizes[axis] // layer.sizes[AXES[axis].parent]
    return (parents[:, None] * group + np.arange(group)[None]).reshape(-1)


def _scores_for(scores: Scores, method: str) -> Scores:
    """Return the scores of the axes that a method prunes; raise UserError if there are none."""
    if not scores.axes:
        raise UserError(
            f"{scores.criterion} does not score heads and neurons: for width pruning, score with {scoring('widths')}"
        )
    parents = {AXES[axis].parent for axis in scores.axes}
    axes = METHOD_AXES.get(method, [axis for axis in scores.axes if axis not in parents])
    units = {key: values for key, values in scores.values.items() if key.axis in axes}
    if not units:
        titles = " and ".join(AXES[axis].title for axis in axes)
        raise UserError(
            f"{scores.criterion} has no scores of {titles}, which method {method!r} removes: use a model with {titles} "
            f"and a criterion that scores {titles}"
        )
    return dataclasses.replace(scores, values=units, by_token_type={})


def _tied(scores: Scores, base: TextConfig, alive: Sequence[int], stack: str) -> Scores:
    """Sum head scores over the layers that share keys and values, so that these layers lose the same heads."""
    units = dict(scores.values)
    kept = base.with_layers(keep_layers(base.layers, alive))
    for producer in kept.producers:
        users = [i for i, layer in zip(alive, kept.layers, strict=True) if layer.mixer.source == producer]
        shared = [Key(stack, i, "kv_heads") for i in (*users, alive[producer])]
        units |= dict.fromkeys(shared, np.sum([units[key] for key in shared], axis=0))
    return dataclasses.replace(scores, values=units)


def _units(
    base: Stack,
    costs: Costs,
    axes: Collection[str],
    alive: Collection[int],
    config: PlanConfig,
    snapped: Mapping[str, int],
) -> list[Units]:
    n_layers = len(base.layers)
    lose_heads = () if config.heads == "keep" else alive
    ranges = {
        "attn_layers": [i for i in layer_range("attn_layers", config.attn_layers, n_layers) if i in lose_heads],
        "mlp_layers": [i for i in layer_range("mlp_layers", config.mlp_layers, n_layers) if i in alive],
    }
    reason = reason_of(config)
    with error_context(reason) if reason else contextlib.nullcontext():
        return units_of(base, costs, axes, ranges=ranges, multiples=snapped)


def _local(
    scores: Scores, base: Stack, units: Sequence[Units], alive: Sequence[int], target: Target, *, trade: bool
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the highest-scoring units of every layer; all layers keep equally many.

    Heads and neurons lose the same share. With `trade`, they lose the shares whose removed scores have the smallest
    sum, which assumes that scores of heads and neurons are comparable.
    """
    if target.counts:
        widths = _widths_of(units, target.counts)
    elif target.removal is None:
        assert target.sparsity is not None
        widths = widths_at(units, target.sparsity)
    else:
        candidates = [solve_widths(units, target.removal)]
        if trade:
            candidates += apart(units, target.removal)
        # candidates about as near to the target as the first one: a difference of one neuron per layer is immaterial
        price = sum(_fine_price(layer) for layer in units)
        gap = max(abs(candidates[0].removed - target.removal), price)
        near = [widths for widths in candidates if abs(widths.removed - target.removal) <= gap]
        widths = min(near, key=lambda widths: _lost(scores, base, widths, alive)) if len(near) > 1 else near[0]
    pools = _ranked(scores, base.layers)
    kept: dict[int, Kept] = {
        i: {
            axis: np.concatenate([pool.highest(widths.counts[i][axis]) for pool in pools[i, axis]])
            for axis in widths.counts[i]
        }
        for i in alive
    }
    return kept, {"sparsity": widths.sparsity}


def _widths_of(units: Sequence[Units], counts: Mapping[str, int]) -> Widths:
    """Return the layer widths with these numbers of units by axis; other axes stay whole.

    Raises UserError if a layer has fewer units, or needs more.
    """
    kept = []
    for i, layer in enumerate(units):
        for axis in layer.axes:
            if not axis.least <= counts.get(axis.axis, axis.size) <= axis.size:
                raise UserError(
                    f"{axis.axis}={counts[axis.axis]} must be from {axis.least} to {axis.size}, the "
                    f"number of {AXES[axis.axis].title} in layer {i}: change it"
                )
        kept.append({**layer.whole, **{axis.axis: counts.get(axis.axis, axis.size) for axis in layer.axes}})
    removed = sum(int(layer.removed(numbers)) for layer, numbers in zip(units, kept, strict=True))
    shares = [
        1 - numbers[axis] / layer.whole[axis] for layer, numbers in zip(units, kept, strict=True) for axis in counts
    ]
    return Widths(tuple(kept), max(shares, default=0.0), removed)


def _fine_price(layer: Units) -> int:
    """Return the number of parameters of a layer's smallest removal: one neuron along every fine axis in range."""
    fewer = {axis.axis: axis.size - (axis.fine and axis.prune) for axis in layer.axes}
    return int(layer.removed(fewer))


def _lost(scores: Scores, base: Stack, widths: Widths, alive: Sequence[int]) -> float:
    """Return the sum of the scores of all units that these widths remove."""
    pools, lost = _ranked(scores, base.layers), 0.0
    for i in alive:
        for axis, count in widths.counts[i].items():
            lost += sum(float(pool.lost[max(len(pool.order) - count, 0)]) for pool in pools[i, axis])
    return lost


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


@functools.lru_cache(maxsize=4)  # by identity; a search for a budget repeats its arguments
def _ranked(scores: Scores, layers: tuple[Layer, ...]) -> dict[tuple[int, str], tuple[_Pool, ...]]:
    """Return {(layer, axis): rankings of its units}, one ranking per parent, inside which units compete."""
    result = {}
    for key, values in scores.values.items():
        assert key.layer is not None
        parent = AXES[key.axis].parent
        rows = values.reshape(layers[key.layer].sizes[parent] if parent else 1, -1)
        result[key.layer, key.axis] = tuple(_Pool.of(row, n * len(row)) for n, row in enumerate(rows))
    return result


def pruned_layer(kept: Kept, layer: Layer) -> Layer:
    """Return a layer after pruning its scored axes to the kept units."""
    return layer.resized(layer.completed({axis: len(indices) for axis, indices in kept.items()}))


def kept_layer(index: int, kept: Kept, layer: Layer) -> KeptLayer:
    """Return a layer's entry in the prune plan; children of a scored axis are kept with their parents."""
    units = dict[str, tuple[int, ...]]()
    for axis in layer.axes:
        size, parents = layer.sizes[axis.name], kept.get(axis.parent)
        if axis.name in kept:
            indices = kept[axis.name]
        elif parents is not None:
            indices = _children(axis.name, parents, layer)
        else:
            indices = np.arange(size)
        units[axis.name] = tuple(map(int, indices))
    return KeptLayer(index, units)


def _global(
    scores: Scores, units: Sequence[Units], alive: Sequence[int], target: Target
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Remove the lowest-scoring units, compared over all layers and axes.

    As in the reference, scores are not normalised (heads, sums over many channels, are rarely removed), and a group
    that would lose everything stays whole. All units up to the n-th smallest score are removed, where n = pool -
    int(initial units * (1 - sparsity)), or the n that comes nearest to the ratio.
    """
    axes = [(i, axis) for i in alive for axis in units[i].axes]
    of_unit = {(key.layer, key.axis): values for key, values in scores.values.items()}
    pool = np.sort(np.concatenate([*(of_unit[i, axis.axis] for i, axis in axes if axis.prune), np.empty(0)]))

    def keep(count: int) -> dict[int, Kept]:
        threshold = pool[count - 1] if count > 0 else -np.inf
        kept = dict[int, dict[str, np.ndarray]]()
        for i, axis in axes:
            kept.setdefault(i, {})[axis.axis] = _above(of_unit[i, axis.axis], threshold, axis.prune)
        return {i: kept.get(i, {}) for i in alive}

    def removed(count: int) -> int:
        kept = keep(count)
        return sum(int(units[i].removed({axis: len(left) for axis, left in kept[i].items()})) for i in alive)

    if target.removal is None:
        assert target.sparsity is not None
        if not 0 <= target.sparsity < 1:
            raise UserError(f"sparsity {target.sparsity:g} must be at least 0 and below 1")
        initial = sum(axis.prune * axis.size for layer in units for axis in layer.axes)
        count = max(len(pool) - int(initial * (1 - target.sparsity)), 0)
    else:
        count = _nearest_count(removed, len(pool), target.removal)
        coarsest = max(_coarsest_price(layer) for layer in units)
        if target.removal - removed(count) > coarsest:
            raise OutOfReach(
                f"ratio {target.asked:g} cannot be reached by global selection, which never empties a layer "
                f"(it reaches {(target.by_depth + removed(count)) / target.total:.4f}): "
                'use selection="local" or a smaller ratio'
            )
    return keep(count), {"units_removed": count}


def _coarsest_price(layer: Units) -> int:
    """Return the parameters of the largest single unit in range."""
    fewer = [{**layer.whole, axis.axis: axis.size - 1} for axis in layer.axes if axis.prune]
    return max((int(layer.removed(counts)) for counts in fewer), default=0)


def _above(values: np.ndarray, threshold: float, inside: bool) -> np.ndarray:
    kept = np.flatnonzero(values > threshold) if inside else np.arange(len(values))
    return kept if len(kept) else np.arange(len(values))


def _nearest_count(removed: Callable[[int], int], most: int, removal: float) -> int:
    """Return the count, up to `most`, whose `removed(count)` comes nearest to `removal`."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(middle) <= removal else (low, middle)
    return min((low, high), key=lambda count: abs(removed(count) - removal))
