"""From a ratio to widths: the cost of a layer, a head and a neuron, and the sparsity that reaches a target."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.stack import LayerShape, Stack, runs
from vlmprune_jax.models.params import param_axes, param_shapes
from vlmprune_jax.prune.config import PlanConfig

# What `o_proj` and `down_proj` read (heads * head_dim, neurons) should be a multiple of: lanes of a TPU's registers;
# blocks of llama.cpp's Q8_0 and Q4_0 and of its K-quants, which lie along a row (a row that does not divide is stored
# in another type); groups of int4 weights that share a scale.
BLOCKS = {"tpu": 128, "gguf": 32, "gguf_k": 256, "int4": 128}
GRID = 10_000  # sparsities that are tried: multiples of 1e-4


class OutOfReach(UserError):
    """Error raised if a pruning method cannot remove the requested number of parameters."""


@dataclass(frozen=True)
class Costs:
    """Parameter counts of a layer: a constant part, and parameters per query head, key/value head and MLP neuron.

    `kinds`: the costs of layers that differ from the first, by whether they have full attention and shared keys.
    """

    layer: int
    q_head: int
    kv_head: int
    neuron: int
    kinds: Mapping[tuple[bool, bool], Costs] = field(default_factory=dict)

    def at(self, shape: LayerShape) -> Costs:
        """Return the parameter costs for layers of one type (sliding window or not, own or reused keys and values)."""
        return self.kinds.get((shape.window is None, shape.shared), self)

    def of(self, shape: LayerShape) -> int:
        """Return the number of parameters of a layer with these widths."""
        cost = self.at(shape)
        return cost.layer + shape.q_heads * cost.q_head + shape.kv_heads * cost.kv_head + shape.mlp * cost.neuron


def layer_costs(cfg: ModelConfig, stack: str = "text", *, products: bool = False) -> Costs:
    """Return the parameter costs of a stack's layers; with `products` only matrices are counted.

    A layer's part of a parameter of all layers (axis `depth`) is among them.
    """
    axes, shapes, kinds = param_axes(cfg), param_shapes(cfg), dict[tuple[bool, bool], Costs]()
    for run, (_, _, shape) in enumerate(runs(cfg.stack(stack).layers)):
        kind = (shape.window is None, shape.shared)
        if kind in kinds:
            continue
        fixed, pruned = 0, {"q_heads": 0, "kv_heads": 0, "mlp": 0}
        for name, sizes in shapes.items():
            names, in_run = axes[name], name.startswith(f"{stack}/layers/{run}/")
            if not in_run and not (name.startswith(f"{stack}/") and "depth" in names and not products):
                continue
            if products and (name.endswith("/bias") or len(names) < 3):
                continue
            apart = ("layer", "depth", *pruned)
            size = math.prod(n for axis, n in zip(names, sizes, strict=True) if axis not in apart)
            along = [axis for axis in names if axis in pruned]
            if along:
                pruned[along[0]] += size
            else:
                fixed += size
        kinds[kind] = Costs(fixed, pruned["q_heads"], pruned["kv_heads"], pruned["mlp"])
    first = next(iter(kinds.values()))
    return dataclasses.replace(first, kinds=kinds if len(kinds) > 1 else {})


def multiples(config: PlanConfig, stack: Stack, gqa: str) -> dict[str, Any]:
    """Return the multiples to which head and neuron counts are rounded, from `snap_for` and `tensor_parallel`.

    A multiple of heads is one of key/value heads with their query heads (gqa="groups"), or of query heads ("q_heads").
    Raises UserError for a multiple that does not suit.
    """
    devices = config.tensor_parallel
    block = 1 if config.snap_for is None else BLOCKS[config.snap_for]
    heads = devices * (block // math.gcd(block, stack.head_dim))  # of query heads
    if gqa == "groups":
        groups = {shape.q_heads // shape.kv_heads for shape in stack.layers}
        heads = math.lcm(devices, *(heads // math.gcd(heads, group) for group in groups))
    found = {}
    for name, needed in (("heads_multiple", heads), ("neurons_multiple", devices * block)):
        own = getattr(config, name)
        if own != 1 and own % needed:
            raise UserError(f"{name}={own} is not a multiple of {needed}, as {reason_of(config)} needs: leave it out")
        found[name] = max(own, needed)
    return found


def reason_of(config: PlanConfig) -> str:
    """Return the names of the settings that require multiples of heads or neurons, for messages."""
    values = {name: getattr(config, name) for name in ("snap_for", "tensor_parallel")}
    return " with ".join(f"{name}={value!r}" for name, value in values.items() if value not in (None, 1))


def check_divides(shapes: Iterable[tuple[int, LayerShape]], devices: int) -> None:
    """Raise UserError if the heads or neurons of a layer cannot be split over this many devices."""
    for index, shape in shapes:
        for what, size in zip(("query heads", "key/value heads", "neurons"), shape.widths, strict=True):
            if size % devices:
                raise UserError(
                    f"layer {index} keeps {size} {what}, which tensor_parallel={devices} does not divide: choose a "
                    "number that divides them, or prune this layer too (attn_layers, mlp_layers, heads)"
                )


@dataclass(frozen=True)
class Units:
    """Prunable units of one layer (heads or head groups, and neurons), with their parameter counts.

    Attention units are whole key/value groups, or one query head of every group. `prune_heads`, `prune_neurons`: the
    layer is in range. Neurons
    of layers that are `wide` times as wide as others are kept in the same share, exactly.
    """

    heads: int
    neurons: int
    head_cost: int
    neuron_cost: int
    prune_heads: bool
    prune_neurons: bool
    head_step: int
    neuron_step: int
    wide: int = 1


def units_of(
    shapes: Sequence[LayerShape],
    costs: Costs,
    *,
    gqa: str,
    attn_layers: Sequence[int],
    mlp_layers: Sequence[int],
    heads_multiple: int,
    neurons_multiple: int,
    double_wide: bool = False,
) -> list[Units]:
    """Return the prunable units of every layer; raise UserError if a layer is narrower than its multiple."""
    result = []
    for i, shape in enumerate(shapes):
        group, each = shape.q_heads // shape.kv_heads, costs.at(shape)
        if gqa == "groups":
            heads, cost, step = shape.kv_heads, group * each.q_head + each.kv_head, heads_multiple
        else:
            heads, cost = group, shape.kv_heads * each.q_head
            step = heads_multiple // math.gcd(heads_multiple, shape.kv_heads)
        unit = Units(
            heads, shape.mlp, cost, each.neuron, i in attn_layers, i in mlp_layers, step, neurons_multiple,
            wide=2 if double_wide and shape.shared else 1,
        )  # fmt: skip
        if unit.prune_heads and step > heads:
            raise UserError(
                f"heads_multiple={heads_multiple} is more than the {shape.kv_heads} heads of layer {i}: keep all heads "
                "(heads='keep')"
            )
        if unit.prune_neurons and neurons_multiple > shape.mlp:
            raise UserError(
                f"neurons_multiple={neurons_multiple} is more than the {shape.mlp} neurons of layer {i}: lower it"
            )
        result.append(unit)
    return result


def kept_heads(units: int, head_dim: int, sparsity: np.ndarray) -> np.ndarray:
    """Return how many attention units each sparsity s keeps, rounded as in the reference code.

    C = units * head_dim channels; int() truncates (algorithms of LLM-Pruner's MetaPruner).
    """
    channels = units * head_dim
    kept = (channels * (1 - sparsity)).astype(np.int64)
    return units - (channels - kept) // head_dim


def kept_neurons(neurons: int, sparsity: np.ndarray) -> np.ndarray:
    """Return how many of C MLP neurons each sparsity s keeps: int(C (1 - s))."""
    return (neurons * (1 - sparsity)).astype(np.int64)


def snap(kept: np.ndarray, step: int, full: int) -> np.ndarray:
    """Round counts to the nearest multiple of `step` between `step` and `full`; halves round up."""
    return np.clip((kept + step // 2) // step * step, step, full // step * step)


@dataclass(frozen=True)
class Widths:
    """Result of the width solver: kept attention units and neurons per layer, sparsity, parameters removed."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    sparsity: float
    removed: int


def widths_at(units: Sequence[Units], head_dim: int, sparsity: float) -> Widths:
    """Return the layer widths at a given sparsity, rounded as in the reference code.

    Raises UserError if a layer would lose all its heads or neurons.
    """
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} must be at least 0 and below 1 (0.3 removes 30 % of the prunable widths)"
        )
    heads, neurons, removed = _on_grid(units, head_dim, np.asarray([sparsity]), smallest=0)
    for i, (h, n) in enumerate(zip(heads[0], neurons[0], strict=True)):
        if h < 1 or n < 1:
            raise UserError(f"sparsity {sparsity:g} would remove all heads or neurons of layer {i}: lower it")
    return Widths(tuple(map(int, heads[0])), tuple(map(int, neurons[0])), sparsity, int(removed[0]))


