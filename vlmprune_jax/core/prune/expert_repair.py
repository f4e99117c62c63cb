"""Least-squares repair of the experts that a plan keeps, and of the shared expert beside them, without training.

With h the neurons of expert j, g its gate in the pruned model and e the error of the stream behind the layer, sum_t w_t
|e_t - g_t D^T h_t|^2 is minimised over a change D of the expert's `down_proj`, over the tokens that are routed to it.
Experts of one token share its error, so all change at once, by the step that lowers the held-out error most, and then
again. The shared expert, which sees all tokens, comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.models.channels.moe import blocks_of, hidden_of
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.layerwise import stream_error
from vlmprune_jax.core.prune.ridge import Solution, Sums, add_into, best_ridge, solved, token_scale, token_sums
from vlmprune_jax.core.prune.stream import LayerStream

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
    layer: Layer, stream: LayerStream, targets: Sequence[jax.Array]
) -> tuple[np.ndarray | None, Solution]:
    """Solve for changes of the down projections of a layer's experts; None if none lowers the held-out error.

    All changes are returned in one flat vector, for `with_experts`. Experts with fewer tokens than neurons stay
    unchanged, and so do all experts of a layer with a norm between the experts and the residual stream.
    """
    before = lowest = stream_error(layer, stream, targets)
    changes = {path: np.zeros(layer.params[path].shape, np.float32) for path in _paths(layer)}
    ridges, tokens = list[float](), 0
    for path in [name for name in changes for _ in range(SWEEPS if name == EXPERTS else 1)]:
        fit, held = (_totals(layer, path, stream, targets, held_out) for held_out in (False, True))
        direction, used = _direction(fit, held)
        tokens = int(np.mean(gather_to_host(fit.tokens)))
        direction = direction.reshape(changes[path].shape)
        old = layer.params[path]
        trials = {step: layer.with_params({path: old + step * direction}) for step in STEPS if used}
        errors = {step: stream_error(trial, stream, targets) for step, trial in trials.items()}
        step = min(errors, key=lambda step: errors[step], default=0.0)
        if step and errors[step] < lowest:
            lowest, layer, ridges = errors[step], trials[step], ridges + used
            changes[path] += step * direction
    vector = np.concatenate([change.ravel() for change in changes.values()]) if ridges else None
    ridge = float(np.median(ridges)) if ridges else None
    return vector, Solution(before, lowest, ridge, tokens, layer.params[EXPERTS].shape[-1])


def with_experts(layer: Layer, vector: np.ndarray) -> Layer:
    """Return a copy of the layer with the weight changes from `repair_experts` added."""
    for path in _paths(layer):
        old = layer.params[path]
        change, vector = vector[: old.size].reshape(old.shape), vector[old.size :]
        layer = layer.with_params({path: old + change})
    return layer


def _paths(layer: Layer) -> list[str]:
    """Return the paths of the weights that can be repaired; none if a norm precedes the addition to the stream."""
    if layer.block.writers["down_proj"].norm is not None:
        return []
    return [path for path in (SHARED, EXPERTS) if path in layer.params]


def _direction(fit: ExpertSums, held: ExpertSums) -> tuple[np.ndarray, list[float]]:
    """Return each expert's weight change, float32[experts, embed, neurons], and the ridge penalties that help."""
    changes, ridges = np.zeros(np.array(fit.cross.shape)[[0, 2, 1]], np.float32), list[float]()
    for expert, tokens in enumerate(np.asarray(gather_to_host(fit.tokens))):
        sums, other = (Sums(total.gram[expert], total.cross[expert]) for total in (fit, held))
        best = best_ridge(sums, other) if tokens > changes.shape[2] else None
        if best is not None:
            changes[expert] = solved(sums, other, best[0], refit=False).T
            ridges.append(best[0])
    return changes, ridges


def _totals(layer: Layer, path: str, stream: LayerStream, targets: Sequence[jax.Array], held_out: bool) -> ExpertSums:
    """Return the least-squares sums of all experts over fitted or held-out calibration rows."""
    compute = functools.partial(_sums, layer, shared=path == SHARED)
    return functools.reduce(add_into, (sums for _, sums in stream.visit(compute, targets, held_out=held_out)))


@functools.partial(jax.jit, static_argnames="shared")
def _sums(layer: Layer, rows: Rows, target: jax.Array, *, shared: bool) -> ExpertSums:
    _, after, values = layer.compute(rows, ("routed",))
    routed: Any = values["routed"]
    used, scale = rows.weight > 0, token_scale(rows.weight, target)
    error = jnp.where(used[..., None], target - after.x, 0.0)  # padding may hold anything
    if shared:
        gram, cross = token_sums(scale, used, routed.shared, error)
        return ExpertSums(gram[None], cross[None], jnp.sum(used, dtype=jnp.float32)[None])
    return _of_experts(routed, layer.params, error, scale, layer.cfg.channel.activation)


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
        hidden = hidden * gates.at[rows].get(mode="fill", fill_value=0)[:, None]
        new = (*token_sums(weight, weight > 0, hidden, missing), jnp.sum(weight > 0, dtype=jnp.float32))
        return ExpertSums(*(total.at[expert].add(part) for total, part in zip(totals, new, strict=True))), None

    zeros = ExpertSums(jnp.zeros((count, neurons, neurons)), jnp.zeros((count, neurons, embed)), jnp.zeros(count))
    return jax.lax.scan(add, zeros, (blocks.rows, blocks.experts))[0]
