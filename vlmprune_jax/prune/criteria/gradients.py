"""Channel scores from the gradients of the calibration loss by the weights of every decoder layer.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time; the embeddings and the vision
tower are never differentiated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.config import IGNORED, ModelConfig, TextConfig, runs
from vlmprune_jax.distributed.memory import free_memory
from vlmprune_jax.distributed.mesh import from_all, within
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.cross_entropy import chunks, cross_entropy
from vlmprune_jax.models.decoder import REMAT_POLICIES, STREAM, Decoder
from vlmprune_jax.models.layers import Projection, contract
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.vlm import Model, Params, mesh_of, place_batch, to_nnx
from vlmprune_jax.prune.criteria.calibration import Arrays
from vlmprune_jax.prune.criteria.groups import coupled

CHUNK = 512  # positions whose float32 logits exist at once: 66 MB for 32,000 words


def gradient_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., Any],
    *,
    squares: bool,
    rows_per_step: int | None,
    memory_budget: int | None,
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
    if mesh is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    with within(mesh):
        steps = [place_batch(one, mesh) for one in _micro(data)]
        stream, cotangents = _forward(model, steps, _Budget(memory_budget))
        layers: list[dict[str, Any]] = []  # from the last to the first
        while stream:
            layer, text = _layer_of(model, len(stream) - 1)
            states = stream.pop()
            sums = _no_sums(layer, cfg, squares)
            for at, micro in enumerate(steps):
                x, products = states[at]
                if products is None:
                    products = _block(layer, x, micro["attention_mask"], text=text)[1]
                states[at] = None
                sums, cotangents[at] = _differentiate(
                    layer, x, micro["attention_mask"], products, cotangents[at], float(counts[at].sum()), sums, text=text
                )
            scores = _reduce(layer, sums, total, samples, cfg=cfg, channels=channels)
            layers.append(jax.tree.map(np.asarray, scores))
            if progress is not None:
                progress(len(layers))
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


def _micro(data: Arrays) -> Iterator[Arrays]:
    """What is differentiated at once: arrays with the positions and targets of the loss in place of labels."""
    labels = data["labels"]
    targets = np.concatenate([labels[..., 1:], np.full_like(labels[..., :1], IGNORED)], axis=-1)
    most = int((targets != IGNORED).sum(axis=-1).max())
    # the head is run at those positions only: first those with a target, in order
    positions = np.argsort(targets == IGNORED, axis=-1, kind="stable")[..., :most].astype(np.int32)
    data = {**data, "positions": positions, "targets": np.take_along_axis(targets, positions, axis=-1)}
    for at in range(len(labels)):
        yield {name: array[at] for name, array in data.items() if name != "labels"}


class _Budget:
    """Bytes of a device that products may take: those asked for, or half of what is free."""

    def __init__(self, asked: int | None):
        self.left = min(from_all(lambda: free_memory() // 2 if asked is None else asked))

    def kept(self, products: list[jax.Array]) -> list[jax.Array] | None:
        """The products, where they fit."""
        size = sum(leaf.addressable_shards[0].data.nbytes for leaf in products)
        if size > self.left:
            return None
        self.left -= size
        return products


def _forward(model: Model, steps: list[dict[str, Any]], budget: _Budget) -> tuple[list[list[Any]], list[jax.Array]]:
    """Of every layer and step its input and its products (None: they do not fit), and the gradients at the output."""
    xs = [_embed(model.params, micro, cfg=model.cfg) for micro in steps]
    stream = []
    for number in range(len(model.cfg.text.layers)):
        layer, text = _layer_of(model, number)
        states: list[Any] = []
        for at, micro in enumerate(steps):
            y, products = _block(layer, xs[at], micro["attention_mask"], text=text)
            states.append((xs[at], budget.kept(products)))
            xs[at] = y
        stream.append(states)
    return stream, [_loss_gradient(model.params, x, micro, cfg=model.cfg) for x, micro in zip(xs, steps, strict=True)]


def _layer_of(model: Model, number: int) -> tuple[Params, TextConfig]:
    """The parameters of a decoder layer, and a decoder's config that has this layer only."""
    for run, (start, length, shape) in enumerate(runs(model.cfg.text.layers)):
        if number < start + length:
            stacked = model.params["text"]["layers"][str(run)]
            return _slice(stacked, number - start), model.cfg.text.with_layers((shape,))
    raise AssertionError(number)


@jax.jit
def _slice(stacked, index):
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _embed(params, micro, *, cfg):
    x, _ = to_nnx(Model(params, cfg)).embed(micro["input_ids"], micro.get("pixel_values"))
    return constrain(x, STREAM)


