"""Whole layers by greedy search: each round removes the layer without which the labels are predicted best.

Each round runs the calibration rows from the layer on trial to the end; the inputs of every kept layer stay on the
hosts, float32[rows, seq, embed]. After the first round only the layers that cost least at their last trial are tried
again, since removing one layer seldom makes another cheaper. `solved` closes every trial cut as `reconstruct` would
(least squares in the layer before it), and so searches for the best model after reconstruction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.cache import ArrayCache, recorded
from vlmprune_jax.distributed.mesh import use_mesh
from vlmprune_jax.families.decoders import layer_problem
from vlmprune_jax.models.vlm import Model, head_of, mesh_of, place_batch, to_nnx
from vlmprune_jax.models.vocabulary import cross_entropy_sum
from vlmprune_jax.prune.config import ReconstructConfig
from vlmprune_jax.prune.criteria.calibration import Arrays
from vlmprune_jax.prune.criteria.criterion import Criterion, Parts
from vlmprune_jax.prune.layers import Layer, Shared, streamed, to_devices
from vlmprune_jax.prune.reconstruction import solve_for
from vlmprune_jax.prune.steps import Step, embedded, row_steps

_CHUNK = 256  # positions whose float32 logits exist at once
States = list[tuple[jax.Array, Shared]]  # of the steps: stream float32[rows, seq, embed], keys for later layers


def greedy_loss(
    model: Model,
    batches: Iterable[Arrays],
    progress: Callable[[int], None] | None,
    *,
    solved: bool,
    candidates: int,
    search: int | None,
    cache: ArrayCache | None,
) -> Parts:
    """Return the order in which greedy search removes layers by smallest increase of cross-entropy, float64[n_layers].

    Args:
      batches: with labels (-100 ignored, not shifted).
      progress: called after each trial with the number of removed layers.
      solved: close every cut by least squares before it is judged.
      candidates: number of layers tried in each round but the first, those with the lowest cost at their last trial.
      search: number of layers to search for, default half; the others follow by their last cost.
      cache: keeps the loss of every trial, for an interrupted search to continue from.

    Raises UserError for options out of range, too few rows to solve for, or a loss that is not finite.
    """
    n_layers = len(model.cfg.text.layers)
    most = n_layers - max(1, model.cfg.deepstack)  # features of the tower go to so many layers
    rounds = min(n_layers // 2, most) if search is None else search
    if not 0 <= rounds <= most or candidates < 1:
        raise UserError(
            f"greedy_loss: search={search} must be at most {most} of the {n_layers} layers and candidates={candidates} "
            "at least 1"
        )
    if mesh_of(model.params) is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    with use_mesh(mesh_of(model.params)):
        cut = _Cut(model, row_steps(list(batches), dataclasses.asdict(ReconstructConfig())), solved)
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
    return {"importance": importance}


class _Cut:
    """Model during greedy search: layers removed so far, and the cached input of every remaining layer."""

    def __init__(self, model: Model, steps: Sequence[Step], solved: bool):
        self.kept = list(range(len(model.cfg.text.layers)))
        self._model, self._steps, self._solved = model, steps, solved
        self._changed = dict[int, Layer]()
        for step, (x, added) in zip(steps, streamed(lambda step: embedded(step, model), steps), strict=True):
            step.ours, step.added_ours = x, added
        self._before = dict[int, States]()
        self._fill(0, [(step.ours, {}) for step in steps])
        self._dense = dict(self._before) if solved else {}
        self.loss = self._loss(self._before[len(self.kept)])
        if not math.isfinite(self.loss):
            raise UserError(
                "greedy_loss: the loss of the unpruned model is not finite: check weights and records for NaN"
            )

    def loss_without(self, layer: int) -> float:
        """Return the summed cross-entropy if one more layer is removed; infinity if this is not possible."""
        place, text = self.kept.index(layer), self._model.cfg.text
        left = [text.layers[number] for number in self.kept if number != layer]
        if layer_problem(text) is None and layer_problem(text.with_layers(left)) is not None:
            return math.inf
        _, x = self._closed(place)
        for now, number in enumerate(self.kept[place + 1 :], start=place):
            x = self._run(self._layer(number), self._at(number, now), x)
        loss = self._loss(x)
        return loss if math.isfinite(loss) else math.inf

    def remove(self, layer: int) -> None:
        """Remove a layer, and update the cached inputs of the layers behind it."""
        place = self.kept.index(layer)
        changed, x = self._closed(place)
        if changed is not None:
            self._changed[changed.number] = changed
        del self.kept[place], self._before[layer]
        self._changed.pop(layer, None)
        self._fill(place, x)

    def _fill(self, place: int, x: States) -> None:
        """Recompute the cached inputs of all layers from index `place` on."""
        for now, number in enumerate(self.kept[place:], start=place):
            self._before[number] = x
            x = self._run(self._layer(number), self._at(number, now), x)
        self._before[len(self._model.cfg.text.layers)] = x

    def _closed(self, place: int) -> tuple[Layer | None, States]:
        """Reconstruct the layer before a removed one; return it (or None) and the residual stream after the removal."""
        x = self._before[self.kept[place]]
        if not self._solved or place == 0:
            return None, x
        before, after = self.kept[place - 1], [*self.kept[place + 1 :], len(self._model.cfg.text.layers)][0]
        for step, ours, dense in zip(self._steps, self._before[before], self._dense[after], strict=True):
            (step.ours, step.shared_ours), (step.dense, _) = ours, dense
        layer = Layer.of(self._model, "text", before)  # not as an earlier cut has changed it: this one is wider
        for step, (stream, step.shared_dense) in zip(self._steps, self._dense[before], strict=True):
            step.statistics = layer.streams(stream, step.given(before, dense=True)).statistics
        change, _ = solve_for(layer, "down_proj", self._steps, self._at(before, place - 1))
        layer = layer if change is None else layer.changed("down_proj", change)
        return layer, self._run(layer, self._at(before, place - 1), self._before[before])

    def _layer(self, number: int) -> Layer:
        return self._changed.get(number) or Layer.of(self._model, "text", number)

    def _at(self, number: int, place: int) -> int:
        """Return the index under which `Step.given` finds a layer's DeepStack features or per-layer embeddings.

        Deepstack features are added to the first layers that are left.
        """
        return number if self._model.cfg.text.block.layer_inputs else place

    def _run(self, layer: Layer, at: int, x: States) -> States:
        """Run a layer on all calibration rows; return the residual streams after it."""

        def run(pair: tuple[tuple[jax.Array, Shared], Step]) -> tuple[jax.Array, Shared]:
            (stream, shared), step = pair
            return layer.run(stream, step.given(at)._replace(shared=shared))

        return list(streamed(run, zip(x, self._steps, strict=True)))

    def _loss(self, x: States) -> float:
        model = self._model

        def loss(pair: tuple[tuple[jax.Array, Shared], Step]) -> jax.Array:
            labels = place_batch({"labels": pair[1].labels}, mesh_of(model.params))["labels"]
            return _loss(model.params, to_devices(pair[0][0]), labels, cfg=model.cfg)

        return sum(map(float, streamed(loss, zip(x, self._steps, strict=True))))


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
