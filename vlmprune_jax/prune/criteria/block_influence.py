"""How much each decoder layer changes its input (ShortGPT, arXiv 2403.03853; angular: arXiv 2403.17887)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.distributed.journal import Journal, continued
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.vlm import Model, encode, mesh_of, place_batch
from vlmprune_jax.prune.criteria.calibration import Arrays, calibration_batches

Progress = Callable[[int], None]


def block_influence(
    model: Model,
    batches: Iterable[Any],
    *,
    reference_compat: bool,
    progress: Progress | None,
    journal: Journal | None,
) -> np.ndarray:
    """float64[n_layers] mean over the real tokens of all samples of 1 - cos(input, output) of each layer.

    The last layer's output is taken after the final norm, and a token whose input or output is zero counts 0.5.
    `reference_compat` sums over all positions, padding included, instead (the reference code's importances).
    """
    total, weight = np.zeros(len(model.cfg.text.layers)), 0.0
    for summed, count in _over_batches(
        functools.partial(_influence, masked=not reference_compat), model, batches, progress, journal
    ):
        total, weight = total + summed, weight + count
    return total if reference_compat else total / _positive(weight)


def angular_distance(
    model: Model,
    batches: Iterable[Any],
    *,
    layers_removed: int,
    reference_compat: bool,
    progress: Progress | None,
    journal: Journal | None,
) -> np.ndarray:
    """float64[n_layers]: entry i is the mean over rows of arccos(cos)/pi between h_i and h_{i + layers_removed}.

    States are those of each row's last real token. Blocks that would reach past the last layer are +inf (never
    removed). `reference_compat` sums over rows instead.
    """
    n_layers = len(model.cfg.text.layers)
    if not 0 < layers_removed < n_layers:
        raise UserError(f"layers_removed={layers_removed} must be between 1 and {n_layers - 1} for {n_layers} layers")
    starts = n_layers - layers_removed + 1
    total, weight = np.zeros(starts), 0.0
    for summed, count in _over_batches(
        functools.partial(_angular, n=layers_removed), model, batches, progress, journal
    ):
        total, weight = total + summed, weight + count
    importance = np.full(n_layers, np.inf)
    importance[:starts] = total if reference_compat else total / _positive(weight)
    return importance


def cosine_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cos over the last axis in float32; 0.5 where a vector is zero.

    Computed as |a/|a| - b/|b||^2 / 2, which keeps its relative precision for the nearly equal states of deep layers,
    where 1 - cos cancels.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norm_a, norm_b = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    zero = (norm_a == 0) | (norm_b == 0)
    gap = a / jnp.where(zero, jnp.ones_like(norm_a), norm_a) - b / jnp.where(zero, jnp.ones_like(norm_b), norm_b)
    return jnp.where(zero[..., 0], jnp.float32(0.5), 0.5 * jnp.sum(gap * gap, axis=-1))


def _over_batches(
    step: Callable[..., Any],
    model: Model,
    batches: Iterable[Any],
    progress: Progress | None,
    journal: Journal | None,
) -> Iterator[tuple[np.ndarray, float]]:
    """(float64[layers or starts], float) of each batch; only these leave the device."""
    mesh = mesh_of(model.params)
    params = jax.tree.map(jnp.asarray, model.params) if mesh is None else model.params

    def sums(arrays: Arrays) -> tuple[list[float], float]:
        placed = place_batch({**arrays, "pixel_values": arrays.get("pixel_values")}, mesh)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            summed, count = step(
                params, model.cfg, placed["input_ids"], placed["pixel_values"], placed["attention_mask"]
            )
        return np.asarray(summed, np.float64).tolist(), float(count)

    checked = calibration_batches(batches, model.cfg, labels=False)
    for done, (summed, count) in enumerate(continued(sums, checked, journal), start=1):
        yield np.asarray(summed), count
        if progress is not None:
            progress(done)


@functools.partial(jax.jit, static_argnames=("cfg", "masked"))
def _influence(params, cfg, ids, pixels, mask, *, masked):
    weight = mask.astype(jnp.float32) if masked else jnp.ones(mask.shape, jnp.float32)

    def tap(before: jax.Array, after: jax.Array) -> jax.Array:
        # where, not a product: padding may hold anything, and NaN * 0 is NaN
        distance = cosine_distance(before, after)
        return jnp.sum(jnp.where(weight > 0, distance, jnp.zeros_like(distance)))

    _, aux = encode(params, cfg, ids, pixel_values=pixels, attention_mask=mask, tap=tap)
    return constrain(aux["tap"], (None,)), constrain(jnp.sum(weight), ())


@functools.partial(jax.jit, static_argnames=("cfg", "n"))
def _angular(params, cfg, ids, pixels, mask, *, n):
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    real = mask.max(axis=1) > 0

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]

    def tap(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
        return at_last(before), at_last(after)

    _, aux = encode(params, cfg, ids, pixel_values=pixels, attention_mask=mask, tap=tap)
    before, after = aux["tap"]
    states = jnp.concatenate([before, after[-1:]])  # [n_layers + 1, batch, embed]
    # clipped: rounding can leave a cosine above 1, whose arccos is NaN
    cosine = jnp.clip(1 - cosine_distance(states[:-n], states[n:]), -1, 1)
    angle = jnp.where(real[None], jnp.arccos(cosine) / jnp.pi, jnp.zeros_like(cosine))
    return constrain(angle.sum(axis=1), (None,)), constrain(real.astype(jnp.float32).sum(), ())


def _positive(weight: float) -> float:
    if weight == 0:
        raise UserError("the calibration batches have no real token: every attention_mask is 0")
    return weight
