"""Training-free repair: least squares around the weights that a plan kept, from a few thousand calibration tokens.

After pruning, what a layer adds to the residual stream is wrong in itself and in what earlier layers left it. Both can
be mended where the layer writes to the stream: with x the input of `down_proj` (or `o_proj`) in the pruned model and r
what then still misses in the stream, sum_t w_t |r_t - D^T x_t|^2 is minimised over a change D of the weight. No
parameter is added. Depth cuts are closed by the layer before them, whose target is the dense stream behind the cut.

Layer by layer two residual streams, the dense model's and the pruned one's, lie on the host, float32[rows, seq, embed]
each; on the device are one layer of either, the activations of a batch, and for one module at a time the sums
G = sum w x x^T [in, in] and C = sum w x r^T [in, embed], of the fitted and of the held-out rows: 8 * in * (in + embed)
bytes in all. Tokens are weighted by 1 / mean(h^2), by which the next norm divides anyway: otherwise the few tokens with
a massive residual would decide everything.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmprune_jax.checks import with_defaults
from vlmprune_jax.config import IGNORED, TextConfig, runs
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.distributed.mesh import whole, within
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.decoder import TAP_INPUTS, Decoder, output_names
from vlmprune_jax.models.params import flatten, param_shapes, unflatten
from vlmprune_jax.models.vlm import Model, mesh_of, place_batch, to_nnx
from vlmprune_jax.prune.criteria.calibration import ANSWER, IMAGE, PADDING, PROMPT, Arrays, calibration_batches
from vlmprune_jax.prune.plan import PrunePlan
from vlmprune_jax.prune.ridge import RIDGES, Sums, held_out_errors
from vlmprune_jax.prune.ridge import change as solve
from vlmprune_jax.prune.surgery import check_plan_is_for

OPTIONS: dict[str, Any] = {"held_out": 0.125, "prompt_weight": 1.0, "image_weight": 0.1, "answer_weight": 1.0}
_STREAM = ("batch", "sequence", None)
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

    These are `down_proj` (fc2) of layers that lost neurons or stand before a depth cut, and `o_proj` (dense) of layers
    that lost heads, with their biases where the model has them. A change is taken only if it lessens the error on rows
    that it was not fitted to, so that few tokens do no harm.

    Args:
      pruned: what `plan` leaves of `teacher`, on one device or a mesh.
      plan: the plan.
      teacher: the dense model, in the same place.
      batches: calibration batches as `score` takes them; labels, where they have them, tell answers from prompts.
      progress: called with the number of finished layers of the pruned model.
      cache: where what was solved for is kept, to continue after an interruption.
      options: `held_out`: share of the rows that choose the ridge (which ones, their content decides); `prompt_weight`,
        `image_weight`, `answer_weight`: what tokens of each kind count.

    Returns:
      The model, and for each of these weights: layer (original number), module, ridge (None: left alone), and
      error_before and error_after: of the stream behind it, on the held-out rows, relative to the stream.

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
    steps = _steps(list(calibration_batches(batches, pruned.cfg, labels=False)), settings)
    store = _Store(cache)
    solved, report = dict[int, dict[str, np.ndarray]](), list[Told]()
    kept = plan.kept_layers
    with within(mesh):
        for step in steps:
            step.dense, step.ours = (
                np.array(whole(_embed(m.params, m.cfg, place_batch(step.inputs, mesh)))) for m in (teacher, pruned)
            )
        for number, (first, end) in enumerate(zip(kept, (*kept[1:], len(plan.layers_before)), strict=True)):
            _advance(steps, teacher, range(first, end))
            layer = dataclasses.replace(_Layer.of(pruned, number), number=first)
            for module in _modules(plan, number, cut=end - first > 1):
                change, told = store.change(f"{number}/{module}", functools.partial(_solve_for, layer, module, steps))
                report.append({"layer": first, "module": module, **told})
                if change is not None:
                    layer = layer.changed(module, change)
                    solved[number] = layer.written
            for step in steps:
                step.ours = layer.run(step.ours, step.mask, "after")
            if progress is not None:
                progress(number + 1)
    return _with_layers(pruned, solved), report


def _modules(plan: PrunePlan, number: int, *, cut: bool) -> list[str]:
    """Which weights of a layer are solved for, in the order in which they write to the stream."""
    layer = plan.layers[number]
    before = plan.layers_before[layer.index]
    lost = {"o_proj": len(layer.q_heads) < before.q_heads, "down_proj": cut or len(layer.neurons) < before.mlp}
    return [module for module in TAP_INPUTS if lost[module]]


@dataclasses.dataclass
class _Step:
    """Rows that go through the device together, and where both streams are: float32[rows, seq, embed] on the host.

    `inputs`: what the models embed. `mask`, and `labels` with -100 where there is none: int32[rows, seq]. `weight`:
    float32[rows, seq], what each token counts. `numbers`: of the rows in the calibration batches. `middle`: the dense
    stream between attention and MLP of the layer at work.
    """

    inputs: dict[str, Any]
    mask: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    numbers: list[int]
    held_out: bool
    dense: np.ndarray = dataclasses.field(init=False)
    ours: np.ndarray = dataclasses.field(init=False)
    middle: np.ndarray = dataclasses.field(init=False)


def _steps(batches: Sequence[Arrays], settings: Mapping[str, Any]) -> list[_Step]:
    """All rows, those to fit to and those to hold out apart, as many at a time as the first batch has."""
    rows = [
        {name: array[row] for name, array in arrays.items()} for arrays in batches for row in range(len(arrays["kind"]))
    ]
    rows = [row | {"number": number} for number, row in enumerate(rows) if row["attention_mask"].any()]
    # By content, so that the order of the rows is immaterial.
    rows.sort(key=lambda row: hashlib.sha256(row["input_ids"][row["attention_mask"] == 1].tobytes()).digest())
    n_held = min(max(1, round(settings["held_out"] * len(rows))), len(rows) - 1)
    if n_held < 1:
        raise UserError("reconstruct needs at least 2 calibration rows: one to fit to and one to hold out")
    weight_of = np.zeros(4, np.float32)
    for kind, name in ((PROMPT, "prompt"), (IMAGE, "image"), (ANSWER, "answer")):
        weight_of[kind] = settings[f"{name}_weight"]
    size = len(batches[0]["kind"])
    return [
        _step(chosen[at : at + size], size, weight_of, held_out)
        for chosen, held_out in ((rows[n_held:], False), (rows[:n_held], True))
        for at in range(0, len(chosen), size)
    ]


def _step(rows: Sequence[Mapping[str, Any]], size: int, weight_of: np.ndarray, held_out: bool) -> _Step:
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
    mask, numbers = arrays["attention_mask"], [row["number"] for row in rows]
    inputs = {"input_ids": arrays["input_ids"], "pixel_values": pixels}
    return _Step(inputs, mask, arrays["labels"], weight_of[arrays["kind"]], numbers, held_out)


@functools.partial(jax.jit, static_argnames=("cfg",))
def _embed(params, cfg, inputs):
    x, _ = to_nnx(Model(params, cfg)).embed(inputs["input_ids"], inputs["pixel_values"])
    return constrain(x.astype(jnp.float32), _STREAM)


def _advance(steps: Sequence[_Step], teacher: Model, layers: range) -> None:
    """The dense streams behind these layers, and between attention and MLP of the first."""
    for number in layers:
        layer = _Layer.of(teacher, number)
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


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One decoder layer in float32, `params` by flat path; its number in the unpruned model, and its dtype."""

    number: int
    params: dict[str, jax.Array]
    text: TextConfig
    dtype: Any
    mesh: Any
    changed_paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, number: int) -> _Layer:
        """Layer `number` of a model's decoder."""
        run, (start, _, shape) = next(
            (run, one) for run, one in enumerate(runs(model.cfg.text.layers)) if number < one[0] + one[1]
        )
        flat = flatten(model.params["text"]["layers"][str(run)])
        own = {path: leaf[number - start] for path, leaf in flat.items()}
        dtype = next(iter(own.values())).dtype
        params = {path: leaf.astype(jnp.float32) for path, leaf in own.items()}
        return cls(number, params, model.cfg.text.with_layers((shape,)), dtype, mesh_of(model.params))

    def run(self, x: np.ndarray, mask: np.ndarray, what: str) -> np.ndarray:
        """The stream "after" the layer, or in its "middle", between attention and MLP: float32[rows, seq, embed]."""
        placed = place_batch({"x": x, "mask": mask}, self.mesh)
        return np.array(whole(_run(self.params, placed["x"], placed["mask"], text=self.text, what=what)))

    def projection(self, module: str) -> str:
        """Path of the weight's projection in the layer."""
        if module == "o_proj":
            return f"self_attn/{output_names(self.text)[0]}"
        return "mlp/down_proj" if self.text.mlp_kind == "gated" else "mlp/fc2"

    def changed(self, module: str, change: np.ndarray) -> _Layer:
        """The layer with float32[in (+ 1 with a bias), embed] added to a weight, rounded to the model's dtype."""
        path, params = self.projection(module), dict(self.params)
        parts = {"weight": change.T}
        if f"{path}/bias" in params:
            parts = {"weight": change[:-1].T, "bias": change[-1]}
        for name, part in parts.items():
            old = params[f"{path}/{name}"]
            new = (old + part.reshape(old.shape)).astype(self.dtype).astype(jnp.float32)
            params[f"{path}/{name}"] = jax.device_put(new, old.sharding)
        paths = (*self.changed_paths, *(f"{path}/{name}" for name in parts))
        return dataclasses.replace(self, params=params, changed_paths=paths)

    @property
    def written(self) -> dict[str, np.ndarray]:
        """What was changed, by path, in the model's dtype."""
        return {path: np.asarray(whole(self.params[path])).astype(self.dtype) for path in self.changed_paths}


