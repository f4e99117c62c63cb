"""Channel scores from the gradients of the calibration loss with respect to the weights of every decoder layer.

Memory-bounded: a forward pass saves each block's input; then, block by block in reverse, the block's weight gradients
are built, reduced to channel scores, and dropped. One layer's gradients exist at a time; the embeddings and the vision
tower are never differentiated.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import IGNORED, ModelConfig, TextConfig
from vlmprune_jax.core.errors import Stopped, UserError
from vlmprune_jax.core.parts import scan_groups
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.distributed.machine import free_memory
from vlmprune_jax.distributed.mesh import from_all, gather_to_host, use_mesh
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.context import STREAM
from vlmprune_jax.models.params import flatten
from vlmprune_jax.models.stack import at_layer
from vlmprune_jax.models.vlm import Model, Params, mesh_of, place_batch, place_inputs, to_nnx
from vlmprune_jax.models.vocabulary import chunks, cross_entropy
from vlmprune_jax.prune.criteria.calibration import ANSWER, IMAGE, KINDS, PROMPT, Arrays, kinds_in, stack_rows
from vlmprune_jax.prune.criteria.groups import summed_axes
from vlmprune_jax.prune.criteria.linearized import Shared, linearized

Found = dict[str, Any]  # of one layer: path of a weight -> its reduced gradient
Cotangent = tuple[jax.Array, Shared]  # gradients at a layer's input, and at the keys and values that layers share
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
    by_kind: bool,
    progress: Callable[[int], None] | None,
    cache: ArrayCache | None,
) -> tuple[list[Found], dict[str, list[Found]]]:
    """Return {path: channel scores} of the weights that are pruned together, for each layer, from gradients.

    `gradient`: of the mean cross-entropy over all labels of all batches, however the rows are cut; `squared`: with
    `squares` the mean over the samples of the squared gradients of their own mean losses, else None; all float32 in the
    weight's shape. `axis` is the axis that is not pruned: `channels` reduces over it, on the device, to any tree.

    The gradient of a projection's weight is a sum over tokens of (gradient at the output) x (input). `weight_of`
    weights the terms by token type. With `by_kind` the result also has `channels` of each type's share, by name; the
    shares add up to the gradient.

    Args:
      batches: with labels (-100 ignored, not shifted). Rows of different length are padded on the right.
      channels: a module-level function; its identity decides what is compiled again.
      rows_per_step: rows differentiated at once, default the first batch's; with `squares` it is 1.
      memory_budget: bytes on a device for products that are kept for the backward pass, default half of what is free;
        products that do not fit are computed twice. The result is the same to the bit.
      weight_of: float32[4], weight of a token of each type.
      progress: called with the number of finished layers.
      cache: saves an eighth of the layers at a time, and on `Stopped`, for an interrupted pass to continue from.

    Raises UserError if no batch has a label.
    """
    data = _stack(batches, 1 if squares else rows_per_step)
    labels = (data["labels"][..., 1:] != IGNORED).sum(axis=-1)  # int[steps, rows]; the first position is not predicted
    if labels.sum() == 0:
        raise UserError(
            f"the calibration batches have no labels (all are {IGNORED}), so there is no loss to differentiate"
        )
    kinds = kinds_in(np.bincount(data["kind"].ravel(), minlength=4)) if by_kind else []
    ways = [weight_of, *(np.eye(4, dtype=np.float32)[KINDS[name]] for name in kinds)]
    mesh = mesh_of(model.params)
    if mesh is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    with use_mesh(mesh):
        steps = [place_inputs(model, micro) for micro in _micro(data, ways)]
        # all-(-100) rows, such as the filler of a last batch, are not samples
        weighed = _Weighed(labels.sum(axis=1), float(labels.sum()), float((labels > 0).sum()))
        layers = _backward(model, steps, weighed, channels, squares, _Budget(memory_budget), progress, cache)
    scores = [[jax.tree.map(operator.itemgetter(way), layer) for layer in layers] for way in range(len(ways))]
    return scores[0], dict(zip(kinds, scores[1:], strict=True))


class _Weighed(NamedTuple):
    """Number of labels per step (int[steps]) and in total, and number of calibration samples."""

    steps: np.ndarray
    total: float
    samples: float


def _backward(
    model: Model,
    steps: list[dict[str, Any]],
    weighed: _Weighed,
    channels: Callable[..., Any],
    squares: bool,
    budget: _Budget,
    progress: Callable[[int], None] | None,
    cache: ArrayCache | None,
) -> list[Found]:
    """Backpropagate layer by layer; return the result of `channels` for every layer, per token type."""
    cfg, n_layers = model.cfg, len(model.cfg.text.layers)
    ways = 1 if steps[0]["counts"] is None else steps[0]["counts"].shape[1]
    structure = functools.partial(_structure, model, channels, squares, ways)
    layers, cotangents = _resume(cache, structure, cfg.text, len(steps), mesh_of(model.params))
    stream, shared, layer_inputs = _forward(model, steps, budget, n_layers - len(layers))
    if not layers:
        for at, keys in enumerate(shared):
            outgoing = _loss_gradient(model.params, stream[-1][at], steps[at], cfg=cfg)
            cotangents.append((outgoing, jax.tree.map(jnp.zeros_like, keys)))
    stream.pop()
    while stream:
        number = len(stream) - 1
        layer, text = _layer_of(model, number)
        states, produces = stream.pop(), number in cfg.text.producers
        sums = _no_sums(layer, cfg, squares, ways)
        for at, micro in enumerate(steps):
            x, products = states[at]
            inputs = (micro, at_layer(layer_inputs[at], number), _used(shared[at], text))
            if products is None:
                products = _block(layer, x, inputs, text=text, produces=produces)[1]
            states[at] = None
            sums, cotangents[at] = _differentiate(
                layer, x, inputs, products, cotangents[at], float(weighed.steps[at]), sums, text=text, produces=produces
            )
        scores = _reduce(layer, sums, weighed.total, weighed.samples, cfg=cfg, channels=channels)
        layers.append(jax.tree.map(np.asarray, scores))
        try:
            if progress is not None:
                progress(len(layers))
        except Stopped:
            _save(cache, layers, cotangents)
            raise
        if len(layers) % -(-n_layers // 8) == 0:
            _save(cache, layers, cotangents)
    return layers[::-1]


def _structure(model: Model, channels: Callable[..., Any], squares: bool, ways: int, number: int) -> Any:
    """Return the pytree structure of one layer's gradient scores."""
    layer, _ = _layer_of(model, number)
    reduce = functools.partial(_reduce, cfg=model.cfg, channels=channels)
    return jax.tree.structure(jax.eval_shape(reduce, layer, _no_sums(layer, model.cfg, squares, ways), 1.0, 1.0))


