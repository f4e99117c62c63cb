"""Channel scores from the gradients of the calibration loss with respect to the weights of every layer of a stack.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time. Of a vision tower or another
encoder, the gradient at its output is that of projector and decoder, whose blocks are recomputed one by one and whose
weights are never differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.cache import ArrayCache
from vlmprune_jax.base.errors import Stopped, UserError
from vlmprune_jax.base.processes import from_all
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.mesh.machine import free_memory
from vlmprune_jax.core.mesh.mesh import gather_to_host, mesh_of, place_batch, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import STREAM
from vlmprune_jax.core.models.media import place_inputs
from vlmprune_jax.core.models.stack import Passed
from vlmprune_jax.core.models.vlm import Model, Params, encode, head_of, to_nnx
from vlmprune_jax.core.models.vocabulary import cross_entropy_sum
from vlmprune_jax.core.prune.activations import batches_of
from vlmprune_jax.core.prune.batches import batch_of
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES, Arrays, stack_rows, types_in, weight_of_token_types
from vlmprune_jax.core.prune.criteria.groups import summed_axes
from vlmprune_jax.core.prune.criteria.linearized import Products, run_with_products
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.stream import LayerStream, on_devices, placed_params

LayerScores = dict[str, Any]  # path of a weight -> its reduced gradient
# Sums over the steps of one layer's weight gradients, {path: float32[ways, *shape]}, and of their squares (or None).
Sums = dict[str, tuple[jax.Array, jax.Array | None]]
_run_with_products = jax.jit(run_with_products)
CHUNK = 512  # positions whose float32 logits exist at once: 66 MB for 32,000 words


def gradient_channels(
    model: Model,
    batches: Iterable[Arrays],
    channels: Callable[..., jax.Array],
    *,
    stack: str = "text",
    squares: bool = False,
    by_token_type: bool = False,
    image_weight: float = 1.0,
    prompt_weight: float = 1.0,
    answer_weight: float = 1.0,
    rows_per_step: int | None = None,
    memory_budget: int | None = None,
    progress: Callable[[int], None] | None = None,
    cache: ArrayCache | None = None,
) -> tuple[list[LayerScores], dict[str, list[LayerScores]]]:
    """Return {path: channel scores} of the weights that are pruned together, for each layer, from gradients.

    `gradient`: gradient of the mean cross-entropy over all labels of all batches, independent of `rows_per_step`.
    `squared`: with `squares`, the mean over samples of the squared gradient of the sample's own mean loss, else None.
    All are float32 in the weight's shape. `axis` is the axis that is not pruned: `channels` reduces over this axis, on
    the device, and returns one array.

    The gradient of a projection's weight is a sum over tokens of (gradient at the output) x (input). `image_weight`,
    `prompt_weight` and `answer_weight` weight the terms by token type. With `by_token_type`, the result also has
    `channels` of each token type's share of the gradient, by name; the shares add up to the gradient, and each costs
    one more product per weight. All positions of a tower are of one type.

    Args:
      batches: batches with labels (-100 ignored, not shifted). Rows of different length are padded on the right. For a
        tower, batches without images are skipped, and their labels do not contribute to the loss.
      channels: a module-level function; another function object is compiled again.
      rows_per_step: number of rows differentiated at once, by default that of the first batch; 1 with `squares`.
      memory_budget: bytes on a device for products that are kept for the backward pass, by default half of the free
        memory; products beyond this limit are computed twice. The result is the same to the bit.
      progress: called with the number of finished layers.
      cache: saves results after each eighth of the layers, and on `Stopped`, so that an interrupted pass continues.

    Raises UserError if no batch (with images) has a label, or if gradients of experts are weighted.
    """
    steps = _steps(batches_of(model.cfg, stack, batches), 1 if squares else rows_per_step)
    weights = {"image_weight": image_weight, "prompt_weight": prompt_weight, "answer_weight": answer_weight}
    weight_of, causal = weight_of_token_types(weights), model.cfg.stack(stack).causal
    plain = not causal or (not by_token_type and bool((weight_of[1:] == 1).all()))  # but for padding
    if not plain and any("experts" in layer.sizes for layer in model.cfg.text.layers):
        raise UserError(
            "gradients of experts cannot be weighted or split by token type: leave out by_token_type, image_weight, "
            "prompt_weight and answer_weight, or use a criterion such as reap"
        )
    counts = np.bincount(np.concatenate([step["token_types"] for step in steps]).ravel(), minlength=len(weight_of))
    types, eye = types_in(counts) if by_token_type and causal else [], np.eye(len(weight_of), dtype=np.float32)
    ways = np.stack([weight_of, *(eye[TOKEN_TYPES[name]] for name in types)])
    with use_mesh(mesh_of(model.params)):
        backward = _Backward(on_devices(model), stack, steps, None if plain else ways, squares, channels)
        layers = backward.scores(memory_budget, progress, cache)
    scores = [[{path: array[way] for path, array in layer.items()} for layer in layers] for way in range(len(ways))]
    return scores[0], dict(zip(types, scores[1:], strict=True))


def _steps(batches: Iterable[Arrays], rows: int | None) -> list[Arrays]:
    """Return all calibration rows in arrays of `rows` rows each, padded to equal lengths and image counts."""
    batches = list(batches)
    rows = rows or len(batches[0]["input_ids"])
    if rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    every = [jax.tree.map(operator.itemgetter(row), b) for b in batches for row in range(len(b["token_types"]))]
    data, starts = stack_rows(every, -(-len(every) // rows) * rows), range(0, len(every), rows)
    return [jax.tree.map(lambda array, start=start: array[start : start + rows], data) for start in starts]


class _Backward(LayerStream):
    """Stream that runs a stack's layers forward, and then in reverse with the gradients of their weights.

    Args:
      steps: rows that are differentiated together, from `_steps`.
      ways: float32[ways, token types], weights of the token types in each way; None: one way with all weights 1.
      squares, channels: see `gradient_channels`.
    """

    def __init__(
        self,
        model: Model,
        stack: str,
        steps: Sequence[Arrays],
        ways: np.ndarray | None,
        squares: bool,
        channels: Callable[..., jax.Array],
    ):
        # number of labels of each step; the first position is not predicted
        self.labels = [np.float32((step["labels"][:, 1:] != IGNORED).sum()) for step in steps]
        if not any(self.labels):
            raise UserError(
                f"the calibration batches{'' if stack == 'text' else ' with images'} have no labels (all are "
                f"{IGNORED}), so there is no loss to differentiate"
            )
        if stack == "text":
            mesh, batches = mesh_of(model.params), [batch_of(step) for step in steps]
            self.targets = [place_batch({name: s[name] for name in ("labels", "token_types")}, mesh) for s in steps]
        else:
            self.targets, batches = [place_inputs(model.params, model.cfg, step) for step in steps], []
            for step in self.targets:
                images = step["media"][stack]
                if images.grid is None:  # each image of one size is a row of the tower
                    images = images._replace(values=images.values.reshape(-1, 1, *images.values.shape[2:]))
                types = np.ones((len(images.values), 1), np.int32)
                batches.append(batch_of({"media": {stack: images}, "token_types": types}))
        super().__init__(model, stack, batches, dtype=None, copies=None)
        self.cfg, self.axes = model.cfg.stack(stack), summed_axes(model.cfg, stack)
        self.ways, self.squares, self.channels = ways, squares, channels
        self.saved = list[tuple[list[State], list[Products | None]]]()  # inputs and products of each layer
        # Gradients of the loss with respect to the state after a layer, and to the outputs of tower layers from which
        # features are taken (DeepStack), {layer: gradient}; one of each for every batch.
        self.cotangents, self.levels = list[State](), list[dict[int, jax.Array]]()
        self.layers = list[LayerScores]()  # from the last one

    def load(self, number: int) -> Layer:
        """Load a layer, which returns its keys and values only if later layers reuse them."""
        return dataclasses.replace(super().load(number), shares=number if number in self.cfg.producers else None)

    def scores(
        self, memory_budget: int | None, progress: Callable[[int], None] | None, cache: ArrayCache | None
    ) -> list[LayerScores]:
        """Return {path: `channels` of the weight's gradient, for each way of weighting tokens} of every layer."""
        # bytes on a device that are left for outputs of projections
        self.budget = min(from_all(lambda: free_memory() // 2 if memory_budget is None else memory_budget))
        if cache is not None:
            self._resume(cache)
        remaining = range(self.n_layers - len(self.layers))
        self.walk(self._forward, remaining)
        if not self.layers:
            self._start_from_loss()

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

    def _start_from_loss(self) -> None:
        """Compute the gradients of the loss at the output of the last layer, and at those of DeepStack layers."""
        cfg, last, stack = self.model.cfg, self.n_layers - 1, self.stack
        params = placed_params(self.model, lambda path: stack != "text" or not path.startswith("text/layers/"))
        after = [states for states, _ in self.saved[1:]] + [self.states]
        numbers = [*getattr(self.cfg, "deepstack", ()), last]
        outputs = [{number: after[number][batch].x for number in numbers} for batch in range(len(self.states))]

        def gradients(rows: Rows, outputs: dict[int, jax.Array], step: Any) -> dict[int, jax.Array]:
            return _loss_gradients(outputs, params, step, cfg=cfg, stack=stack)

        self.levels = [levels for _, levels in self.visit(gradients, outputs, self.targets)]
        for levels, state in zip(self.levels, self.states, strict=True):
            self.cotangents.append(State(levels.pop(last), jax.tree.map(jnp.zeros_like, dict(state.shared))))

    def _backward(self, layer: Layer) -> None:
        """Add up a layer's weight gradients over all batches, and reduce them; go back to the layer's input."""
        self.states, products = self.saved.pop()
        axes = tuple((path, axis) for path, axis in self.axes.items() if path in layer.params)
        n_ways = 1 if self.ways is None else len(self.ways)
        zeros = {path: jnp.zeros((n_ways, *layer.params[path].shape), jnp.float32) for path, _ in axes}
        sums: Sums = {path: (x, jnp.zeros_like(x) if self.squares else None) for path, x in zeros.items()}

        def differentiate(rows: Rows, cotangent: State, products: Any, target: Any, labels: Any) -> State:
            nonlocal sums
            if products is None:
                products = _run_with_products(layer, rows, {})[1]
            sums, cotangent = _differentiate(layer, rows, products, target, self.ways, labels, cotangent, sums)
            return cotangent

        types = [arrays["token_types"] for arrays in self.targets]
        visited = self.visit(differentiate, self.cotangents, products, types, self.labels)
        for batch, (_, (x, shared)) in enumerate(visited):
            level = self.levels[batch].get(layer.number - 1)
            self.cotangents[batch] = State(x if level is None else x + level, shared)
        total, samples = float(sum(self.labels)), float(np.count_nonzero(self.labels))
        scores = _reduce(layer.params, sums, total, samples, axes, self.channels)
        self.layers.append(jax.tree.map(np.asarray, scores))

    def _save(self, cache: ArrayCache | None) -> None:
        """Cache the scores of finished layers, and the gradients at the input of the last finished layer."""
        if cache is not None:
            gradients = enumerate(jax.tree.leaves((self.cotangents, self.levels)))
            arrays = {f"{len(self.layers)} layers/{i}": gather_to_host(x) for i, x in gradients}
            for number, scores in enumerate(self.layers):
                arrays |= {f"layer {number}/{path}": array for path, array in scores.items()}
            cache.add({key: arrays[key] for key in cache.missing(arrays)})
            cache.publish()

    def _resume(self, cache: ArrayCache) -> None:
        """Read the scores of finished layers, and the gradients from which an interrupted pass continues."""
        levels = dict.fromkeys(getattr(self.cfg, "deepstack", ()), 0)
        cotangent, n = State(0, dict.fromkeys(self.cfg.producers, (0, 0))), len(self.batches)
        structure: Any = jax.tree.structure(([cotangent] * n, [levels] * n))
        for finished in range(self.n_layers, 0, -1):
            keys = [f"{finished} layers/{i}" for i in range(structure.num_leaves)]
            if not cache.missing(keys):
                placed = place_batch({key: cache[key] for key in keys}, self.mesh)
                self.cotangents, self.levels = jax.tree.unflatten(structure, placed.values())
                for number in range(finished):
                    params = self.load(self.n_layers - 1 - number).params
                    paths = [path for path in self.axes if path in params]
                    self.layers.append({path: cache[f"layer {number}/{path}"] for path in paths})
                return


@functools.partial(jax.jit, static_argnames=("cfg", "stack"))
def _loss_gradients(
    outputs: dict[int, jax.Array], params: Params, step: Any, *, cfg: ModelConfig, stack: str
) -> dict[int, jax.Array]:
    """Return the gradient of a step's summed cross-entropy at outputs of a stack's layers, {layer: output}."""

    def loss(outputs: dict[int, jax.Array]) -> jax.Array:
        def passed(keep: Sequence[int]) -> Passed:
            kept = jnp.stack([outputs[number] for number in keep]) if keep else None
            return Passed(outputs[max(outputs)], kept, {})

        module, head = to_nnx(Model(params, cfg)), head_of(params, cfg)
        if stack == "text":
            final = module.text.final_norm(outputs[max(outputs)])
        else:
            getattr(module, stack).passed = passed
            x, embeds = module.embed(step["input_ids"], step["media"])
            final, _ = encode(
                params, cfg, step["input_ids"], inputs_embeds=x, layer_embeds=embeds, remat="full",
                position_ids=step.get("position_ids"), attention_mask=step["attention_mask"],
            )  # fmt: skip
        return cross_entropy_sum(final, head, step["labels"], chunk=max(1, CHUNK // len(final)))

    return jax.tree.map(lambda gradient: constrain(gradient, STREAM), jax.grad(loss)(outputs))


@functools.partial(jax.jit, donate_argnames=("cotangent", "sums"))
def _differentiate(
    layer: Layer,
    rows: Rows,
    products: Products,
    token_types: jax.Array,
    ways: Any,
    labels: Any,
    cotangent: State,
    sums: Sums,
) -> tuple[Sums, State]:
    """Backpropagate one step through a layer: add weight gradients to the sums, return the input gradient.

    `labels`: the step's number of labels; with squares, a step is one row, and the gradient of the row's mean loss is
    squared.
    """
    counts = None if ways is None else jnp.asarray(ways)[:, token_types]
    used = {number: pair for number, pair in rows.shared.items() if number == layer.cfg.layers[0].mixer.source}

    def block(probes: Any, x: jax.Array, used: Any) -> State:
        return run_with_products(layer, rows._replace(x=x, shared=used), probes, products, counts)[0]

    probes = {path: jnp.zeros(first.shape, layer.params[path].dtype) for path, (first, _) in sums.items()}
    produced, pull = jax.vjp(block, probes, rows.x, used)
    keys = cotangent.shared
    gradients, x, of_used = pull(State(cotangent.x, {number: keys[number] for number in produced.shared}))
    keys = {**keys, **{number: jax.tree.map(jnp.add, keys[number], pair) for number, pair in of_used.items()}}
    added = dict(sums)
    for path, (first, squared) in sums.items():
        gradient = gradients[path].astype(jnp.float32)
        if squared is not None:  # the gradient of the row's own mean loss (0 labels: gradient 0)
            squared = squared + jnp.square(gradient / jnp.maximum(labels, 1))
        added[path] = first + gradient, squared
    return added, State(x, keys)


@functools.partial(jax.jit, static_argnames=("axes", "channels"))
def _reduce(
    params: Mapping[str, jax.Array], sums: Sums, total: Any, samples: Any, axes: Any, channels: Callable[..., jax.Array]
) -> dict[str, jax.Array]:
    """Return {path: channel scores [ways, ...]} from a layer's sums over `total` labels and `samples` rows."""
    scores = {}
    for path, axis in axes:
        weight, (first, squared) = params[path].astype(jnp.float32), sums[path]
        means = first / total, None if squared is None else squared / samples
        by_way = jax.vmap(lambda g, a, weight=weight, axis=axis: channels(weight, g, a, axis))(*means)
        scores[path] = constrain(by_way, ())
    return scores
