"""Training-free repair: least squares for the weights that a plan keeps, from a few thousand calibration tokens.

After pruning, what a layer adds to the residual stream is wrong, and so is the stream that earlier layers left. Both
are repaired where the layer writes to the stream: with x the input of `down_proj` (or `o_proj`) in the pruned model and
r the error of the stream, sum_t w_t |r_t - D^T x_t|^2 is minimised over a change D of the weight. No parameter is
added. The layer before a depth cut closes it: its target is the dense stream behind the cut.

Where a block adds a per-layer branch behind its MLP and scales its output (Gemma 4), the target is that of the stream
between MLP and branch, from which both make the dense stream.

If a norm follows the projection, what enters the norm is fitted: at the statistics of the dense model's output the norm
is an affine map, which scales x and r. The reported error is always that of the stream, computed with the norm itself.

The tower is reconstructed before the decoder, over the positions of all images with equal weight; the decoder then
reads the features of the reconstructed tower, and its dense stream those of the dense tower.

The residual streams of the dense and of the pruned model are on the hosts, float32[rows, seq, embed] each, of a tower
float32[images, positions, width] (2.4 MB an image of CLIP ViT-L at 336 pixels), and one more for each first layer to
whose output features of the tower are added (Qwen3-VL: three). Each process holds the rows of its devices, and sums are
reduced over the mesh. On the device are one layer of the dense and two of the pruned model, the activations of a batch,
and for one module at a time the sums G = sum w x x^T [in, in] and C = sum w x r^T [in, embed], of fitted and held-out
rows: 8 * in * (in + embed) bytes in all. Tokens are weighted by 1 / mean(h^2), the factor of the next norm: otherwise
the few tokens with a massive residual would dominate.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.parts import WRITERS as WRITERS_OF
from vlmprune_jax.core.settings import override
from vlmprune_jax.data.cache import ArrayCache, recorded
from vlmprune_jax.distributed.mesh import gather_to_host, use_mesh
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.context import WRITERS
from vlmprune_jax.models.params import param_shapes
from vlmprune_jax.models.vlm import Model, mesh_of, place_batch
from vlmprune_jax.prune.config import ReconstructConfig
from vlmprune_jax.prune.criteria.calibration import calibration_batches
from vlmprune_jax.prune.kept import KeptStack
from vlmprune_jax.prune.layers import Layer, run_block, streamed, to_devices, with_layers
from vlmprune_jax.prune.layerwise import replaced, train_layer
from vlmprune_jax.prune.plan import PrunePlan
from vlmprune_jax.prune.readers import READER_OF, can_read, reader_change
from vlmprune_jax.prune.ridge import RIDGES, Sums, add_into, held_out_errors
from vlmprune_jax.prune.ridge import change as solve
from vlmprune_jax.prune.steps import (
    STEPS,
    Step,
    embedded,
    entrance,
    names_of_rows,
    pass_all,
    pass_layers,
    pass_ours,
    wait_for,
)
from vlmprune_jax.prune.surgery import check_plan_is_for, trim_vocabulary

SolveReport = dict[str, Any]
READ_BELOW = 0.4  # share of the neurons that is left; above it readers gain nothing (SmolLM2: 0.3 % at 0.49)


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
) -> tuple[Model, list[SolveReport]]:
    """Repair the output projections of pruned layers by least squares, towards the unpruned model's residual stream.

    The weights are `down_proj` (fc2) of layers that lost neurons or precede a depth cut, and `o_proj` (dense, out_proj)
    of layers that lost heads, with their biases if the model has them, in every stack that the plan cuts. If enough
    neurons go, the weights that read the stream are repaired as well (`readers`), and with method "layerwise" each
    layer is then trained (`layerwise`). A change is accepted only if it reduces the error on held-out rows, so that few
    tokens do no harm.

    Args:
      pruned: the model that `plan` leaves of `teacher`, on one device or a mesh; weights on the host or in files
        (`hf.lazy.open_model`) go to the device one layer at a time.
      plan: the plan.
      teacher: the dense model, in the same place.
      batches: calibration batches as `score` takes them; labels, if present, tell answers from prompts.
      progress: called with the number of finished layers, out of `layers_to_solve`.
      cache: keeps solved changes, to continue after an interruption.
      config: settings; `options` override single ones.
      options: settings by name, see `ReconstructConfig`. Held-out rows are chosen by their content.

    Returns:
      The model, and for each of these weights: stack, layer (original number), module ("self_attn" or "mlp" for what
        a branch reads, "layer" for a trained one), ridge (None: unchanged, 0: trained), error_before and error_after of
        the stream behind it, on the held-out rows, relative to the stream; and the number of tokens, and of unknowns
        per output.

    Raises:
      UserError: models and plan that do not belong together, batches that do not fit, activations that are not finite.
    """
    config = override(ReconstructConfig() if config is None else config, options, "reconstruct")
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
    report, done = list[SolveReport](), itertools.count(1)
    with use_mesh(mesh):
        for stack in _stacks(plan):
            steps = STEPS[stack](checked, settings, names, pruned.cfg)
            _enter(steps, *(entrance(model, stack) for model in (teacher, pruned)))
            tick = lambda: None if progress is None else progress(next(done))  # noqa: E731
            solved, rows = _solve(stack, plan.stacks[stack], teacher, pruned, steps, cache, config, tick)
            pruned = with_layers(pruned, stack, solved)
            report += [{"stack": stack, **row} for row in rows]
    return pruned, report


def _enter(steps: Sequence[Step], teacher: Model, pruned: Model) -> None:
    """Compute the first layer's input and the DeepStack additions, for the unpruned and the pruned model."""
    for step, (x, added) in zip(steps, streamed(lambda step: embedded(step, teacher), steps), strict=True):
        step.dense, step.added_dense = x, added
    for step, (x, added) in zip(steps, streamed(lambda step: embedded(step, pruned), steps), strict=True):
        pairs = zip(step.added_dense, added, strict=True)
        same = all(bool(jnp.array_equal(to_devices(dense), to_devices(ours))) for dense, ours in pairs)
        step.ours, step.added_ours = x, step.added_dense if same else added  # of one tower: in memory once


