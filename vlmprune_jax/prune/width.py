"""Choice of heads and neurons: equal widths layer by layer, or one pool over all layers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.core.checks import layer_range
from vlmprune_jax.core.config import ModelConfig, TextConfig
from vlmprune_jax.core.errors import UserError, error_context
from vlmprune_jax.core.stack import LayerShape, Stack
from vlmprune_jax.prune.config import PlanConfig
from vlmprune_jax.prune.kept import KeptLayer
from vlmprune_jax.prune.scores import Scores
from vlmprune_jax.prune.solver import (
    Costs,
    OutOfReach,
    Units,
    Widths,
    apart,
    check_divides,
    layer_costs,
    most_removable,
    multiples,
    reason_of,
    solve_widths,
    units_of,
    widths_at,
)

Kept = tuple[np.ndarray, np.ndarray]  # sorted: key/value heads (gqa "groups") or query heads, and neurons


@dataclass(frozen=True)
class Target:
    """Target of width pruning: a number of parameters to remove, or a sparsity.

    `asked` is the ratio that the user set and `total` the count it refers to, for messages.
    """

    removal: float | None
    sparsity: float | None
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
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the kept heads and neurons of every remaining layer, and the solver's result for the plan.

    With a `base`, ratio and sparsity are relative to that wider config, as in the reference's iterative pruning. Raises
    UserError for ranges or multiples that do not fit, or a target out of reach.
    """
    base_cfg, gqa = config.base or cfg, scores.options.get("gqa", "groups")
    base, n_layers = base_cfg.stack(stack), len(cfg.stack(stack).layers)
    if len(base.layers) != n_layers:
        raise UserError(
            f"base has {len(base.layers)} layers, but the model has {n_layers}: only heads and neurons may differ"
        )
    if gqa == "groups" and isinstance(base, TextConfig) and base.producers:
        scores = _tied(scores, base, alive)
    costs, snapped = layer_costs(cfg, stack), multiples(config, base, gqa)
    units = _units(base, costs, gqa, alive, dataclasses.replace(config, **snapped))
    by_depth = sum(costs.of(shape) for i, shape in enumerate(base.layers) if i not in alive)
    removal = None if ratio is None else max(ratio * total - by_depth, 0)
    target = Target(removal, config.sparsity, ratio, total, by_depth)
    if removal is not None and removal > most_removable(units):
        raise OutOfReach(
            f"ratio {ratio:g} cannot be reached by width pruning of the {stack} stack "
            f"within attn_layers={config.attn_layers or 'all'}, "
            f"mlp_layers={config.mlp_layers or 'all'}{', heads kept' if config.heads == 'keep' else ''}"
            f"{' after removing layers' if by_depth else ''}: the most is "
            f"{(by_depth + most_removable(units)) / total:.4f}"
        )
    if config.selection == "global":
        if gqa != "groups" or max(snapped.values()) > 1:
            raise UserError(
                'selection="global" needs gqa="groups" and no multiples, because every layer gets its own width'
            )
        kept, solved = _global(scores, base, units, alive, target)
    else:
        kept, solved = _local(scores, base, units, alive, target, trade=config.heads == "auto")
    shapes = cfg.stack(stack).layers
    check_divides(((i, shape_of(kept[i], shapes[i], gqa)) for i in alive), config.tensor_parallel)
    return kept, {**solved, **snapped}


def _tied(scores: Scores, base: TextConfig, alive: Sequence[int]) -> Scores:
    """Return head scores that make layers with shared keys and values lose the same heads."""
    heads = [*scores.widths[0]]
    kept = base.with_layers([base.layers[i] for i in alive])
    for producer in kept.producers:
        window = kept.layers[producer].window
        users = [i for i in alive if base.layers[i].shared and base.layers[i].window == window]
        together = sum(heads[i] for i in users) + heads[alive[producer]]
        for i in (*users, alive[producer]):
            heads[i] = together
    return dataclasses.replace(scores, heads=tuple(heads))


def _units(base: Stack, costs: Costs, gqa: str, alive: Collection[int], config: PlanConfig) -> list[Units]:
    n_layers = len(base.layers)
    lose_heads = () if config.heads == "keep" else alive
    attn_layers = [i for i in layer_range("attn_layers", config.attn_layers, n_layers) if i in lose_heads]
    mlp_layers = [i for i in layer_range("mlp_layers", config.mlp_layers, n_layers) if i in alive]
    reason = reason_of(config)
    with error_context(reason) if reason else contextlib.nullcontext():
        return units_of(
            base.layers,
            costs,
            gqa=gqa,
            attn_layers=attn_layers,
            mlp_layers=mlp_layers,
            heads_multiple=config.heads_multiple,
            neurons_multiple=config.neurons_multiple,
            double_wide=isinstance(base, TextConfig) and base.double_wide,
        )


