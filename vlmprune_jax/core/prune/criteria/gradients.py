"""Channel scores from the gradients of the calibration loss with respect to the weights of every layer of a stack.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time. Of a vision tower or another
encoder, the gradient at its output is that of projector and decoder, whose blocks are recomputed one by one and whose
weights are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.placement import mesh_of, place_batch, place_inputs
from vlmprune_jax.core.models.stack import Passed
from vlmprune_jax.core.models.vlm import Model, Params, encode, head_of, to_nnx
from vlmprune_jax.core.models.vocabulary import chunks, cross_entropy, cross_entropy_sum
from vlmprune_jax.core.prune.activations import batches_of
from vlmprune_jax.core.prune.batches import CalibrationBatch, text_batch
from vlmprune_jax.core.prune.calibration import ANSWER, IMAGE, PROMPT, TOKEN_TYPES, TYPES, Arrays, stack_rows, types_in
from vlmprune_jax.core.prune.criteria.groups import summed_axes
from vlmprune_jax.core.prune.criteria.linearized import Products, run_with_products
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.stream import LayerStream, on_devices, placed_params

LayerScores = dict[str, Any]  # path of a weight -> its reduced gradient
_run_with_products = jax.jit(run_with_products)
CHUNK = 512  # positions whose float32 logits exist at once: 66 MB for 32,000 words


class Cotangent(NamedTuple):
    """Gradients of the loss with respect to what a layer returns for one batch."""

    x: jax.Array
    """Gradient at the residual stream."""

    shared: dict[int, Any]
    """Gradients at keys and values that later layers reuse."""

    levels: dict[int, jax.Array]
    """Gradients at the outputs of earlier tower layers from which features are taken, by layer (DeepStack)."""


class Sums(NamedTuple):
    """Sums over the steps of one layer's weight gradients, float32[ways, *shape] by path, and of their squares."""

    first: dict[str, jax.Array]
    squared: dict[str, jax.Array]


def gradient_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., Any],
    *,
    stack: str = "text",
    squares: bool,
    rows_per_step: int | None,
    memory_budget: int | None,
    weight_of: np.ndarray,
    by_token_type: bool,
    progress: Callable[[int], None] | None,
    cache: ArrayCache | None,
) -> tuple[list[LayerScores], dict[str, list[LayerScores]]]:
    """Return {path: channel scores} of the weights that are pruned together, for each layer, from gradients.

    `gradient`: gradient of the mean cross-entropy over all labels of all batches, independent of `rows_per_step`.
    `squared`: with `squares`, the mean over samples of the squared gradient of the sample's own mean loss, else None.
    All are float32 in the weight's shape. `axis` is the axis that is not pruned: `channels` reduces over this axis, on
    the device, and may return any tree.

    The gradient of a projection's weight is a sum over tokens of (gradient at the output) x (input). `weight_of`
    weights the terms by token type. With `by_token_type`, the result also has `channels` of each token type's share of
    the gradient, by name; the shares add up to the gradient.

    Args:
      batches: batches with labels (-100 ignored, not shifted). Rows of different length are padded on the right. For a
        tower, batches without images are skipped, and their labels do not contribute to the loss.
      channels: a module-level function; another function object is compiled again.
      rows_per_step: number of rows differentiated at once, by default that of the first batch; 1 with `squares`.
      memory_budget: bytes on a device for products that are kept for the backward pass, by default half of the free
        memory; products beyond this limit are computed twice. The result is the same to the bit.
      weight_of: float32[4], weight of a token of each type.
      progress: called with the number of finished layers.
      cache: saves results after each eighth of the layers, and on `Stopped`, so that an interrupted pass continues.

    Raises UserError if no batch (with images) has a label, or if gradients of experts are weighted.
    """
    cfg, mesh, is_text = model.cfg, mesh_of(model.params), stack == "text"
    data = _steps(batches if is_text else batches_of(cfg, stack, batches), 1 if squares else rows_per_step)
    labels = (data["labels"][..., 1:] != IGNORED).sum(axis=-1)  # int[steps, rows]; the first position is not predicted
    if labels.sum() == 0:
        raise UserError(
            f"the calibration batches{'' if is_text else ' with images'} have no labels (all are {IGNORED}), so there "
            "is no loss to differentiate"
        )
    types = types_in(np.bincount(data["token_types"].ravel(), minlength=len(TYPES))) if by_token_type else []
    plain = not by_token_type and bool((weight_of[[PROMPT, IMAGE, ANSWER]] == 1).all())
    if not plain and any("experts" in layer.sizes for layer in cfg.text.layers):
        raise UserError(
            "gradients of experts cannot be weighted or split by token type: leave out by_token_type, image_weight, "
            "prompt_weight and answer_weight, or use a criterion such as reap"
        )
    ways = [weight_of, *(np.eye(len(TYPES), dtype=np.float32)[TOKEN_TYPES[name]] for name in types)]
    model = on_devices(model)
    steps = [jax.tree.map(operator.itemgetter(step), data) for step in range(len(labels))]
    with use_mesh(mesh):
        if is_text:
            inputs = [text_batch(arrays, weight_of) for arrays in steps]
            losses = [place_batch(arrays, mesh) for arrays in _loss_inputs(data, [] if plain else ways)]
        else:
            losses = [place_inputs(model.params, cfg, text_batch(s, weight_of).inputs | s) for s in steps]
            inputs = [_tower_batch(arrays, stack) for arrays in losses]
        stream = _Backward(model, stack, inputs, losses, labels, squares, channels)
        layers = stream.scores(memory_budget, progress, cache)
    scores = [[jax.tree.map(operator.itemgetter(way), layer) for layer in layers] for way in range(len(ways))]
    return scores[0], dict(zip(types, scores[1:], strict=True))


