"""Evaluation on a TPU slice, computed from shapes: memory, and lower bounds on the time of benchmark questions.

A question is the vision tower's pass over its image, the prefill of the prompt, and an answer of some tokens. A phase
takes at least the longer of its arithmetic at the chip's peak and of reading its weights and cache once from HBM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmprune_jax.base.chips import Chip
from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import decoding_mesh, make_mesh, row_ways
from vlmprune_jax.core.models.flops import active_params, causal_flops, head_of, vision_flops, weight_flops
from vlmprune_jax.core.models.params import abstract_params, count_params
from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.preparation import Preparation, fixed_size
from vlmprune_jax.io.families import family_of
from vlmprune_jax.io.families.tiles import ImageShape
from vlmprune_jax.run.evaluation.config import EvaluateSpec
from vlmprune_jax.run.planning.ahead_of_time import Slice
from vlmprune_jax.run.workdir.tpu_plan import GIB, PlannedEvaluation, PlannedModel

BATCH = 1000  # number of questions in the estimate; as many run at once as fit
_CACHE = 2  # bytes per number: bfloat16


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


# Bytes per weight of the matrices in the decoder's layers, with scales; the rest stays in bfloat16, as in exports.
WEIGHT_FORMATS = {
    "bf16": 2.0,
    "w8a8": 1.0,  # one scale per row, which is negligible
    "w4a16": 0.5 + 2 / 128,  # a bfloat16 scale per group of 128
}


@dataclass(frozen=True)
class Bound:
    """Lower bounds (s) on the phases tower, prefill and decode, for `rows` questions at once on one group of chips.

    `chips`: number of chips in the group, a power of two; other groups answer other questions.
    """

    chips: int
    rows: int
    phases: dict[str, float]

    def seconds(self, questions: int, chips: int) -> dict[str, float]:
        """Return the seconds of each phase for answering `questions` questions on all groups of `chips` chips."""
        batches = questions / self.rows / (chips // self.chips)
        return {name: batches * seconds for name, seconds in self.phases.items()}


def preparation_of(data: DataSpec, cfg: ModelConfig, folder: Path) -> Preparation | None:
    """Return how a model divides images into tiles or patches; None if images stay whole."""
    if cfg.vision is None:
        return None
    if family_of(cfg).images == "whole":
        if data.max_image_tokens is not None:
            with error_context(f"data.max_image_tokens={data.max_image_tokens}"):
                raise fixed_size(cfg.tokens_per_image)
        return None
    return load_image_processor(folder, data, slot_tokens=cfg.tokens_per_image).preparation


def size_of(cfg: ModelConfig) -> PlannedModel:
    """Return a model's numbers of layers and parameters."""
    return PlannedModel(layers=len(cfg.text.layers), parameters=count_params(cfg))


def prompt_of(cfg: ModelConfig, preparation: Preparation | None, question: Questions) -> tuple[int, ImageShape]:
    """Return a question's prompt length in tokens and its image's shape (0 tiles for text models).

    `preparation`: how the model prepares images (None: images have one size).
    """
    if cfg.vision is None:
        return question.text, ImageShape(slots=0)
    image = ImageShape()
    if preparation is not None:
        image = preparation.plan(question.width, question.height)
    return question.text + image.positions(cfg.tokens_per_image), image


