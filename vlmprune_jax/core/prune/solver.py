"""From a ratio to widths: the prunable units of a layer, and the numbers of them that reach a target."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.prune.config import BLOCKS, PlanConfig
from vlmprune_jax.core.prune.layer_costs import Costs, Polynomial
from vlmprune_jax.core.stack import Stack

GRID = 10_000  # number of sparsities that the solver tries (multiples of 1e-4)


class OutOfReach(UserError):
    """Error raised if a pruning method cannot remove the requested number of parameters."""


def multiples(config: PlanConfig, stack: Stack, gqa: str) -> dict[str, Any]:
    """Return the multiples to which head and neuron counts are rounded, by setting.

    They follow from `align_to` and `tensor_parallel`, unless a larger multiple is set. Heads are counted as key/value
    heads with their query heads (gqa="groups"), or as query heads ("q_heads"). Raises UserError if a configured
    multiple is not divisible by the multiple that these two settings need.
    """
    devices = config.tensor_parallel
    block = 1 if config.align_to is None else BLOCKS[config.align_to]
    heads = devices * (block // math.gcd(block, stack.attention.head_dim))  # of query heads
    if gqa == "groups":
        groups = {layer.mixer.group for layer in stack.layers}
        heads = math.lcm(devices, *(heads // math.gcd(heads, group) for group in groups))
    steps = {}
    for name, needed in (("heads_multiple", heads), ("neurons_multiple", devices * block)):
        multiple = getattr(config, name)
        if multiple != 1 and multiple % needed:
            raise UserError(
                f"{name}={multiple} is not a multiple of {needed}, as {reason_of(config)} needs: leave it out"
            )
        steps[name] = max(multiple, needed)
    own = {(axis.name, axis.multiple) for layer in stack.layers for axis in layer.axes if axis.multiple}
    for axis, name in own:
        smallest = min(layer.sizes[axis] for layer in stack.layers if axis in layer.sizes)
        steps[name] = getattr(config, name) or served_multiple(smallest)
    return steps


def served_multiple(size: int) -> int:
    """Return the multiple of units that engines serve without a slower path: 64, 32, or 1 for small sizes."""
    return next((multiple for multiple in (64, 32) if size % multiple == 0 and size >= 4 * multiple), 1)


def reason_of(config: PlanConfig) -> str:
    """Return the names of the settings that require multiples of heads or neurons, for messages."""
    values = {name: getattr(config, name) for name in ("align_to", "tensor_parallel")}
    return " with ".join(f"{name}={value!r}" for name, value in values.items() if value not in (None, 1))


def check_divides(layers: Iterable[tuple[int, Layer]], devices: int) -> None:
    """Raise UserError if the units of an axis of a layer cannot be split over this many devices."""
    for index, layer in layers:
        for axis, size in layer.sizes.items():
            if size % devices:
                raise UserError(
                    f"layer {index} keeps {size} {AXES[axis].title}, which tensor_parallel={devices} does not divide: "
                    "choose a number that divides them, or prune this layer too (attn_layers, mlp_layers, heads)"
                )


@dataclass(frozen=True)
class AxisUnits:
    """Units of one axis of a layer; the solver chooses how many are kept."""

    axis: str
    """Name of the axis."""

    size: int
    """Number of units; for an axis with a parent, units per parent (all parents keep equally many)."""

    parents: int
    """Number of units of the parent axis (1 without a parent)."""

    channels: int
    """Number of channels of a unit: 1, or the channels of a head."""

    step: int
    """Number of which the kept units are a multiple."""

    prune: bool
    """True if units of this axis and layer may be removed."""

    wide: int = 1
    """Width relative to other layers (an integer factor); all layers keep exactly the same share."""

    least: int = 1
    """Minimum number of units with which the layer can be computed."""

    @property
    def fewest(self) -> int:
        """Smallest number of units that may be kept."""
        return -(-self.least // self.step) * self.step

    @property
    def fine(self) -> bool:
        """True if a unit is one channel (a neuron); neuron counts compensate for the coarse steps of head counts."""
        return self.channels == 1

    def at_sparsity(self, sparsity: np.ndarray, smallest: int) -> np.ndarray:
        """Return how many units each sparsity s keeps, rounded as in the reference code (LLM-Pruner's MetaPruner).

        Of C = units * channels, int(C (1 - s)) channels are kept; units that lose only some of their channels are kept.
        """
        if not self.prune:
            return np.full(len(sparsity), self.size)
        usual = self.size // self.wide
        channels = usual * self.channels
        gone = channels - (channels * (1 - sparsity)).astype(np.int64)
        kept = np.maximum(usual - gone // self.channels, min(smallest, 1) * self.least)
        return self.wide * (kept if self.step == 1 else np.maximum(snap(kept, self.step, usual), self.fewest))


@dataclass(frozen=True)
class Units:
    """Prunable units of one layer."""

    layer: Layer
    """The layer before width pruning."""

    cost: Polynomial
    """Number of parameters as a function of the sizes."""

    axes: tuple[AxisUnits, ...]
    """The axes that are scored."""

    def removed(self, counts: Mapping[str, Any]) -> Any:
        """Return the number of parameters removed if `counts` units are kept (for axes with a parent: per parent)."""
        sizes = {units.axis: counts[units.axis] * units.parents for units in self.axes}
        return self.cost(self.layer.sizes) - self.cost({**self.layer.sizes, **self.layer.completed(sizes)})

    @property
    def whole(self) -> dict[str, int]:
        """Number of units by axis in the unpruned layer."""
        return {units.axis: units.size for units in self.axes}

    def without_coarse(self, counts: Mapping[str, int]) -> Units:
        """Return the layer's units with the coarse axes (heads) pruned to `counts` and fixed from then on."""
        sizes = {units.axis: counts[units.axis] * units.parents for units in self.axes if not units.fine}
        layer = self.layer.resized(self.layer.completed(sizes))
        axes = tuple(
            units if units.fine else dataclasses.replace(units, size=counts[units.axis], prune=False)
            for units in self.axes
        )
        return Units(layer, self.cost, axes)


def units_of(
    layers: Mapping[int, Layer],
    costs: Costs,
    scored: Collection[str],
    *,
    ranges: Mapping[str, Collection[int]],
    multiples: Mapping[str, int],
) -> dict[int, Units]:
    """Return the prunable units of every layer.

    Args:
      layers: the layers, by original number.
      scored: names of the axes that have scores.
      ranges: {setting: layers that may be pruned}, for example for "attn_layers" (see `Part.settings`).
      multiples: {setting: number of which the kept units are a multiple}, for example for "heads_multiple".

    Raises UserError if a layer has fewer units than the multiple.
    """
    result = dict[int, Units]()
    for i, layer in layers.items():
        axes = list[AxisUnits]()
        for part in layer.parts:
            in_range, of_part = part.settings
            for axis in part.axes:
                if axis.name not in scored:
                    continue
                name = axis.multiple or of_part
                parents = layer.sizes[axis.parent] if axis.parent else 1
                units = AxisUnits(
                    axis.name,
                    size=layer.sizes[axis.name] // parents,
                    parents=parents,
                    channels=part.fixed_sizes.get(axis.channels, 1),
                    # heads of all parents are side by side in a row
                    step=multiples[name] // (math.gcd(multiples[name], parents) if axis.channels else 1),
                    prune=i in ranges[in_range],
                    wide=part.relative_width,
                    least=part.least(axis.name),
                )
                if units.prune and units.step > units.size:
                    raise UserError(
                        f"{name}={multiples[name]} is more than the {layer.sizes[axis.name]} {axis.title} of layer "
                        f"{i}: lower it, or keep them all ({in_range}, heads='keep')"
                    )
                axes.append(units)
        result[i] = Units(layer, costs.at(layer), tuple(axes))
    return result


def snap(kept: np.ndarray, step: int, full: int) -> np.ndarray:
    """Round counts to the nearest multiple of `step` between `step` and `full`; halves round up."""
    return np.clip((kept + step // 2) // step * step, step, full // step * step)


Counts = Mapping[str, int]  # {axis: number of kept units}; for an axis with a parent, the number per parent


@dataclass(frozen=True)
class Widths:
    """Layer widths that the solver chose, with the sparsity and the number of parameters that they remove."""

    counts: tuple[Counts, ...]
    """Kept units of every layer."""

    sparsity: float
    """Share of the units in range that is removed, before rounding."""

    removed: int
    """Number of parameters removed."""


def widths_at(units: Sequence[Units], sparsity: float) -> Widths:
    """Return the layer widths at a given sparsity, rounded as in the reference code.

    Raises UserError if a layer would lose all units of an axis.
    """
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity {sparsity:g} must be at least 0 and below 1 (0.3 removes 30 % of the prunable widths)"
        )
    widths = _Grid.of(units, np.asarray([sparsity]), smallest=0).widths(units, 0)
    for i, counts in enumerate(widths.counts):
        for axis, count in counts.items():
            if count < 1:
                raise UserError(
                    f"sparsity {sparsity:g} would remove all {AXES[axis].title} of layer {i}: lower the sparsity"
                )
    return widths


def smallest_sparsity(units: Sequence[Units], removal: float) -> Widths:
    """Return the widths at the lowest sparsity that removes at least `removal` parameters."""
    grid = _whole_grid(tuple(units))
    return grid.widths(units, int(np.argmax(grid.removed >= removal)) if grid.removed[-1] >= removal else GRID)


def most_removable(units: Sequence[Units]) -> int:
    """Return the maximum number of parameters that width pruning can remove (each axis keeps its minimum of units)."""
    total = 0
    for layer, times in Counter(units).items():  # equal layers are computed once, here and below
        fewest = {axis.axis: axis.fewest if axis.prune else axis.size for axis in layer.axes}
        total += times * int(layer.removed(fewest))
    return total


def solve_widths(units: Sequence[Units], removal: float) -> Widths:
    """Return equal layer widths whose number of removed parameters is nearest to `removal`.

    Heads follow the smallest common sparsity that reaches the target. Then the share of fine units (neurons), the same
    in all layers in range, is changed until the total is nearest. With neurons in range, the error is at most half of
    one neuron (or multiple) in every layer; with heads alone, half of one head in every layer.
    """
    start = smallest_sparsity(units, removal)
    index = round(start.sparsity * GRID)
    before = [_whole_grid(tuple(units)).widths(units, index - 1)] if index else []
    candidates = [_tune(units, widths, removal) for widths in (start, *before)]
    return min(candidates, key=lambda widths: abs(widths.removed - removal))


def apart(units: Sequence[Units], removal: float) -> list[Widths]:
    """Return one candidate per number of removed heads; each candidate removes about `removal` parameters in total.

    Neurons account for the parameters that the heads leave to remove, the same share in all layers in range. A number
    of heads has no candidate if it alone removes too much, or if there are too few neurons for the remainder.
    """
    sizes = [axis.size for layer in units for axis in layer.axes if axis.prune and not axis.fine]
    candidates = []
    for gone in range(max(sizes, default=0)):
        by_heads, after = 0, dict[Units, Units]()
        for layer, times in Counter(units).items():
            counts = layer.whole | {
                axis.axis: int(snap(np.asarray(max(axis.size - gone, 1)), axis.step, axis.size))
                for axis in layer.axes
                if axis.prune and not axis.fine
            }
            by_heads += times * int(layer.removed(counts))
            after[layer] = layer.without_coarse(counts)
        fixed, rest = [after[layer] for layer in units], removal - by_heads
        if 0 <= rest <= most_removable(fixed):
            widths = solve_widths(fixed, rest)
            candidates.append(dataclasses.replace(widths, removed=widths.removed + by_heads))
    return candidates


def _tune(units: Sequence[Units], widths: Widths, removal: float) -> Widths:
    """Return the widths with neurons scaled by one fraction in all layers, to remove about `removal` parameters."""
    fine = [axis for layer in units for axis in layer.axes if axis.fine and axis.prune]
    if not fine:
        return widths
    most = max(axis.size // axis.wide for axis in fine)
    fractions = np.arange(1, most + 1)
    # widths of equal layers are equal
    counts_of = dict(zip(units, widths.counts, strict=True))
    kept, removed = dict[Units, dict[str, Any]](), np.zeros(most, np.int64)
    for layer, times in Counter(units).items():
        kept[layer] = dict(counts_of[layer]) | {
            axis.axis: axis.wide
            * np.maximum(
                snap(axis.size // axis.wide * fractions // most, axis.step, axis.size // axis.wide), axis.fewest
            )
            for axis in layer.axes
            if axis.fine and axis.prune
        }
        removed += times * layer.removed(kept[layer])
    gap = np.abs(removed - removal)
    best = int(np.flatnonzero(gap == gap.min())[-1])  # among equally near candidates, the widest
    tuned = {
        layer: {axis: int(np.broadcast_to(n, most)[best]) for axis, n in counts.items()}
        for layer, counts in kept.items()
    }
    return Widths(tuple(tuned[layer] for layer in units), widths.sparsity, int(removed[best]))


@dataclass(frozen=True, eq=False)
class _Grid:
    """Kept units of every layer, and removed parameters, for a range of sparsities."""

    sparsities: np.ndarray
    counts: Mapping[Units, Mapping[str, np.ndarray]]
    removed: np.ndarray

    @classmethod
    def of(cls, units: Sequence[Units], sparsities: np.ndarray, smallest: int) -> _Grid:
        """Compute the grid; at least `smallest` units of every axis are kept."""
        counts, removed = {}, np.zeros(len(sparsities), np.int64)
        for layer, times in Counter(units).items():
            counts[layer] = {axis.axis: axis.at_sparsity(sparsities, smallest) for axis in layer.axes}
            removed += times * layer.removed(counts[layer])
        return cls(sparsities, counts, removed)

    def widths(self, units: Sequence[Units], index: int) -> Widths:
        """Return the widths at one sparsity of the grid."""
        counts = {
            layer: {axis: int(kept[index]) for axis, kept in arrays.items()} for layer, arrays in self.counts.items()
        }
        widths = tuple(counts[layer] for layer in units)
        return Widths(widths, float(self.sparsities[index]), int(self.removed[index]))


@functools.lru_cache(maxsize=4)  # a search for a budget repeats its arguments
def _whole_grid(units: tuple[Units, ...]) -> _Grid:
    """Return kept units and removed parameters for every sparsity that the solver tries."""
    return _Grid.of(units, np.arange(GRID + 1) / GRID, smallest=1)
