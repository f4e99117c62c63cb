"""Channel scores from the gradients of the calibration loss with respect to the weights of every decoder layer.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time; the embeddings and the vision
tower are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import Stopped, UserError
from vlmprune_jax.base.processes import from_all
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.mesh.machine import free_memory
from vlmprune_jax.core.mesh.mesh import gather_to_host, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import STREAM
from vlmprune_jax.core.models.placement import mesh_of, place_batch
from vlmprune_jax.core.models.vlm import Model, Params, to_nnx
from vlmprune_jax.core.models.vocabulary import chunks, cross_entropy
from vlmprune_jax.core.prune.batches import text_batch
from vlmprune_jax.core.prune.calibration import ANSWER, IMAGE, PROMPT, TOKEN_TYPES, TYPES, Arrays, stack_rows, types_in
from vlmprune_jax.core.prune.criteria.groups import summed_axes
from vlmprune_jax.core.prune.criteria.linearized import Products, run_with_products
from vlmprune_jax.core.prune.layers import Given, Layer, Rows, Shared, State
from vlmprune_jax.core.prune.walk import LayerStream
from vlmprune_jax.core.stack import Stack

Found = dict[str, Any]  # for one layer: path of a weight -> its reduced gradient
Cotangent = tuple[jax.Array, dict[int, Any]]  # gradients at a layer's input, and at the keys and values of `Shared`
CHUNK = 512  # positions whose float32 logits exist at once: 66 MB for 32,000 words


def gradient_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., Any],
    *,
    squares: bool,
    rows_per_step: int | None,
    memory_budget: int | None,
    weight_of: np.ndarray,
    by_token_type: bool,
    progress: Callable[[int], None] | None,
    cache: ArrayCache | None,
) -> tuple[list[Found], dict[str, list[Found]]]:
    """Return {path: channel scores} of the weights that are pruned together, for each layer, from gradients.

    `gradient`: gradient of the mean cross-entropy over all labels of all batches, independent of `rows_per_step`.
    `squared`: with `squares`, the mean over samples of the squared gradient of the sample's own mean loss, else None.
    All are float32 in the weight's shape. `axis` is the axis that is not pruned: `channels` reduces over this axis, on
    the device, and may return any tree.

    The gradient of a projection's weight is a sum over tokens of (gradient at the output) x (input). `weight_of`
    weights the terms by token type. With `by_token_type`, the result also has `channels` of each token type's share of
    the gradient, by name; the shares add up to the gradient.

    Args:
      batches: batches with labels (-100 ignored, not shifted). Rows of different length are padded on the right.
      channels: a module-level function; another function object is compiled again.
      rows_per_step: number of rows differentiated at once, by default that of the first batch; 1 with `squares`.
      memory_budget: bytes on a device for products that are kept for the backward pass, by default half of the free
        memory; products beyond this limit are computed twice. The result is the same to the bit.
      weight_of: float32[4], weight of a token of each type.
      progress: called with the number of finished layers.
      cache: saves results after each eighth of the layers, and on `Stopped`, so that an interrupted pass continues.

    Raises UserError if no batch has a label, or if gradients of experts are weighted.
    """
    data = _stack(batches, 1 if squares else rows_per_step)
    labels = (data["labels"][..., 1:] != IGNORED).sum(axis=-1)  # int[steps, rows]; the first position is not predicted
    if labels.sum() == 0:
        raise UserError(
            f"the calibration batches have no labels (all are {IGNORED}), so there is no loss to differentiate"
        )
    types = types_in(np.bincount(data["token_types"].ravel(), minlength=len(TYPES))) if by_token_type else []
    _check_experts(model.cfg, weighted=by_token_type or not _all_ones(weight_of))
    ways = [weight_of, *(np.eye(len(TYPES), dtype=np.float32)[TOKEN_TYPES[name]] for name in types)]
    mesh = mesh_of(model.params)
    if mesh is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    # all-(-100) rows, such as the filler of a last batch, are not samples
    weighed = _Weighed(labels.sum(axis=1).astype(np.float32), float(labels.sum()), float((labels > 0).sum()))
    with use_mesh(mesh):
        steps = [text_batch({name: array[at] for name, array in data.items()}, weight_of) for at in range(len(labels))]
        stream = LayerStream(model, "text", steps, dtype=None, copies=None)
        losses = [place_batch(arrays, mesh) for arrays in _loss_inputs(data, ways)]
        layers = _backward(stream, losses, weighed, channels, squares, _Budget(memory_budget), progress, cache)
    scores = [[jax.tree.map(operator.itemgetter(way), layer) for layer in layers] for way in range(len(ways))]
    return scores[0], dict(zip(types, scores[1:], strict=True))


class _Weighed(NamedTuple):
    """Normalisers of the gradients: labels per step (float32[steps]) and in total, and number of calibration rows."""

    steps: np.ndarray
    total: float
    samples: float


def _backward(
    stream: LayerStream,
    losses: list[dict[str, Any]],
    weighed: _Weighed,
    channels: Callable[..., Any],
    squares: bool,
    budget: _Budget,
    progress: Callable[[int], None] | None,
    cache: ArrayCache | None,
) -> list[Found]:
    """Backpropagate layer by layer; return the result of `channels` for every layer, per token type."""
    cfg, counts = stream.model.cfg, [arrays["counts"] for arrays in losses]
    ways = 1 if counts[0] is None else counts[0].shape[1]
    layers, cotangents = ([], []) if cache is None else _resume(cache, stream, channels, squares, ways)
    saved = _forward(stream, budget, stream.n_layers - len(layers))
    if not layers:

        def at_last(rows: Rows, arrays: Any) -> Cotangent:
            outgoing = _loss_gradient(stream.model.params, rows.x, arrays, cfg=cfg)
            return outgoing, jax.tree.map(jnp.zeros_like, dict(rows.given.shared))

        cotangents = [cotangent for _, cotangent in stream.visit(at_last, stream.n_layers, losses)]
    stream.states.clear()
    while saved:
        layer, (states, products) = _layer(stream, len(saved) - 1), saved.pop()
        sums = _no_sums(layer.params, cfg, squares, ways)
        sums = _add_gradients(layer, stream.at(states), sums, cotangents, products, counts, weighed.steps)
        scores = _reduce(layer.params, sums, weighed.total, weighed.samples, cfg=cfg, channels=channels)
        layers.append(jax.tree.map(np.asarray, scores))
        try:
            if progress is not None:
                progress(len(layers))
        except Stopped:
            _save(cache, layers, cotangents)
            raise
        if len(layers) % -(-stream.n_layers // 8) == 0:
            _save(cache, layers, cotangents)
    return layers[::-1]


def _add_gradients(
    layer: Layer,
    stream: LayerStream,
    sums: Any,
    cotangents: list[Cotangent],
    products: list[Products | None],
    counts: list[Any],
    labels: np.ndarray,
) -> Any:
    """Return the sums with a layer's weight gradients of all batches; replace the cotangents by those at its input."""
    static = {"stack": layer.stack, "cfg": layer.cfg, "shares": layer.shares}

    def differentiate(rows: Rows, cotangent: Cotangent, known: Products | None, counts: Any, labels: Any) -> Cotangent:
        nonlocal sums
        if known is None:
            known = _block(layer.params, rows.x, rows.given, **static)[1]
        inputs = (layer.params, rows.x, rows.given, known, counts, labels)
        sums, incoming = _differentiate(inputs, cotangent, sums, **static)
        return incoming

    visited = stream.visit(differentiate, layer.number, cotangents, products, counts, list(labels))
    for at, (_, incoming) in enumerate(visited):
        cotangents[at] = incoming
    return sums