def _save(cache: ArrayCache | None, layers: list[Found], cotangents: list[Cotangent]) -> None:
    """Cache the scores of finished layers, and the gradient at the input of the last finished layer."""
    if cache is None:
        return
    last, arrays = len(layers), dict[str, np.ndarray]()
    for number, layer in enumerate(layers):
        if cache.missing([f"layer {number}/0"]):
            arrays |= {f"layer {number}/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(layer))}
    for at, (outgoing, keys) in enumerate(cotangents):
        arrays |= {f"{last} layers/{at}": gather_to_host(outgoing)}
        arrays |= {
            f"{last} layers/{at}/{size}/{i}": gather_to_host(pair[i]) for size, pair in keys.items() for i in range(2)
        }
    cache.add(arrays)
    cache.publish()


def _resume(
    cache: ArrayCache | None, structure: Callable[[int], Any], text: TextConfig, steps: int, mesh: Mesh | None
) -> tuple[list[Found], list[Cotangent]]:
    """Return the cached scores of finished layers, and the gradients from which an interrupted pass continues."""
    n_layers, sizes = len(text.layers), [text.layers[number].mixer.window or 0 for number in text.producers]

    def there(done: int) -> bool:
        keys = [*(f"layer {n}/0" for n in range(done)), *(f"{done} layers/{at}" for at in range(steps))]
        return cache is not None and not cache.missing(keys)

    done = next((done for done in range(n_layers, 0, -1) if there(done)), 0)
    if cache is None or not done:
        return [], []
    layers = []
    for number in range(done):
        tree = structure(n_layers - 1 - number)
        leaves = [cache[f"layer {number}/{i}"] for i in range(tree.num_leaves)]
        layers.append(jax.tree.unflatten(tree, leaves))
    held = cache

    def placed(name: str) -> Any:
        return place_batch({"x": held[f"{done} layers/{name}"]}, mesh)["x"]

    return layers, [
        (placed(f"{at}"), {size: (placed(f"{at}/{size}/0"), placed(f"{at}/{size}/1")) for size in sizes})
        for at in range(steps)
    ]


def _stack(batches: Iterable[Arrays], rows: int | None) -> Arrays:
    """Stack all calibration rows to arrays [steps, rows, ...], padded to equal lengths and image counts."""
    seen = list(batches)
    rows = rows or len(seen[0]["input_ids"])
    if rows < 1:
        raise UserError(f"rows_per_step={rows} must be at least 1")
    every = [{name: array[at] for name, array in batch.items()} for batch in seen for at in range(len(batch["kind"]))]
    steps = math.ceil(len(every) / rows)
    stacked = stack_rows(every, steps * rows)
    return {name: array.reshape(steps, rows, *array.shape[1:]) for name, array in stacked.items()}


def _micro(data: Arrays, ways: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield each step's inputs, with positions and target ids in place of labels.

    counts: float32[rows, ways, seq], the weight of each token in each weighting; None if all are 1.
    """
    labels = data["labels"]
    targets = np.concatenate([labels[..., 1:], np.full_like(labels[..., :1], IGNORED)], axis=-1)
    most = int((targets != IGNORED).sum(axis=-1).max())
    # the head is run at those positions only: first those with a target, in order
    positions = np.argsort(targets == IGNORED, axis=-1, kind="stable")[..., :most].astype(np.int32)
    data = {**data, "positions": positions, "targets": np.take_along_axis(targets, positions, axis=-1)}
    plain = len(ways) == 1 and bool((ways[0][[PROMPT, IMAGE, ANSWER]] == 1).all())
    for at in range(len(labels)):
        counts = None if plain else np.stack([way[data["kind"][at]] for way in ways], axis=1)
        micro = {name: array[at] for name, array in data.items() if name not in ("labels", "kind")}
        yield {**micro, "counts": counts}


class _Budget:
    """Device memory in bytes for stored matrix products: the setting, or half of the free memory."""

    def __init__(self, asked: int | None):
        self.left = min(from_all(lambda: free_memory() // 2 if asked is None else asked))

    def kept(self, products: list[jax.Array]) -> list[jax.Array] | None:
        """Return the matrix products if they still fit in the memory budget; None otherwise."""
        size = sum(leaf.addressable_shards[0].data.nbytes for leaf in products)
        if size > self.left:
            return None
        self.left -= size
        return products


def _forward(
    model: Model, steps: list[dict[str, Any]], budget: _Budget, layers: int
) -> tuple[list[list[Any]], list[Shared], list[Any]]:
    """Run the forward pass up to a given layer.

    Returns: their inputs and products (None if too large) for every step, and the last output; the keys and values that
      layers share, and the layers' own inputs (None: they have none), for every step.
    """
    embedded = [_embed(model.params, micro, cfg=model.cfg) for micro in steps]
    xs, added, nothing = [x for x, _ in embedded], [extra for _, extra in embedded], [None for _ in steps]
    added, layer_inputs = (nothing, added) if model.cfg.text.block.layer_inputs else (added, nothing)
    stream, shared = [], [Shared() for _ in steps]
    for number in range(layers):
        layer, text = _layer_of(model, number)
        produces, states = number in model.cfg.text.producers, list[Any]()
        for at, micro in enumerate(steps):
            inputs = (micro, at_layer(layer_inputs[at], number), _used(shared[at], text))
            (y, keys), products = _block(layer, xs[at], inputs, text=text, produces=produces)
            shared[at] |= keys
            states.append((xs[at], budget.kept(products)))
            features = added[at]
            xs[at] = y if features is None or number >= len(features) else _add(y, features, number)
        stream.append(states)
    return [*stream, xs], shared, layer_inputs


def _used(shared: Shared, text: TextConfig) -> Shared:
    """Return the keys and values of an earlier layer that this layer reuses."""
    (shape,) = text.layers
    return {shape.mixer.window or 0: shared[shape.mixer.window or 0]} if shape.mixer.kv_shared else {}


def _layer_of(model: Model, number: int) -> tuple[Params, TextConfig]:
    """Return the parameters of one decoder layer, and a config that has only this layer."""
    for run, (start, length, shape) in enumerate(scan_groups(model.cfg.text.layers)):
        if number < start + length:
            stacked = model.params["text"]["layers"][str(run)]
            return at_layer(stacked, number - start), model.cfg.text.with_layers((shape,))
    raise AssertionError(number)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _embed(params: Params, micro: Any, *, cfg: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    images = {name: micro.get(name) for name in ("pixel_values", "image_grid_thw")}
    x, _, added = to_nnx(Model(params, cfg)).embed(micro["input_ids"], **images)
    return constrain(x, STREAM), added


@jax.jit
def _add(y: jax.Array, added: jax.Array, number: Any) -> jax.Array:
    return constrain(y + at_layer(added, number), STREAM)


@functools.partial(jax.jit, static_argnames=("text", "produces"))
def _block(layer: Params, x: jax.Array, inputs: Any, *, text: TextConfig, produces: bool) -> tuple[Any, Any]:
    micro, layer_input, shared = inputs
    mask, positions = micro["attention_mask"], micro.get("position_ids")
    return linearized(layer, x, mask, None, text, positions, layer_input, shared, produces)[:2]


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


def _no_sums(layer: Params, cfg: ModelConfig, squares: bool, ways: int) -> tuple[Any, Any]:
    flat = flatten(layer)
    shapes = {name: (ways, *flat[name].shape) for name in summed_axes(cfg) if name in flat}
    zeros = [{name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()} for _ in range(1 + squares)]
    return zeros[0], zeros[1] if squares else {}


@functools.partial(jax.jit, static_argnames=("text", "produces"), donate_argnames=("cotangent", "sums"))
def _differentiate(
    layer: Params,
    x: jax.Array,
    inputs: Any,
    products: Any,
    cotangent: Cotangent,
    weight: Any,
    sums: Any,
    *,
    text: TextConfig,
    produces: bool,
) -> tuple[tuple[Any, Any], Cotangent]:
    """Backpropagate one step through a layer: add weight gradients to the sums, return the input gradient.

    weight: labels of the step, whose one row's mean loss is squared.
    """
    micro, layer_input, shared = inputs
    counts, mask = None if micro["counts"] is None else jnp.swapaxes(micro["counts"], 0, 1), micro["attention_mask"]
    pull = linearized(layer, x, mask, counts, text, micro.get("position_ids"), layer_input, shared, produces)[2]
    (outgoing, keys), size = cotangent, text.layers[0].mixer.window or 0
    gradients, incoming, used = pull(products)((outgoing, {size: keys[size]} if produces else {}))
    keys = {**keys, **{size: jax.tree.map(jnp.add, keys[size], pair) for size, pair in used.items()}}
    first, squared = sums
    weight_gradients = {name: flatten(gradients)[name].astype(jnp.float32) for name in first}
    first = jax.tree.map(jnp.add, first, weight_gradients)
    # the sample's own mean loss: its summed gradient over its label count (0 labels: gradient 0)
    squared = {name: old + jnp.square(weight_gradients[name] / jnp.maximum(weight, 1)) for name, old in squared.items()}
    return (first, squared), (incoming, keys)


@functools.partial(jax.jit, static_argnames=("cfg", "channels"))
def _reduce(layer: Params, sums: Any, total: Any, samples: Any, *, cfg: ModelConfig, channels: Any) -> dict[str, Any]:
    flat, (first, squared) = flatten(layer), sums
    scores = {}
    for name, axis in {name: axis for name, axis in summed_axes(cfg).items() if name in flat}.items():
        channel_scores = [
            channels(
                flat[name].astype(jnp.float32),
                first[name][way] / total,
                squared[name][way] / samples if squared else None,
                axis,
            )
            for way in range(len(first[name]))
        ]
        scores[name] = jax.tree.map(lambda *leaves: constrain(jnp.stack(leaves), ()), *channel_scores)
    return scores
