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

The residual streams of the unpruned and of the pruned model are in memory (`walk`), float32[rows, seq, embed] each, of
a tower float32[images, positions, width] (2.4 MB an image of CLIP ViT-L at 336 pixels), and one more for each first
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
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.cache import ArrayCache, recorded
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.mesh.mesh import gather_to_host, use_mesh
from vlmprune_jax.core.mesh.rules import constrain
from vlmprune_jax.core.models.context import WRITERS
from vlmprune_jax.core.models.params import param_shapes
from vlmprune_jax.core.models.placement import mesh_of
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.part import WRITERS as WRITERS_OF
from vlmprune_jax.core.plans.kept import KeptStack
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.batches import CalibrationBatch, names_of_rows, stack_batches
from vlmprune_jax.core.prune.calibration import calibration_batches
from vlmprune_jax.core.prune.expert_repair import has_experts, repair_experts, with_experts
from vlmprune_jax.core.prune.layers import Layer, Rows, run_block, to_devices, with_layers
from vlmprune_jax.core.prune.layerwise import replaced, train_layer
from vlmprune_jax.core.prune.readers import READER_OF, can_read, reader_change
from vlmprune_jax.core.prune.reconstruct_config import ReconstructConfig
from vlmprune_jax.core.prune.ridge import Sums, best_ridge, total_sums
from vlmprune_jax.core.prune.ridge import change as solve
from vlmprune_jax.core.prune.surgery import check_plan_is_for, trim_vocabulary
from vlmprune_jax.core.prune.walk import LayerStream

RepairRow = dict[str, Any]
# Numbers in the row of a weight; experts alone have the last two of their own.
_NUMBERS = ("error_before", "error_after", "tokens", "unknowns")
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
) -> tuple[Model, list[RepairRow]]:
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
    if config.trains_layers and not any(kept.removed_layers for kept in plan.stacks.values()):
        raise UserError(
            'reconstruct.method="layerwise" needs a plan that removes layers (training layers one by one gains nothing '
            'after width pruning): set it to "least_squares"'
        )
    settings = {**config.by_name, "held_out": config.held_out}
    check_plan_is_for(teacher, plan)
    if param_shapes(plan.apply_to(teacher.cfg)) != param_shapes(pruned.cfg):
        raise UserError(
            "reconstruct: the pruned model was not made with this plan from this teacher: apply the plan to the teacher"
        )
    teacher, mesh = trim_vocabulary(teacher, plan.vocabulary), mesh_of(pruned.params)
    batches = list(batches)
    checked = list(calibration_batches(batches, pruned.cfg, labels=False))
    names = names_of_rows(batches, checked)
    repairs, done = list[RepairRow](), itertools.count(1)
    with use_mesh(mesh):
        for stack in _stacks(plan):
            streams = _streams(teacher, pruned, stack, stack_batches(checked, settings, names, pruned.cfg, stack))
            tick = lambda: None if progress is None else progress(next(done))  # noqa: E731
            solved, rows = _solve(plan.stacks[stack], *streams, cache, config, tick)
            pruned = with_layers(pruned, stack, solved)
            repairs += [{"stack": stack, **row} for row in rows]
    return pruned, repairs


def _streams(
    teacher: Model, pruned: Model, stack: str, batches: Sequence[CalibrationBatch]
) -> tuple[LayerStream, LayerStream]:
    """Return the calibration batches at the first layer of the unpruned and of the pruned model."""
    unpruned, stream = LayerStream(teacher, stack, batches), LayerStream(pruned, stack, batches)
    for at, pair in enumerate(zip(unpruned.embeds, stream.embeds, strict=True)):
        if all(
            bool(jnp.array_equal(to_devices(a), to_devices(b)))
            for a, b in zip(*map(jax.tree.leaves, pair), strict=True)
        ):
            stream.embeds[at] = unpruned.embeds[at]  # of one tower: in memory once
    return unpruned, stream