def _block(params: Mapping[str, jax.Array], x: jax.Array, mask: jax.Array, text: TextConfig, read: tuple[str, ...]):
    """(stream in the middle, stream after, what the projections `read`) of one layer."""
    decoder = nnx.eval_shape(lambda: Decoder(text, None))
    apply, state = decoder.run_parts("0")
    nnx.replace_by_pure_dict(state, unflatten(params))
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    after, _, inputs = apply(state, x, decoder.context(positions, mask), None, ("o_proj", *read))
    out = f"self_attn/{output_names(text)[0]}"
    attended = jnp.einsum("bsqh,eqh->bse", inputs["o_proj"], params[f"{out}/weight"])
    if f"{out}/bias" in params:
        attended = attended + params[f"{out}/bias"][None, None]
    return constrain(x + attended, _STREAM), after, inputs


@functools.partial(jax.jit, static_argnames=("text", "what"))
def _run(params, x, mask, *, text, what):
    middle, after, _ = _block(params, x, mask, text, ())
    return middle if what == "middle" else after


@functools.partial(jax.jit, static_argnames=("text", "module", "bias"))
def _sums(params, x, target, mask, weight, *, text, module, bias):
    middle, after, inputs = _block(params, x, mask, text, (module,))
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


def _solve_for(layer: _Layer, module: str, steps: Sequence[_Step]) -> tuple[np.ndarray | None, Told]:
    """float32[in (+ 1), embed] to add to a weight (and its bias), or None where nothing lessens the held-out error."""
    bias = f"{layer.projection(module)}/bias" in layer.params
    fit, held = (_total(layer, module, bias, [one for one in steps if one.held_out == out]) for out in (False, True))
    stream = layer.text.hidden_size * float(sum(one.weight.sum() for one in steps if one.held_out))
    errors = np.asarray(held_out_errors(fit, held, jnp.asarray(RIDGES, jnp.float32)), np.float64)
    best, before = int(np.nanargmin(np.append(errors, 0.0))), float(held.energy) / stream
    if best == len(RIDGES):
        return None, {"ridge": None, "error_before": before, "error_after": before}
    change = solve(jax.tree.map(jnp.add, fit, held), RIDGES[best])
    told = {"ridge": RIDGES[best], "error_before": before, "error_after": before + float(errors[best]) / stream}
    return np.array(whole(change)), told