def _steps(batches: Iterable[Arrays], rows: int | None) -> Arrays:
    """Stack all calibration rows to arrays [steps, rows, ...], padded to equal lengths and image counts."""
    batches = list(batches)
    rows = rows or len(batches[0]["input_ids"])
    if rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    every = [jax.tree.map(operator.itemgetter(row), b) for b in batches for row in range(len(b["token_types"]))]
    steps = math.ceil(len(every) / rows)
    stacked = stack_rows(every, steps * rows)
    return jax.tree.map(lambda array: array.reshape(steps, rows, *array.shape[1:]), stacked)


def _tower_batch(step: Mapping[str, Any], stack: str) -> CalibrationBatch:
    """Return the images of a step's rows as they pass the tower: one in a row, or packed images of varying size."""
    images: Packed = step["media"][stack]
    if images.grid is None:
        images = images._replace(values=images.values.reshape(-1, 1, *images.values.shape[2:]))
    unused = np.ones((len(images.values), 1), np.float32)
    return CalibrationBatch({"media": {stack: images}}, {"grid": images.grid}, unused, unused, [])


class _Backward(LayerStream):
    """Stream that runs a stack's layers forward, and then in reverse, with the gradients of their weights."""

    def __init__(
        self,
        model: Model,
        stack: str,
        batches: list[CalibrationBatch],
        losses: list[dict[str, Any]],
        labels: np.ndarray,
        squares: bool,
        channels: Callable[..., Any],
    ):
        super().__init__(model, stack, batches, dtype=None, copies=None)
        self.losses, self.squares, self.channels = losses, squares, channels
        self.cfg, self.axes = model.cfg.stack(stack), summed_axes(model.cfg, stack)
        self.counts = [arrays.get("counts") for arrays in losses]
        # all-(-100) rows, such as the filler of a last batch, are not samples
        self.labels = list(labels.sum(axis=1).astype(np.float32))
        self.total, self.samples = float(labels.sum()), float((labels > 0).sum())
        self.saved = list[tuple[list[State], list[Products | None]]]()  # inputs and products of each layer
        self.layers, self.cotangents = list[LayerScores](), list[Cotangent]()

    def load(self, number: int) -> Layer:
        """Load a layer, which returns its keys and values only if later layers reuse them."""
        return dataclasses.replace(super().load(number), shares=number if number in self.cfg.producers else None)

    def scores(
        self, memory_budget: int | None, progress: Callable[[int], None] | None, cache: ArrayCache | None
    ) -> list[LayerScores]:
        """Return the result of `channels` for every layer, per way of weighting tokens."""
        # bytes on a device that are left for outputs of projections
        self.budget = min(from_all(lambda: free_memory() // 2 if memory_budget is None else memory_budget))
        if cache is not None:
            self._resume(cache)
        remaining = range(self.n_layers - len(self.layers))
        self.walk(self._forward, remaining)
        if not self.layers:
            self.cotangents = self._at_end()

        def backward(layer: Layer) -> None:
            self._backward(layer)
            try:
                if progress is not None:
                    progress(len(self.layers))
            except Stopped:
                self._save(cache)
                raise
            if len(self.layers) % -(-self.n_layers // 8) == 0:
                self._save(cache)

        self.walk(backward, reversed(remaining))
        return self.layers[::-1]

    def _forward(self, layer: Layer) -> None:
        """Run a layer; save its inputs and, while the memory budget lasts, the outputs of its projections."""

        def run(rows: Rows) -> tuple[State, Products | None]:
            state, products = _run_with_products(layer, rows, {})
            size = sum(array.addressable_shards[0].data.nbytes for array in products)
            if size > self.budget:
                return state, None
            self.budget -= size
            return state, products

        before = list(self.states)
        self.saved.append((before, self.advance(layer, run)))

    def _backward(self, layer: Layer) -> None:
        """Add up a layer's weight gradients over all batches, and reduce them; go back to the layer's input."""
        sums, (self.states, products) = self._no_sums(layer), self.saved.pop()

        def differentiate(rows: Rows, cotangent: Cotangent, products: Any, counts: Any, labels: Any) -> Cotangent:
            nonlocal sums
            if products is None:
                products = _run_with_products(layer, rows, {})[1]
            sums, cotangent = _differentiate(layer, rows, products, counts, labels, cotangent, sums)
            return cotangent

        visited = self.visit(differentiate, self.cotangents, products, self.counts, self.labels)
        for batch, (_, cotangent) in enumerate(visited):
            level = cotangent.levels.get(layer.number - 1)
            self.cotangents[batch] = cotangent if level is None else cotangent._replace(x=cotangent.x + level)
        self.layers.append(jax.tree.map(np.asarray, self._reduced(layer, sums)))

    def _at_end(self) -> list[Cotangent]:
        """Return the gradients of the loss at the output of the last layer, for each batch."""
        cfg, last, stack = self.model.cfg, self.n_layers - 1, self.stack
        params = placed_params(self.model, lambda path: stack != "text" or not path.startswith("text/layers/"))
        outputs = [states for states, _ in self.saved[1:]] + [self.states]
        numbers = [*getattr(self.cfg, "deepstack", ()), last]
        levels = [{number: outputs[number][batch].x for number in numbers} for batch in range(len(self.states))]

        def gradient(rows: Rows, levels: dict[int, jax.Array], arrays: Any) -> Cotangent:
            if stack == "text":
                levels = {last: _loss_gradient(params, rows.x, arrays, cfg=cfg)}
            else:
                levels = _tower_gradient(levels, params, arrays, cfg=cfg, stack=stack)
            return Cotangent(levels.pop(last), jax.tree.map(jnp.zeros_like, dict(rows.shared)), levels)

        return [cotangent for _, cotangent in self.visit(gradient, levels, self.losses)]

    def _no_sums(self, layer: Layer) -> Sums:
        ways = 1 if self.counts[0] is None else self.counts[0].shape[1]
        shapes = {name: (ways, *layer.params[name].shape) for name in self.axes if name in layer.params}
        squared = shapes if self.squares else {}
        return Sums(*({name: jnp.zeros(x, jnp.float32) for name, x in each.items()} for each in (shapes, squared)))

    def _reduced(self, layer: Layer, sums: Sums) -> LayerScores:
        axes = tuple((name, axis) for name, axis in self.axes.items() if name in layer.params)
        return _reduce(layer.params, sums, self.total, self.samples, axes=axes, channels=self.channels)

    def _save(self, cache: ArrayCache | None) -> None:
        """Cache the scores of finished layers, and the gradient at the input of the last finished layer."""
        if cache is None:
            return
        leaves = jax.tree.leaves(self.cotangents)
        arrays = {f"{len(self.layers)} layers/{i}": gather_to_host(x) for i, x in enumerate(leaves)}
        for number, layer in enumerate(self.layers):
            if cache.missing([f"layer {number}/0"]):
                arrays |= {f"layer {number}/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(layer))}
        cache.add(arrays)
        cache.publish()

    def _resume(self, cache: ArrayCache) -> None:
        """Read the scores of finished layers, and the gradients from which an interrupted pass continues."""
        levels = dict.fromkeys(getattr(self.cfg, "deepstack", ()), 0)
        cotangent: Any = (0, dict.fromkeys(self.cfg.producers, (0, 0)), levels)
        structure: Any = jax.tree.structure([Cotangent(*cotangent) for _ in self.batches])
        for done in range(self.n_layers, 0, -1):
            keys = [f"{done} layers/{i}" for i in range(structure.num_leaves)]
            if cache.missing([*keys, *(f"layer {number}/0" for number in range(done))]):
                continue
            for number in range(done):
                layer = self.load(self.n_layers - 1 - number)
                shapes = jax.eval_shape(lambda layer=layer: self._reduced(layer, self._no_sums(layer)))
                leaves = [cache[f"layer {number}/{i}"] for i in range(len(jax.tree.leaves(shapes)))]
                self.layers.append(jax.tree.unflatten(jax.tree.structure(shapes), leaves))
            placed = place_batch({key: cache[key] for key in keys}, self.mesh)
            self.cotangents = jax.tree.unflatten(structure, placed.values())
            return


def _loss_inputs(data: Arrays, ways: list[np.ndarray]) -> list[dict[str, Any]]:
    """Return, for each step, the positions of the tokens to predict, their target ids and their weights (`counts`).

    counts: float32[rows, ways, seq], the weight of each token in each weighting; None without `ways`: all are 1.
    """
    labels = data["labels"]
    targets = np.concatenate([labels[..., 1:], np.full_like(labels[..., :1], IGNORED)], axis=-1)
    most = int((targets != IGNORED).sum(axis=-1).max())
    # the head is run at those positions only: first those with a target, in order
    positions = np.argsort(targets == IGNORED, axis=-1, kind="stable")[..., :most].astype(np.int32)
    targets = np.take_along_axis(targets, positions, axis=-1)
    counts = [np.stack([way[row] for way in ways], axis=1) if ways else None for row in data["token_types"]]
    steps = zip(positions, targets, counts, strict=True)
    return [dict(zip(("positions", "targets", "counts"), step, strict=True)) for step in steps]


@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss_gradient(params: Params, x: jax.Array, step: Any, *, cfg: ModelConfig) -> jax.Array:
    """Return the cross-entropy gradient at the last block's output, computed in chunks of positions."""
    module, positions, targets = to_nnx(Model(params, cfg)), step["positions"], step["targets"]

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


@functools.partial(jax.jit, static_argnames=("cfg", "stack"))
def _tower_gradient(
    outputs: dict[int, jax.Array], params: Params, step: Any, *, cfg: ModelConfig, stack: str
) -> dict[int, jax.Array]:
    """Return the gradient of the decoder's cross-entropy at outputs of a tower's layers, {layer: output}."""
    ids = step["input_ids"]

    def loss(outputs: dict[int, jax.Array]) -> jax.Array:
        def passed(keep: Sequence[int]) -> Passed:
            kept = jnp.stack([outputs[number] for number in keep]) if keep else None
            return Passed(outputs[max(outputs)], kept, {})

        module = to_nnx(Model(params, cfg))
        getattr(module, stack).passed = passed
        x, _, embeds = module.embed(ids, step.get("media"))
        final, _ = encode(
            params, cfg, ids, inputs_embeds=x, layer_embeds=embeds, position_ids=step.get("position_ids"),
            attention_mask=step["attention_mask"], remat="full",
        )  # fmt: skip
        return cross_entropy_sum(final, head_of(params, cfg), step["labels"], chunk=CHUNK)

    return jax.grad(loss)(outputs)


@functools.partial(jax.jit, donate_argnames=("cotangent", "sums"))
def _differentiate(
    layer: Layer, rows: Rows, products: Products, counts: Any, labels: Any, cotangent: Cotangent, sums: Sums
) -> tuple[Sums, Cotangent]:
    """Backpropagate one step through a layer: add weight gradients to the sums, return the input gradient.

    `labels`: the step's number of labels; with squares, a step is one row, and the gradient of the row's mean loss is
    squared.
    """
    counts = None if counts is None else jnp.swapaxes(counts, 0, 1)
    used = {number: pair for number, pair in rows.shared.items() if number == layer.cfg.layers[0].mixer.source}

    def block(probes: Any, x: jax.Array, used: Any) -> State:
        return run_with_products(layer, rows._replace(x=x, shared=used), probes, products, counts)[0]

    probes = {name: jnp.zeros(total.shape, layer.params[name].dtype) for name, total in sums.first.items()}
    produced, pull = jax.vjp(block, probes, rows.x, used)
    keys = cotangent.shared
    gradients, x, of_used = pull(State(cotangent.x, {number: keys[number] for number in produced.shared}))
    keys = {**keys, **{number: jax.tree.map(jnp.add, keys[number], pair) for number, pair in of_used.items()}}
    gradients = {name: gradient.astype(jnp.float32) for name, gradient in gradients.items()}
    # the sample's own mean loss: its summed gradient over its label count (0 labels: gradient 0)
    squares = {name: jnp.square(gradients[name] / jnp.maximum(labels, 1)) for name in sums.squared}
    added = jax.tree.map(jnp.add, sums, Sums(gradients, squares))
    return added, Cotangent(x, keys, cotangent.levels)


@functools.partial(jax.jit, static_argnames=("axes", "channels"))
def _reduce(params: Mapping[str, jax.Array], sums: Sums, total: Any, samples: Any, *, axes: Any, channels: Any) -> Any:
    scores = {}
    for name, axis in axes:
        weight, squared = params[name].astype(jnp.float32), sums.squared.get(name)
        channel_scores = [
            channels(weight, first / total, None if squared is None else squared[way] / samples, axis)
            for way, first in enumerate(sums.first[name])
        ]
        scores[name] = jax.tree.map(lambda *leaves: constrain(jnp.stack(leaves), ()), *channel_scores)
    return scores