class Targets(NamedTuple):
    """Residual streams of the unpruned model for each batch, which a repaired layer should reproduce."""

    before: Sequence[jax.Array]
    """Stream at the layer's input; () if input projections are not repaired."""

    middle: Sequence[Any]
    """Stream between the layer's attention and MLP; None if no repair needs it."""

    after: Sequence[jax.Array]
    """Stream after the layer and the removed layers that follow it."""

    statistics: Sequence[dict[str, jax.Array]]
    """Norm statistics of the output projections, see `Layer.run`."""


def _solve(
    kept: KeptStack,
    unpruned: LayerStream,
    stream: LayerStream,
    cache: ArrayCache | None,
    config: ReconstructConfig,
    tick: Callable[[], None],
) -> tuple[dict[int, dict[str, np.ndarray]], list[RepairRow]]:
    """Solve for a stack's repaired weights; return {layer: {path: array}} and a row per weight.

    `unpruned`, `stream`: residual streams of the unpruned and of the pruned model.
    """
    solved, repairs, trains = dict[int, dict[str, np.ndarray]](), list[RepairRow](), False
    for number in range(kept.kept_layers[0]):
        unpruned.advance(unpruned.layer(number), number)
    for number, (first, end) in enumerate(_spans(kept)):
        targets = _targets(unpruned, first, end, _modules(kept, number), reads=_reads(config, kept))
        layer = dataclasses.replace(stream.layer(number), number=first)
        for module in WRITERS:
            key, lost = f"{stream.stack}/{number}/{module}", module in _modules(kept, number)
            if lost and has_experts(layer, module):
                repair = functools.partial(repair_experts, layer, stream, number, targets.after)
                change, row = _recorded(cache, key, repair)
                repairs.append({"layer": first, "module": module, **row})
                layer, lost = layer if change is None else with_experts(layer, change), False
            elif targets.before and can_read(layer, READER_OF[module]):
                read = functools.partial(_read, layer, module, stream, number, targets, lost, config.refits)
                change, row = _recorded(cache, f"{key}/reader", read)
                row |= _counts(layer, module, stream)
                repairs.append({"layer": first, "module": READER_OF[module], **row})
                if change is not None:
                    layer, lost = layer.reading(READER_OF[module], change), True
            if lost:
                solution = functools.partial(solve_for, layer, module, stream, number, targets, refit=config.refits)
                change, row = _recorded(cache, key, solution)
                repairs.append({"layer": first, "module": module, **row, **_counts(layer, module, stream)})
                if change is not None:
                    layer = layer.changed(module, change)
        trains = trains or (config.trains_layers and end - first > 1)
        if trains:
            train = functools.partial(train_layer, layer, stream, number, targets.after)
            vector, row = _recorded(cache, f"{stream.stack}/{number}/layer", train)
            repairs.append({"layer": first, "module": "layer", **row, **_counts(layer, "down_proj", stream)})
            if vector is not None:
                layer = replaced(layer, vector)
        if layer.changed_paths:
            solved[number] = layer.written
        if number + 1 < len(kept.layers):
            stream.advance(layer, number)
        tick()
    return solved, repairs


def _targets(unpruned: LayerStream, first: int, end: int, modules: Sequence[str], *, reads: bool) -> Targets:
    """Run the unpruned model's layers from `first` up to `end`; return the targets for repairing layer `first`."""
    before = [state.x for state in unpruned.states] if reads else []
    capture = ("statistics", "middle") if reads or "o_proj" in modules else ("statistics",)
    captured = unpruned.advance(unpruned.layer(first), first, capture)
    for removed in range(first + 1, end):
        unpruned.advance(unpruned.layer(removed), removed)
    after, statistics = [state.x for state in unpruned.states], [values["statistics"] for values in captured]
    return Targets(before, [values.get("middle") for values in captured], after, statistics)


def _reads(config: ReconstructConfig, kept: KeptStack) -> bool:
    """Return True if attention and MLP input projections are repaired as well as output projections."""
    left, whole = (
        sum(size for sizes in layers for axis, size in sizes.items() if WRITERS_OF[axis] == WRITERS[1])
        for layers in (kept.sizes, [kept.sizes_before[layer.index] for layer in kept.layers])
    )
    return config.readers == "auto" and left < READ_BELOW * whole


