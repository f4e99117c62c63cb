"""Channel scores from the gradients of the calibration loss by the weights of every decoder layer.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time; the embeddings and the vision
tower are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vlmprune_jax.config import IGNORED, ModelConfig, runs
from vlmprune_jax.distributed.mesh import row_ways, within
from vlmprune_jax.distributed.rules import constrain, sharding
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.decoder import Context
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model, Params, VisionLanguageModel, mesh_of, text_context, to_nnx
from vlmprune_jax.prune.criteria.calibration import Arrays
from vlmprune_jax.prune.criteria.groups import coupled

CHUNK = 256  # positions whose float32 logits exist at once: 33 MB a row for 32,000 words


def gradient_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., Any],
    *,
    squares: bool,
    rows_per_step: int | None,
    progress: Callable[[int], None] | None,
) -> list[dict[str, Any]]:
    """Per layer {path: channels(weight, gradient, squared, axis)} of its coupled weights (see `groups.coupled`).

    `gradient`: of the mean cross-entropy over all labels of all batches, however the rows are cut; `squared`: with
    `squares` the mean over the samples of the squared gradients of their own mean losses, else None; all float32 in the
    weight's shape. `axis` is the one that is not pruned: `channels` reduces over it, on the device, to any tree.

    Args:
      batches: with labels (-100 ignored, not shifted). Rows of different length are padded on the right.
      channels: a function of a module; its identity decides what is compiled again.
      rows_per_step: rows differentiated at once, default the first batch's; with `squares` it is 1.
      progress: called with the number of finished layers.

    Raises:
      UserError: no label at all.
    """
    cfg, mesh = model.cfg, mesh_of(model.params)
    data = _stack(batches, 1 if squares else rows_per_step)
    counts = _label_counts(data["labels"])
    if counts.sum() == 0:
        raise UserError(
            f"the calibration batches have no label: every one is {IGNORED}, so there is no loss to differentiate"
        )
    # all-(-100) rows, such as the filler of a last batch, are not samples
    total, samples = float(counts.sum()), float((counts > 0).sum())
    params = jax.tree.map(jnp.asarray, model.params) if mesh is None else model.params
    placed = _place(data, mesh)
    layers: list[dict[str, Any]] = []  # from the last to the first
    with within(mesh):
        inputs, cotangent = _forward(params, cfg, placed)
        weights = jnp.asarray(counts.sum(axis=1), jnp.float32)
        for run, (_, length, _) in reversed(list(enumerate(runs(cfg.text.layers)))):
            own, alone = _only_run(params, cfg, run)
            for i in reversed(range(length)):
                scores, cotangent = _layer(
                    own, inputs[run], cotangent, placed["attention_mask"], weights, i, total, samples,
                    cfg=alone, squares=squares, channels=channels,
                )  # fmt: skip
                layers.append(jax.tree.map(np.asarray, scores))
                if progress is not None:
                    progress(len(layers))
            inputs[run] = None
    return layers[::-1]


def _stack(batches: Iterable[Arrays], rows: int | None) -> Arrays:
    """All rows as [steps, rows, ...]: padded to one length and one number of images, then to whole steps."""
    seen = list(batches)
    rows = rows or len(seen[0]["input_ids"])
    if rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    length = max(arrays["input_ids"].shape[1] for arrays in seen)
    slots = max(arrays["pixel_values"].shape[1] if "pixel_values" in arrays else 0 for arrays in seen)
    total = sum(len(arrays["input_ids"]) for arrays in seen)
    steps = math.ceil(total / rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    result: Arrays = {}
    for name, value in fill.items():
        flat = np.full((steps * rows, length), value, np.int32)
        start = 0
        for arrays in seen:
            part = arrays[name]
            flat[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        result[name] = flat.reshape(steps, rows, length)
    if slots:
        result["pixel_values"] = _stack_pixels(seen, steps * rows, slots).reshape(
            steps, rows, slots, *_image_shape(seen)
        )
    return result


def _image_shape(seen: list[Arrays]) -> tuple[int, ...]:
    return next(arrays["pixel_values"].shape[2:] for arrays in seen if "pixel_values" in arrays)


def _stack_pixels(seen: list[Arrays], rows: int, slots: int) -> np.ndarray:
    pixels, start = np.zeros((rows, slots, *_image_shape(seen)), np.float32), 0
    for arrays in seen:
        part = arrays.get("pixel_values")
        if part is not None:
            pixels[start : start + len(part), : part.shape[1]] = part
        start += len(arrays["input_ids"])
    return pixels


def _label_counts(labels: np.ndarray) -> np.ndarray:
    """int[steps, rows] labels that are predicted: not the first position, which nothing precedes."""
    return (labels[..., 1:] != IGNORED).sum(axis=-1)


def _place(data: Arrays, mesh: Mesh | None) -> dict[str, jax.Array]:
    if mesh is None:
        return {name: jnp.asarray(array) for name, array in data.items()}
    ways = row_ways(mesh)
    axes = (None, "batch" if data["input_ids"].shape[1] % ways == 0 else None)
    return {name: jax.device_put(a, sharding(mesh, axes + (None,) * (a.ndim - 2))) for name, a in data.items()}


@functools.partial(jax.jit, static_argnames=("cfg",))
def _forward(params, cfg, data):
    """Block inputs per run [steps, length, rows, seq, embed], and the summed loss's gradient at the blocks' output."""
    module = to_nnx(Model(params, cfg))

    def step(micro: dict[str, jax.Array]):
        x, _ = module.embed(micro["input_ids"], micro.get("pixel_values"))
        ctx = text_context(module, micro["attention_mask"])
        x = constrain(x, ("batch", "sequence", None))
        inputs = []
        for run in range(len(runs(cfg.text.layers))):
            apply, state = module.text.run_parts(str(run))
            x, before = jax.lax.scan(functools.partial(_block_input, apply, ctx), x, state)
            inputs.append(before)
        return inputs, _loss_gradient(module, x, micro["labels"])

    return jax.lax.map(step, data)


def _block_input(apply: Callable[..., Any], ctx: Context, x: jax.Array, layer: nnx.State):
    return apply(layer, x, ctx)[0], x


def _loss_gradient(module: VisionLanguageModel, x: jax.Array, labels: jax.Array) -> jax.Array:
    """d(sum of cross-entropies) / dx of the last block's output; float32 logits exist for CHUNK positions at a time."""
    batch, seq, embed = x.shape
    targets = jnp.concatenate([labels[:, 1:], jnp.full((batch, 1), IGNORED, labels.dtype)], axis=1)
    size = min(CHUNK, seq)
    n = math.ceil(seq / size)
    padding = n * size - seq
    x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)), constant_values=IGNORED)

    def cross_entropy(h: jax.Array, wanted: jax.Array) -> jax.Array:
        logits = module.text.logits(module.text.final_norm(h)).astype(jnp.float32)
        logs = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(wanted != IGNORED, picked, jnp.zeros_like(picked)))

    chunks = x.reshape(batch, n, size, embed).swapaxes(0, 1), targets.reshape(batch, n, size).swapaxes(0, 1)
    gradient = jax.lax.map(lambda chunk: jax.grad(cross_entropy)(*chunk), chunks)
    return gradient.swapaxes(0, 1).reshape(batch, n * size, embed)[:, :seq]


