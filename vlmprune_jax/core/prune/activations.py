"""Sums over the tokens of calibration batches, layer by layer: only a criterion's sums leave the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.checks import check_returned
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal, continued
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.lazy import LazyArray
from vlmprune_jax.core.models.placement import mesh_of, place_batch
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.batches import CalibrationBatch, text_batch, tower_batches
from vlmprune_jax.core.prune.calibration import TOKEN_TYPES, TYPES, Arrays, positive, types_in
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.stream import LayerStream, on_devices

LayerSums = dict[str, np.ndarray]
R = TypeVar("R")
T = TypeVar("T")


class Tokens(NamedTuple):
    """Weight and type of each token in a batch (for a vision tower: of each image position).

    `weight`: float32, 0 for padding and excluded token types, else 1 or the weight of the token's type in the settings.
    `token_type`: int32, one of PADDING, PROMPT, IMAGE, VIDEO and ANSWER (a token with a label; a batch without labels
    has no answer tokens).
    """

    weight: jax.Array
    token_type: jax.Array


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


def accumulate(
    model: Model,
    batches: Iterable[Arrays],
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    inputs: tuple[str, ...],
    carries: bool,
    stack: str,
    weight_of: np.ndarray,
    splits: bool,
    progress: Callable[[int], None] | None,
    journal: Journal | None,
) -> tuple[list[LayerSums], dict[str, list[LayerSums]]]:
    """Run `function(layer values, tokens, **options)` on all layers and batches; sum its results in float64.

    With `splits`, also return the sums over the tokens of each type alone, by name, if there are several types.

    Args:
      function: see `Criterion`; `inputs`: values that it reads; `carries`: True if it has a parameter `carry`.
      stack: name of the stack; for a tower, batches without images are skipped.
      weight_of: float32[types], weight of a token of each type.
      journal: file that keeps the sums of each batch, to continue an interrupted pass.

    Raises UserError for a tower if no batch has images.
    """
    # token weights: over all tokens, and over each type alone
    types = [*TOKEN_TYPES.values()] if splits else []
    ways = jnp.asarray(np.stack([weight_of, *np.eye(len(TYPES), dtype=np.float32)[types]]))
    fixed = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in options.items())
    model = on_devices(model)
    measure = functools.partial(_sums, ways, function=function, options=fixed, carries=carries)
    n_layers, counts, totals = len(model.cfg.stack(stack).layers), np.zeros(len(TYPES), int), list[LayerSums]()

    def added(results: list[LayerSums]) -> LayerSums:
        return {name: sum(np.asarray(sums[name], np.float64) for sums in results) for name in results[0]}

    def sums_of(group: list[CalibrationBatch]) -> list[dict[str, Any]]:
        layers = visit_layers(model, stack, group, inputs, measure, added)
        return layers if journal is None else [{name: x.tolist() for name, x in layer.items()} for layer in layers]

    def groups() -> Iterator[list[CalibrationBatch]]:
        for group in grouped(model, stack, batches, weight_of):
            for batch in group:
                counts[:] += np.bincount(batch.token_types.ravel(), minlength=len(TYPES))
            yield group

    entries = continued(sums_of, groups(), journal, lambda _, entry: _fits(entry, n_layers))
    with use_mesh(mesh_of(model.params)):
        for done, entry in enumerate(entries, start=1):
            new = [{name: np.asarray(x) for name, x in layer.items()} for layer in entry]
            totals = [added(list(pair)) for pair in zip(totals, new, strict=True)] if totals else new
            if progress is not None:
                progress(done)
    positive(len(totals))
    by_way = [[{name: x[way] for name, x in layer.items()} for layer in totals] for way in range(len(ways))]
    of_type = dict(zip(TOKEN_TYPES, by_way[1:], strict=False))
    return by_way[0], {name: of_type[name] for name in types_in(counts) if splits}


def _fits(entry: Any, n_layers: int) -> bool:
    """Return True if a journal entry consists of numeric arrays for each layer."""
    try:
        arrays = [np.asarray(x) for layer in entry for x in layer.values()]
    except (AttributeError, TypeError, ValueError):
        return False
    return len(entry) == n_layers and all(array.dtype.kind in "if" for array in arrays)


def batches_of(cfg: ModelConfig, stack: str, batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yield the batches that contain inputs of a stack, such as images; raise UserError if none does."""
    array, some = cfg.input_of(stack), False
    for arrays in batches:
        if array in arrays:
            some = True
            yield arrays
    if not some:
        raise UserError(
            "the calibration batches have no images, which scores of a vision tower need: add records with images"
            if stack == "vision"
            else f"the calibration batches have no {array}, which scores of {stack} need: add batches with it"
        )


