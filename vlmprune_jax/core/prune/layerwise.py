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

from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.prune.layers import Layer, Rows, to_devices
from vlmprune_jax.core.prune.least_squares import Solution, count_tokens, token_scale
from vlmprune_jax.core.prune.stream import LayerStream

RATE, EPOCHS, WARMUP = 2e-4, 6, 3  # learning rate (1e-3 raises the error), epochs, warm-up steps
PATIENCE = 2  # epochs without a lower held-out error, after which the layer is done
ROWS = 2  # rows per optimizer step and device
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


@jax.jit
def _error(layer: Layer, rows: Rows, target: jax.Array) -> jax.Array:
    after = layer.compute(rows)[1].x
    error = jnp.where(rows.weight[..., None] > 0, target - after, 0.0)
    return jnp.sum(token_scale(rows.weight, target) * jnp.mean(error * error, axis=-1))


def stream_error(layer: Layer, stream: LayerStream, targets: Sequence[jax.Array]) -> float:
    """Return the squared error of the stream after a layer, relative to its mean square, per held-out token."""
    pairs = [*stream.visit(functools.partial(_error, layer), targets, held_out=True)]
    return sum(float(total) for _, total in pairs) / sum(float(batch.weight.sum()) for batch, _ in pairs)


@functools.partial(jax.jit, donate_argnames=("params", "state"))
def _step(
    params: Any, state: Any, layer: Layer, rate: Any, rows: Rows, target: jax.Array
) -> tuple[dict[str, jax.Array], Any]:
    mean = 1 / jnp.maximum(jnp.sum(rows.weight), 1e-9)

    def loss(params: Any) -> jax.Array:
        return mean * _error(dataclasses.replace(layer, params=params), rows, target)

    gradients = jax.grad(loss)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
        updates, state = _ADAM.update(gradients, state)
    return jax.tree.map(lambda value, update: value - rate * update, params, updates), state


def train_layer(layer: Layer, stream: LayerStream, targets: Sequence[jax.Array]) -> tuple[Layer, Solution]:
    """Train one pruned layer to reproduce the unpruned model's stream after it; return it if the held-out error falls.

    All weights and norms are trained by Adam with a cosine schedule; the epoch with the lowest held-out error is kept.
    """
    steps = list[tuple[int, slice]]()  # rows of each optimizer step: number of a batch, and its rows
    for number, batch in enumerate(stream.batches):
        size = ROWS if layer.mesh is None else len(batch.weight)
        slices = [slice(start, start + size) for start in range(0, len(batch.weight), size)]
        steps += [(number, rows) for rows in slices if not batch.held_out and batch.weight[rows].any()]
    before = lowest = stream_error(layer, stream, targets)
    best, stale, number = None, 0, 0
    params = {path: leaf.copy() for path, leaf in layer.params.items()}
    state, random = _ADAM.init(params), np.random.default_rng(layer.number)
    unchanged = dataclasses.replace(layer, params={})
    for _ in range(EPOCHS):
        for step in random.permutation(len(steps)):
            number += 1
            rate = RATE * min(number / WARMUP, 0.5 * (1 + math.cos(math.pi * number / (EPOCHS * len(steps)))))
            batch, chosen = steps[step]
            arrays = stream.rows(batch), to_devices(targets[batch])
            if layer.mesh is None:
                arrays = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], arrays)
            params, state = _step(params, state, unchanged, rate, *arrays)
        error = stream_error(dataclasses.replace(layer, params=params), stream, targets)
        if error < lowest:
            lowest, stale, best = error, 0, {path: np.array(gather_to_host(leaf)) for path, leaf in params.items()}
        elif (stale := stale + 1) == PATIENCE:
            break
    path = layer.block.writers["down_proj"]
    unknowns = layer.params[f"{path}/weight"][0].size + (f"{path}/bias" in layer.params)
    solution = Solution(before, lowest, None if best is None else 0.0, count_tokens(stream), unknowns)
    return layer if best is None else layer.with_params(best), solution
