"""Whole layers by greedy search: each round removes the layer without which the labels are predicted best.

Each round runs the calibration rows from the layer on trial to the end; the inputs of every kept layer stay on the
hosts, float32[rows, seq, embed]. After the first round only the layers that cost least at their last trial are tried
again, since removing one layer seldom makes another cheaper. With `solved`, every trial removal is repaired by least
squares in the layer before it, as by `reconstruct`, so that the search finds the best model after reconstruction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.cache import ArrayCache, recorded
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.limits import why_no_class
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.models.placement import mesh_of, place_batch
from vlmprune_jax.core.models.vlm import Model, head_of, to_nnx
from vlmprune_jax.core.models.vocabulary import cross_entropy_sum
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.batches import row_batches
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.reconstruction import Targets, solve_for
from vlmprune_jax.core.prune.walk import LayerStream

_CHUNK = 256  # positions whose float32 logits exist at once


def greedy_loss(
    model: Model,
    batches: Iterable[Arrays],
    progress: Callable[[int], None] | None,
    *,
    solved: bool,
    candidates: int,
    search: int | None,
    cache: ArrayCache | None,
) -> Values:
    """Return the order in which greedy search removes layers by smallest increase of cross-entropy, float64[n_layers].

    Args:
      batches: batches with labels (-100 ignored, not shifted).
      progress: called after each trial with the number of removed layers.
      solved: repair the model by least squares after each trial removal, before its loss is computed.
      candidates: number of layers tried in each step after the first: those with the lowest last cost.
      search: number of layers to search for, by default half; the other layers follow in the order of their last cost.
      cache: keeps the loss of every trial, so that an interrupted search continues.

    Raises UserError for options out of range, too few rows for least squares, or a loss that is not finite.
    """
    n_layers = len(model.cfg.text.layers)
    most = n_layers - max(1, model.cfg.deepstack)  # DeepStack features are added to this many layers
    rounds = min(n_layers // 2, most) if search is None else search
    if not 0 <= rounds <= most or candidates < 1:
        raise UserError(
            f"greedy_loss: search={search} must be at most {most} of the {n_layers} layers and candidates={candidates} "
            "at least 1"
        )
    if mesh_of(model.params) is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    with use_mesh(mesh_of(model.params)):
        rows = row_batches(list(batches), dataclasses.asdict(ReconstructConfig()))
        cut = _Cut(LayerStream(model, "text", rows, copies=2 * n_layers + 2), solved)
        # Cost of each layer at its last trial: the loss without it minus the loss at that time.
        order, costs, loss = list[int](), dict[int, float](), cut.loss
        trial = lambda key, layer: {key: np.asarray([cut.loss_without(layer)])}  # noqa: E731
        for done in range(rounds):
            tried = sorted(cut.kept, key=lambda layer: costs.get(layer, -math.inf))[: candidates if done else None]
            for layer in tried:
                key = f"{done}/{layer}"
                losses = recorded(cache, [key], functools.partial(trial, key, layer))
                costs[layer] = losses[key].item() - loss
                if progress is not None:
                    progress(done)  # a round is long, the first above all: it ends between two layers on SIGTERM
            cheapest = min(tried, key=lambda layer: costs[layer])
            if costs[cheapest] == math.inf:
                break
            order.append(cheapest)
            loss += costs[cheapest]
            cut.remove(order[-1])
            if progress is not None:
                progress(done + 1)
    order += sorted(cut.kept, key=lambda layer: costs.get(layer, 0.0))
    importance = np.empty(n_layers)
    importance[order] = np.arange(n_layers)
    return {Key("text", None, LAYERS): importance}


class _Cut:
    """Model during greedy search: layers removed so far, and the input of every remaining layer, kept on the hosts."""

    def __init__(self, stream: LayerStream, solved: bool):
        self.kept = list(range(stream.n_layers))
        self._stream, self._solved = stream, solved
        self._changed = dict[int, Layer]()
        self._before = dict[int, list[State]]()  # layer -> its input; number of layers -> the last output
        self._fill(0, stream)
        self._dense = dict(self._before) if solved else {}
        self.loss = self._loss(stream.at(self._before[stream.n_layers]))
        if not math.isfinite(self.loss):
            raise UserError(
                "greedy_loss: the loss of the unpruned model is not finite: check weights and records for NaN"
            )

    def loss_without(self, layer: int) -> float:
        """Return the summed cross-entropy after removing one more layer; infinity if the layer cannot be removed."""
        place, cfg = self.kept.index(layer), self._stream.model.cfg
        left = [cfg.text.layers[number] for number in self.kept if number != layer]
        if len(left) < cfg.deepstack:
            return math.inf
        if why_no_class(cfg) is None and why_no_class(cfg.with_layers(left)) is not None:
            return math.inf
        _, stream = self._closed(place)
        for now, number in enumerate(self.kept[place + 1 :], start=place):
            stream.advance(self._layer(number), self._at(number, now))
        loss = self._loss(stream)
        return loss if math.isfinite(loss) else math.inf

    def remove(self, layer: int) -> None:
        """Remove a layer, and update the cached inputs of the layers behind it."""
        place = self.kept.index(layer)
        changed, stream = self._closed(place)
        if changed is not None:
            self._changed[changed.number] = changed
        del self.kept[place], self._before[layer]
        self._changed.pop(layer, None)
        self._fill(place, stream)

    def _fill(self, place: int, stream: LayerStream) -> None:
        """Recompute the cached inputs of all remaining layers from index `place` on; `stream` is the input there."""
        for now, number in enumerate(self.kept[place:], start=place):
            self._before[number] = list(stream.states)
            stream.advance(self._layer(number), self._at(number, now))
        self._before[stream.n_layers] = stream.states

    def _closed(self, place: int) -> tuple[Layer | None, LayerStream]:
        """Reconstruct the layer before a removed one; return it (or None) and the stream after the removal."""
        if not self._solved or place == 0:
            return None, self._stream.at(self._before[self.kept[place]])
        before, after = self.kept[place - 1], [*self.kept[place + 1 :], self._stream.n_layers][0]
        layer = self._stream.layer(before)  # with original weights: an earlier repair was for fewer removed layers
        captured = self._stream.at(self._dense[before]).advance(layer, before, ("statistics",))
        statistics = [values["statistics"] for values in captured]
        targets = Targets([], [], [state.x for state in self._dense[after]], statistics)
        stream = self._stream.at(self._before[before])
        change, _ = solve_for(layer, "down_proj", stream, self._at(before, place - 1), targets)
        layer = layer if change is None else layer.changed("down_proj", change)
        stream.advance(layer, self._at(before, place - 1))
        return layer, stream

    def _layer(self, number: int) -> Layer:
        return self._changed.get(number) or self._stream.layer(number)

    def _at(self, number: int, place: int) -> int:
        """Return the index under which a layer finds its DeepStack features or per-layer embeddings.

        DeepStack features are added to the first remaining layers, per-layer embeddings keep the original number.
        """
        return number if self._stream.model.cfg.text.block.layer_inputs else place

    def _loss(self, stream: LayerStream) -> float:
        model = stream.model
        labels = [place_batch({"labels": batch.labels}, stream.mesh)["labels"] for batch in stream.batches]

        def loss(rows: Rows, labels: jax.Array) -> jax.Array:
            return _loss(model.params, rows.x, labels, cfg=model.cfg)

        return sum(float(total) for _, total in stream.visit(loss, stream.n_layers, labels))


@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss(params: Any, x: jax.Array, labels: jax.Array, *, cfg: Any) -> jax.Array:
    final = to_nnx(Model(params, cfg)).text.final_norm(x)
    return cross_entropy_sum(final, head_of(params, cfg), labels, chunk=_CHUNK)


GREEDY_LOSS = Criterion(
    scores=("layers",),
    needs="labels",
    function=greedy_loss,
    options={"solved": False, "candidates": 6, "search": None},
    counts="layers",
    journals=True,
)
