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
from vlmprune_jax.core.mesh.mesh import mesh_of, use_mesh
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.params import param_shapes
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
            stream = _Repair(stack, plan.stacks[stack], teacher, pruned, checked, cache, config)
            stream.walk(stream.repair, progress=lambda _: progress and progress(next(finished)))
            pruned = with_layers(pruned, stack, stream.changed)
            repairs += stream.repairs
    return pruned, repairs


def _check(pruned: Model, plan: PrunePlan, teacher: Model, config: ReconstructConfig) -> None:
    """Raise UserError for a plan that did not make `pruned` from `teacher`, or that has nothing for the method."""
    if config.method == "layerwise" and not any(kept.removed_layers for kept in plan.stacks.values()):
        raise UserError(
            'reconstruct.method="layerwise" needs a plan that removes layers (training layers one by one gains nothing '
            'after width pruning): set it to "least_squares"'
        )
    check_plan_is_for(teacher, plan)
    if param_shapes(plan.apply_to(teacher.cfg)) != param_shapes(pruned.cfg):
        raise UserError(
            "reconstruct: the pruned model was not made with this plan from this teacher: apply the plan to the teacher"
        )


class _Repair(LayerStream):
    """Stream through a pruned component that repairs its layers, in step with the unpruned component's stream."""

    def __init__(
        self,
        stack: str,
        kept: KeptStack,
        teacher: Model,
        pruned: Model,
        batches: Sequence[Arrays],
        cache: ArrayCache | None,
        config: ReconstructConfig,
    ):
        if stack == "text":
            grouped = row_batches(batches, vars(config))
        else:
            grouped = tower_batches(batches, vars(config), pruned.cfg, stack)
        super().__init__(pruned, stack, grouped)
        self.unpruned = LayerStream(teacher, stack, grouped)
        for number, pair in enumerate(zip(self.unpruned.embeds, self.embeds, strict=True)):
            leaves = zip(*map(jax.tree.leaves, pair), strict=True)
            if all(bool(jnp.array_equal(to_devices(a), to_devices(b))) for a, b in leaves):
                self.embeds[number] = self.unpruned.embeds[number]  # of a tower that both models have: in memory once
        self.cache, self.config, self.lost, self.spans = cache, config, _lost_modules(kept), _spans(kept)
        self.repairs, self.changed = list[dict[str, Any]](), dict[int, dict[str, np.ndarray]]()
        left, before = (
            sum(size for sizes in layers for axis, size in sizes.items() if WRITERS_OF[axis] == WRITERS[1])
            for layers in (kept.sizes, [kept.sizes_before[layer.index] for layer in kept.layers])
        )
        self.repairs_readers, self.trains = config.readers == "auto" and left < READ_BELOW * before, False

    def repair(self, loaded: Layer) -> Layer | None:
        """Repair one layer: attention, then MLP, each first its inputs and then its output; then train the layer."""
        lost, (first, end) = self.lost[loaded.number], self.spans[loaded.number]
        targets = self._targets(first, end, ("middle",) if self.repairs_readers or "o_proj" in lost else ())
        layer = dataclasses.replace(loaded, number=first)
        for module in WRITERS:
            if module in lost and module == "down_proj" and EXPERTS in layer.params:
                layer = self._repaired(module, repair_experts, layer, targets.after)
                continue
            before, options = layer, {"module": module, "refit": self.config.refits}
            if self.repairs_readers and hasattr(layer.block, norm_name(layer, module)):
                reader = READER_OF[module]
                layer = self._repaired(reader, repair_readers, layer, targets, lost=module in lost, **options)
            if module in lost or layer is not before:
                layer = self._repaired(module, repair_writer, layer, targets, **options)
        self.trains = self.trains or (self.config.method == "layerwise" and end - first > 1)
        if self.trains:
            layer = self._repaired("layer", train_layer, layer, targets.after)
        if layer.params is not loaded.params:
            self.changed[loaded.number] = layer.changes_from(loaded)
        return layer if loaded.number + 1 < self.n_layers else None  # nothing reads what the last layer adds

    def _repaired(
        self, name: str, repair: Callable[..., tuple[Layer, Solution]], layer: Layer, targets: Any, **options: Any
    ) -> Layer:
        """Return the layer after one repair, with changed parameters from the cache if they are there."""
        key = f"{self.stack}/{self.number}/{name}"
        keys = {path: f"{key}/{path}" for path in layer.params}

        def compute() -> dict[str, np.ndarray]:
            repaired, solution = repair(layer, self, targets, **options)
            arrays = dict.fromkeys(keys.values(), np.zeros(0))  # unchanged
            arrays |= {keys[path]: values for path, values in repaired.changes_from(layer).items()}
            return {key: np.frombuffer(msgspec.json.encode(solution), np.uint8), **arrays}

        stored = recorded(self.cache, [key, *keys.values()], compute)
        where, todo = f"the cached repair {key}", "remove the cache and run again"
        row = checked(parse_json(stored[key].tobytes(), where, todo), Solution, where, todo)
        self.repairs.append({"stack": self.stack, "layer": layer.number, "module": name, **row})
        changed = {path: stored[name] for path, name in keys.items() if stored[name].size}
        return layer.with_params(changed) if changed else layer

    def _targets(self, first: int, end: int, middle: tuple[str, ...]) -> Targets:
        """Run the unpruned model's layers up to `end`; return the targets for repairing layer `first`."""
        unpruned = self.unpruned
        unpruned.walk(numbers=range(unpruned.number, first))
        before = [state.x for state in unpruned.states] if self.repairs_readers else []
        layer = unpruned.load(first)
        captured = unpruned.advance(layer, functools.partial(layer.run, capture=("statistics", *middle)))
        unpruned.walk(numbers=range(first + 1, end))
        after, statistics = [state.x for state in unpruned.states], [values["statistics"] for values in captured]
        return Targets(before, [values.get("middle") for values in captured], after, statistics)


def layers_to_solve(plan: PrunePlan) -> int:
    """Return the number of layers to reconstruct, for the progress bar."""
    return sum(len(plan.stacks[stack].layers) for stack in _stacks(plan))


def _stacks(plan: PrunePlan) -> list[str]:
    """Return the pruned stacks that reconstruction can repair, in the order of the forward pass."""
    order = sorted(plan.stacks, key=lambda name: name == "text")  # towers first
    return [name for name in order if any(_lost_modules(plan.stacks[name]))]


def _spans(kept: KeptStack) -> list[tuple[int, int]]:
    """Return the original layers (start, stop) that each kept layer stands for: itself and removed ones after it."""
    return list(itertools.pairwise((*kept.kept_layers, len(kept.sizes_before))))


def _lost_modules(kept: KeptStack) -> list[set[str]]:
    """Return the names of the output projections to repair in each kept layer."""
    modules, fewer_experts = list[set[str]](), False
    for layer, (first, end) in zip(kept.layers, _spans(kept), strict=True):
        smaller = {axis for axis, size in layer.sizes.items() if size < kept.sizes_before[layer.index][axis]}
        lost = {WRITERS_OF[axis] for axis in smaller}
        if end - first > 1:
            lost.add(WRITERS[1])
        if fewer_experts:  # in an earlier layer: attention sees all tokens, which an expert does not
            lost.add(WRITERS[0])
        modules.append(lost & {*WRITERS})
        fewer_experts = fewer_experts or "experts" in smaller
    return modules
