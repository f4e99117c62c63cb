"""Planning of evaluation on a TPU slice: memory, bytes per token and minimum times, compiled without TPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import decoding_mesh, make_mesh, row_ways, use_mesh
from vlmprune_jax.core.mesh.rules import sharding
from vlmprune_jax.core.models.decoder import map_cache
from vlmprune_jax.core.models.generate import decode, prefill
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import abstract_params, count_params, flatten, unflatten
from vlmprune_jax.io.data.preparation import Preparation
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.run.planning.ahead_of_time import Slice, compile_for_tpu
from vlmprune_jax.run.planning.questions import BATCH, BENCHMARKS, bound, prompt_of
from vlmprune_jax.run.workdir.tpu_plan import Hbm, PlannedEvaluation, PlannedModel

NEW_TOKENS = 17  # of the compiled programs: 16 steps of the decoding loop


@dataclass(frozen=True)
class EvaluationCase:
    """Inputs for planning the evaluation of one model on a TPU slice.

    `preparation`: how the model prepares images (None: images of one size, or no images). `mesh`: sizes (data, fsdp,
    tensor), or () for the sizes that `decoding_mesh` chooses. `rows`: rows of a batch, rounded up so that devices share
    them evenly. `weights`: weight formats for which minimum times are computed; the compiled programs have weights of
    `dtype`.
    """

    cfg: ModelConfig
    dtype: str
    slice: Slice
    preparation: Preparation | None
    rows: int
    mesh: tuple[int, ...] = ()
    weights: tuple[str, ...] = ("bf16",)

    @property
    def itemsize(self) -> int:
        """Number of bytes per weight."""
        return np.dtype(self.dtype).itemsize

    def make_mesh(self) -> Mesh:
        """Return the mesh for generation on the TPU slice's devices."""
        every = make_mesh(1, -1, 1, devices=self.slice.devices)
        mesh = decoding_mesh(self.cfg, every, count_params(self.cfg) * self.itemsize, self.mesh)
        assert mesh is not None
        return mesh


def plan_evaluation(case: EvaluationCase) -> PlannedEvaluation:
    """Compile prefill and decoding for the benchmark with the longest prompts; return memory and minimum times.

    Raises:
      DoesNotFit: a batch needs more HBM than a chip has.
    """
    mesh, chip = case.make_mesh(), case.slice.chip
    ways = row_ways(mesh)
    rows = -(-case.rows // ways) * ways
    prompts = {name: prompt_of(case.cfg, case.preparation, question) for name, question in BENCHMARKS.items()}
    length, image = max(prompts.values(), key=lambda prompt: prompt[0])
    params, arrays = unflatten(abstract_params(case.cfg, case.dtype, mesh)), _arrays(case, rows, length, image, mesh)
    with use_mesh(mesh):
        begun = jax.eval_shape(lambda *inputs: prefill(inputs[0], case.cfg, inputs[1], NEW_TOKENS, ()), params, arrays)
        first = compile_for_tpu(prefill, params, case.cfg, arrays, NEW_TOKENS, ())
        later = compile_for_tpu(decode, params, case.cfg, *_placed(case.cfg, begun, mesh), NEW_TOKENS, ())
    leaves = flatten(params).values()
    weights = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * case.itemsize for leaf in leaves)
    needed = max(program.arguments + program.temporaries for program in (first, later))
    largest = int((chip.hbm - weights) / max(needed - weights, 1) * rows / ways) * ways
    phases = {
        form: {
            name: bound(case.cfg, chip, mesh.size, form, *prompts[name], question.answer).phases(BATCH, mesh.size)
            for name, question in BENCHMARKS.items()
        }
        for form in case.weights
    }
    return PlannedEvaluation(
        topology=case.slice.name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        model=PlannedModel(layers=len(case.cfg.text.layers), parameters=count_params(case.cfg)),
        rows=rows,
        tokens_per_row=length,
        hbm=Hbm(arguments=weights, temporaries=needed - weights, free=chip.hbm - needed),
        largest_batch=largest,
        received=sum(later.received.values()) / (NEW_TOKENS - 1),
        seconds={name: sum(phases[case.weights[0]][name].values()) for name in BENCHMARKS},
        phases=phases,
        compile_seconds=first.seconds + later.seconds,
    )


def _arrays(case: EvaluationCase, rows: int, length: int, image: ImageShape, mesh: Mesh) -> dict[str, Any]:
    """Return the inputs of `prefill` as abstract arrays."""
    cfg = case.cfg

    def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * len(shape))
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding(mesh, axes))

    arrays: dict[str, Any] = {"ids": array(length), "valid": array(length), "ended": array(dtype=bool)}
    vision = cfg.vision
    if vision is not None and vision.dynamic_resolution:
        patches = image.rows * image.columns
        images = Packed(array(patches, vision.patch_values, dtype=np.float32), array(1, 3))
        arrays["media"] = {"vision": images}
        if cfg.text.rope.sections:
            arrays |= {"positions": array(3, length), "delta": array(1), "least": array(1)}
    elif vision is not None:
        side = vision.image_size
        arrays["media"] = {"vision": Packed(array(image.slots, vision.channels, side, side, dtype=np.float32))}
    return arrays


def _placed(cfg: ModelConfig, begun: Any, mesh: Mesh) -> Any:
    """Add shardings to the abstract cache and decoding state: rows over (data, fsdp), heads over `tensor`."""

    def place(axes: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, axes))

    cache, state = begun
    rows = jax.tree.map(lambda leaf: place(("batch", *(None,) * (leaf.ndim - 1)), leaf), state)
    return map_cache(cfg.text, place, cache), rows
