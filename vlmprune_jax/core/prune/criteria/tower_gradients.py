"""Channel scores from the gradients of the calibration loss with respect to the weights of every vision tower layer.

The loss is the decoder's: the gradient passes back through all of it, with blocks recomputed one by one, and through
the projector; neither is differentiated with respect to its weights. Unlike the decoder's (`gradients`), a tower's
gradients fit all at once: float32 gradients of its heads and neurons, 1.2 GB for CLIP ViT-L, twice that for second
order.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.layer import layer_runs
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.inputs import encode_inputs
from vlmprune_jax.core.models.params import Flat, flatten, unflatten
from vlmprune_jax.core.models.placement import mesh_of, place_inputs
from vlmprune_jax.core.models.vlm import Model, Params, encode, head_of
from vlmprune_jax.core.models.vocabulary import cross_entropy_sum
from vlmprune_jax.core.prune.activations import batches_of
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.criteria.groups import summed_axes

CHUNK = 256  # positions whose float32 logits exist at once
_NAMES = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw", "position_ids")


def tower_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., Any],
    *,
    stack: str,
    squares: bool,
    rows_per_step: int | None,
    progress: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """Return {path: channel scores} of the weights pruned together, for each layer of a vision tower, from gradients.

    Batches without images are skipped, and their labels do not contribute to the loss. All layers finish together after
    the last step; after each step before, `progress` is called with 0.

    Raises UserError if no batch has an image, or no batch with an image has a label.
    """
    mesh, cfg = mesh_of(model.params), model.cfg
    params = jax.tree.map(jnp.asarray, model.params) if mesh is None else model.params
    axes = summed_axes(cfg, stack)
    flat = flatten(params[stack]["layers"])
    weights = {path: leaf for path, leaf in flat.items() if path.partition("/")[2] in axes}
    sums, last, total, samples = (_zeros(weights), _zeros(weights) if squares else None), None, 0, 0
    with use_mesh(mesh):
        for arrays in _steps(batches_of(cfg, stack, batches), cfg, 1 if squares else rows_per_step):
            labels = int((arrays["labels"][:, 1:] != IGNORED).sum())
            if not labels:
                continue
            placed = place_inputs(model.params, cfg, arrays)
            sums, loss = _add(sums, weights, params, placed, labels, cfg=cfg, stack=stack)
            jax.block_until_ready(last)  # two steps under way: a long queue of collectives can starve on few cores
            last = loss
            total, samples = total + labels, samples + 1
            if progress is not None:
                progress(0)
        if total == 0:
            raise UserError(
                f"the calibration batches with images have no labels (all are {IGNORED}), so there is no loss to "
                "differentiate"
            )
        of_axis = tuple((path, axes[path.partition("/")[2]]) for path in weights)
        scores = jax.tree.map(np.asarray, _reduced(weights, sums, float(total), float(samples), channels, of_axis))
    layers = dict[int, Any]()
    for run, (numbers, _) in enumerate(layer_runs(cfg.stack(stack).layers)):
        stacked = {name: scores[f"{run}/{name}"] for name in axes}
        layers |= {number: jax.tree.map(operator.itemgetter(i), stacked) for i, number in enumerate(numbers)}
    if progress is not None:
        progress(len(layers))
    return [layers[number] for number in sorted(layers)]


def _zeros(flat: Flat) -> Flat:
    return {path: jnp.zeros(leaf.shape, jnp.float32, device=leaf.sharding) for path, leaf in flat.items()}


def _steps(batches: Iterable[Arrays], cfg: ModelConfig, rows: int | None) -> Iterator[Arrays]:
    """Yield the calibration rows of each gradient step: `rows_per_step` rows, or one batch."""
    if rows is not None and rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    names = (*_NAMES, *cfg.encoder_arrays)
    for arrays in batches:
        size = rows or len(arrays["input_ids"])
        for start in range(0, len(arrays["input_ids"]), size):
            yield {name: arrays[name][start : start + size] for name in names if name in arrays}


@functools.partial(jax.jit, static_argnames=("cfg", "stack"), donate_argnames=("sums",))
def _add(
    sums: Any, weights: Flat, params: Params, batch: Any, labels: Any, *, cfg: ModelConfig, stack: str
) -> tuple[tuple[Flat, Flat | None], jax.Array]:
    """Add one step's gradients, and optionally their squares, to float32 sums; also return the step's loss.

    `weights`: arrays, by path below the tower's layers. The loss is the summed cross-entropy; the square is that of
    the gradient of its mean over the `labels` of the step.
    """

    def loss(weights: Flat) -> jax.Array:
        layers = unflatten({**flatten(params[stack]["layers"]), **weights})
        filled = {**params, stack: {**params[stack], "layers": layers}}
        final, _ = encode(filled, cfg, batch["input_ids"], **encode_inputs(cfg, batch), remat="full")
        return cross_entropy_sum(final, head_of(params, cfg), batch["labels"], chunk=CHUNK)

    value, gradient = jax.value_and_grad(loss)(weights)
    gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    first, squared = sums
    if squared is not None:
        squared = jax.tree.map(lambda old, new: old + jnp.square(new / labels), squared, gradient)
    return (jax.tree.map(jnp.add, first, gradient), squared), value


@functools.partial(jax.jit, static_argnames=("channels", "of_axis"))
def _reduced(weights: Flat, sums: Any, total: Any, samples: Any, channels: Any, of_axis: Any) -> dict[str, Any]:
    """Return {path: result of `channels`} for a group of equal layers, stacked."""
    first, squared = sums
    scores = {}
    for path, axis in of_axis:
        operands = [weights[path].astype(jnp.float32), first[path] / total]
        a = [] if squared is None else [squared[path] / samples]
        reduce = lambda w, g, a=None, axis=axis: channels(w, g, a, axis)  # noqa: E731
        scores[path] = jax.tree.map(lambda leaf: constrain(leaf, ()), jax.vmap(reduce)(*operands, *a))
    return scores