def _total(layer: _Layer, module: str, bias: bool, steps: Sequence[_Step]) -> Sums:
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
        sums = _sums(layer.params, **place_batch(arrays, layer.mesh), text=layer.text, module=module, bias=bias)
        energy = np.asarray(sums.energy)
        wrong = [number for number, one in zip(step.numbers, energy, strict=False) if not math.isfinite(one)]
        if wrong:
            rows = ", ".join(map(str, sorted(wrong)[:5]))
            raise UserError(
                f"reconstruct: activations behind {module} of layer {layer.number} are not finite in rows {rows} of "
                "the calibration batches: look for what is wrong with these records, or with the weights"
            )
        sums = sums._replace(energy=jnp.asarray(energy.sum()))
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    assert totals is not None
    return totals


def _with_layers(model: Model, solved: Mapping[int, Mapping[str, np.ndarray]]) -> Model:
    """The model with these parameters of its layers, by number and path."""
    layers = dict(model.params["text"]["layers"])
    for run, (start, length, _) in enumerate(runs(model.cfg.text.layers)):
        flat = flatten(layers[str(run)])
        for path in {path for number in range(start, start + length) for path in solved.get(number, ())}:
            own = np.array(whole(flat[path]))
            for number in range(start, start + length):
                own[number - start] = solved.get(number, {}).get(path, own[number - start])
            flat[path] = jax.device_put(own, flat[path].sharding)
        layers[str(run)] = unflatten(flat)
    return model.replace(params={**model.params, "text": {**model.params["text"], "layers": layers}})