def smallest_sparsity(units: Sequence[Units], head_dim: int, removal: float) -> Widths:
    """Return the widths at the lowest sparsity that removes at least `removal` parameters."""
    heads, neurons, removed = _whole_grid(tuple(units), head_dim)
    best = int(np.argmax(removed >= removal)) if removed[-1] >= removal else GRID
    return Widths(tuple(map(int, heads[best])), tuple(map(int, neurons[best])), best / GRID, int(removed[best]))


def most_removable(units: Sequence[Units]) -> int:
    """Return the maximum number of parameters that width pruning can remove (one unit per type remains)."""
    return sum(
        u.prune_heads * (u.heads - u.head_step) * u.head_cost
        + u.prune_neurons * (u.neurons - u.neuron_step) * u.neuron_cost
        for u in units
    )


def solve_widths(units: Sequence[Units], head_dim: int, removal: float) -> Widths:
    """Return equal layer widths whose removed parameters come nearest to `removal`.

    Heads follow the smallest common sparsity that reaches the target; then the number of neurons, one fraction for all
    layers in range, is moved until the total is nearest. With neurons in range the error is at most half of one neuron
    (or multiple) in every layer; with heads alone, half of one head in every layer.
    """
    start = smallest_sparsity(units, head_dim, removal)
    before = [widths_at_grid for widths_at_grid in (_previous(units, head_dim, start),) if widths_at_grid is not None]
    candidates = [_tune_neurons(units, widths, removal) for widths in (start, *before)]
    return min(candidates, key=lambda widths: abs(widths.removed - removal))


