"""Values of a model's layers on calibration batches, layer by layer: only what is computed from them is kept."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.checks import check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import place_batch
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.lazy import LazyArray, to_device
from vlmprune_jax.core.models.stack import fill
from vlmprune_jax.core.models.vlm import Model, stack_module
from vlmprune_jax.core.prune.batches import CalibrationBatch, batch_of, tower_batches
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.stream import LayerStream

LayerSums = dict[str, np.ndarray]
TOGETHER = 8  # batches that pass a layer before the next one is loaded


class Tokens(NamedTuple):
    """Weight and type of each token in a batch (for a vision tower: of each image position)."""

    weight: jax.Array
    """float32, 0 for padding and excluded token types, else 1 or the weight of the token's type in the settings."""

    token_type: jax.Array
    """int32: PADDING, PROMPT, IMAGE, VIDEO or ANSWER (a token with a label; none in a batch without labels)."""


class LayerValues(NamedTuple):
    """Values of one layer on one batch, as a criterion sees them; a tower has one row [1, ...] per image position."""

    before: jax.Array
    """Residual stream before the layer, float[batch, seq, embed]."""

    after: jax.Array
    """Residual stream after the layer; of the decoder's last layer, after the final norm."""

    inputs: dict[str, jax.Array]
    """Intermediate values that the criterion asks for, by name (`context.VALUES`; the same names in every family)."""

    params: dict[str, jax.Array]
    """Parameters of the layer by path."""

    scales: dict[str, jax.Array]
    """float32[batch, seq, 1] for each writer in `inputs` with a norm after it: the norm's factor on the output."""


def batches_of(cfg: ModelConfig, stack: str, batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yield the batches that contain inputs of a stack, such as images; raise UserError if none does."""
    chosen = (arrays for arrays in batches if stack == "text" or stack in arrays["media"])
    first = next(chosen, None)
    if first is None:
        inputs = "images" if stack == "vision" else dict(cfg.encoders)[stack].array
        raise UserError(
            f"the calibration batches have no {inputs}, which scores of {stack} need: add records with {inputs}"
        )
    yield first
    yield from chosen


def grouped(model: Model, stack: str, batches: Iterable[Arrays]) -> Iterator[list[list[CalibrationBatch]]]:
    """Yield groups of batches that pass a stack together: `TOGETHER` of them, or all if the weights are in files.

    A batch of rows may give several batches of images for a tower.
    """
    in_files = any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(model.params))
    batches = batches_of(model.cfg, stack, batches)
    while arrays := list(batches if in_files else itertools.islice(batches, TOGETHER)):
        if stack == "text":
            yield [[batch_of(rows)] for rows in arrays]
        else:
            yield [tower_batches([rows], {}, model.cfg, stack, distinct=False) for rows in arrays]


def layer_sums(
    model: Model,
    stack: str,
    group: Sequence[Sequence[CalibrationBatch]],
    inputs: tuple[str, ...],
    function: Callable[..., Any],
    options: Mapping[str, Any],
    ways: np.ndarray,
) -> list[list[LayerSums]]:
    """Pass a group of batches through all layers; return a criterion's sums for each batch and layer, in float64.

    Args:
      inputs: intermediate values to pass to `function`, of `context.VALUES`.
      function, options: see `Criterion.function`, with needs="activations".
      ways: float32[ways, types], weights of the token types; every sum has the shape [ways, ...].
    """
    batches = [batch for parts in group for batch in parts]
    stream = LayerStream(model, stack, batches, dtype=None, copies=2)
    types = [place_batch({"types": batch.token_types}, stream.mesh)["types"] for batch in batches]
    carried, totals = [None] * len(batches), [list[LayerSums]() for _ in group]
    fixed = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items())
    norm, carries, weights = None, "carry" in inspect.signature(function).parameters, jnp.asarray(ways)
    if stack == "text":
        norm = jax.tree.map(to_device, model.params[stack][stack_module(stack, model.cfg.text).norm_name])

    def visit(layer: Layer) -> None:
        def compute(rows: Rows, types: jax.Array, carry: Any) -> tuple[State, Any]:
            return _sums(layer, rows, types, carry, weights, norm, stream.n_layers - 1, function, inputs, fixed)

        pairs = stream.advance(layer, compute, types, carried)
        carried[:] = [carry for _, carry in pairs]
        sums = [jax.tree.map(np.asarray, sums) for sums, _ in pairs]
        for index in np.ndindex(np.shape(layer.number)):  # one of a single layer
            of_layer = iter([{name: x[index] for name, x in batch_sums.items()} for batch_sums in sums])
            for total, parts in zip(totals, group, strict=True):
                total.append(added(list(itertools.islice(of_layer, len(parts)))))

    stream.walk(visit, None if carries else stream.scan_groups())
    return totals


def added(results: Sequence[Mapping[str, Any]]) -> LayerSums:
    """Add up sums of the same names in float64."""
    names = results[0] if results else ()
    return {name: np.sum([np.asarray(sums[name], np.float64) for sums in results], axis=0) for name in names}


@functools.partial(jax.jit, static_argnames=("inputs", "function", "options"))
def _sums(
    layer: Layer,
    rows: Rows,
    types: jax.Array,
    carry: Any,
    ways: jax.Array,
    norm: Any,
    last: Any,
    function: Callable[..., Any],
    inputs: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
) -> tuple[State, tuple[dict[str, jax.Array], Any]]:
    """Run a layer; return the state after it, and (the criterion's sums, what the next layer gets as `carry`).

    Of stacked equal layers, all are run, and the sums have a leading layer axis.
    """
    if jnp.ndim(layer.number):

        def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, dict[str, jax.Array]]:
            at_layer = layer, rows._replace(x=x), types, None, ways, norm, last
            state, (sums, _) = _sums(*at_layer, function, inputs, options)
            return state.x, sums

        x, sums = jax.lax.scan(step, rows.x, layer)
        return State(x, {}), (sums, None)
    state, values = layer.run(rows, (*inputs, *(("statistics",) if {*inputs} & {*WRITERS} else ())))
    statistics = values.pop("statistics", {})
    scales = {name: statistics[name][..., 1:] for name in statistics if name in inputs}
    after = state.x
    if norm is not None:  # a condition, so that all layers are one program
        module = stack_module(layer.stack, layer.cfg)
        final_norm = fill(getattr(module, module.norm_name), norm)
        after = jax.lax.cond(layer.number == last, final_norm, lambda x: x, after)
    arrays = rows.x, after, values, scales, types
    if not layer.cfg.causal:  # a tower's positions are rows of their own
        arrays = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), arrays)
    before, after, values, scales, types = arrays
    layer_values = LayerValues(before, after, values, layer.params, scales)

    def weighted_sums(weights: jax.Array, carry: Any) -> Any:
        tokens = Tokens(weights[types], types)
        if "carry" in inspect.signature(function).parameters:
            return function(layer_values, tokens, carry=carry, **dict(options))
        sums = function(layer_values, tokens, **dict(options))
        check_returned(function, sums, isinstance(sums, dict), "sums by name, {name: array}")
        return sums, None

    sums, carry = jax.vmap(weighted_sums, in_axes=(0, None if carry is None else 0))(ways, carry)
    return state, (jax.tree.map(lambda leaf: constrain(leaf, (None,) * leaf.ndim), sums), carry)