def bound(
    cfg: ModelConfig,
    chip: Chip,
    chips: int,
    weights: str,
    length: int,
    image: ImageShape,
    answer: int,
    rows: int | None = None,
) -> Bound:
    """Return a lower bound on the time of questions with prompts of `length` and answers of `answer` tokens.

    The chips are split into equal groups; each group holds a copy of the weights and answers its own questions.
    `rows`: questions that a group answers at once (None: as many as fit in memory, at most `BATCH` over all chips).
    The group size is the fastest one if `rows` is given, otherwise the one with the most questions per second.

    Raises UserError if the weights do not fit on the chips, or the chip has no int8 units.
    """
    int8, whole = weights == "w8a8", count_params(cfg)
    if int8 and not chip.int8:
        raise UserError(f"{weights}: this TPU has no int8 units with a published peak: use another generation")
    layers, head = weight_flops(cfg, "text/layers/", (), False), weight_flops(cfg, head_of(cfg), (), False)
    matrices = layers / 2 + whole - active_params(cfg)  # with all experts, since a batch's tokens choose all of them
    layer_bytes = matrices * WEIGHT_FORMATS[weights]
    tower_bytes = 2 * sum(count_params(cfg, part) for part in ("vision", "projector"))
    total = layer_bytes + 2 * (whole - matrices)
    groups = [n for n in (2**k for k in range(chips.bit_length())) if total < n * chip.hbm]
    if not groups:
        raise UserError(f"{total / 2**30:.1f} GiB of weights do not fit on {chips} chips: use a larger slice")
    cache, mean = (
        sum(layer.mixer.state_bytes(tokens, _CACHE) for layer in cfg.text.layers)
        for tokens in (length + answer, length + answer // 2)
    )
    rate = chip.int8 if int8 else chip.flops

    def on(group: int) -> Bound:
        n = rows or max(1, min(-(-BATCH * group // chips), int((group * chip.hbm - total) / cache)))

        def at_least(of_layers: float, others: float, n_bytes: float) -> float:
            """Return seconds per group: the longer of arithmetic (layers, other FLOPs) and memory traffic."""
            return max(of_layers / rate + others / chip.flops, n_bytes / chip.hbm_bandwidth) / group

        phases = {
            "tower": at_least(0, n * vision_flops(cfg, (), image.slots, image.tokens), tower_bytes),
            # the output head is needed for the last token alone
            "prefill": at_least(n * length * layers, n * (head + causal_flops(cfg, length)), layer_bytes),
            "decode": max(answer - 1, 0) * at_least(n * layers, n * head, layer_bytes + head + n * mean),
        }
        return Bound(group, n, phases)

    def cost(found: Bound) -> float:
        return sum(found.phases.values()) * (1 if rows else found.chips / found.rows)

    return min(map(on, groups), key=cost)


def plan_evaluation(
    cfg: ModelConfig,
    dtype: str,
    target: Slice,
    preparation: Preparation | None,
    spec: EvaluateSpec,
    formats: Sequence[str] = ("bf16",),
) -> PlannedEvaluation:
    """Return memory and least seconds of an evaluation; its rows are those of the benchmark with the longest prompts.

    Args:
      cfg, dtype: the model, and the data type of its weights for the memory.
      preparation: how the model prepares images (None: images of one size, or no images).
      spec: rows per batch, rounded up so that devices share them evenly, and the mesh.
      formats: names of `WEIGHT_FORMATS` for the least seconds.

    Raises UserError if weights and cache do not fit on the slice.
    """
    itemsize, chip = np.dtype(dtype).itemsize, target.chip
    every = make_mesh(1, -1, 1, devices=target.devices)
    mesh = decoding_mesh(cfg, every, count_params(cfg) * itemsize, spec.mesh)
    assert mesh is not None
    ways = row_ways(mesh)
    rows = -(-spec.batch_size // ways) * ways
    prompts = {name: prompt_of(cfg, preparation, question) for name, question in BENCHMARKS.items()}
    longest = max(prompts, key=lambda name: prompts[name][0])
    length = prompts[longest][0]
    leaves = abstract_params(cfg, dtype, mesh).values()
    weights = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize for leaf in leaves)
    tokens = length + BENCHMARKS[longest].answer
    per_row = sum(layer.mixer.state_bytes(tokens, itemsize) for layer in cfg.text.layers) / mesh.size
    if weights + rows * per_row > chip.hbm:
        raise UserError(
            f"the evaluation on {target.name} needs {(weights + rows * per_row) / GIB:.2f} GiB of HBM per chip for "
            f"weights and cache, which is more than it has ({chip.hbm / GIB:.2f} GiB): use a larger slice or a smaller "
            "evaluate.batch_size"
        )
    phases = {
        form: {
            name: bound(cfg, chip, mesh.size, form, *prompts[name], question.answer).seconds(BATCH, mesh.size)
            for name, question in BENCHMARKS.items()
        }
        for form in formats
    }
    return PlannedEvaluation(
        topology=target.name,
        chips=mesh.size // chip.halves,
        mesh=dict(mesh.shape),
        model=size_of(cfg),
        rows=rows,
        tokens_per_row=length,
        weights=weights,
        cache=rows * per_row,
        largest_batch=int((chip.hbm - weights) / per_row / ways) * ways,
        phases=phases,
    )