def _read(
    layer: Layer, module: str, stream: LayerStream, place: int, targets: Targets, lost: bool, refit: bool
) -> tuple[np.ndarray | None, RepairRow]:
    """Solve for a change of attention's or the MLP's input; return None unless the held-out error falls.

    The errors with and without the change are compared after least squares for the output projection. Without the
    change, the output projection is solved only if it `lost` heads or neurons.
    """
    before_norm = targets.before if module == "o_proj" else targets.middle
    solution = reader_change(layer, READER_OF[module], stream, place, before_norm, refit=refit)
    alone = solve_for(layer, module, stream, place, targets, refit=refit)[1]
    before = alone["error_after" if lost else "error_before"]
    if solution is not None:
        change, ridge = solution
        reading = layer.reading(READER_OF[module], change)
        after = solve_for(reading, module, stream, place, targets, refit=refit)[1]["error_after"]
        if after < before:
            return change, {"ridge": ridge, "error_before": before, "error_after": after}
    return None, {"ridge": None, "error_before": before, "error_after": before}


def _counts(layer: Layer, module: str, stream: LayerStream) -> RepairRow:
    path = layer.block.writers[module].projection
    unknowns = layer.params[f"{path}/weight"][0].size + (f"{path}/bias" in layer.params)
    return {"tokens": sum(int((batch.weight > 0).sum()) for batch in stream.batches), "unknowns": unknowns}


def layers_to_solve(plan: PrunePlan) -> int:
    """Return the number of layers to reconstruct, for the progress bar."""
    return sum(len(plan.stacks[stack].layers) for stack in _stacks(plan))


def _stacks(plan: PrunePlan) -> list[str]:
    """Return the pruned stacks that reconstruction can repair, in the order of the forward pass."""
    order = sorted(plan.stacks, key=lambda name: name == "text")  # towers first
    return [name for name in order if any(_modules(plan.stacks[name], i) for i in range(len(plan.stacks[name].layers)))]


def _spans(kept: KeptStack) -> list[tuple[int, int]]:
    """Return the original layers (start, stop) that each kept layer stands for: itself and removed ones after it."""
    return list(itertools.pairwise((*kept.kept_layers, len(kept.sizes_before))))


def _modules(kept: KeptStack, number: int) -> list[str]:
    """Return the names of a layer's output projections to repair, in the order of the forward pass."""
    layer, (first, end) = kept.layers[number], _spans(kept)[number]
    before, cut = kept.sizes_before[layer.index], end - first > 1
    lost = {WRITERS_OF[axis] for axis, size in layer.sizes.items() if size < before[axis]}
    lost |= {WRITERS[1]} if cut else set()
    earlier = zip(kept.layers[:number], kept.sizes, strict=False)
    if any(sizes.get("experts", 0) < kept.sizes_before[x.index].get("experts", 0) for x, sizes in earlier):
        lost |= {WRITERS[0]}  # sees all tokens, which an expert does not
    return [module for module in WRITERS if module in lost]