def _solve(
    stack: str,
    kept: KeptStack,
    teacher: Model,
    pruned: Model,
    steps: Sequence[Step],
    cache: ArrayCache | None,
    config: ReconstructConfig,
    tick: Callable[[], None],
) -> tuple[dict[int, dict[str, np.ndarray]], list[SolveReport]]:
    """Solve for a stack's repaired weights; return {layer: {path: array}} and a report per weight."""
    solved, report, trains = dict[int, dict[str, np.ndarray]](), list[SolveReport](), False
    reads = _reads(config, kept)
    _advance(steps, teacher, stack, range(kept.kept_layers[0]), middle=False)
    for number, (first, end) in enumerate(_spans(kept)):
        before = [step.dense for step in steps] if reads else []
        _advance(steps, teacher, stack, range(first, end), middle=reads or "o_proj" in _modules(kept, number))
        layer = dataclasses.replace(Layer.of(pruned, stack, number), number=first)
        if reads:
            pass_all(steps)
        for module in WRITERS:
            key, lost = f"{stack}/{number}/{module}", module in _modules(kept, number)
            if reads and can_read(layer, READER_OF[module]):
                dense = before if module == "o_proj" else [step.middle for step in steps]
                read = functools.partial(_read, layer, module, steps, dense, number, lost=lost, refit=config.refits)
                change, row = _recorded(cache, f"{key}/reader", read)
                report.append({"layer": first, "module": READER_OF[module], **row, **_counts(layer, module, steps)})
                if change is not None:
                    layer, lost = layer.reading(READER_OF[module], change), True
            if lost:
                solve = functools.partial(solve_for, layer, module, steps, number, refit=config.refits)
                change, row = _recorded(cache, key, solve)
                report.append({"layer": first, "module": module, **row, **_counts(layer, module, steps)})
                if change is not None:
                    layer = layer.changed(module, change)
        trains = trains or (config.trains_layers and end - first > 1)
        pass_all(steps)
        if trains:
            train = functools.partial(train_layer, layer, steps, number)
            vector, row = _recorded(cache, f"{stack}/{number}/layer", train)
            report.append({"layer": first, "module": "layer", **row, **_counts(layer, "down_proj", steps)})
            if vector is not None:
                layer = replaced(layer, vector)
        if layer.changed_paths:
            solved[number] = layer.written
        wait_for(steps, functools.partial(pass_ours, layer, number))
        tick()
    return solved, report


