"""Number of parameters of a layer as a polynomial in the sizes of its prunable axes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Layer, array_axes, layer_runs
from vlmprune_jax.core.models.params import param_axes, param_shapes


@dataclass(frozen=True)
class Polynomial:
    """Number of parameters of a layer, exact for all sizes of its prunable axes.

    No weight has an axis twice, so each weight is a product of sizes and a constant.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]
    """Pairs (axes, coefficient)."""

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        """Return the number of parameters for these axis sizes, which are numbers or arrays that broadcast together."""
        return sum(coefficient * math.prod(sizes[axis] for axis in axes) for axes, coefficient in self.terms)


@dataclass(frozen=True)
class Costs:
    """Parameter counts of the layers of one component."""

    kinds: Mapping[Layer, Polynomial]
    """Counts as polynomials, by `Layer.kind`."""

    def at(self, layer: Layer) -> Polynomial:
        """Return the parameter count of layers of this kind, as a polynomial in the sizes of their prunable axes."""
        return self.kinds[layer.kind]

    def of(self, layer: Layer) -> int:
        """Return the number of parameters of a layer, from the sizes of its axes."""
        return int(self.at(layer)(layer.sizes))

    def active(self, layer: Layer, tokens: int = 1) -> int:
        """Return the number of a layer's parameters that `tokens` tokens can use."""
        return int(self.at(layer)(layer.active_sizes(tokens)))

    def price(self, layer: Layer, axis: str) -> int:
        """Return the number of parameters of one unit of an axis, including the units of child axes in it."""
        fewer = layer.completed({axis: layer.sizes[axis] - 1})
        return self.of(layer) - int(self.at(layer)({**layer.sizes, **fewer}))


def layer_costs(cfg: ModelConfig, stack: str = "text", *, products: bool = False) -> Costs:
    """Return the parameter costs of a component's layers; with `products` only matrices are counted.

    The counts include a layer's share of parameters that all layers have in common (axis `depth`).
    """
    axes, shapes, kinds = param_axes(cfg), param_shapes(cfg), dict[Layer, Polynomial]()
    for run, (_, layer) in enumerate(layer_runs(cfg.stack(stack).layers)):
        if layer.kind in kinds:
            continue
        terms = Counter[tuple[str, ...]]()
        for name, sizes in shapes.items():
            names, in_run = axes[name], name.startswith(f"{stack}/layers/{run}/")
            if not in_run and not (name.startswith(f"{stack}/") and "depth" in names and not products):
                continue
            if products and (name.endswith("/bias") or len(names) < 3):
                continue
            fixed = [n for axis, n in zip(names, sizes, strict=True) if axis not in ("layer", "depth", *layer.sizes)]
            terms[tuple(axis for axis in array_axes(names) if axis in layer.sizes)] += math.prod(fixed)
        kinds[layer.kind] = Polynomial(tuple(terms.items()))
    return Costs(kinds)
