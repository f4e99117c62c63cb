"""Training-free repair: least squares for the weights that a plan keeps, from a few thousand calibration tokens.

After pruning, what a layer adds to the residual stream is wrong, and so is the stream that earlier layers left. Both
are repaired where the layer writes to the stream: with x the input of `down_proj` (or `o_proj`) in the pruned model and
r the error of the stream, sum_t w_t |r_t - D^T x_t|^2 is minimised over a change D of the weight. No parameter is
added. The layer before a depth cut closes it: its target is the unpruned stream behind the cut.

Where a block adds a per-layer branch behind its MLP and scales its output (Gemma 4), the target is that of the stream
between MLP and branch, from which both make the unpruned stream.

If a norm follows the projection, what enters the norm is fitted: at the statistics of the unpruned model's output the
norm is an affine map, which scales x and r. The reported error is always that of the stream, computed with the norm
itself.

The tower is reconstructed before the decoder, over the positions of all images with equal weight; the decoder then
reads the features of the reconstructed tower, and its unpruned stream those of the unpruned tower.

The residual streams of the unpruned and of the pruned model are in memory (`stream`), float32[rows, seq, embed] each,
of a tower float32[images, positions, width] (2.4 MB an image of CLIP ViT-L at 336 pixels), and one more for each first
layer to whose output features of the tower are added (Qwen3-VL: three). Each process holds the rows of its devices, and
sums are reduced over the mesh. On the device are one layer of either model, the activations of a batch, and for one
module at a time the sums G = sum w x x^T [in, in] and C = sum w x r^T [in, embed], of fitted and held-out rows: 8 * in
* (in + embed) bytes in all. Tokens are weighted by 1 / mean(h^2), the factor of the next norm: otherwise the few tokens
with a massive residual would dominate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from vlmprune_jax.base.cache import ArrayCache, recorded
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import checked, parse_json
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.models.placement import mesh_of
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import WRITERS as WRITERS_OF
from vlmprune_jax.core.plans.kept import KeptStack
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.batches import row_batches, tower_batches
from vlmprune_jax.core.prune.calibration import Arrays, calibration_batches
from vlmprune_jax.core.prune.expert_repair import EXPERTS, repair_experts
from vlmprune_jax.core.prune.layers import Layer, to_devices, with_layers
from vlmprune_jax.core.prune.layerwise import train_layer
from vlmprune_jax.core.prune.least_squares import READER_OF, Solution, Targets, norm_name, repair_readers, repair_writer
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.stream import LayerStream
from vlmprune_jax.core.prune.surgery import check_plan_is_for, trim_vocabulary

READ_BELOW = 0.4  # kept share of neurons above which repairing readers gains nothing (SmolLM2: 0.3 % at 0.49)


def reconstruct(
    pruned: Model,
    plan: PrunePlan,
    teacher: Model,
    batches: Iterable[Any],
    config: ReconstructConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    cache: ArrayCache | None = None,
    **options: Any,
) -> tuple[Model, list[dict[str, Any]]]:
    """Repair the output projections of pruned layers by least squares, towards the unpruned model's residual stream.

    The repaired weights are `down_proj` (fc2) of layers that lost neurons or precede removed layers, and `o_proj`
    (dense, out_proj) of layers that lost heads, with their biases if any, in every stack that the plan prunes. If less
    than `READ_BELOW` of the neurons remain, the projections that read the residual stream are also repaired
    (`readers`). With method "layerwise", layers are then trained one by one (`layerwise`). A change is accepted only if
    it reduces the error on held-out rows, so that too few tokens do no harm.

    Args:
      pruned: the model that `plan` made from `teacher`, on one device or a mesh; weights on the host or in files
        (`hf.lazy.open_model`) are moved to the device one layer at a time.
      plan: the prune plan that made `pruned`.
      teacher: the unpruned model, on the same devices, on the host or in files.
      batches: calibration batches (see `score`); labels, if present, distinguish answers from prompts.
      progress: called with the number of finished layers, out of `layers_to_solve`.
      cache: keeps solved changes, to continue after an interruption.
      config: settings; `options` override single settings.
      options: settings by name, see `ReconstructConfig`. Held-out rows are chosen by their content.

    Returns:
      The repaired model, and one row per weight: stack, layer (original number), module ("o_proj",
        "down_proj"; "self_attn" or "mlp" for input projections; "layer" for a trained layer), ridge (None = unchanged,
        0 = trained), error_before and error_after (relative error of the residual stream on held-out rows), tokens, and
        unknowns per output.

    Raises:
      UserError: `plan` did not make `pruned` from `teacher`, the model cannot read a batch, or activations are not
        finite.
    """
    config = override(ReconstructConfig() if config is None else config, options, "reconstruct")
    if config.method == "none":
        return pruned, []
    _check(pruned, plan, teacher, config)
    teacher = trim_vocabulary(teacher, plan.vocabulary)
    checked = list(calibration_batches(batches, pruned.cfg, labels=False))
    repairs, finished = list[dict[str, Any]](), itertools.count(1)
    with use_mesh(mesh_of(pruned.params)):
        for stack in _stacks(plan):
            repair = _Repair(plan.stacks[stack], *_streams(stack, teacher, pruned, checked, config), cache, config)
            repair.stream.walk(repair.visit, progress=lambda _: progress and progress(next(finished)))
            pruned = with_layers(pruned, stack, repair.changed)
            repairs += repair.rows
    return pruned, repairs


def _check(pruned: Model, plan: PrunePlan, teacher: Model, config: ReconstructConfig) -> None:
    """Raise UserError for a plan that did not make `pruned` from `teacher`, or that has nothing for the method."""
    if config.trains_layers and not any(kept.removed_layers for kept in plan.stacks.values()):
        raise UserError(
            'reconstruct.method="layerwise" needs a plan that removes layers (training layers one by one gains nothing '
            'after width pruning): set it to "least_squares"'
        )
    check_plan_is_for(teacher, plan)
    if param_shapes(plan.apply_to(teacher.cfg)) != param_shapes(pruned.cfg):
        raise UserError(
            "reconstruct: the pruned model was not made with this plan from this teacher: apply the plan to the teacher"
        )


def _streams(
    stack: str, teacher: Model, pruned: Model, checked: Sequence[Arrays], config: ReconstructConfig
) -> tuple[LayerStream, LayerStream]:
    """Return the streams of the unpruned and of the pruned model through a component, at the first layer.

    Additional embeddings of both models are in memory once if they come from one tower.
    """
    settings = {**config.by_name, "held_out": config.held_out}
    is_text, cfg = stack == "text", pruned.cfg
    grouped = row_batches(checked, settings) if is_text else tower_batches(checked, settings, cfg, stack)
    unpruned, stream = LayerStream(teacher, stack, grouped), LayerStream(pruned, stack, grouped)
    for number, pair in enumerate(zip(unpruned.embeds, stream.embeds, strict=True)):
        leaves = zip(*map(jax.tree.leaves, pair), strict=True)
        if all(bool(jnp.array_equal(to_devices(a), to_devices(b))) for a, b in leaves):
            stream.embeds[number] = unpruned.embeds[number]
    return unpruned, stream


class _Repair:
    """Visitor of a pruned component's layers that repairs them, in step with the unpruned model."""

    def __init__(
        self,
        kept: KeptStack,
        unpruned: LayerStream,
        stream: LayerStream,
        cache: ArrayCache | None,
        config: ReconstructConfig,
    ):
        self.kept, self.unpruned, self.stream, self.cache, self.config = kept, unpruned, stream, cache, config
        self.rows, self.changed = list[dict[str, Any]](), dict[int, dict[str, np.ndarray]]()
        self._reads, self._trains = _reads(config, kept), False

    def visit(self, loaded: Layer) -> Layer | None:
        """Repair one layer: attention, then MLP, each first its inputs and then its output; then train the layer."""
        number, lost, config = loaded.number, _lost_modules(self.kept, loaded.number), self.config
        first, end = _spans(self.kept)[number]
        targets = self._targets(first, end, "middle" if self._reads or "o_proj" in lost else None)
        layer = dataclasses.replace(loaded, number=first)
        for module in WRITERS:
            if module in lost and module == "down_proj" and EXPERTS in layer.params:
                layer = self._once(module, repair_experts, layer, targets.after)
                continue
            before, options = layer, {"module": module, "refit": config.refits}
            if self._reads and hasattr(layer.block, norm_name(layer, module)):
                layer = self._once(READER_OF[module], repair_readers, layer, targets, lost=module in lost, **options)
            if module in lost or layer is not before:
                layer = self._once(module, repair_writer, layer, targets, **options)
        self._trains = self._trains or (config.trains_layers and end - first > 1)
        if self._trains:
            layer = self._once("layer", train_layer, layer, targets.after)
        if layer.params is not loaded.params:
            self.changed[number] = layer.changes_from(loaded)
        return layer if number + 1 < self.stream.n_layers else None  # nothing reads what the last layer adds

    def _once(
        self, name: str, repair: Callable[..., tuple[Layer, Solution]], layer: Layer, targets: Any, **options: Any
    ) -> Layer:
        """Return the layer after one repair, with changed parameters from the cache if they are there."""
        key = f"{self.stream.stack}/{self.stream.number}/{name}"
        keys = {path: f"{key}/{path}" for path in layer.params}

        def compute() -> dict[str, np.ndarray]:
            repaired, solution = repair(layer, self.stream, targets, **options)
            arrays = dict.fromkeys(keys.values(), np.zeros(0))  # unchanged
            arrays |= {keys[path]: values for path, values in repaired.changes_from(layer).items()}
            return {key: np.frombuffer(msgspec.json.encode(solution), np.uint8), **arrays}

        stored = recorded(self.cache, [key, *keys.values()], compute)
        where, todo = f"the cached repair {key}", "remove the cache and run again"
        row = checked(parse_json(stored[key].tobytes(), where, todo), Solution, where, todo)
        self.rows.append({"stack": self.stream.stack, "layer": layer.number, "module": name, **row})
        changed = {path: stored[name] for path, name in keys.items() if stored[name].size}
        return layer.with_params(changed) if changed else layer

    def _targets(self, first: int, end: int, middle: str | None) -> Targets:
        """Run the unpruned model's layers up to `end`; return the targets for repairing layer `first`."""
        unpruned = self.unpruned
        unpruned.walk(numbers=range(unpruned.number, first))
        before = [state.x for state in unpruned.states] if self._reads else []
        layer, capture = unpruned.load(first), ("statistics", *((middle,) if middle else ()))
        captured = unpruned.advance(layer, functools.partial(layer.run, capture=capture))
        unpruned.walk(numbers=range(first + 1, end))
        after, statistics = [state.x for state in unpruned.states], [values["statistics"] for values in captured]
        return Targets(before, [values.get("middle") for values in captured], after, statistics)