def _reads(config: ReconstructConfig, kept: KeptStack) -> bool:
    """Return True if attention and MLP input projections are repaired as well as output projections."""
    left, whole = (
        sum(size for sizes in layers for axis, size in sizes.items() if WRITERS_OF[axis] == WRITERS[1])
        for layers in (kept.sizes, [kept.sizes_before[layer.index] for layer in kept.layers])
    )
    return config.readers == "auto" and left < READ_BELOW * whole


def _read(
    layer: Layer,
    module: str,
    steps: Sequence[Step],
    dense: Sequence[jax.Array],
    place: int,
    *,
    lost: bool,
    refit: bool,
) -> tuple[np.ndarray | None, SolveReport]:
    """Solve for the change of a branch's input; return None unless it lowers the held-out error.

    Both ways are compared after the writer is solved; without the change only if it `lost` something.
    """
    solution = reader_change(layer, READER_OF[module], steps, dense, place, refit=refit)
    alone = solve_for(layer, module, steps, place, refit=refit)[1]
    before = alone["error_after" if lost else "error_before"]
    if solution is not None:
        change, ridge = solution
        after = solve_for(layer.reading(READER_OF[module], change), module, steps, place, refit=refit)[1]["error_after"]
        if after < before:
            return change, {"ridge": ridge, "error_before": before, "error_after": after}
    return None, {"ridge": None, "error_before": before, "error_after": before}


def _counts(layer: Layer, module: str, steps: Sequence[Step]) -> SolveReport:
    path = layer.block.writers[module].projection
    unknowns = layer.params[f"{path}/weight"][0].size + (f"{path}/bias" in layer.params)
    return {"tokens": sum(int((step.weight > 0).sum()) for step in steps), "unknowns": unknowns}


def layers_to_solve(plan: PrunePlan) -> int:
    """Return the number of layers to reconstruct, for the progress bar."""
    return sum(len(plan.stacks[stack].layers) for stack in _stacks(plan))


def _stacks(plan: PrunePlan) -> list[str]:
    """Return the pruned stacks that reconstruction can repair, in the order of the forward pass."""
    order = [name for name in ("vision", "text") if name in plan.stacks]
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
    return [module for module in WRITERS if module in lost]


def _advance(steps: Sequence[Step], teacher: Model, stack: str, layers: range, *, middle: bool) -> None:
    """Run the unpruned model's residual streams through these layers; the last one waits for its rows."""
    for number in layers:
        if number > layers.start:
            pass_all(steps)
        first = number == layers.start
        wait_for(steps, functools.partial(_pass_dense, Layer.of(teacher, stack, number), first, first and middle))


def _pass_dense(layer: Layer, first: bool, middle: bool, step: Step) -> None:
    """Run a layer of the unpruned model; keep what the first layer's writers are solved for."""
    streams = layer.streams(step.dense, step.given(layer.number, dense=True))
    step.dense, step.shared_dense = streams.after, streams.shared
    if first:
        step.middle, step.statistics = streams.middle if middle else None, streams.statistics


def _recorded(
    cache: ArrayCache | None, key: str, solve: Callable[[], tuple[np.ndarray | None, SolveReport]]
) -> tuple[np.ndarray | None, SolveReport]:
    """Return a weight's correction (or None) and report, from the cache or newly computed (collective)."""

    def arrays() -> dict[str, np.ndarray]:
        change, row = solve()
        facts = [math.nan if row["ridge"] is None else row["ridge"], row["error_before"], row["error_after"]]
        return {key: np.asarray(facts), f"{key}/change": np.zeros(0) if change is None else change}

    stored = recorded(cache, [key, f"{key}/change"], arrays)
    ridge, before, after = stored[key].tolist()
    row = {"ridge": None if math.isnan(ridge) else ridge, "error_before": before, "error_after": after}
    return (None if row["ridge"] is None else stored[f"{key}/change"]), row


