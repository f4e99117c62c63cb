"""Whole layers by greedy search: each round removes the layer without which the labels are predicted best.

Each round runs the calibration rows from the layer on trial to the end; the inputs of every kept layer stay on the
hosts, float32[rows, seq, embed]. After the first round only the layers that cost least at their last trial are tried
again, since removing one layer seldom makes another cheaper. With `solved`, every trial removal is repaired by least
squares in the layer before it, as by `reconstruct`, so that the search finds the best model after reconstruction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from vlmprune_jax.base.cache import ArrayCache, recorded
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.layer import keep_layers
from vlmprune_jax.core.limits import why_no_class
from vlmprune_jax.core.mesh.mesh import mesh_of, place_batch, use_mesh
from vlmprune_jax.core.models.context import LayerEmbeds
from vlmprune_jax.core.models.vlm import Model, head_of, to_nnx
from vlmprune_jax.core.models.vocabulary import cross_entropy_sum
from vlmprune_jax.core.part import LAYERS, Key
from vlmprune_jax.core.prune.batches import CalibrationBatch, row_batches
from vlmprune_jax.core.prune.calibration import Arrays
from vlmprune_jax.core.prune.criteria.criterion import Criterion, Values
from vlmprune_jax.core.prune.layers import Layer, Rows, State
from vlmprune_jax.core.prune.least_squares import Targets, repair_writer
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.stream import LayerStream, on_devices

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
    model = on_devices(model)
    with use_mesh(mesh_of(model.params)):
        cut = _Cut(model, row_batches(list(batches), vars(ReconstructConfig())), solved)
        # Cost of each layer at its last trial: the loss without it minus the loss at that time.
        order, costs, loss = list[int](), dict[int, float](), cut.loss
        for done in range(rounds):
            tried = sorted(cut.kept, key=lambda layer: costs.get(layer, -math.inf))[: candidates if done else None]
            for layer in tried:
                key = f"{done}/{layer}"

                def trial(key: str = key, layer: int = layer) -> dict[str, np.ndarray]:
                    return {key: np.asarray([cut.loss_without(layer)])}

                costs[layer] = recorded(cache, [key], trial)[key].item() - loss
                if progress is not None:
                    progress(done)  # a round is long, the first above all: it ends between two layers on SIGTERM
            cheapest = min(tried, key=lambda layer: costs[layer])
            if costs[cheapest] == math.inf:
                break
            order.append(cheapest)
            loss += costs[cheapest]
            cut.remove(cheapest)
            if progress is not None:
                progress(done + 1)
    order += sorted(cut.kept, key=lambda layer: costs.get(layer, 0.0))
    importance = np.empty(n_layers)
    importance[order] = np.arange(n_layers)
    return {Key("text", None, LAYERS): importance}


class _Cut(LayerStream):
    """Stream through the layers that are left, with the input of every one of them kept on the hosts."""

    def __init__(self, model: Model, batches: Sequence[CalibrationBatch], solved: bool):
        super().__init__(model, "text", batches, copies=2 * len(model.cfg.text.layers) + 2)
        self.kept, self._solved = list(range(self.n_layers)), solved
        self._changed = dict[int, Layer]()
        self._before = dict[int, list[State]]()  # layer -> its input; number of layers -> the last output
        self._fill(self.kept)
        self._unpruned = dict(self._before) if solved else {}
        self.loss = self._loss()
        if not math.isfinite(self.loss):
            raise UserError(
                "greedy_loss: the loss of the unpruned model is not finite: check weights and records for NaN"
            )

    def load(self, number: int) -> Layer:
        """Load a layer, as it was repaired when layers behind it were removed."""
        return self._changed.get(number) or super().load(number)

    def embeds_of(self, batch: int) -> LayerEmbeds:
        """Return DeepStack features by position among the layers left, or per-layer embeddings by layer number."""
        by_number = self.model.cfg.text.block.layer_inputs or self.number not in self.kept
        return self.embeds[batch].of_layer(self.number if by_number else self.kept.index(self.number))

    def loss_without(self, layer: int) -> float:
        """Return the summed cross-entropy after removing one more layer; infinity if the layer cannot be removed."""
        cfg = self.model.cfg
        left = keep_layers(cfg.text.layers, [number for number in self.kept if number != layer])
        if len(left) < cfg.deepstack:
            return math.inf
        if why_no_class(cfg) is None and why_no_class(cfg.with_layers(left)) is not None:
            return math.inf
        trial = self._without(layer)[1]
        trial.walk(numbers=trial.kept[self.kept.index(layer) :])
        loss = trial._loss()
        return loss if math.isfinite(loss) else math.inf

    def remove(self, layer: int) -> None:
        """Remove a layer, and update the cached inputs of the layers behind it."""
        changed, closed = self._without(layer)
        if changed is not None:
            self._changed[changed.number] = changed
        behind = closed.kept[self.kept.index(layer) :]
        del self._before[layer]
        self._changed.pop(layer, None)
        self.kept, self.states = closed.kept, closed.states
        self._fill(behind)

    def _fill(self, numbers: Sequence[int]) -> None:
        """Recompute the cached inputs of the layers `numbers`, the last ones, from the stream at the first of them."""

        def remember(layer: Layer) -> Layer:
            self._before[layer.number] = list(self.states)
            return layer

        self.walk(remember, numbers)
        self._before[self.n_layers] = self.states

    def _without(self, removed: int) -> tuple[Layer | None, _Cut]:
        """Return the reconstructed layer before a removed one, or None, and the stream behind the removed one."""
        index, cut = self.kept.index(removed), self.at(removed, self._before[removed])
        cut.kept = [number for number in self.kept if number != removed]
        if not self._solved or index == 0:
            return None, cut
        number, after = self.kept[index - 1], [*cut.kept, self.n_layers][index]
        layer = super().load(number)  # with original weights: an earlier repair was for fewer removed layers
        unpruned = self.at(number, self._unpruned[number])
        unpruned.kept = list(range(self.n_layers))
        captured = unpruned.advance(layer, functools.partial(layer.run, capture=("statistics",)))
        statistics = [values["statistics"] for values in captured]
        targets = Targets([], [], [state.x for state in self._unpruned[after]], statistics)
        cut.number, cut.states = number, list(self._before[number])
        layer, _ = repair_writer(layer, cut, targets, module="down_proj")
        cut.advance(layer)
        return layer, cut

    def _loss(self) -> float:
        labels = [place_batch({"labels": batch.labels}, self.mesh)["labels"] for batch in self.batches]
        loss = functools.partial(_loss, self.model.params, cfg=self.model.cfg)
        return sum(float(total) for _, total in self.visit(loss, labels))


@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss(params: Any, rows: Rows, labels: jax.Array, *, cfg: Any) -> jax.Array:
    final = to_nnx(Model(params, cfg)).text.final_norm(rows.x)
    return cross_entropy_sum(final, head_of(params, cfg), labels, chunk=_CHUNK)


GREEDY_LOSS = Criterion(
    scores=("layers",),
    needs="labels",
    function=greedy_loss,
    options={"solved": False, "candidates": 6, "search": None},
)