def apart(units: Sequence[Units], head_dim: int, removal: float) -> list[Widths]:
    """Return one candidate per number of removed heads, each removing about `removal` parameters in all.

    Neurons make up for the rest, one fraction of them for all layers in range; a number of heads is left out if it
    removes too much or leaves too few neurons to remove.
    """
    inside = [u for u in units if u.prune_heads]
    found = []
    for gone in range(max((u.heads for u in inside), default=0)):
        heads = [
            int(snap(np.asarray(max(u.heads - gone, 1)), u.head_step, u.heads)) if u.prune_heads else u.heads
            for u in units
        ]
        by_heads = sum((u.heads - kept) * u.head_cost for u, kept in zip(units, heads, strict=True))
        fixed = [dataclasses.replace(u, prune_heads=False) for u in units]
        rest = removal - by_heads
        if 0 <= rest <= most_removable(fixed):
            widths = solve_widths(fixed, head_dim, rest)
            found.append(Widths(tuple(heads), widths.neurons, widths.sparsity, widths.removed + by_heads))
    return found


def _previous(units: Sequence[Units], head_dim: int, start: Widths) -> Widths | None:
    """Return the widths at the next lower sparsity that the solver tries; None at sparsity 0."""
    if start.sparsity == 0:
        return None
    sparsity = round(start.sparsity * GRID - 1) / GRID
    heads, neurons, removed = _on_grid(units, head_dim, np.asarray([sparsity]), smallest=1)
    return Widths(tuple(map(int, heads[0])), tuple(map(int, neurons[0])), sparsity, int(removed[0]))


def _tune_neurons(units: Sequence[Units], widths: Widths, removal: float) -> Widths:
    inside = [i for i, u in enumerate(units) if u.prune_neurons]
    if not inside:
        return widths
    by_heads = sum((u.heads - kept) * u.head_cost for u, kept in zip(units, widths.heads, strict=True))
    kept, by_neurons = _neuron_grid(tuple(units[i] for i in inside))
    removed = by_heads + by_neurons
    gap = np.abs(removed - removal)
    best = int(np.flatnonzero(gap == gap.min())[-1])  # the widest of equally near ones
    neurons = list(widths.neurons)
    for column, i in enumerate(inside):
        neurons[i] = int(kept[best, column])
    return Widths(widths.heads, tuple(neurons), widths.sparsity, int(removed[best]))


@functools.lru_cache(maxsize=4)  # a search for a budget repeats its arguments
def _neuron_grid(units: tuple[Units, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return kept neurons int[fractions, layers], and removed parameters int[fractions], for each fraction."""
    usual = [u.neurons // u.wide for u in units]
    fractions = np.arange(1, max(usual) + 1)
    kept = np.stack(
        [u.wide * snap(n * fractions // max(usual), u.neuron_step, n) for u, n in zip(units, usual, strict=True)],
        axis=1,
    )
    full = np.asarray([u.neurons for u in units])
    cost = np.asarray([u.neuron_cost for u in units])
    return kept, ((full[None] - kept) * cost[None]).sum(axis=1)


@functools.lru_cache(maxsize=4)
def _whole_grid(units: tuple[Units, ...], head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kept units and removed parameters for every sparsity that the solver tries."""
    return _on_grid(units, head_dim, np.arange(GRID + 1) / GRID, smallest=1)


def _on_grid(
    units: Sequence[Units], head_dim: int, sparsity: np.ndarray, smallest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return kept heads and neurons int[grid, layers], and removed parameters int[grid], for given sparsities."""
    heads, neurons, removed = [], [], np.zeros(len(sparsity), np.int64)
    for u in units:
        h = np.full(len(sparsity), u.heads)
        n = np.full(len(sparsity), u.neurons)
        if u.prune_heads:
            h = np.maximum(kept_heads(u.heads, head_dim, sparsity), smallest)
            h = h if u.head_step == 1 else snap(h, u.head_step, u.heads)
        if u.prune_neurons:
            usual = u.neurons // u.wide
            n = np.maximum(kept_neurons(usual, sparsity), smallest)
            n = u.wide * (n if u.neuron_step == 1 else snap(n, u.neuron_step, usual))
        heads.append(h)
        neurons.append(n)
        removed += (u.heads - h) * u.head_cost + (u.neurons - n) * u.neuron_cost
    return np.stack(heads, axis=1), np.stack(neurons, axis=1), removed
