"""Training-free repair: least squares around the weights that a plan kept, from a few thousand calibration tokens.

After pruning, what a layer adds to the residual stream is wrong in itself and in what earlier layers left it. Both can
be mended where the layer writes to the stream: with x the input of `down_proj` (or `o_proj`) in the pruned model and r
what then still misses in the stream, sum_t w_t |r_t - D^T x_t|^2 is minimised over a change D of the weight. No
parameter is added. Depth cuts are closed by the layer before them, whose target is the dense stream behind the cut.

A tower is solved for before the decoder, over the positions of all images, which count alike; the decoder then reads
what the solved tower sees, and its dense stream what the dense tower sees.

Layer by layer two residual streams, the dense model's and the pruned one's, lie on the host, float32[rows, seq, embed]
each, of a tower float32[images, positions, width] (2.4 MB an image of CLIP ViT-L at 336 pixels). On the device are one
layer of either, the activations of a batch, and for one module at a time the sums G = sum w x x^T [in, in] and
C = sum w x r^T [in, embed], of the fitted and of the held-out rows: 8 * in * (in + embed) bytes in all. Tokens are
weighted by 1 / mean(h^2), by which the next norm divides anyway: otherwise the few tokens with a massive residual would
decide everything.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.checks import with_defaults
from vlmprune_jax.config import IGNORED, ModelConfig
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.distributed.mesh import whole, within
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.decoder import TAP_INPUTS
from vlmprune_jax.models.params import param_shapes
from vlmprune_jax.models.vlm import Model, mesh_of, place_batch, to_nnx
from vlmprune_jax.prune.criteria.activations import real_images
from vlmprune_jax.prune.criteria.calibration import ANSWER, IMAGE, PADDING, PROMPT, Arrays, calibration_batches
from vlmprune_jax.prune.layers import STREAM, Layer, block, with_layers
from vlmprune_jax.prune.plan import KeptStack, PrunePlan
from vlmprune_jax.prune.ridge import RIDGES, Sums, held_out_errors
from vlmprune_jax.prune.ridge import change as solve
from vlmprune_jax.prune.surgery import check_plan_is_for

OPTIONS: dict[str, Any] = {"held_out": 0.125, "prompt_weight": 1.0, "image_weight": 0.1, "answer_weight": 1.0}
Told = dict[str, Any]


def reconstruct(
    pruned: Model,
    plan: PrunePlan,
    teacher: Model,
    batches: Iterable[Any],
    *,
    progress: Callable[[int], None] | None = None,
    cache: ArrayCache | None = None,
    **options: Any,
) -> tuple[Model, list[Told]]:
    """The pruned model, with the weights solved for that write to the stream where something was removed.

    These are `down_proj` (fc2) of layers that lost neurons or stand before a depth cut, and `o_proj` (dense, out_proj)
    of layers that lost heads, with their biases where the model has them, in every stack that the plan cuts. A change
    is taken only if it lessens the error on rows that it was not fitted to, so that few tokens do no harm.

    Args:
      pruned: what `plan` leaves of `teacher`, on one device or a mesh.
      plan: the plan.
      teacher: the dense model, in the same place.
      batches: calibration batches as `score` takes them; labels, where they have them, tell answers from prompts.
      progress: called with the number of finished layers, of those that `layers_to_solve` counts.
      cache: where what was solved for is kept, to continue after an interruption.
      options: `held_out`: share of the rows that choose the ridge (which ones, their content decides); `prompt_weight`,
        `image_weight`, `answer_weight`: what tokens of each kind count.

    Returns:
      The model, and for each of these weights: stack, layer (original number), module, ridge (None: left alone),
      error_before and error_after: of the stream behind it, on the held-out rows, relative to the stream; and how many
      tokens there were for how many unknowns of each output.

    Raises:
      UserError: models and plan that do not belong together, batches that do not fit, activations that are not finite.
    """
    settings = with_defaults("reconstruct", options, OPTIONS)
    check_plan_is_for(teacher, plan)
    if param_shapes(plan.apply_to(teacher.cfg)) != param_shapes(pruned.cfg):
        raise UserError("reconstruct: the pruned model is not what this plan leaves of this teacher: apply the plan")
    mesh = mesh_of(pruned.params)
    if mesh is None:
        pruned, teacher = (m.replace(params=jax.tree.map(jnp.asarray, m.params)) for m in (pruned, teacher))
    if pruned.cfg.any_size:
        raise UserError("reconstruct: models whose images are of any size are not supported: leave it out")
    batches = list(batches)
    checked = list(calibration_batches(batches, pruned.cfg, labels=False))
    names = names_of_rows(batches, checked)
    store, report, done = _Store(cache), list[Told](), itertools.count(1)
    with within(mesh):
        for stack in _stacks(plan):
            steps = (
                row_steps(checked, settings, names)
                if stack == "text"
                else _image_steps(checked, pruned.cfg, settings, names)
            )
            for step in steps:
                step.dense, step.ours = (
                    np.array(whole(embed(m.params, place_batch(step.inputs, mesh), cfg=m.cfg, stack=stack)))
                    for m in (teacher, pruned)
                )
            tick = lambda: None if progress is None else progress(next(done))  # noqa: E731
            solved, told = _solve(stack, plan.stacks[stack], teacher, pruned, steps, store, tick)
            pruned = with_layers(pruned, stack, solved)
            report += [{"stack": stack, **one} for one in told]
    return pruned, report


def _solve(
    stack: str,
    kept: KeptStack,
    teacher: Model,
    pruned: Model,
    steps: Sequence[Step],
    store: _Store,
    tick: Callable[[], None],
) -> tuple[dict[int, dict[str, np.ndarray]], list[Told]]:
    """What is new of the layers of one stack, by number and path, and what was done to each weight."""
    solved, report = dict[int, dict[str, np.ndarray]](), list[Told]()
    _advance(steps, teacher, stack, range(kept.kept_layers[0]))
    for number, (first, end) in enumerate(_spans(kept)):
        _advance(steps, teacher, stack, range(first, end))
        layer = dataclasses.replace(Layer.of(pruned, stack, number), number=first)
        for module in _modules(kept, number):
            key = f"{number}/{module}" if stack == "text" else f"{stack}/{number}/{module}"
            change, told = store.change(key, functools.partial(solve_for, layer, module, steps))
            report.append({"layer": first, "module": module, **told, **_counts(layer, module, steps)})
            if change is not None:
                layer = layer.changed(module, change)
                solved[number] = layer.written
        for step in steps:
            step.ours = layer.run(step.ours, step.mask, "after")
        tick()
    return solved, report


def _counts(layer: Layer, module: str, steps: Sequence[Step]) -> Told:
    path = layer.projection(module)
    unknowns = layer.params[f"{path}/weight"][0].size + (f"{path}/bias" in layer.params)
    return {"tokens": sum(int((step.weight > 0).sum()) for step in steps), "unknowns": unknowns}


def layers_to_solve(plan: PrunePlan) -> int:
    """How far `progress` counts: the layers left of the stacks that lost something."""
    return sum(len(plan.stacks[stack].layers) for stack in _stacks(plan))


def _stacks(plan: PrunePlan) -> list[str]:
    """Stacks that lost something that a weight could make up for, in the order in which a batch passes through them."""
    order = [name for name in ("vision", "text") if name in plan.stacks]
    return [name for name in order if any(_modules(plan.stacks[name], i) for i in range(len(plan.stacks[name].layers)))]


def _spans(kept: KeptStack) -> list[tuple[int, int]]:
    """Of each layer that is left, the original numbers of itself and of the next: it stands for all in between."""
    return list(itertools.pairwise((*kept.kept_layers, len(kept.layers_before))))


def _modules(kept: KeptStack, number: int) -> list[str]:
    """Which weights of a layer are solved for, in the order in which they write to the stream."""
    layer, (first, end) = kept.layers[number], _spans(kept)[number]
    before, cut = kept.layers_before[layer.index], end - first > 1
    lost = {"o_proj": len(layer.q_heads) < before.q_heads, "down_proj": cut or len(layer.neurons) < before.mlp}
    return [module for module in TAP_INPUTS if lost[module]]


@dataclasses.dataclass
class Step:
    """Rows that go through the device together, and where both streams are: float32[rows, seq, embed] on the host.

    `inputs`: what the models embed. `mask`, and of text `labels` with -100 where there is none: int32[rows, seq].
    `weight`: float32[rows, seq], what each token counts. `names`: what messages call the rows. `middle`:
    the dense stream between attention and MLP of the layer at work.
    """

    inputs: dict[str, Any]
    mask: np.ndarray
    weight: np.ndarray
    names: list[str]
    held_out: bool
    labels: np.ndarray | None = None
    dense: np.ndarray = dataclasses.field(init=False)
    ours: np.ndarray = dataclasses.field(init=False)
    middle: np.ndarray = dataclasses.field(init=False)


def names_of_rows(batches: Sequence[Any], checked: Sequence[Arrays]) -> list[str]:
    """What messages call the rows of the batches: by their records, where the batches tell them."""
    names = list[str]()
    for batch, arrays in zip(batches, checked, strict=True):
        ids = getattr(batch, "record_ids", None) or [""] * len(arrays["kind"])
        names += [f"record {name}" if name else f"row {len(names) + at}" for at, name in enumerate(ids)]
    return names


def row_steps(batches: Sequence[Arrays], settings: Mapping[str, Any], names: Sequence[str] | None = None) -> list[Step]:
    """All rows, those to fit to and those to hold out apart, as many at a time as the first batch has.

    Without a `held_out` in the settings none is held out.
    """
    rows = [
        {name: array[row] for name, array in arrays.items()} for arrays in batches for row in range(len(arrays["kind"]))
    ]
    names = names or [f"row {number}" for number in range(len(rows))]
    rows = [row | {"name": name} for name, row in zip(names, rows, strict=True) if row["attention_mask"].any()]
    # By content, so that the order of the rows is immaterial.
    rows.sort(key=lambda row: hashlib.sha256(row["input_ids"][row["attention_mask"] == 1].tobytes()).digest())
    weight_of = np.zeros(4, np.float32)
    for kind, name in ((PROMPT, "prompt"), (IMAGE, "image"), (ANSWER, "answer")):
        weight_of[kind] = settings[f"{name}_weight"]
    size = len(batches[0]["kind"])
    return [
        _step(chosen[at : at + size], size, weight_of, held_out)
        for chosen, held_out in _parted(rows, settings, "rows")
        for at in range(0, len(chosen), size)
    ]


def _step(rows: Sequence[Mapping[str, Any]], size: int, weight_of: np.ndarray, held_out: bool) -> Step:
    """Rows padded to the longest of them and to `size` rows."""
    arrays = {}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("kind", PADDING), ("labels", IGNORED)):
        arrays[name] = np.full((size, max(len(row["kind"]) for row in rows)), fill, np.int32)
        for at, row in enumerate(rows):
            if name in row:
                arrays[name][at, : len(row[name])] = row[name]
    images = [(at, row["pixel_values"]) for at, row in enumerate(rows) if "pixel_values" in row]
    pixels = None
    if images:
        pixels = np.zeros((size, max(len(p) for _, p in images), *images[0][1].shape[1:]), np.float32)
        for at, own in images:
            pixels[at, : len(own)] = own
    mask, names = arrays["attention_mask"], [row["name"] for row in rows]
    inputs = {"input_ids": arrays["input_ids"], "pixel_values": pixels}
    return Step(inputs, mask, weight_of[arrays["kind"]], names, held_out, arrays["labels"])


def _image_steps(
    batches: Sequence[Arrays], cfg: ModelConfig, settings: Mapping[str, Any], names: Sequence[str]
) -> list[Step]:
    """The images of all rows, each once, since one that is fitted to must not be held out as well."""
    images = dict[bytes, tuple[np.ndarray, str]]()
    row = 0
    for arrays in batches:
        pixels = arrays.get("pixel_values")
        if pixels is not None:
            for at, real in enumerate(real_images(arrays["kind"], pixels.shape[1], cfg.tokens_per_image)):
                images |= {hashlib.sha256(one.tobytes()).digest(): (one, names[row + at]) for one in pixels[at, real]}
        row += len(arrays["kind"])
    chosen = [images[key] for key in sorted(images)]
    assert cfg.vision is not None
    size, positions = len(batches[0]["kind"]), cfg.vision.n_patches + cfg.vision.class_token
    steps = []
    for part, held_out in _parted(chosen, settings, "images"):
        for at in range(0, len(part), size):
            own = part[at : at + size]
            pixels = np.zeros((size, *own[0][0].shape), np.float32)
            pixels[: len(own)] = [image for image, _ in own]
            real = np.repeat((np.arange(size) < len(own))[:, None], positions, axis=1)
            steps.append(
                Step(
                    {"pixel_values": pixels},
                    real.astype(np.int32),
                    real.astype(np.float32),
                    [name for _, name in own],
                    held_out,
                )
            )
    return steps


def _parted(chosen: Sequence[Any], settings: Mapping[str, Any], what: str) -> tuple[tuple[Sequence[Any], bool], ...]:
    """(those to fit to, False) and (those to hold out, True).

    Raises:
      UserError: there are fewer than two.
    """
    if "held_out" not in settings:
        return ((chosen, False),)
    n_held = min(max(1, round(settings["held_out"] * len(chosen))), len(chosen) - 1)
    if n_held < 1:
        raise UserError(f"reconstruct needs at least 2 calibration {what}: one to fit to and one to hold out")
    return (chosen[n_held:], False), (chosen[:n_held], True)


@functools.partial(jax.jit, static_argnames=("cfg", "stack"))
def embed(params, inputs, *, cfg, stack):
    module = to_nnx(Model(params, cfg))
    if stack == "vision":
        dtype = jax.tree.leaves(params["vision"])[0].dtype
        x = module.vision.embed(inputs["pixel_values"].astype(dtype))
    else:
        x, *_ = module.embed(inputs["input_ids"], inputs["pixel_values"])
    return constrain(x.astype(jnp.float32), STREAM)


def _advance(steps: Sequence[Step], teacher: Model, stack: str, layers: range) -> None:
    """The dense streams behind these layers, and between attention and MLP of the first."""
    for number in layers:
        layer = Layer.of(teacher, stack, number)
        for step in steps:
            if number == layers.start:
                step.middle = layer.run(step.dense, step.mask, "middle")
            step.dense = layer.run(step.dense, step.mask, "after")


class _Store:
    """What was solved for, by module: taken from the cache where an interrupted pass left it there."""

    def __init__(self, cache: ArrayCache | None):
        self._cache = cache

    def change(self, key: str, solve: Callable[[], tuple[np.ndarray | None, Told]]) -> tuple[np.ndarray | None, Told]:
        """(change of the weight or None, what the report says); every process must call it, in step."""
        if self._cache is None:
            return solve()
        if self._cache.missing([key]):
            change, told = solve()
            facts = [math.nan if told["ridge"] is None else told["ridge"], told["error_before"], told["error_after"]]
            self._cache.add({key: np.asarray(facts), f"{key}/change": np.zeros(0) if change is None else change})
            self._cache.publish()
        ridge, before, after = self._cache[key].tolist()
        told = {"ridge": None if math.isnan(ridge) else ridge, "error_before": before, "error_after": after}
        return (None if told["ridge"] is None else self._cache[f"{key}/change"]), told


@functools.partial(jax.jit, static_argnames=("cfg", "module", "bias"))
def _sums(params, x, target, mask, weight, *, cfg, module, bias):
    middle, after, inputs = block(params, x, mask, cfg, (module,))
    residual = target - (middle if module == "o_proj" else after)
    read = inputs[module].reshape(*x.shape[:2], -1)
    if bias:
        read = jnp.concatenate([read, jnp.ones_like(read[..., :1])], axis=-1)
    # where, not products: padding may hold anything, and NaN * 0 is NaN
    counts = weight[..., None] > 0
    read, residual = jnp.where(counts, read, 0.0), jnp.where(counts, residual, 0.0)
    scale = jnp.where(weight > 0, weight / jnp.mean(target * target, axis=-1), 0.0)
    weighted = read * scale[..., None]
    gram = jnp.einsum("bsi,bsj->ij", weighted, read, precision="highest")
    cross = jnp.einsum("bsi,bse->ie", weighted, residual, precision="highest")
    energy = jnp.sum(scale * jnp.sum(residual * residual, axis=-1), axis=-1)
    return Sums(constrain(gram, ("mlp", None)), constrain(cross, ("mlp", None)), constrain(energy, ()))


def solve_for(layer: Layer, module: str, steps: Sequence[Step]) -> tuple[np.ndarray | None, Told]:
    """float32[in (+ 1), embed] to add to a weight (and its bias), or None where nothing lessens the held-out error."""
    bias = f"{layer.projection(module)}/bias" in layer.params
    fit, held = (_total(layer, module, bias, [one for one in steps if one.held_out == out]) for out in (False, True))
    stream = layer.cfg.hidden_size * float(sum(one.weight.sum() for one in steps if one.held_out))
    errors = np.asarray(held_out_errors(fit, held, jnp.asarray(RIDGES, jnp.float32)), np.float64)
    best, before = int(np.nanargmin(np.append(errors, 0.0))), float(held.energy) / stream
    if best == len(RIDGES):
        return None, {"ridge": None, "error_before": before, "error_after": before}
    change = solve(jax.tree.map(jnp.add, fit, held), RIDGES[best])
    told = {"ridge": RIDGES[best], "error_before": before, "error_after": before + float(errors[best]) / stream}
    return np.array(whole(change)), told


def _total(layer: Layer, module: str, bias: bool, steps: Sequence[Step]) -> Sums:
    """Sums over these rows, `energy` over all of them.

    Raises:
      UserError: what a row gives is not finite.
    """
    totals = None
    for step in steps:
        arrays = {
            "x": step.ours,
            "target": step.middle if module == "o_proj" else step.dense,
            "mask": step.mask,
            "weight": step.weight,
        }
        sums = _sums(layer.params, **place_batch(arrays, layer.mesh), cfg=layer.cfg, module=module, bias=bias)
        energy = np.asarray(sums.energy)
        wrong = [name for name, one in zip(step.names, energy, strict=False) if not math.isfinite(one)]
        if wrong:
            raise UserError(
                f"reconstruct: activations behind {module} of layer {layer.number} are not finite in "
                f"{', '.join(sorted(wrong)[:5])} of the calibration batches: look for what is wrong there, or with the "
                "weights"
            )
        sums = sums._replace(energy=jnp.asarray(energy.sum()))
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    assert totals is not None
    return totals