def _only_run(params: Params, cfg: ModelConfig, run: int) -> tuple[Params, ModelConfig]:
    """The decoder with one run of layers, so that equal runs of any model share one compiled step."""
    _, length, shape = runs(cfg.text.layers)[run]
    text = {**params["text"], "layers": {"0": params["text"]["layers"][str(run)]}}
    alone = dataclasses.replace(cfg.with_layers((shape,) * length), vision=None, projector=None)
    return {"text": text}, alone


@functools.partial(jax.jit, static_argnames=("cfg", "squares", "channels"), donate_argnames=("cotangent",))
def _layer(params, inputs, cotangent, masks, weights, index, total, samples, *, cfg, squares, channels):
    """Channel scores {weight: tree} of layer `index` of the only run, and the gradient at its input.

    inputs: [steps, length, rows, seq, embed]; cotangent: [steps, rows, seq, embed]; weights: float32[steps] labels.
    """
    module = to_nnx(Model(params, cfg))
    apply, state = module.text.run_parts("0")
    layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), state)
    attention, mlp = coupled(cfg)
    axes = attention | mlp
    w = {name: _weights(layer)[name].astype(jnp.float32) for name in axes}

    def step(carry: Any, micro: Any):
        first, squared = carry
        x, outgoing, mask, weight = micro
        ctx = text_context(module, mask)
        _, pull = jax.vjp(lambda own, h: apply(own, h, ctx)[0], layer, x)
        gradients, incoming = pull(outgoing)
        g = {name: _weights(gradients)[name].astype(jnp.float32) for name in axes}
        first = jax.tree.map(jnp.add, first, g)
        if squares:
            # the sample's own mean loss: its summed gradient over its label count (0 labels: gradient 0)
            squared = jax.tree.map(lambda old, new: old + jnp.square(new / jnp.maximum(weight, 1)), squared, g)
        return (first, squared), incoming

    zeros = jax.tree.map(jnp.zeros_like, w)
    block = jax.lax.dynamic_index_in_dim(inputs, index, axis=1, keepdims=False)
    (first, squared), incoming = jax.lax.scan(
        step, (zeros, zeros if squares else {}), (block, cotangent, masks, weights)
    )
    scores = {}
    for name, axis in axes.items():
        a = squared[name] / samples if squares else None
        scores[name] = jax.tree.map(lambda x: constrain(x, ()), channels(w[name], first[name] / total, a, axis))
    return scores, incoming


def _weights(state: nnx.State) -> Mapping[str, jax.Array]:
    return flatten(nnx.to_pure_dict(state))