def _linearized(layer: Params, x: jax.Array, mask: jax.Array, text: TextConfig):
    """(output of a block, its products, pull): `pull(products)` is the transpose of its derivative.

    The products (of the projections and of attention: what the remat policy "dots" saves) are all that it needs beside
    layer, input and mask; given others than its own they need not be computed, and XLA drops what made them.
    """
    decoder = nnx.eval_shape(lambda: Decoder(text, None))
    graph, state = nnx.split(decoder.layers["0"])
    ctx = decoder.context(jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), mask)

    def block(own: Params, h: jax.Array) -> jax.Array:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, own)
        module = nnx.merge(graph, filled)
        for _, part in nnx.iter_modules(module):
            if isinstance(part, Projection):
                part.product = _product
        return module(h, ctx)[0]

    saving = jax.checkpoint(block, policy=REMAT_POLICIES["dots"], prevent_cse=False)
    y, transpose = jax.vjp(saving, layer, x)
    leaves, structure = jax.tree.flatten(transpose)
    given = {id(leaf) for leaf in jax.tree.leaves((layer, x, ctx))}

    def pull(products: list[jax.Array]) -> Callable[..., Any]:
        others = iter(products)
        return jax.tree.unflatten(structure, [leaf if id(leaf) in given else next(others) for leaf in leaves])

    return y, [leaf for leaf in leaves if id(leaf) not in given], pull


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, weight: jax.Array, n: int) -> jax.Array:
    """`contract`, whose gradient by the weight has the narrower factor first.

    XLA:CPU transposes the first factor and, to do so, computes again all that made it. jax puts the gradient of the
    output there, at the end of a long computation; the input is narrower for gate_proj and up_proj, and theirs is one.
    """
    return contract(x, weight, n)


def _product_forward(x: jax.Array, weight: jax.Array, n: int):
    return contract(x, weight, n), (x, weight)


def _product_backward(n: int, saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    tokens, outputs = tuple(range(x.ndim - n)), tuple(range(weight.ndim - n))
    by_input = jax.lax.dot_general(grad, weight, ((tuple(range(len(tokens), grad.ndim)), outputs), ((), ())))
    if weight.size > math.prod(weight.shape[: len(outputs)]) ** 2:  # more inputs than outputs
        return by_input, jax.lax.dot_general(grad, x, ((tokens, tokens), ((), ())))
    by_weight = jax.lax.dot_general(x, grad, ((tokens, tokens), ((), ())))
    return by_input, jnp.moveaxis(by_weight, tuple(range(n)), tuple(range(-n, 0)))


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.jit, static_argnames=("text",))
def _block(layer, x, mask, *, text):
    y, products, _ = _linearized(layer, x, mask, text)
    return y, products


@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss_gradient(params, x, micro, *, cfg):
    """d(sum of cross-entropies) / dx of the last block's output; float32 logits exist for CHUNK positions at a time."""
    module, positions, targets = to_nnx(Model(params, cfg)), micro["positions"], micro["targets"]

    def loss(h: jax.Array, wanted: jax.Array) -> jax.Array:
        logits = module.text.logits(module.text.final_norm(h)).astype(jnp.float32)
        return jnp.sum(jnp.where(wanted == IGNORED, 0.0, cross_entropy(logits, wanted)))

    picked = jnp.take_along_axis(x, positions[..., None], axis=1)
    size = max(1, CHUNK // len(x))
    pieces = chunks(picked, size, 0), chunks(targets, size, IGNORED)
    gradient = jax.lax.map(lambda piece: jax.grad(loss)(*piece), pieces)  # [n, batch, size, embed]
    gradient = jnp.moveaxis(gradient, 0, 1).reshape(len(x), -1, x.shape[-1])[:, : positions.shape[1]]
    rows = jnp.arange(len(x))[:, None]
    return constrain(jnp.zeros_like(x).at[rows, positions].set(gradient, unique_indices=True), STREAM)


def _no_sums(layer: Params, cfg: ModelConfig, squares: bool) -> tuple[Any, Any]:
    attention, mlp = coupled(cfg)
    flat = flatten(layer)
    zeros = [{name: jnp.zeros_like(flat[name], jnp.float32) for name in attention | mlp} for _ in range(1 + squares)]
    return zeros[0], zeros[1] if squares else {}


@functools.partial(jax.jit, static_argnames=("text",), donate_argnames=("cotangent", "sums"))
def _differentiate(layer, x, mask, products, cotangent, weight, sums, *, text):
    """Sums of the coupled weights' gradients and of their squares with this step's, and the gradient at the input.

    weight: labels of the step, whose one row's mean loss is squared.
    """
    gradients, incoming = _linearized(layer, x, mask, text)[2](products)(cotangent)
    first, squared = sums
    found = {name: flatten(gradients)[name].astype(jnp.float32) for name in first}
    first = jax.tree.map(jnp.add, first, found)
    # the sample's own mean loss: its summed gradient over its label count (0 labels: gradient 0)
    squared = {name: old + jnp.square(found[name] / jnp.maximum(weight, 1)) for name, old in squared.items()}
    return (first, squared), incoming


@functools.partial(jax.jit, static_argnames=("cfg", "channels"))
def _reduce(layer, sums, total, samples, *, cfg, channels):
    attention, mlp = coupled(cfg)
    flat, (first, squared) = flatten(layer), sums
    scores = {}
    for name, axis in (attention | mlp).items():
        a = squared[name] / samples if squared else None
        found = channels(flat[name].astype(jnp.float32), first[name] / total, a, axis)
        scores[name] = jax.tree.map(lambda leaf: constrain(leaf, ()), found)
    return scores