def _local(
    scores: Scores, base: Stack, units: Sequence[Units], alive: Sequence[int], target: Target, *, trade: bool
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Return the highest-scoring units of every layer; all layers keep equally many.

    Heads and neurons lose the same share, or (`trade`) the shares whose scores add up to the least: the smallest loss
    per parameter, as far as scores of both are comparable.
    """
    if target.removal is None:
        assert target.sparsity is not None
        widths = widths_at(units, base.head_dim, target.sparsity)
    else:
        found = [solve_widths(units, base.head_dim, target.removal)]
        if trade:
            found += apart(units, base.head_dim, target.removal)
        # of all that come about as near to the target: one unit more or less is immaterial
        gap = max(abs(found[0].removed - target.removal), sum(u.prune_neurons * u.neuron_cost for u in units))
        near = [one for one in found if abs(one.removed - target.removal) <= gap]
        widths = min(near, key=lambda one: _lost(scores, base, one, alive)) if len(near) > 1 else near[0]
    return _kept(scores, base, widths, alive), {"sparsity": widths.sparsity}


def _lost(scores: Scores, base: Stack, widths: Widths, alive: Sequence[int]) -> float:
    """Return the summed scores of the units that are removed."""
    heads, neurons = (_ranked(scores, kind, base.layers) for kind in ("heads", "mlp"))
    lost = 0.0
    for i in alive:
        pools = [*((pool, widths.heads[i]) for pool in heads[i]), (neurons[i][0], widths.neurons[i])]
        lost += sum(float(pool.lost[max(len(pool.order) - count, 0)]) for pool, count in pools)
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
def _ranked(scores: Scores, kind: str, shapes: tuple[LayerShape, ...]) -> tuple[tuple[_Pool, ...], ...]:
    """Return each layer's ranking of units, one ranking per key/value head if query heads are pruned singly."""
    values = dict(zip(("heads", "mlp"), scores.widths, strict=True))[kind]
    within = kind == "heads" and scores.options.get("gqa") == "q_heads"
    parts = [one.reshape(shape.kv_heads if within else 1, -1) for one, shape in zip(values, shapes, strict=True)]
    return tuple(tuple(_Pool.of(row, i * len(row)) for i, row in enumerate(part)) for part in parts)


def _kept(scores: Scores, base: Stack, widths: Widths, alive: Sequence[int]) -> dict[int, Kept]:
    """Return {layer: indices of its highest-scoring units}, as many as the layer keeps."""
    heads, neurons = (_ranked(scores, kind, base.layers) for kind in ("heads", "mlp"))
    return {
        i: (
            np.concatenate([pool.highest(widths.heads[i]) for pool in heads[i]]),
            neurons[i][0].highest(widths.neurons[i]),
        )
        for i in alive
    }


def shape_of(kept: Kept, shape: LayerShape, gqa: str) -> LayerShape:
    """Return a layer's shape after pruning."""
    heads, neurons = map(len, kept)
    q, kv = (heads * (shape.q_heads // shape.kv_heads), heads) if gqa == "groups" else (heads, shape.kv_heads)
    return shape.with_widths(q, kv, neurons)


def kept_layer(index: int, kept: Kept, shape: LayerShape, gqa: str) -> KeptLayer:
    """Return a layer's entry in the prune plan."""
    heads, neurons = kept
    group = shape.q_heads // shape.kv_heads
    if gqa == "groups":
        kv, q = heads, (heads[:, None] * group + np.arange(group)[None]).reshape(-1)
    else:
        kv, q = np.arange(shape.kv_heads), heads
    return KeptLayer(index, *(tuple(int(i) for i in part) for part in (q, kv, neurons)))


def _global(
    scores: Scores, base: Stack, units: Sequence[Units], alive: Sequence[int], target: Target
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """Remove the lowest-scoring heads and neurons, compared over all layers.

    As in the reference, scores are not normalised (heads, sums over many channels, are rarely removed), and a group
    that would lose everything stays whole. Everything up to the n-th smallest is removed: n = pool - int(initial units
    * (1 - sparsity)), or the count nearest to the ratio.
    """
    head_scores, neuron_scores = scores.widths
    attention = [head_scores[i] for i in alive if units[i].prune_heads]
    mlp = [neuron_scores[i] for i in alive if units[i].prune_neurons]
    pool = np.sort(np.concatenate([*attention, *mlp, np.empty(0)]))

    def keep(count: int) -> dict[int, Kept]:
        threshold = pool[count - 1] if count > 0 else -np.inf
        return {
            i: (
                _above(head_scores[i], threshold, units[i].prune_heads),
                _above(neuron_scores[i], threshold, units[i].prune_neurons),
            )
            for i in alive
        }

    def removed(count: int) -> int:
        return sum(
            (units[i].heads - len(heads)) * units[i].head_cost
            + (units[i].neurons - len(neurons)) * units[i].neuron_cost
            for i, (heads, neurons) in keep(count).items()
        )

    if target.removal is None:
        assert target.sparsity is not None
        if not 0 <= target.sparsity < 1:
            raise UserError(f"sparsity {target.sparsity:g} must be at least 0 and below 1")
        initial = sum(u.prune_heads * u.heads + u.prune_neurons * u.neurons for u in units)
        count = max(len(pool) - int(initial * (1 - target.sparsity)), 0)
    else:
        count = _nearest_count(removed, len(pool), target.removal)
        largest = max((u.head_cost if u.prune_heads else u.neuron_cost) for u in units)
        if target.removal - removed(count) > largest:  # further away than the coarsest single unit
            raise OutOfReach(
                f"ratio {target.asked:g} cannot be reached by global selection, which never empties a layer "
                f"(it reaches {(target.by_depth + removed(count)) / target.total:.4f}): "
                'use selection="local" or a smaller ratio'
            )
    return keep(count), {"units_removed": count}


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
