"""One layer of a stack at a time, in float32: what it makes of the residual stream, and the same with other weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vlmprune_jax.core.config import TextConfig, VisionConfig, runs
from vlmprune_jax.distributed.mesh import gather_to_host
from vlmprune_jax.distributed.rules import constrain
from vlmprune_jax.models.decoder import Decoder, output_names
from vlmprune_jax.models.params import flatten, unflatten
from vlmprune_jax.models.vision import SCALES, VisionTower
from vlmprune_jax.models.vlm import Model, mesh_of, place_batch

STREAM = ("batch", "sequence", None)


class Given(NamedTuple):
    """What a layer is given beside the stream.

    `mask`: int[rows, seq], 1 = real token; `positions`: int[rows, 3, seq], None where they count along the mask;
    `added`: float[rows, seq, embed], what is added to its output (None: nothing). Towers look at none of them, but at
    `grid`, int[rows, 3], where images are of any size (`VisionTower.tapped`).
    """

    mask: Any
    positions: Any = None
    added: Any = None
    grid: Any = None

    def placed(self, mesh: Mesh | None) -> Given:
        """The same on the device, or split over a mesh."""
        return Given(**place_batch(self._asdict(), mesh))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the decoder or the tower, `params` by flat path; its number in the unpruned model, and its dtype."""

    number: int
    params: dict[str, jax.Array]
    cfg: TextConfig | VisionConfig
    dtype: Any
    mesh: Any
    changed_paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, stack: str, number: int) -> Layer:
        """Layer `number` of a model's stack."""
        cfg = model.cfg.text if stack == "text" else model.cfg.vision
        assert cfg is not None
        run, (start, _, shape) = next(
            (run, one) for run, one in enumerate(runs(cfg.layers)) if number < one[0] + one[1]
        )
        flat = flatten(model.params[stack]["layers"][str(run)])
        own = {path: leaf[number - start] for path, leaf in flat.items()}
        dtype = next(iter(own.values())).dtype
        params = {path: leaf.astype(jnp.float32) for path, leaf in own.items()}
        return cls(number, params, cfg.alone(shape), dtype, mesh_of(model.params))

    def run(self, x: np.ndarray, given: Given, what: str) -> np.ndarray:
        """The stream "after" the layer, or in its "middle", between attention and MLP: float32[rows, seq, embed]."""
        placed = place_batch({"x": x}, self.mesh)["x"]
        return np.array(gather_to_host(_run(self.params, placed, given.placed(self.mesh), cfg=self.cfg, what=what)))

    def projection(self, module: str) -> str:
        """Path of the projection in the layer that a tap calls "o_proj" or "down_proj"."""
        return projection(self.cfg, module)

    def changed(self, module: str, change: np.ndarray) -> Layer:
        """The layer with float32[in (+ 1 with a bias), embed] added to what a weight writes, in the model's dtype."""
        path, params = self.projection(module), dict(self.params)
        scale = params.get(SCALES.get(f"{path}/weight", ""))
        if scale is not None:  # the weight writes through it; what it silences nothing can change
            of_outputs = np.asarray(gather_to_host(scale))
            change = np.divide(change, of_outputs, out=np.zeros_like(change), where=of_outputs != 0)
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
        return {path: np.asarray(gather_to_host(self.params[path])).astype(self.dtype) for path in self.changed_paths}


def projection(cfg: TextConfig | VisionConfig, module: str) -> str:
    """Path in a layer of the projection that a tap calls "o_proj" or "down_proj"."""
    if module == "o_proj":
        return "self_attn/out_proj" if isinstance(cfg, VisionConfig) else f"self_attn/{output_names(cfg)[0]}"
    return "mlp/down_proj" if cfg.mlp_kind == "gated" else "mlp/fc2"


def block(
    params: Mapping[str, jax.Array],
    x: jax.Array,
    given: Given,
    cfg: TextConfig | VisionConfig,
    read: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(stream in the middle, stream after, what the projections `read`) of one layer."""
    inputs: dict[str, jax.Array]
    if isinstance(cfg, VisionConfig):
        tower = nnx.eval_shape(lambda: VisionTower(cfg))
        apply, state = tower.run_parts("0")
        nnx.replace_by_pure_dict(state, unflatten(params))
        after, inputs = apply(state, x, ("o_proj", *read), None, tower.context(x, given.grid))
    else:
        decoder = nnx.eval_shape(lambda: Decoder(cfg, None))
        apply, state = decoder.run_parts("0")
        nnx.replace_by_pure_dict(state, unflatten(params))
        positions = given.positions
        if positions is None:
            positions = jnp.maximum(jnp.cumsum(given.mask, axis=1) - 1, 0)
        after, _, inputs = apply(state, x, decoder.context(positions, given.mask), None, ("o_proj", *read))
        after = after if given.added is None else after + given.added
    out = projection(cfg, "o_proj")
    attended = jnp.einsum("bsqh,eqh->bse", inputs["o_proj"], params[f"{out}/weight"])
    if f"{out}/bias" in params:
        attended = attended + params[f"{out}/bias"][None, None]
    scale = params.get(SCALES.get(f"{out}/weight", ""))
    attended = attended if scale is None else attended * scale[None, None]
    return constrain(x + attended, STREAM), after, inputs


@functools.partial(jax.jit, static_argnames=("cfg", "what"))
def _run(params, x, given, *, cfg, what):
    middle, after, _ = block(params, x, given, cfg, ())
    return middle if what == "middle" else after


def with_layers(model: Model, stack: str, changed: Mapping[int, Mapping[str, np.ndarray]]) -> Model:
    """The model with these parameters of the layers of a stack, by number and path."""
    layers = dict(model.params[stack]["layers"])
    for run, (start, length, _) in enumerate(runs(model.cfg.stack(stack).layers)):
        flat = flatten(layers[str(run)])
        for path in {path for number in range(start, start + length) for path in changed.get(number, ())}:
            own = np.array(gather_to_host(flat[path]))
            for number in range(start, start + length):
                own[number - start] = changed.get(number, {}).get(path, own[number - start])
            flat[path] = jax.device_put(own, flat[path].sharding)
        layers[str(run)] = unflatten(flat)
    return model.replace(params={**model.params, stack: {**model.params[stack], "layers": layers}})
