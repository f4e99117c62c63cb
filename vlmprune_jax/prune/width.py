"""Which heads and neurons stay: equal widths layer by layer, or one pool over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune_jax.config import LayerShape, ModelConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.prune.options import layer_range, one_of
from vlmprune_jax.prune.plan import KeptLayer
from vlmprune_jax.prune.scores import Scores
from vlmprune_jax.prune.solver import Units, layer_costs, most_removable, solve_widths, units_of, widths_at

Kept = tuple[np.ndarray, np.ndarray]  # sorted kept attention units or query heads, and neurons


def choose_widths(
    scores: Scores | None, cfg: ModelConfig, alive: Sequence[int], ratio: float | None, settings: Mapping[str, Any], total: int
) -> tuple[list[KeptLayer], dict[str, Any]]:
    """Kept layers among `alive` (original numbers), and what the solver found, for the plan's record.

    With a `base`, ratio and sparsity are relative to that wider config, as in the reference's iterative pruning.

    Raises:
      UserError: ranges or multiples that do not fit, or a target out of reach.
    """
    assert scores is not None and scores.heads is not None and scores.mlp is not None
    base, gqa = settings.get("base") or cfg, scores.options.get("gqa", "groups")
    n_layers, costs = len(cfg.text.layers), layer_costs(cfg)
    if len(base.text.layers) != n_layers:
        raise UserError(f"base has {len(base.text.layers)} layers but the model has {n_layers}: widths only may differ")
    one_of("selection", settings["selection"], ("local", "global"))
    ranges = {name: layer_range(name, settings[name], n_layers) for name in ("attn_layers", "mlp_layers")}
    multiples = {name: _multiple(name, settings[name]) for name in ("heads_multiple", "neurons_multiple")}
    living = {name: [i for i in inside if i in set(alive)] for name, inside in ranges.items()}
    units = units_of(base.text.layers, costs, gqa=gqa, **living, **multiples)
    # what is gone already: earlier steps (base is wider), and layers that the depth part of a hybrid plan removed
    before = sum(costs.of(shape) for shape in base.text.layers)
    depth = sum(costs.of(s) for i, s in enumerate(base.text.layers) if i not in set(alive))
    if ratio is not None and ratio * total > depth + most_removable(units):
        raise UserError(
            f"ratio {ratio:g} cannot be reached by width within attn_layers={settings['attn_layers']}, "
            f"mlp_layers={settings['mlp_layers']}{' after removing layers' if depth else ''}: the most is "
            f"{(depth + most_removable(units)) / total:.4f}"
        )
    if settings["selection"] == "global":
        if gqa != "groups" or max(multiples.values()) > 1:
            raise UserError('selection="global" gives every layer its own width: it takes gqa="groups" and no multiples')
        kept, solved = _global(scores, cfg, units, alive, ratio, settings.get("sparsity"), total, before - depth, depth)
    else:
        if ratio is None:
            widths = widths_at(units, base.text.head_dim, settings["sparsity"])
        else:
            widths = solve_widths(units, base.text.head_dim, max(ratio * total - depth, 0))
        solved = {"sparsity": widths.sparsity}
        kept = {i: _local(scores, i, widths.heads[i], widths.neurons[i], cfg.text.layers[i], gqa) for i in alive}
    return [_kept_layer(i, *kept[i], cfg.text.layers[i], gqa) for i in alive], solved


def _multiple(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={value!r} must be a whole number, at least 1")
    return value


def _local(scores: Scores, layer: int, heads: int, neurons: int, shape: LayerShape, gqa: str) -> Kept:
    """The highest-scoring `heads` units and `neurons` of one layer (equal scores: the later ones stay)."""
    assert scores.heads is not None and scores.mlp is not None
    if gqa == "groups":
        return _highest(scores.heads[layer], heads), _highest(scores.mlp[layer], neurons)
    group = shape.q_heads // shape.kv_heads
    parts = scores.heads[layer].reshape(shape.kv_heads, group)
    chosen = [kv * group + _highest(part, heads) for kv, part in enumerate(parts)]
    return np.concatenate(chosen), _highest(scores.mlp[layer], neurons)


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the `count` largest values (all, if there are fewer)."""
    return np.sort(np.argsort(values, kind="stable")[max(len(values) - count, 0) :])


def _kept_layer(index: int, heads: np.ndarray, neurons: np.ndarray, shape: LayerShape, gqa: str) -> KeptLayer:
    group = shape.q_heads // shape.kv_heads
    if gqa == "groups":
        kv, q = heads, (heads[:, None] * group + np.arange(group)[None]).reshape(-1)
    else:
        kv, q = np.arange(shape.kv_heads), heads
    return KeptLayer(index, *(tuple(int(i) for i in part) for part in (q, kv, neurons)))


def _global(
    scores: Scores,
    cfg: ModelConfig,
    units: Sequence[Units],
    alive: Sequence[int],
    ratio: float | None,
    sparsity: float | None,
    total: int,
    base_parameters: int,
    depth: int,
) -> tuple[dict[int, Kept], dict[str, Any]]:
    """One pool of head and neuron scores over all layers in range; everything up to the n-th smallest goes.

    As in the reference: scores are not normalised (heads, being sums over many channels, rarely go), and a group that
    would lose everything is left whole. n = pool - int(initial units * (1 - sparsity)), or what comes nearest to the ratio.
    """
    assert scores.heads is not None and scores.mlp is not None
    pool = np.sort(
        np.concatenate(
            [scores.heads[i] for i in alive if units[i].prune_heads]
            + [scores.mlp[i] for i in alive if units[i].prune_neurons]
            + [np.empty(0)]
        )
    )
    initial = sum(u.prune_heads * u.heads + u.prune_neurons * u.neurons for u in units)
    costs = layer_costs(cfg)

    def keep(count: int) -> dict[int, Kept]:
        threshold = pool[count - 1] if count > 0 else -np.inf
        return {i: _above(scores, i, threshold, units[i]) for i in alive}

    def removed(count: int) -> int:
        left = sum(costs.of(_kept_layer(i, *kept, cfg.text.layers[i], "groups").shape) for i, kept in keep(count).items())
        return depth + base_parameters - left

    if ratio is None:
        assert sparsity is not None
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity {sparsity:g} must be at least 0 and below 1")
        count = max(len(pool) - int(initial * (1 - sparsity)), 0)
    else:
        count = _bisect(removed, len(pool), ratio * total)
        if removed(count) < ratio * total * 0.99:
            raise UserError(
                f"ratio {ratio:g} cannot be reached by global selection, which leaves a layer whole rather than empty: "
                f'it comes to {removed(count) / total:.4f}: use selection="local" or a smaller ratio'
            )
    return keep(count), {"units_removed": count}


def _above(scores: Scores, layer: int, threshold: float, unit: Units) -> Kept:
    assert scores.heads is not None and scores.mlp is not None
    result = []
    for values, inside in ((scores.heads[layer], unit.prune_heads), (scores.mlp[layer], unit.prune_neurons)):
        kept = np.flatnonzero(values > threshold) if inside else np.arange(len(values))
        result.append(kept if len(kept) else np.arange(len(values)))
    return result[0], result[1]


def _bisect(removed: Any, most: int, removal: float) -> int:
    """The count whose `removed` is nearest to `removal`, below any group that would empty (removed grows up to there)."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(middle) <= removal else (low, middle)
    return min((low, high), key=lambda count: abs(removed(count) - removal))