def _recorded(
    cache: ArrayCache | None, key: str, solve: Callable[[], tuple[np.ndarray | None, RepairRow]]
) -> tuple[np.ndarray | None, RepairRow]:
    """Return a weight's correction (or None) and row, from the cache or newly computed (collective)."""

    def arrays() -> dict[str, np.ndarray]:
        change, row = solve()
        facts = [math.nan if row["ridge"] is None else row["ridge"], *(row.get(name, math.nan) for name in _NUMBERS)]
        return {key: np.asarray(facts), f"{key}/change": np.zeros(0) if change is None else change}

    stored = recorded(cache, [key, f"{key}/change"], arrays)
    ridge, *numbers = stored[key].tolist()
    row: RepairRow = {name: value for name, value in zip(_NUMBERS, numbers, strict=False) if not math.isnan(value)}
    row |= {name: int(row[name]) for name in _NUMBERS[2:] if name in row}
    row["ridge"] = None if math.isnan(ridge) else ridge
    return (None if row["ridge"] is None else stored[f"{key}/change"]), row


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "module"))
def _sums(
    params: Any, x: Any, weight: Any, given: Any, target: Any, statistics: Any, *, stack: str, cfg: Any, module: str
) -> Sums:
    capture = (module, f"{module}_out", "middle")
    block, after, values = run_block(stack, cfg, params, x, given, capture)
    residual = target - (values["middle"] if module == "o_proj" else after)
    read = values[module].reshape(*x.shape[:2], -1)
    if f"{block.writers[module].projection}/bias" in params:
        read = jnp.concatenate([read, jnp.ones_like(read[..., :1])], axis=-1)
    missing, out, factor = residual, values[f"{module}_out"], jnp.float32(1)
    if module == "down_proj" and block.scalar is not None:
        # fitted where it writes, before the per-layer branch and the layer's scale
        factor, hidden_pruned = block.scalar, values["middle"] + block.follow(module, out)
        missing = (block.before_extra(target, given.embeds.per_layer_embeds, hidden_pruned) - hidden_pruned) * factor
        read = read * factor
    if statistics is not None:
        # At the unpruned output's statistics the norm is an affine map: what enters it is fitted to the unpruned one.
        missing = missing + block.follow(module, out) * factor - block.follow(module, out, statistics) * factor
        read = read * statistics[..., 1:]
    # where, not products: padding may hold anything, and NaN * 0 is NaN
    counts = weight[..., None] > 0
    read, missing, residual = (jnp.where(counts, array, 0.0) for array in (read, missing, residual))
    scale = jnp.where(weight > 0, weight / jnp.mean(target * target, axis=-1), 0.0)
    weighted = read * scale[..., None]
    gram = jnp.einsum("bsi,bsj->ij", weighted, read, precision="highest")
    cross = jnp.einsum("bsi,bse->ie", weighted, missing, precision="highest")
    energy = jnp.sum(scale * jnp.sum(residual * residual, axis=-1), axis=-1)
    return Sums(constrain(gram, ("mlp", None)), constrain(cross, ("mlp", None)), constrain(energy, ()))


def solve_for(
    layer: Layer, module: str, stream: LayerStream, place: int, targets: Targets, *, refit: bool = True
) -> tuple[np.ndarray | None, RepairRow]:
    """Solve for a weight's correction by ridge regression; None if no ridge penalty lowers the held-out error.

    `place`: the layer's number among the remaining layers. `refit`: solve again on all rows after choosing the penalty.
    """
    fit, held = (_total(layer, module, stream, place, targets, held_out) for held_out in (False, True))
    weight = layer.cfg.hidden_size * float(sum(batch.weight.sum() for batch in stream.batches if batch.held_out))
    best, before = best_ridge(fit, held), float(held.energy) / weight
    unchanged = {"ridge": None, "error_before": before, "error_after": before}
    if best is None:
        return None, unchanged
    ridge, difference = best
    after = before + difference / weight
    if layer.block.writers[module].norm is not None:  # the norm's statistics change with the weight: measure
        trial = layer.changed(module, np.array(gather_to_host(solve(fit, ridge))))
        after = float(_total(trial, module, stream, place, targets, True).energy) / weight
        if after >= before:
            return None, unchanged
    change = solve(jax.tree.map(jnp.add, fit, held) if refit else fit, ridge)
    return np.array(gather_to_host(change)), {"ridge": ridge, "error_before": before, "error_after": after}


def _total(layer: Layer, module: str, stream: LayerStream, place: int, targets: Targets, held_out: bool) -> Sums:
    """Return the least-squares sums over fitted or held-out calibration rows."""
    target = targets.middle if module == "o_proj" else targets.after
    statistics = [arrays.get(module) for arrays in targets.statistics]

    def sums(rows: Rows, target: jax.Array, statistics: jax.Array | None) -> Sums:
        return _sums(layer.params, *rows, target, statistics, stack=layer.stack, cfg=layer.cfg, module=module)

    what = f"outputs of {module} in layer {layer.number}"
    return total_sums(stream, place, held_out, sums, target, statistics, what=what)
