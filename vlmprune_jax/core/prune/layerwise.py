"""Training of one layer at a time against the unpruned residual stream, after its reconstruction.

It needs the memory of one layer, its optimizer and the streams of a few rows, so that a model of any size trains on one
small chip. It lowers perplexity after depth cuts and does nothing for width pruning.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlmprune_jax.core.config import Stack
from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.models.placement import place_batch
from vlmprune_jax.core.prune.layers import Given, Layer, Rows, run_block, to_devices
from vlmprune_jax.core.prune.walk import LayerStream

RATE, EPOCHS, WARMUP = 2e-4, 6, 3  # learning rate (1e-3 raises the error), epochs, warm-up steps
PATIENCE = 2  # epochs without a lower held-out error, after which the layer is done
ROWS = 2  # rows per optimizer step and device
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


def _loss(params: Any, x: Any, target: Any, weight: Any, given: Given, stack: str, cfg: Stack) -> jax.Array:
    """Return the weighted squared error of the residual stream, relative to its mean square, summed over tokens."""
    _, after, _ = run_block(stack, cfg, params, x, given, ())
    scale = jnp.where(weight > 0, weight / jnp.mean(target * target, axis=-1), 0.0)
    error = jnp.where(weight[..., None] > 0, target - after, 0.0)
    return jnp.sum(scale * jnp.mean(error * error, axis=-1))


_error = functools.partial(jax.jit, static_argnames=("stack", "cfg"))(_loss)


def stream_error(layer: Layer, stream: LayerStream, place: int, targets: Sequence[jax.Array]) -> float:
    """Return the error of the residual stream after a pruned layer, on held-out rows.

    Args:
      place: the layer's number among the remaining layers.
      targets: residual stream of the unpruned model after the layer, for each batch.
    """

    def error(rows: Rows, target: jax.Array) -> jax.Array:
        return _error(layer.params, rows.x, target, rows.weight, rows.given, stack=layer.stack, cfg=layer.cfg)

    pairs = [*stream.visit(error, place, targets, held_out=True)]
    return sum(float(total) for _, total in pairs) / sum(float(batch.weight.sum()) for batch, _ in pairs)


@functools.partial(jax.jit, static_argnames=("stack", "cfg"), donate_argnames=("params", "state"))
def _step(
    params: Any, state: Any, rate: Any, x: Any, target: Any, weight: Any, given: Given, *, stack: str, cfg: Stack
) -> tuple[Any, Any]:
    mean = 1 / jnp.maximum(jnp.sum(weight), 1e-9)
    gradients = jax.grad(lambda values: mean * _loss(values, x, target, weight, given, stack, cfg))(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
        updates, state = _ADAM.update(gradients, state)
    return jax.tree.map(lambda value, update: value - rate * update, params, updates), state


def _split(arrays: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Split the rows of a batch into parts of `size`; leave out parts without weight."""
    count = len(arrays["weight"])
    if size >= count:
        return [arrays] if arrays["weight"].any() else []
    arrays = jax.tree.map(np.asarray, arrays)  # on a CPU without a copy
    chunks = [jax.tree.map(lambda leaf, at=at: leaf[at : at + size], arrays) for at in range(0, count, size)]
    return [chunk for chunk in chunks if chunk["weight"].any()]


def train_layer(
    layer: Layer, stream: LayerStream, place: int, targets: Sequence[jax.Array]
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Train one pruned layer to reproduce the unpruned model's stream; return its parameters as a flat vector.

    All weights and norms are trained by Adam with a cosine schedule; the epoch with the lowest held-out error is kept.
    The vector is None if the held-out error does not fall.

    Args:
      stream: calibration rows at the layer's input.
      place: the layer's number among the remaining layers.
      targets: residual stream of the unpruned model after the layer, for each batch.
    """
    fitted, held = list[dict[str, Any]](), list[dict[str, Any]]()
    for at, batch in enumerate(stream.batches):
        streams = {"x": stream.states[at].x, "target": targets[at]}
        arrays = {**streams, "weight": batch.weight, "given": stream.given(at, place)}
        if batch.held_out:
            held += _split(arrays, len(batch.weight))
        else:
            fitted += _split(arrays, ROWS if layer.mesh is None else len(batch.weight))
    tokens = sum(float(part["weight"].sum()) for part in held)
    total, stack, cfg = EPOCHS * len(fitted), layer.stack, layer.cfg

    def placed(part: dict[str, Any]) -> dict[str, Any]:
        streams = {name: to_devices(part[name]) for name in ("x", "target")}
        return {
            **streams,
            **place_batch({"weight": part["weight"]}, layer.mesh),
            "given": part["given"].placed(layer.mesh),
        }

    def held_out_error(params: Any) -> float:
        return sum(float(_error(params, **placed(part), stack=stack, cfg=cfg)) for part in held) / tokens

    before = lowest = held_out_error(layer.params)
    best, stale, number = None, 0, 0
    params = {path: leaf.copy() for path, leaf in layer.params.items()}
    state, random = _ADAM.init(params), np.random.default_rng(layer.number)
    for _ in range(EPOCHS):
        for at in random.permutation(len(fitted)):
            number += 1
            rate = RATE * min(number / WARMUP, 0.5 * (1 + math.cos(math.pi * number / total)))
            params, state = _step(params, state, rate, **placed(fitted[at]), stack=stack, cfg=cfg)
        error = held_out_error(params)
        if error < lowest:
            lowest, stale, best = error, 0, {path: np.array(gather_to_host(leaf)) for path, leaf in params.items()}
        elif (stale := stale + 1) == PATIENCE:
            break
    row = {"ridge": None if best is None else 0.0, "error_before": before, "error_after": lowest}
    return None if best is None else np.concatenate([best[path].ravel() for path in sorted(best)]), row


def replaced(layer: Layer, vector: np.ndarray) -> Layer:
    """Return the layer with all parameters replaced by the values in a vector from `train_layer`."""
    params, at = dict[str, jax.Array](), 0
    for path in sorted(layer.params):
        old = layer.params[path]
        new = vector[at : at + old.size].reshape(old.shape).astype(layer.dtype).astype(np.float32)
        params[path], at = jax.device_put(new, old.sharding), at + old.size
    return dataclasses.replace(layer, params=params, changed_paths=tuple(params))
