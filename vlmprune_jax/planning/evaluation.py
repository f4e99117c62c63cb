"""Evaluation on a TPU slice: memory, bytes per token and the least time for benchmarks, compiled without TPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.data.preparation import Preparation
from vlmprune_jax.distributed.mesh import decoding_mesh, make_mesh, row_ways, use_mesh
from vlmprune_jax.distributed.rules import sharding
from vlmprune_jax.families.tiles import ImageShape
from vlmprune_jax.models.context import CACHE_AXES
from vlmprune_jax.models.flops import causal_flops, head_of, vision_flops, weight_flops
from vlmprune_jax.models.generate import decode, prefill
from vlmprune_jax.models.params import count_params, flatten, param_axes, param_shapes, unflatten
from vlmprune_jax.planning.ahead_of_time import Slice, compile_for_tpu
from vlmprune_jax.planning.traffic import hbm_bytes
from vlmprune_jax.workdir.tpu_plan import Hbm, PlannedEvaluation, PlannedModel

_NEW_TOKENS = 17  # of the compiled programs: 16 steps of the decoding loop


@dataclass(frozen=True)
class Questions:
    """Typical question of a benchmark: image size in pixels, text tokens, and tokens of the longest answer."""

    width: int
    height: int
    text: int
    answer: int


BENCHMARKS = {
    "MMMU": Questions(900, 500, 160, 16),
    "ScienceQA": Questions(500, 300, 120, 4),
    "MathVista": Questions(700, 500, 140, 256),
    "AI2D": Questions(700, 500, 70, 4),
    "MME-C": Questions(900, 600, 50, 4),
    "MME-P": Questions(1000, 700, 50, 4),
    "POPE": Questions(640, 480, 40, 4),
    "DocVQA": Questions(1700, 2200, 45, 32),
    "GQA": Questions(500, 400, 40, 8),
}


@dataclass(frozen=True)
class EvaluationCase:
    """Inputs for planning the evaluation of one model on a TPU slice.

    `preparation`: of its images (None: they have one size, or the model takes none). `mesh`: sizes (data, fsdp,
    tensor), or () for those of `decoding_mesh`. `rows`: of a batch, raised to a multiple of what shares it.
    """

    cfg: ModelConfig
    dtype: str
    slice: Slice
    preparation: Preparation | None
    rows: int
    mesh: tuple[int, ...] = ()

    @property
    def itemsize(self) -> int:
        """Number of bytes per weight."""
        return jnp.dtype(self.dtype).itemsize

    def shape(self, asked: Questions) -> tuple[int, ImageShape]:
        """Return a question's prompt length in tokens and its image's shape (0 tiles for text models)."""
        if self.cfg.vision is None:
            return asked.text, ImageShape(slots=0)
        whole = ImageShape() if self.preparation is None else None
        image = whole or self.preparation.image_shape(asked.width, asked.height, 1)  # type: ignore[union-attr]
        return asked.text + image.positions(self.cfg.tokens_per_image), image

    def make_mesh(self) -> Mesh:
        """Return the mesh for generation on the TPU slice's devices."""
        every = make_mesh(1, -1, 1, devices=self.slice.devices)
        mesh = decoding_mesh(self.cfg, every, count_params(self.cfg) * self.itemsize, self.mesh)
        assert mesh is not None
        return mesh


@dataclass(frozen=True)
class _Memory:
    """Memory per chip in bytes: all weights, the weights read per token, and key/value cache per row and token.

    `padded`: that cache as TPUs hold it (see `Decoder.empty_cache`).
    """

    weights: float
    read: float
    cache: float
    padded: float