def grouped(
    model: Model, stack: str, batches: Iterable[Arrays], weight_of: np.ndarray
) -> Iterator[list[CalibrationBatch]]:
    """Yield the calibration batches that pass a stack together: those of one batch, or all if weights are in files."""
    group = list[CalibrationBatch]()
    in_files = any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(model.params))
    for arrays in batches_of(model.cfg, stack, batches):
        if stack == "text":
            group.append(text_batch(arrays, weight_of))
        else:
            names = [""] * len(arrays["token_types"])
            group += tower_batches([arrays], {}, names, model.cfg, stack, distinct=False)
        if group and not in_files:
            yield group
            group = []
    if group:
        yield group


def visit_layers(
    model: Model,
    stack: str,
    batches: Sequence[CalibrationBatch],
    inputs: tuple[str, ...],
    measure: Callable[[LayerValues, jax.Array, Any], tuple[R, Any]],
    reduce: Callable[[list[R]], T],
) -> list[T]:
    """Pass batches through all layers; return `reduce` of the batches' results, for each layer.

    Args:
      inputs: intermediate values to pass to `measure`, of `context.VALUES`.
      measure: compiled function of the layer's values, the tokens' types and what it returned for the layer before;
        returns the result and what the next layer gets.
    """
    stream = LayerStream(model, stack, batches, dtype=None, copies=2 if len(batches) > 1 else None)
    types = [place_batch({"types": batch.token_types}, stream.mesh)["types"] for batch in batches]
    carried, results = [None] * len(batches), list[T]()
    causal = model.cfg.stack(stack).causal
    capture = (*inputs, *(("statistics",) if {*inputs} & {*WRITERS} else ()))

    def visit(layer: Layer) -> None:
        last = layer.number + 1 == stream.n_layers

        def of_rows(rows: Rows, state: State, values: dict[str, Any], types: jax.Array, carry: Any) -> Any:
            statistics = values.pop("statistics", {})
            scales = {name: statistics[name][..., 1:] for name in statistics if name in inputs}
            after = stream.final_norm(state.x) if last else state.x
            arrays = rows.x, after, values, scales, types
            if not causal:  # a tower's positions are rows of their own
                arrays = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), arrays)
            before, after, values, scales, types = arrays
            return measure(LayerValues(before, after, values, layer.params, scales), types, carry)

        pairs = stream.advance(layer, capture, of_rows, types, carried)
        results.append(reduce([result for result, _ in pairs]))
        carried[:] = [carry for _, carry in pairs]

    stream.walk(visit)
    return results


@functools.partial(jax.jit, static_argnames=("function", "options", "carries"))
def _sums(
    ways: jax.Array, values: LayerValues, types: jax.Array, carry: Any, *, function: Any, options: Any, carries: bool
) -> tuple[dict[str, jax.Array], Any]:
    """Return a criterion's sums {name: [ways, ...]} over the tokens of one batch, for each way of weighting them."""

    def weighted_sums(weights: jax.Array, carry: Any) -> Any:
        tokens = Tokens(weights[types], types)
        if carries:
            return function(values, tokens, carry=carry, **dict(options))
        sums = function(values, tokens, **dict(options))
        check_returned(function, sums, isinstance(sums, dict), "sums by name, {name: array}")
        return sums, None

    sums, carry = jax.vmap(weighted_sums, in_axes=(0, None if carry is None else 0))(ways, carry)
    return jax.tree.map(lambda leaf: constrain(leaf, (None,) * leaf.ndim), sums), carry
