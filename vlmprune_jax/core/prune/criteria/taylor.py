"""Taylor scores: estimated change of the loss without a head or a neuron (LLM-Pruner, arXiv 2305.11627)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import STACKS
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.config import VARIANTS
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values, declared
from vlmprune_jax.core.prune.criteria.gradients import gradient_channels
from vlmprune_jax.core.prune.criteria.groups import reduce_groups


def taylor(
    model: Model,
    batches: Iterable[Arrays],
    progress: Callable[[int], None] | None,
    *,
    variant: str,
    reduction: str,
    gqa: str,
    stack: str,
    rows_per_step: int | None,
    **options: Any,
) -> tuple[Values, dict[str, Values]]:
    """Return Taylor importance of heads and neurons, from gradients of the mean cross-entropy.

    With W a weight, g its gradient and A = sum_j g_j^2 / N, where g_j is the gradient of sample j's own mean loss, the
    channel score is a sum over the axis that is not pruned: vectorize |sum W g|, param_first sum |W g|, param_second
    sum |W A W|, param_mix sum |W g - W A W / 2|.

    Args:
      batches, progress: see `gradient_channels`.
      rows_per_step: rows differentiated at once, by default those of the first batch (second order: one row).
      options: arguments of `gradient_channels`: weights of the token types, `by_token_type`, memory and cache.

    Raises UserError if there is no label, or for rows_per_step with second order.
    """
    squares = VARIANTS[one_of("taylor variant", variant, tuple(VARIANTS))]
    if squares and rows_per_step not in (None, 1):
        raise UserError(
            f"rows_per_step={rows_per_step} must be 1 for taylor {variant}, which squares the gradient of each record"
        )

    layers, by_type = gradient_channels(
        model,
        batches,
        _SALIENCIES[variant],
        stack=stack,
        squares=squares,
        rows_per_step=rows_per_step,
        progress=progress,
        **options,
    )
    reduced = functools.partial(reduce_groups, cfg=model.cfg, reduction=reduction, gqa=gqa, stack=stack)
    return reduced(layers), {name: reduced(type_layers) for name, type_layers in by_type.items()}


def _saliency(variant: str, w: jax.Array, g: jax.Array, a: jax.Array, axis: int) -> jax.Array:
    """Return the channel scores of a weight `w` from its gradient `g` and mean squared gradients `a`."""
    if variant == "vectorize":
        return jnp.abs(jnp.sum(w * g, axis=axis))
    change = w * g if variant == "param_first" else w * a * w
    if variant == "param_mix":
        change = w * g - 0.5 * change
    return jnp.sum(jnp.abs(change), axis=axis)


_SALIENCIES = {variant: functools.partial(_saliency, variant) for variant in VARIANTS}  # once: each is compiled once

TAYLOR = Criterion(
    scores=("widths",),
    needs="labels",
    function=taylor,
    options={
        **declared("variant", "gqa", "memory_budget", "by_token_type"),
        "reduction": "sum",
        "rows_per_step": None,
    },
    stacks=STACKS,
    splits=True,
)