def _save(cache: ArrayCache | None, layers: list[Found], cotangents: list[Cotangent]) -> None:
    """Cache the scores of finished layers, and the gradient at the input of the last finished layer."""
    if cache is None:
        return
    arrays = {f"{len(layers)} layers/{i}": gather_to_host(x) for i, x in enumerate(jax.tree.leaves(cotangents))}
    for number, layer in enumerate(layers):
        if cache.missing([f"layer {number}/0"]):
            arrays |= {f"layer {number}/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(layer))}
    cache.add(arrays)
    cache.publish()


def _resume(
    cache: ArrayCache, stream: LayerStream, channels: Callable[..., Any], squares: bool, ways: int
) -> tuple[list[Found], list[Cotangent]]:
    """Return the cached scores of finished layers, and the gradients from which an interrupted pass continues."""
    cfg, text = stream.model.cfg, stream.model.cfg.text

    def scores(number: int) -> Any:
        params = _layer(stream, number).params
        return _reduce(params, _no_sums(params, cfg, squares, ways), 1.0, 1.0, cfg=cfg, channels=channels)

    def read(name: str, structure: Any) -> Any:
        return jax.tree.unflatten(structure, [cache[f"{name}/{i}"] for i in range(structure.num_leaves)])

    shared = dict.fromkeys(text.producers, (0, 0))
    structure: Any = jax.tree.structure([(0, shared) for _ in stream.batches])
    for done in range(stream.n_layers, 0, -1):
        keys = [f"{done} layers/{i}" for i in range(structure.num_leaves)]
        if not cache.missing([*keys, *(f"layer {number}/0" for number in range(done))]):
            wholes = (functools.partial(scores, stream.n_layers - 1 - number) for number in range(done))
            trees = (jax.tree.structure(jax.eval_shape(whole)) for whole in wholes)
            layers = [read(f"layer {number}", tree) for number, tree in enumerate(trees)]
            placed = (
                place_batch({"x": x}, stream.mesh)["x"] for x in jax.tree.leaves(read(f"{done} layers", structure))
            )
            return layers, jax.tree.unflatten(structure, placed)
    return [], []


def _stack(batches: Iterable[Arrays], rows: int | None) -> Arrays:
    """Stack all calibration rows to arrays [steps, rows, ...], padded to equal lengths and image counts."""
    seen = list(batches)
    rows = rows or len(seen[0]["input_ids"])
    if rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    every = [
        {name: array[at] for name, array in batch.items()} for batch in seen for at in range(len(batch["token_types"]))
    ]
    steps = math.ceil(len(every) / rows)
    stacked = stack_rows(every, steps * rows)
    return {name: array.reshape(steps, rows, *array.shape[1:]) for name, array in stacked.items()}


def _loss_inputs(data: Arrays, ways: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return, for each step, the positions of the tokens to predict, their target ids and their weights (`counts`).

    counts: float32[rows, ways, seq], the weight of each token in each weighting; None if all are 1.
    """
    labels = data["labels"]
    targets = np.concatenate([labels[..., 1:], np.full_like(labels[..., :1], IGNORED)], axis=-1)
    most = int((targets != IGNORED).sum(axis=-1).max())
    # the head is run at those positions only: first those with a target, in order
    positions = np.argsort(targets == IGNORED, axis=-1, kind="stable")[..., :most].astype(np.int32)
    targets = np.take_along_axis(targets, positions, axis=-1)
    plain = len(ways) == 1 and _all_ones(ways[0])
    counts = [None if plain else np.stack([way[row] for way in ways], axis=1) for row in data["token_types"]]
    steps = zip(positions, targets, counts, strict=True)
    return [dict(zip(("positions", "targets", "counts"), step, strict=True)) for step in steps]


def _check_experts(cfg: ModelConfig, weighted: bool) -> None:
    if weighted and any("experts" in layer.sizes for layer in cfg.text.layers):
        raise UserError(
            "gradients of experts cannot be weighted or split by token type: leave out by_token_type, image_weight, "
            "prompt_weight and answer_weight, or use a criterion such as reap"
        )


def _all_ones(weight_of: np.ndarray) -> bool:
    return bool((weight_of[[PROMPT, IMAGE, ANSWER]] == 1).all())


class _Budget:
    """Device memory (bytes) left for stored outputs of projections: `memory_budget`, or half of the free memory."""

    def __init__(self, asked: int | None):
        self.left = min(from_all(lambda: free_memory() // 2 if asked is None else asked))

    def kept(self, products: list[jax.Array]) -> list[jax.Array] | None:
        """Return the outputs of projections if they still fit in the memory budget; None otherwise."""
        size = sum(leaf.addressable_shards[0].data.nbytes for leaf in products)
        if size > self.left:
            return None
        self.left -= size
        return products


def _forward(stream: LayerStream, budget: _Budget, n_layers: int) -> list[tuple[list[State], list[Products | None]]]:
    """Run the first `n_layers`; return their inputs and outputs of projections (None if too large) by batch."""
    saved = []
    for number in range(n_layers):
        layer, states, products = _layer(stream, number), list(stream.states), list[Products | None]()

        def forward(rows: Rows, layer: Layer = layer) -> tuple[tuple[jax.Array, Shared], Products]:
            return _block(layer.params, rows.x, rows.given, stack=layer.stack, cfg=layer.cfg, shares=layer.shares)

        for at, (_, ((x, keys), computed)) in enumerate(stream.visit(forward, number)):
            stream.states[at] = State(x, {**states[at].shared, **keys})
            products.append(budget.kept(computed))
        saved.append((states, products))
    return saved


def _layer(stream: LayerStream, number: int) -> Layer:
    """Load a layer; its keys and values are returned only if later layers reuse them."""
    producer = number in stream.model.cfg.text.producers
    return dataclasses.replace(stream.layer(number), shares=number if producer else None)


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "shares"))
def _block(params: Any, x: jax.Array, given: Given, *, stack: str, cfg: Stack, shares: int | None) -> Any:
    return run_with_products(params, x, given, {}, stack=stack, cfg=cfg, shares=shares)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss_gradient(params: Params, x: jax.Array, micro: Any, *, cfg: ModelConfig) -> jax.Array:
    """Return the cross-entropy gradient at the last block's output, computed in chunks of positions."""
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


def _no_sums(params: Any, cfg: ModelConfig, squares: bool, ways: int) -> tuple[Any, Any]:
    shapes = {name: (ways, *params[name].shape) for name in summed_axes(cfg) if name in params}
    zeros = [{name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()} for _ in range(1 + squares)]
    return zeros[0], zeros[1] if squares else {}


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "shares"), donate_argnames=("cotangent", "sums"))
def _differentiate(
    inputs: Any, cotangent: Cotangent, sums: Any, *, stack: str, cfg: Stack, shares: int | None
) -> tuple[tuple[Any, Any], Cotangent]:
    """Backpropagate one step through a layer: add weight gradients to the sums, return the input gradient.

    The last entry of `inputs` is the step's number of labels; with squares, a step is one row, and the gradient of the
    row's mean loss is squared.
    """
    (params, x, given, products, counts, labels), (outgoing, keys), (first, squared) = inputs, cotangent, sums
    counts = None if counts is None else jnp.swapaxes(counts, 0, 1)
    used = {number: keys for number, keys in given.shared.items() if number == cfg.layers[0].mixer.source}

    def block(probes: Any, x: jax.Array, used: Any) -> tuple[jax.Array, Shared]:
        shared = given._replace(shared=used)
        return run_with_products(params, x, shared, probes, products, counts, stack=stack, cfg=cfg, shares=shares)[0]

    probes = {name: jnp.zeros(total.shape, params[name].dtype) for name, total in first.items()}
    (_, produced), pull = jax.vjp(block, probes, x, used)
    gradients, incoming, of_used = pull((outgoing, {number: keys[number] for number in produced}))
    keys = {**keys, **{number: jax.tree.map(jnp.add, keys[number], pair) for number, pair in of_used.items()}}
    gradients = {name: gradient.astype(jnp.float32) for name, gradient in gradients.items()}
    first = jax.tree.map(jnp.add, first, gradients)
    # the sample's own mean loss: its summed gradient over its label count (0 labels: gradient 0)
    squared = {name: total + jnp.square(gradients[name] / jnp.maximum(labels, 1)) for name, total in squared.items()}
    return (first, squared), (incoming, keys)


@functools.partial(jax.jit, static_argnames=("cfg", "channels"))
def _reduce(params: Any, sums: Any, total: Any, samples: Any, *, cfg: ModelConfig, channels: Any) -> dict[str, Any]:
    first, squared = sums
    scores = {}
    for name, axis in {name: axis for name, axis in summed_axes(cfg).items() if name in params}.items():
        channel_scores = [
            channels(
                params[name].astype(jnp.float32),
                first[name][way] / total,
                squared[name][way] / samples if squared else None,
                axis,
            )
            for way in range(len(first[name]))
        ]
        scores[name] = jax.tree.map(lambda *leaves: constrain(jnp.stack(leaves), ()), *channel_scores)
    return scores
