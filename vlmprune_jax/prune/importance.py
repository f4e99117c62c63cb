"""Importance matrices: mean squares of the input channels of a decoder's matrices, weights of llama.cpp's quantiser.

The stream of the model is on the host and passes layer by layer, as in `gptq`; sums are float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.config import Stack
from vlmprune_jax.core.settings import override
from vlmprune_jax.distributed.mesh import use_mesh
from vlmprune_jax.export.format import Importance
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.layout import make_slots
from vlmprune_jax.models.block import READERS
from vlmprune_jax.models.vlm import Model, mesh_of
from vlmprune_jax.prune.config import TokenWeights
from vlmprune_jax.prune.gptq import embedded_steps, finite_sums, inside
from vlmprune_jax.prune.layers import Given, Layer, run_block


def importance(
    model: Model,
    batches: Iterable[Any],
    weights: TokenWeights | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Importance:
    """Return the mean squares of the inputs of the decoder's matrices, for `save(..., format="gguf", imatrix=...)`.

    Args:
      model: the model to be saved, on one device or a mesh.
      batches: calibration batches as `score` takes them; labels, if present, tell answers from prompts.
      progress: called with the number of finished layers.
      weights: weights of the calibration tokens; `options` override single ones.
      options: `prompt_weight`, `image_weight`, `answer_weight`, see `TokenWeights`.

    Raises:
      UserError: batches that do not fit, activations that are not finite.
    """
    weights = override(TokenWeights() if weights is None else weights, options, "importance")
    mesh, cfg = mesh_of(model.params), model.cfg
    if mesh is None:
        model = model.replace(params=jax.tree.map(jnp.asarray, model.params))
    slots = [one for one in make_slots(cfg, family_of(cfg)) if one.path.startswith("text/layers/")]
    means: dict[str, np.ndarray] = {}
    with use_mesh(mesh):
        steps = embedded_steps(model, batches, weights)
        weight = sum(float(step.weight.sum(dtype=np.float64)) for step in steps)
        for number in range(len(cfg.text.layers)):
            layer = Layer.of(model, "text", number)
            sums = finite_sums(_squares, layer, steps, "importance")
            for slot in slots:
                if slot.layer == number and len(slot.hf_shape) == 2:
                    means[slot.name] = sums[layer.block.reader_of(inside(slot))] / weight
            for step in steps:
                step.ours = layer.run(step.ours, step.given(number))
            if progress is not None:
                progress(number + 1)
    rows = sum(int((step.weight > 0).any(axis=1).sum()) for step in steps)
    return Importance(means, rows, sum(int((step.weight > 0).sum()) for step in steps))


@functools.partial(jax.jit, static_argnames=("stack", "cfg"))
def _squares(
    params: Mapping[str, jax.Array], x: jax.Array, weight: jax.Array, given: Given, *, stack: str, cfg: Stack
) -> dict[str, jax.Array]:
    _, _, values = run_block(stack, cfg, params, x, given, READERS)

    def of(name: str) -> jax.Array:
        read = values[name].reshape(*x.shape[:2], -1)
        return jnp.einsum("bsi,bs->i", jnp.where(weight[..., None] > 0, read, 0.0) ** 2, weight, precision="highest")

    return {name: of(name) for name in READERS}