def plan_evaluation(case: EvaluationCase) -> PlannedEvaluation:
    """Compile prefill and decoding for the benchmark with the longest prompts; return memory and minimum times.

    Raises:
      DoesNotFit: a batch needs more HBM than a chip has.
    """
    mesh, chip = case.make_mesh(), case.slice.chip
    ways = row_ways(mesh)
    rows = -(-case.rows // ways) * ways
    length, image = max((case.shape(asked) for asked in BENCHMARKS.values()), key=lambda shape: shape[0])
    params, arrays = _params(case, mesh), _arrays(case, rows, length, image, mesh)
    with use_mesh(mesh):
        begun = jax.eval_shape(lambda *inputs: prefill(inputs[0], case.cfg, inputs[1], _NEW_TOKENS, ()), params, arrays)
        first = compile_for_tpu(prefill, params, case.cfg, arrays, _NEW_TOKENS, ())
        later = compile_for_tpu(decode, params, case.cfg, *_placed(begun, mesh), _NEW_TOKENS, ())
    cached = sum(leaf.size for leaf in jax.tree.leaves(begun[0])) / (rows * (length + _NEW_TOKENS))
    steps, memory = _NEW_TOKENS - 1, _memory(case, mesh, params, cached)
    needed = max(program.arguments + program.temporaries for program in (first, later))
    largest = int((chip.hbm - memory.weights) / max(needed - memory.weights, 1) * rows / ways) * ways
    received = sum(later.received.values()) / steps
    return PlannedEvaluation(
        topology=case.slice.name,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        model=PlannedModel(layers=len(case.cfg.text.layers), parameters=count_params(case.cfg)),
        rows=rows,
        tokens_per_row=length,
        hbm=Hbm(arguments=memory.weights, temporaries=needed - memory.weights, free=chip.hbm - needed),
        largest_batch=largest,
        resident=memory.read + memory.cache * length * rows,
        read=hbm_bytes(later.text) / steps,
        received=received,
        seconds={
            name: _seconds(case, asked, memory, needed / rows, received / rows) for name, asked in BENCHMARKS.items()
        },
        compile_seconds=first.seconds + later.seconds,
    )


def _seconds(case: EvaluationCase, asked: Questions, memory: _Memory, row: float, received: float) -> float:
    """Return the minimum seconds for 1,000 questions in the largest batch that fits in memory."""
    cfg, chip, chips = case.cfg, case.slice.chip, len(case.slice.devices)
    length, image = case.shape(asked)
    rows = min(1000, max(1, int((chip.hbm - memory.weights) / (memory.padded * (length + asked.answer)))))
    per_token = weight_flops(cfg, "text/layers/", (), False) + weight_flops(cfg, head_of(cfg), (), False)
    prompt = length * per_token + causal_flops(cfg, length) + vision_flops(cfg, (), image.slots, image.tokens)
    first = max(chip.seconds(rows * prompt / chips, memory.weights, 0).values())
    traffic = memory.read + rows * memory.padded * (length + asked.answer / 2)
    step = max(chip.seconds(rows * per_token / chips, traffic, received * rows).values())
    return 1000 / rows * (first + asked.answer * step)


def _params(case: EvaluationCase, mesh: Mesh) -> Any:
    axes, dtype = param_axes(case.cfg), jnp.dtype(case.dtype)
    shapes = param_shapes(case.cfg).items()
    return unflatten(
        {p: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes[p], shape)) for p, shape in shapes}
    )


def _arrays(case: EvaluationCase, rows: int, length: int, image: ImageShape, mesh: Mesh) -> dict[str, Any]:
    """Return the inputs of `prefill` as abstract arrays."""
    cfg = case.cfg

    def array(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * len(shape))
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding(mesh, axes))

    arrays: dict[str, Any] = {"ids": array(length), "valid": array(length), "ended": array(dtype=bool)}
    arrays |= {"pixels": None, "pixel_mask": None}
    vision = cfg.vision
    if vision is not None and vision.dynamic_resolution:
        patches = image.rows * image.columns
        arrays |= {"pixels": array(patches, vision.patch_values, dtype=np.float32), "grid": array(1, 3)}
        if cfg.text.rope.sections:
            arrays |= {"positions": array(3, length), "delta": array(1)}
    elif vision is not None:
        side = vision.image_size
        arrays["pixels"] = array(image.slots, vision.channels, side, side, dtype=np.float32)
    return arrays


def _placed(begun: Any, mesh: Mesh) -> Any:
    """Return key/value cache and decoding state with shardings: rows over (data, fsdp), heads over `tensor`."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        axes = CACHE_AXES if leaf.ndim == len(CACHE_AXES) else ("batch", *(None,) * (leaf.ndim - 1))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, axes))

    return jax.tree.map(place, begun)


def _memory(case: EvaluationCase, mesh: Mesh, params: Any, cached: float) -> _Memory:
    """Return the memory of a case; `cached`: numbers in the cache per row and token on all chips."""
    cfg, size = case.cfg, case.itemsize
    flat = {path: math.prod(leaf.sharding.shard_shape(leaf.shape)) * size for path, leaf in flatten(params).items()}
    read = sum(n for path, n in flat.items() if path.startswith(("text/layers/", "text/norm", head_of(cfg))))
    cache = sum(layer.mixer.state_size(1) for layer in cfg.text.layers)
    return _Memory(sum(flat.values()), read, cache * size / mesh.size, cached * size / mesh.size)
