"""Values of a model's layers on calibration batches, layer by layer: only what is computed from them is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.lazy import LazyArray
from vlmprune_jax.core.models.placement import place_batch
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.prune.batches import CalibrationBatch, text_batch, tower_batches
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.stream import LayerStream

LayerSums = dict[str, np.ndarray]
TOGETHER = 8  # batches that pass a layer before the next one is loaded
R = TypeVar("R")
T = TypeVar("T")


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
    some = False
    for arrays in batches:
        if stack == "text" or stack in arrays["media"]:
            some = True
            yield arrays
    if not some:
        inputs = "images" if stack == "vision" else dict(cfg.encoders)[stack].array
        raise UserError(
            f"the calibration batches have no {inputs}, which scores of {stack} need: add records with {inputs}"
        )


def grouped(
    model: Model, stack: str, batches: Iterable[Arrays], weight_of: np.ndarray
) -> Iterator[list[list[CalibrationBatch]]]:
    """Yield groups of batches that pass a stack together: `TOGETHER` of them, or all if the weights are in files.

    A batch of rows may give several batches of images for a tower.
    """
    in_files = any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(model.params))
    batches = batches_of(model.cfg, stack, batches)
    while arrays := list(batches if in_files else itertools.islice(batches, TOGETHER)):
        if stack == "text":
            yield [[text_batch(rows, weight_of)] for rows in arrays]
        else:
            names = [[""] * len(rows["token_types"]) for rows in arrays]
            pairs = zip(arrays, names, strict=True)
            yield [tower_batches([rows], {}, of_rows, model.cfg, stack, distinct=False) for rows, of_rows in pairs]


def visit_layers(
    model: Model,
    stack: str,
    group: Sequence[Sequence[CalibrationBatch]],
    inputs: tuple[str, ...],
    measure: Callable[[LayerValues, jax.Array, Any], tuple[R, Any]],
    reduce: Callable[[list[R]], T],
) -> list[list[T]]:
    """Pass a group of batches through all layers; return `reduce` of the results of each batch, for each layer.

    Args:
      inputs: intermediate values to pass to `measure`, of `context.VALUES`.
      measure: compiled function of the layer's values, the tokens' types and what it returned for the layer before;
        returns the result and what the next layer gets.
    """
    batches = [batch for parts in group for batch in parts]
    stream = LayerStream(model, stack, batches, dtype=None, copies=2)
    types = [place_batch({"types": batch.token_types}, stream.mesh)["types"] for batch in batches]
    carried, layers = [None] * len(batches), list[list[T]]()
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
        results = iter([result for result, _ in pairs])
        layers.append([reduce(list(itertools.islice(results, len(parts)))) for parts in group])
        carried[:] = [carry for _, carry in pairs]

    stream.walk(visit)
    return layers