def _reads(config: ReconstructConfig, kept: KeptStack) -> bool:
    """Return True if attention and MLP input projections are repaired as well as output projections."""
    left, whole = (
        sum(size for sizes in layers for axis, size in sizes.items() if WRITERS_OF[axis] == WRITERS[1])
        for layers in (kept.sizes, [kept.sizes_before[layer.index] for layer in kept.layers])
    )
    return config.readers == "auto" and left < READ_BELOW * whole


def layers_to_solve(plan: PrunePlan) -> int:
    """Return the number of layers to reconstruct, for the progress bar."""
    return sum(len(plan.stacks[stack].layers) for stack in _stacks(plan))


def _stacks(plan: PrunePlan) -> list[str]:
    """Return the pruned stacks that reconstruction can repair, in the order of the forward pass."""
    order = sorted(plan.stacks, key=lambda name: name == "text")  # towers first
    kept = plan.stacks
    return [name for name in order if any(_lost_modules(kept[name], i) for i in range(len(kept[name].layers)))]


def _spans(kept: KeptStack) -> list[tuple[int, int]]:
    """Return the original layers (start, stop) that each kept layer stands for: itself and removed ones after it."""
    return list(itertools.pairwise((*kept.kept_layers, len(kept.sizes_before))))


def _lost_modules(kept: KeptStack, number: int) -> set[str]:
    """Return the names of a layer's output projections to repair."""
    layer, (first, end) = kept.layers[number], _spans(kept)[number]
    before, cut = kept.sizes_before[layer.index], end - first > 1
    lost = {WRITERS_OF[axis] for axis, size in layer.sizes.items() if size < before[axis]}
    lost |= {WRITERS[1]} if cut else set()
    earlier = zip(kept.layers[:number], kept.sizes, strict=False)
    if any(sizes.get("experts", 0) < kept.sizes_before[x.index].get("experts", 0) for x, sizes in earlier):
        lost |= {WRITERS[0]}  # sees all tokens, which an expert does not
    return lost & {*WRITERS}
