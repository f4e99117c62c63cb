"""From a ratio to widths: the prunable units of a layer, and the numbers of them that reach a target."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import layer_range
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer
from vlmprune_jax.core.models.flops import Costs, Polynomial, layer_costs
from vlmprune_jax.core.part import AXES
from vlmprune_jax.core.prune.config import BLOCKS, PlanConfig

GRID = 10_000  # number of sparsities that the solver tries (multiples of 1e-4)


class OutOfReach(UserError):
    """Error raised if a pruning method cannot remove the requested number of parameters."""


@dataclass(frozen=True)
class Component:
    """Component of a model to prune, and the settings by which it is pruned."""

    name: str
    """Name of the component, such as the decoder "text"."""

    cfg: ModelConfig
    """Config of the model."""

    original: ModelConfig
    """Config before the first step of iterative pruning, to whose widths ratio and sparsity refer; else `cfg`."""

    config: PlanConfig
    """Settings; `ratio` is the share of all parameters to remove from this component."""

    total: int
    """Number of parameters that count as 100 % for ratios."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers of the component."""
        return self.cfg.stack(self.name).layers

    @functools.cached_property
    def costs(self) -> Costs:
        """Parameter costs of the layers."""
        return layer_costs(self.cfg, self.name)


def multiples(component: Component, gqa: str) -> dict[str, Any]:
    """Return the multiples to which head and neuron counts are rounded, by setting.

    They follow from `align_to` and `tensor_parallel`, unless a larger multiple is set. Heads are counted as key/value
    heads with their query heads (gqa="groups"), or as query heads ("q_heads"). Raises UserError if a configured
    multiple is not divisible by the multiple that these two settings need.
    """
    config, stack = component.config, component.original.stack(component.name)
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
    for axis in {axis for layer in stack.layers for axis in layer.axes if axis.multiple}:
        smallest = min(layer.sizes[axis.name] for layer in stack.layers if axis in layer.axes)
        # engines serve these multiples without a slower path
        served = (multiple for multiple in (64, 32) if smallest % multiple == 0 and smallest >= 4 * multiple)
        steps[axis.multiple] = getattr(config, axis.multiple) or next(served, 1)
    return steps


