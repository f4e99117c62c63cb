"""Cost of a config under every limit of a budget, and the smallest removal that satisfies all limits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from vlmprune_jax.base.budget import Budget
from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.chips import slice_of
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.base.weight_files import DTYPES
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.layer import Stack
from vlmprune_jax.core.models.flops import (
    active_params,
    causal_flops,
    forward_flops,
    head_of,
    layer_costs,
    limited_row,
    vision_flops,
    weight_flops,
)
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune.solver import OutOfReach

Measure = Callable[[ModelConfig], dict[str, float]]  # cost of a config, by the names of the limits


def make_measure(cfg: ModelConfig, budget: Budget) -> Measure:
    """Return a function from layer widths to the pruned model's exact costs, without building the model.

    `parameters`, `disk_bytes`, `memory_bytes` and `flops` (a multiply-add is two) add up over layers. `step_ms` is the
    roofline of `vlmprune plan` for decoding one token of every row: the weights of decoder and output head and the
    whole cache are read once, split evenly over the slice's devices, without communication; of experts, only those that
    the tokens can use are read. `decode_ms` is interpolated over the parameter counts of measured models. Raises
    UserError for a workload that this model cannot have, or an unknown slice or dtype.
    """
    itemsize = DTYPES[one_of("budget dtype", budget.dtype, tuple(DTYPES))].itemsize
    with error_context("prune.budget.slice"):
        chip, devices = slice_of(budget.slice)
    images = budget.images if cfg.vision is not None else 0
    if ("flops" in budget.limits or budget.image_tokens) and images * cfg.tokens_per_image > budget.context:
        raise UserError(
            f"prune.budget.context={budget.context} is less than the {images * cfg.tokens_per_image} image tokens of "
            f"prune.budget.images={images}: raise prune.budget.context"
        )
    context, _, _ = limited_row(cfg, budget.context, images, budget.image_tokens)
    costs, head = layer_costs(cfg), weight_flops(cfg, head_of(cfg), (), False)

    def step_ms(now: ModelConfig) -> float:
        weights = head // 2 + sum(int(costs.at(layer)(layer.active_sizes(budget.batch))) for layer in now.text.layers)
        attention = sum(layer.mixer.mixing_flops(context, last=True) for layer in now.text.layers)
        flops = weight_flops(now, "text/layers/", (), False) + head + attention
        traffic = itemsize * (weights + budget.batch * cache_size(now.text, context))
        seconds = chip.seconds(budget.batch * flops / devices, traffic / devices, 0)
        return 1000 * max(seconds.values())

    exported = budget.exported or (lambda now: now)
    prompt = {"length": budget.context, "images": images, "image_tokens": budget.image_tokens}

    parameters = functools.partial(active_params, tokens=None)
    measures: dict[str, Callable[[ModelConfig], float]] = {
        "parameters": parameters,
        "disk_bytes": lambda now: itemsize * parameters(exported(now)) + budget.other_bytes,
        "memory_bytes": lambda now: itemsize * (parameters(now) + budget.batch * cache_size(now.text, context)),
        "flops": lambda now: forward_flops(now, **prompt),
        "step_ms": step_ms,
        "decode_ms": lambda now: _between(budget.curve, parameters(now)),
    }
    if "decode_ms" in budget.limits:
        _check_curve(budget.curve, count_params(cfg))
    return lambda now: {name: measures[name](now) for name in budget.limits}


def _check_curve(curve: Sequence[Sequence[float]], whole: int) -> None:
    """Raise UserError unless decode times were measured for the unpruned model and for a smaller one."""
    sizes = sorted({size for size, _ in curve})
    if len(sizes) < 2 or not sizes[0] < whole <= 1.01 * sizes[-1]:
        measured_sizes = ", ".join(f"{size:,.0f}" for size in sizes)
        raise UserError(
            f"prune.budget.decode_ms: speeds were measured for models of {measured_sizes or 'no'} parameters, "
            f"but this model has {whole:,}: measure it and a smaller copy "
            "(vlmprune bench --model=DIR --against=PRUNED --json=FILE.json)"
        )


def _between(curve: Sequence[Sequence[float]], size: int) -> float:
    """Return the decode time in ms for a parameter count, interpolated between measured models."""
    sizes, times = zip(*sorted(map(tuple, curve)), strict=True)
    if size < sizes[0]:
        raise OutOfReach(f"no measured model has fewer than {sizes[0]:,.0f} parameters")
    return float(np.interp(size, sizes, times))


def speed_limits(
    before: ModelConfig, after: ModelConfig, *, length: int, images: int, batch: int
) -> tuple[float, float]:
    """Return upper bounds on the speed-ups of pruning: for a prompt from FLOPs, for a decoded token from bytes.

    A bound is the ratio of the component that shrank most: decoder layers, output head or vision tower. Whatever share
    of the time each component takes, the whole model cannot be faster by a larger factor.
    """

    def flops(cfg: ModelConfig) -> list[int]:
        layers = length * weight_flops(cfg, "text/layers/", (), False) + causal_flops(cfg, length)
        return [layers, weight_flops(cfg, head_of(cfg), (), False), vision_flops(cfg, (), images)]

    def weights(cfg: ModelConfig) -> list[int]:
        layers = weight_flops(cfg, "text/layers/", (), False) // 2 + batch * cache_size(cfg.text, length)
        return [layers, weight_flops(cfg, head_of(cfg), (), False) // 2]

    def largest(sizes: Callable[[ModelConfig], list[int]]) -> float:
        return max(old / new for old, new in zip(sizes(before), sizes(after), strict=True) if new)

    return largest(flops), largest(weights)


def cache_size(text: Stack, context: int) -> int:
    """Return the number of values that generation caches per sequence (keys and values, or recurrent states)."""
    return sum(layer.mixer.state_size(context) for layer in text.layers)


def least_ratio(
    budget: Budget, measure: Measure, config_at: Callable[[float], ModelConfig], total: int
) -> tuple[float, dict[str, float]]:
    """Return the smallest pruning ratio whose plan satisfies the budget, and that plan's cost.

    Costs decrease with the ratio, except for small steps where heads are traded for neurons or layers for widths, or
    where a layer is kept rather than emptied; there, the result is the smallest ratio of its neighbourhood. Ratios are
    resolved to one of `total` parameters, or to 1/64 above ratios that no plan reaches. Raises UserError with the
    nearest cost if no plan satisfies the budget.
    """
    limits = budget.limits

    def cost_at(ratio: float) -> dict[str, float] | None:
        try:
            return measure(config_at(ratio))
        except OutOfReach:
            return None

    def fits(cost: dict[str, float]) -> bool:
        return all(cost[name] <= limit for name, limit in limits.items())

    low, high = 0.0, 1.0
    least, best = cost_at(low), None
    if least is not None and fits(least):
        return low, least
    while high - low > 0.5 / total:
        middle = (low + high) / 2
        cost = cost_at(middle)
        if cost is not None and fits(cost):
            high, best = middle, cost
        elif cost is None and best is None:
            high = middle  # more than can be removed
        else:
            low, least = middle, cost or least
    for ratio in range(1, 64) if best is None else ():  # a ratio above the unreachable ones may remove another layer
        cost = cost_at(ratio / 64)
        if cost is not None and fits(cost):
            return ratio / 64, cost
    if best is None:
        over = {name: cost for name, cost in (least or {}).items() if cost > limits[name]}
        budgets = ", ".join(f"prune.budget.{name}={amount(limits[name])}" for name in over)
        nearest = " and ".join(f"{amount(cost)} {name}" for name, cost in over.items())
        raise UserError(
            f"{budgets}: cannot be reached with these settings (nearest: {nearest}): raise the budget, allow "
            "more to be removed (protect, attn_layers, mlp_layers, heads), or use another method"
        )
    return high, best


def amount(value: float) -> str:
    """Format a cost with its unit, such as "4.2 GB"."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
