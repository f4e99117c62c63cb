"""Least-squares repair of the experts that a plan keeps, and of the shared expert beside them, without training.

With h the neurons of expert j, g its gate in the pruned model and e the error of the stream behind the layer, sum_t w_t
|e_t - g_t D^T h_t|^2 is minimised over a change D of the expert's `down_proj`, over the tokens that are routed to it.
Experts of one token share its error, so all change at once, by the step that lowers the held-out error most, and then
again. The shared expert, which sees all tokens, comes first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.models.channels.moe import blocks_of, hidden_of
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.prune.layers import Given, Layer, Rows, run_block
from vlmprune_jax.core.prune.layerwise import stream_error
from vlmprune_jax.core.prune.ridge import Sums, add_into, best_ridge
from vlmprune_jax.core.prune.ridge import change as solve
from vlmprune_jax.core.prune.walk import LayerStream
from vlmprune_jax.core.stack import Stack

EXPERTS, SHARED = "mlp/experts/down_proj/weight", "mlp/dense/down_proj/weight"
SWEEPS, STEPS = 3, (1.0, 0.5, 0.25)


class ExpertSums(NamedTuple):
    """Sums over the tokens of each expert, from which least squares solves for its weight change."""

    gram: jax.Array
    """float32[experts, neurons, neurons], sum of w g^2 h h^T."""

    cross: jax.Array
    """float32[experts, neurons, embed], sum of w g h e^T."""

    tokens: jax.Array
    """float32[experts], number of tokens."""


def has_experts(layer: Layer, module: str) -> bool:
    """Return True if the output projection called `module` belongs to experts in this layer."""
    return module == "down_proj" and EXPERTS in layer.params


def repair_experts(
    layer: Layer, stream: LayerStream, place: int, targets: Sequence[jax.Array]
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Solve for changes of the down projections of a layer's experts; None if none lowers the held-out error.

    All changes are returned in one flat vector, for `with_experts`. Experts with fewer tokens than neurons stay
    unchanged, and so do all experts of a layer with a norm between the experts and the residual stream.
    """
    before = lowest = stream_error(layer, stream, place, targets)
    changes = {path: np.zeros(layer.params[path].shape, np.float32) for path in _paths(layer)}
    ridges, tokens, unknowns = list[float](), 0, layer.params[EXPERTS].shape[-1]
    for path in [name for name in changes for _ in range(SWEEPS if name == EXPERTS else 1)]:
        fit, held = (_totals(layer, path, stream, place, targets, held_out) for held_out in (False, True))
        direction, used = _direction(fit, held)
        tokens = int(np.mean(gather_to_host(fit.tokens)))
        direction = direction.reshape(changes[path].shape)
        trials = {step: _added(layer, path, step * direction) for step in STEPS if used}
        errors = {step: stream_error(trial, stream, place, targets) for step, trial in trials.items()}
        step = min(errors, key=lambda step: errors[step], default=0.0)
        if step and errors[step] < lowest:
            lowest, layer, ridges = errors[step], trials[step], ridges + used
            changes[path] += step * direction
    vector = np.concatenate([change.ravel() for change in changes.values()]) if ridges else None
    row = {"ridge": float(np.median(ridges)) if ridges else None, "error_before": before, "error_after": lowest}
    return vector, {**row, "tokens": tokens, "unknowns": unknowns}


def with_experts(layer: Layer, vector: np.ndarray) -> Layer:
    """Return a copy of the layer with the weight changes from `repair_experts` added."""
    for path in _paths(layer):
        shape, size = layer.params[path].shape, layer.params[path].size
        layer, vector = _added(layer, path, vector[:size].reshape(shape)), vector[size:]
    return layer


def _paths(layer: Layer) -> list[str]:
    """Return the paths of the weights that can be repaired; none if a norm precedes the addition to the stream."""
    if layer.block.writers["down_proj"].norm is not None:
        return []
    return [path for path in (SHARED, EXPERTS) if path in layer.params]