@functools.partial(jax.jit, static_argnames=("stack", "cfg", "module"))
def _sums(
    params: Any, x: Any, target: Any, weight: Any, statistics: Any, given: Any, *, stack: str, cfg: Any, module: str
) -> Any:
    want = (module, f"{module}_out", "middle")
    block, after, values = run_block(stack, cfg, params, x, given, want)
    residual = target - (values["middle"] if module == "o_proj" else after)
    read = values[module].reshape(*x.shape[:2], -1)
    if f"{block.writers[module].projection}/bias" in params:
        read = jnp.concatenate([read, jnp.ones_like(read[..., :1])], axis=-1)
    missing, out, factor = residual, values[f"{module}_out"], jnp.float32(1)
    if module == "down_proj" and block.scalar is not None:
        # fitted where it writes, before the per-layer branch and the layer's scale
        factor, ours = block.scalar, values["middle"] + block.follow(module, out)
        missing = (block.before_extra(target, given.added, ours) - ours) * factor
        read = read * factor
    if statistics is not None:
        # At the dense output's statistics the norm is an affine map: what enters it is fitted to the dense model's.
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
    layer: Layer, module: str, steps: Sequence[Step], place: int, *, refit: bool = True
) -> tuple[np.ndarray | None, SolveReport]:
    """Solve for a weight's correction by ridge regression; None if no ridge penalty lowers the held-out error.

    `place`: the layer's among those that are left. `refit`: solve again on all rows after the ridge is chosen.
    """
    fitted, held_out = ([step for step in steps if step.held_out == out] for out in (False, True))
    fit, held = (_total(layer, module, part, place) for part in (fitted, held_out))
    stream = layer.cfg.hidden_size * float(sum(step.weight.sum() for step in held_out))
    errors = np.asarray(gather_to_host(held_out_errors(fit, held, np.asarray(RIDGES, np.float32))), np.float64)
    best, before = int(np.nanargmin(np.append(errors, 0.0))), float(held.energy) / stream
    unchanged = {"ridge": None, "error_before": before, "error_after": before}
    if best == len(RIDGES):
        return None, unchanged
    after = before + float(errors[best]) / stream
    if layer.block.writers[module].norm is not None:  # the norm's statistics change with the weight: measure
        trial = layer.changed(module, np.array(gather_to_host(solve(fit, RIDGES[best]))))
        after = float(_total(trial, module, held_out, place).energy) / stream
        if after >= before:
            return None, unchanged
    change = solve(jax.tree.map(jnp.add, fit, held) if refit else fit, RIDGES[best])
    return np.array(gather_to_host(change)), {"ridge": RIDGES[best], "error_before": before, "error_after": after}


def _total(layer: Layer, module: str, steps: Sequence[Step], place: int) -> Sums:
    """Return the least-squares sums over all calibration rows."""
    totals, energies = None, np.float32(0)

    def add(step: Step) -> jax.Array:
        nonlocal totals
        streams = (step.ours, step.middle if module == "o_proj" else step.dense, step.statistics.get(module))
        x, target, statistics = jax.tree.map(to_devices, streams)
        weight, given = place_batch({"weight": step.weight}, layer.mesh)["weight"], step.given(place).placed(layer.mesh)
        sums = _sums(
            layer.params, x, target, weight, statistics, given, stack=layer.stack, cfg=layer.cfg, module=module
        )
        products = sums.gram, sums.cross
        totals = products if totals is None else add_into(totals, products)
        return sums.energy

    for step, sums_of_rows in pass_layers(steps, add):
        energy = np.asarray(sums_of_rows)
        wrong = [name for name, value in zip(step.names, energy, strict=False) if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"reconstruct: outputs of {module} in layer {layer.number} are not finite in "
                f"{', '.join(sorted(wrong)[:5])} of the calibration batches: check these records and the weights"
            )
        energies += energy.sum()
    assert totals is not None
    return Sums(*totals, energies)
