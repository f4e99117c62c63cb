"""Least-squares repair of the experts that a plan keeps, and of the shared expert beside them, without training.

With h the neurons of expert j, g its gate in the pruned model and e the error of the stream behind the layer, sum_t w_t
|e_t - g_t D^T h_t|^2 is minimised over a change D of the expert's `down_proj`, over the tokens that are routed to it.
Experts of one token share its error, so all change at once, by the step that lowers the held-out error most, and then
again. The shared expert, which sees all tokens, comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.mesh.mesh import gather_to_host
from vlmprune_jax.core.models.channels import blocks_of, hidden_of
from vlmprune_jax.core.models.context import Routed
from vlmprune_jax.core.prune.layers import Layer, Rows
from vlmprune_jax.core.prune.layerwise import stream_error
from vlmprune_jax.core.prune.least_squares import Solution, Sums, best_ridge, both_sums, solved, token_scale, token_sums
from vlmprune_jax.core.prune.stream import LayerStream

EXPERTS, SHARED = "mlp/experts/down_proj/weight", "mlp/dense/down_proj/weight"
SWEEPS, STEPS = 3, (1.0, 0.5, 0.25)


def repair_experts(layer: Layer, stream: LayerStream, targets: Sequence[jax.Array]) -> tuple[Layer, Solution]:
    """Change the down projections of a layer's experts; return the layer, unchanged unless the held-out error falls.

    Experts with fewer tokens than neurons stay unchanged, and so do all experts of a layer with a norm between the
    experts and the residual stream.
    """
    original = layer
    before = lowest = stream_error(layer, stream, targets)
    has_norm = layer.block.norm_after("down_proj") is not None
    paths = [path for path in (SHARED, EXPERTS) if path in layer.params and not has_norm]
    changes = {path: np.zeros(layer.params[path].shape, np.float32) for path in paths}
    ridges, tokens = list[float](), 0
    for path in [name for name in changes for _ in range(SWEEPS if name == EXPERTS else 1)]:
        compute = functools.partial(_sums, layer, shared=path == SHARED)
        fit, held = both_sums(stream, compute, targets, title="experts")
        direction, used = _direction(fit, held)
        tokens, direction = int(np.mean(gather_to_host(fit.tokens))), direction.reshape(changes[path].shape)
        trials = {step: layer.with_params({path: layer.params[path] + step * direction}) for step in STEPS if used}
        errors = {step: stream_error(trial, stream, targets) for step, trial in trials.items()}
        step = min(errors, key=lambda step: errors[step], default=0.0)
        if step and errors[step] < lowest:
            lowest, layer, ridges = errors[step], trials[step], ridges + used
            changes[path] += step * direction
    solution = Solution(before, lowest, None, tokens, layer.params[EXPERTS].shape[-1])
    if not ridges:
        return original, solution
    solution.ridge = float(np.median(ridges))
    return original.with_params({path: original.params[path] + change for path, change in changes.items()}), solution


def _direction(fit: Sums, held: Sums) -> tuple[np.ndarray, list[float]]:
    """Return each expert's weight change, float32[experts, embed, neurons], and the ridge penalties that help."""
    changes, ridges = np.zeros(np.array(fit.cross.shape)[[0, 2, 1]], np.float32), list[float]()
    for expert, tokens in enumerate(np.asarray(gather_to_host(fit.tokens))):
        sums, other = (Sums(total.gram[expert], total.cross[expert]) for total in (fit, held))
        best = best_ridge(sums, other) if tokens > changes.shape[2] else None
        if best is not None:
            changes[expert] = solved(sums, other, best[0], refit=False).T
            ridges.append(best[0])
    return changes, ridges


@functools.partial(jax.jit, static_argnames="shared")
def _sums(layer: Layer, rows: Rows, target: jax.Array, *, shared: bool) -> Sums:
    _, after, values = layer.compute(rows, ("routed",))
    routed: Any = values["routed"]
    used, scale = rows.weight > 0, token_scale(rows.weight, target)
    error = jnp.where(used[..., None], target - after.x, 0.0)  # padding may hold anything
    if shared:
        sums = token_sums(scale, used, routed.shared, error)
        return Sums(sums.gram[None], sums.cross[None], tokens=jnp.sum(used, dtype=jnp.float32)[None])
    return _of_experts(routed, layer.params, error, scale, layer.cfg.channel.activation)


def _of_experts(routed: Routed, params: Any, error: jax.Array, scale: jax.Array, act: str) -> Sums:
    """Return the least-squares sums of all experts by a scan over token blocks, each routed to one expert."""
    gate, up, down = (params[f"mlp/experts/{name}/weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    (count, embed, neurons), k = down.shape, routed.experts.shape[-1]
    flat = [array.reshape(-1, *array.shape[2:]) for array in (routed.read, error, scale)]
    gates, blocks = routed.gates.reshape(-1), blocks_of(routed.experts.reshape(-1, k), count)

    def add(totals: Sums, block: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
        rows, expert = block
        read, missing, weight = (array.at[rows // k].get(mode="fill", fill_value=0) for array in flat)
        hidden = hidden_of(act, read, gate[expert], up[expert])
        hidden = hidden * gates.at[rows].get(mode="fill", fill_value=0)[:, None]
        new = token_sums(weight, weight > 0, hidden, missing)
        new = new._replace(energy=None, tokens=jnp.sum(weight > 0, dtype=jnp.float32))
        return jax.tree.map(lambda total, part: total.at[expert].add(part), totals, new), None

    zeros = jnp.zeros((count, neurons, neurons)), jnp.zeros((count, neurons, embed)), None, jnp.zeros(count)
    return jax.lax.scan(add, Sums(*zeros), (blocks.rows, blocks.experts))[0]._replace(energy=0.0)