def _added(layer: Layer, path: str, change: np.ndarray) -> Layer:
    """Return a copy of the layer with `change` added to the weight at `path`, rounded to the model's dtype."""
    old = layer.params[path]
    new = jax.device_put((old + jnp.asarray(change)).astype(layer.dtype).astype(jnp.float32), old.sharding)
    paths = tuple(dict.fromkeys((*layer.changed_paths, path)))
    return dataclasses.replace(layer, params={**layer.params, path: new}, changed_paths=paths)


def _direction(fit: ExpertSums, held: ExpertSums) -> tuple[np.ndarray, list[float]]:
    """Return each expert's weight change, float32[experts, embed, neurons], and the ridge penalties that help."""
    changes, ridges = np.zeros(np.array(fit.cross.shape)[[0, 2, 1]], np.float32), list[float]()
    for expert, tokens in enumerate(np.asarray(gather_to_host(fit.tokens))):
        sums, other = (Sums(total.gram[expert], total.cross[expert], 0.0) for total in (fit, held))
        best = best_ridge(sums, other) if tokens > changes.shape[2] else None
        if best is not None:
            changes[expert] = np.asarray(gather_to_host(solve(sums, best[0]))).T
            ridges.append(best[0])
    return changes, ridges


def _totals(
    layer: Layer, path: str, stream: LayerStream, place: int, targets: Sequence[jax.Array], held_out: bool
) -> ExpertSums:
    """Return the least-squares sums of all experts over fitted or held-out calibration rows."""

    def sums(rows: Rows, target: jax.Array) -> ExpertSums:
        return _sums(layer.params, *rows, target, stack=layer.stack, cfg=layer.cfg, path=path)

    totals = None
    for _, of_batch in stream.visit(sums, place, targets, held_out=held_out):
        totals = of_batch if totals is None else add_into(totals, of_batch)
    assert totals is not None
    return totals


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "path"))
def _sums(
    params: Any, x: Any, weight: Any, given: Given, target: Any, *, stack: str, cfg: Stack, path: str
) -> ExpertSums:
    _, after, values = run_block(stack, cfg, params, x, given, ("routed",))
    routed: Any = values["routed"]
    used = weight > 0
    error = jnp.where(used[..., None], target - after, 0.0)  # padding may hold anything
    scale = jnp.where(used, weight / jnp.mean(target * target, axis=-1), 0.0)
    if path == SHARED:
        read = jnp.where(used[..., None], routed.shared, 0.0)
        gram = jnp.einsum("bs,bsi,bsj->ij", scale, read, read, precision="highest")
        cross = jnp.einsum("bs,bsi,bse->ie", scale, read, error, precision="highest")
        return ExpertSums(gram[None], cross[None], jnp.sum(used, dtype=jnp.float32)[None])
    return _of_experts(routed, params, error, scale, cfg.channel.activation)


def _of_experts(routed: Routed, params: Any, error: jax.Array, scale: jax.Array, act: str) -> ExpertSums:
    """Return the least-squares sums of all experts by a scan over token blocks, each routed to one expert."""
    gate, up, down = (params[f"mlp/experts/{name}/weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    (count, embed, neurons), k = down.shape, routed.experts.shape[-1]
    flat = [array.reshape(-1, *array.shape[2:]) for array in (routed.read, error, scale)]
    gates, blocks = routed.gates.reshape(-1), blocks_of(routed.experts.reshape(-1, k), count)

    def add(totals: ExpertSums, block: tuple[jax.Array, jax.Array]) -> tuple[ExpertSums, None]:
        rows, expert = block
        read, missing, weight = (array.at[rows // k].get(mode="fill", fill_value=0) for array in flat)
        hidden = hidden_of(act, read, gate[expert], up[expert])
        hidden = jnp.where(weight[:, None] > 0, hidden * gates.at[rows].get(mode="fill", fill_value=0)[:, None], 0.0)
        left = (hidden * weight[:, None]).T
        products = (jnp.matmul(left, right, precision="highest") for right in (hidden, missing))
        new = (*products, jnp.sum(weight > 0, dtype=jnp.float32))
        return ExpertSums(*(total.at[expert].add(part) for total, part in zip(totals, new, strict=True))), None

    zeros = ExpertSums(jnp.zeros((count, neurons, neurons)), jnp.zeros((count, neurons, embed)), jnp.zeros(count))
    return jax.lax.scan(add, zeros, (blocks.rows, blocks.experts))[0]