def reason_of(config: PlanConfig) -> str:
    """Return the names of the settings that require multiples of heads or neurons, for messages."""
    values = {name: getattr(config, name) for name in ("align_to", "tensor_parallel")}
    return " with ".join(f"{name}={value!r}" for name, value in values.items() if value not in (None, 1))


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
    def fine(self) -> bool:
        """True if a unit is one channel (a neuron); neuron counts compensate for the coarse steps of head counts."""
        return self.channels == 1

    @property
    def usual(self) -> int:
        """Number of units that a layer of the usual width has."""
        return self.size // self.wide

    def rounded(self, kept: Any) -> Any:
        """Round usual counts to multiples of `step` (halves up) in the allowed range; return the counts of this axis.

        An axis that may not be pruned keeps all its units.
        """
        if not self.prune:
            return np.full(np.shape(kept), self.size)
        nearest = (kept + self.step // 2) // self.step * self.step
        least = -(-self.least // self.step) * self.step
        return self.wide * np.maximum(np.clip(nearest, self.step, self.usual // self.step * self.step), least)

    def left(self, sparsity: np.ndarray) -> np.ndarray:
        """Return the usual counts at each sparsity s before rounding, as in the reference code (LLM-Pruner).

        Of C = units * channels, int(C (1 - s)) channels are kept; units that lose only some of their channels are kept.
        """
        channels = self.usual * self.channels
        return self.usual - (channels - (channels * (1 - sparsity)).astype(np.int64)) // self.channels


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


def units_of(
    component: Component, layers: Mapping[int, Layer], scored: Collection[str], multiples: Mapping[str, int]
) -> dict[int, Units]:
    """Return the prunable units of every layer.

    Args:
      component: the component, whose settings limit the layers that may be pruned.
      layers: the layers, by original number.
      scored: names of the axes that have scores.
      multiples: {setting: number of which the kept units are a multiple}, for example for "heads_multiple".

    Raises UserError if a layer has fewer units than the multiple.
    """
    config, count = component.config, len(component.layers)
    ranges = {name: layer_range(name, getattr(config, name), count) for name in ("attn_layers", "mlp_layers")}
    if config.heads == "keep":
        ranges["attn_layers"] = range(0)
    result = dict[int, Units]()
    for i, layer in layers.items():
        axes = list[AxisUnits]()
        pairs = [(part, axis) for part in layer.parts for axis in part.axes if axis.name in scored]
        for part, axis in pairs:
            in_range, name = part.settings[0], axis.multiple or part.settings[1]
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
                reason = reason_of(config)
                raise UserError(
                    f"{reason}{': ' * bool(reason)}{name}={multiples[name]} is more than the "
                    f"{layer.sizes[axis.name]} {axis.title} of layer {i}: lower it, or keep them all ({in_range}, "
                    "heads='keep')"
                )
            axes.append(units)
        result[i] = Units(layer, component.costs.at(layer), tuple(axes))
    return result


@dataclass(frozen=True)
class Widths:
    """Layer widths that the solver chose, with the sparsity and the number of parameters that they remove."""

    counts: Mapping[Units, Mapping[str, int]]
    """{units of a layer: {axis: number of kept units}}; for an axis with a parent, the number per parent."""

    sparsity: float
    """Share of the units in range that is removed, before rounding."""

    removed: int
    """Number of parameters removed."""


@dataclass(frozen=True, eq=False)
class _Choices:
    """Alternative widths of all layers, and the parameters that each alternative removes."""

    counts: Mapping[Units, Mapping[str, np.ndarray]]
    removed: np.ndarray

    @classmethod
    def of(cls, units: Iterable[Units], length: int, kept: Callable[[Units, AxisUnits], np.ndarray]) -> _Choices:
        """Compute `length` alternatives from `kept`, which returns the counts of one axis of a layer."""
        counts, removed = {}, np.zeros(length, np.int64)
        for layer, times in Counter(units).items():  # equal layers are computed once
            counts[layer] = {axis.axis: kept(layer, axis) for axis in layer.axes}
            removed += times * layer.removed(counts[layer])
        return cls(counts, removed)

    def widths(self, index: int, sparsity: float) -> Widths:
        """Return one alternative, of this sparsity."""
        counts = {
            layer: {axis: int(kept[index]) for axis, kept in arrays.items()} for layer, arrays in self.counts.items()
        }
        return Widths(counts, sparsity, int(self.removed[index]))


def _at_sparsities(units: Iterable[Units], sparsities: np.ndarray, fewer_heads: int | None = None) -> _Choices:
    """Return the widths at these sparsities; with `fewer_heads`, the heads are those that this number leaves."""

    def kept(_: Units, axis: AxisUnits) -> np.ndarray:
        if fewer_heads is None or axis.fine:
            return axis.rounded(axis.left(sparsities))
        return axis.rounded(np.full(len(sparsities), axis.size - fewer_heads))

    return _Choices.of(units, len(sparsities), kept)


@functools.lru_cache(maxsize=4)  # a search for a budget repeats its arguments
def _grid(units: tuple[Units, ...], fewer_heads: int | None) -> _Choices:
    """Return the widths at every sparsity that the solver tries."""
    return _at_sparsities(units, np.arange(GRID + 1) / GRID, fewer_heads)


def widths_at(units: Sequence[Units], sparsity: float) -> Widths:
    """Return the layer widths at a given sparsity, rounded as in the reference code.

    Raises UserError if a layer would lose all units of an axis.
    """
    for i, axis in ((i, axis) for i, layer in enumerate(units) for axis in layer.axes):
        if axis.prune and axis.step == 1 and axis.left(np.asarray(sparsity)) < 1:
            raise UserError(
                f"sparsity {sparsity:g} would remove all {AXES[axis.axis].title} of layer {i}: lower the sparsity"
            )
    return _at_sparsities(units, np.asarray([sparsity])).widths(0, sparsity)


def smallest_sparsity(units: Sequence[Units], removal: float, fewer_heads: int | None = None) -> Widths:
    """Return the widths at the lowest sparsity that removes at least `removal` parameters."""
    grid = _grid(tuple(units), fewer_heads)
    index = int(np.argmax(grid.removed >= removal)) if grid.removed[-1] >= removal else GRID
    return grid.widths(index, index / GRID)


def most_removable(units: Iterable[Units], fewer_heads: int | None = None) -> int:
    """Return the maximum number of parameters that width pruning can remove (each axis keeps its minimum of units)."""
    return int(_at_sparsities(units, np.ones(1), fewer_heads).removed[0])


def solve_widths(units: Sequence[Units], removal: float, fewer_heads: int | None = None) -> Widths:
    """Return equal layer widths whose number of removed parameters is nearest to `removal`.

    Heads follow the smallest common sparsity that reaches the target, or every layer loses `fewer_heads`. Then the
    share of fine units (neurons), the same in all layers in range, is changed until the total is nearest. With neurons
    in range, the error is at most half of one neuron (or multiple) in every layer; with heads alone, half of one head
    in every layer.
    """
    candidates = [smallest_sparsity(units, removal, fewer_heads)]
    if index := round(candidates[0].sparsity * GRID):
        candidates.append(_grid(tuple(units), fewer_heads).widths(index - 1, (index - 1) / GRID))
    return min((_tune(units, widths, removal) for widths in candidates), key=lambda x: abs(x.removed - removal))


def apart(units: Sequence[Units], removal: float) -> list[Widths]:
    """Return one candidate per number of removed heads; each candidate removes about `removal` parameters in total.

    Neurons account for the parameters that the heads leave to remove, the same share in all layers in range. A number
    of heads has no candidate if it alone removes too much, or if there are too few neurons for the remainder.
    """
    heads = max((axis.size for layer in units for axis in layer.axes if axis.prune and not axis.fine), default=0)
    fewer = np.arange(heads)

    def without_heads(_: Units, axis: AxisUnits) -> np.ndarray:
        return np.full(heads, axis.size) if axis.fine else axis.rounded(axis.size - fewer)

    by_heads = _Choices.of(units, heads, without_heads).removed
    possible = [n for n in range(heads) if by_heads[n] <= removal <= most_removable(units, n)]
    return [solve_widths(units, removal, n) for n in possible]


def _tune(units: Sequence[Units], widths: Widths, removal: float) -> Widths:
    """Return the widths with neurons scaled by one fraction in all layers, to remove about `removal` parameters."""
    most = max((axis.usual for layer in units for axis in layer.axes if axis.fine and axis.prune), default=0)
    if not most:
        return widths
    fractions = np.arange(1, most + 1)

    def kept(layer: Units, axis: AxisUnits) -> np.ndarray:
        fixed = np.full(most, widths.counts[layer][axis.axis])
        return axis.rounded(axis.usual * fractions // most) if axis.fine and axis.prune else fixed

    choices = _Choices.of(units, most, kept)
    gap = np.abs(choices.removed - removal)
    return choices.widths(int(np.flatnonzero(gap == gap.min())[-1]), widths.sparsity)  # of equals, the widest
