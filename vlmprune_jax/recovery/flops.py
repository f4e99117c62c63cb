"""The arithmetic that one optimizer step needs: the model FLOPs behind MFU and the planner."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vlmprune_jax.config import ModelConfig, VisionConfig
from vlmprune_jax.models.params import param_axes, param_shapes
from vlmprune_jax.recovery.config import LossConfig
from vlmprune_jax.recovery.losses import compares_logits, needs_logits, needs_teacher


@dataclass(frozen=True)
class StepFlops:
    """FLOPs (a multiply-add is two) of one optimizer step over all devices.

    `student`, `teacher`: matrix products of decoder and head; `attention`: scores and mixing in both decoders;
    `vision`: towers and projectors.
    """

    student: int
    teacher: int
    attention: int
    vision: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.student + self.teacher + self.attention + self.vision


def step_flops(
    cfg: ModelConfig,
    teacher_cfg: ModelConfig | None,
    loss: LossConfig,
    trained: Collection[str],
    *,
    rows: int,
    length: int,
    images: int,
) -> StepFlops:
    """6 N_student + 2 N_teacher per token, plus attention and vision: model FLOPs as in PaLM (arXiv 2204.02311, B).

    What is computed again in the backward pass does not count, and padding does, so that MFU is about the program and
    `padding` about the data. N are the weights of matrix products, the head included and looked-up tables not. Of the
    6 N, 2 N are the forward pass; 2 N gradients of activations, in the decoder always, for whatever trains is in it or
    below; 2 N gradients of the weight, where it trains: a frozen weight above an adapter counts 4 N. Attention counts
    the keys that a query may see (causal, within its window), twice again where gradients pass.

    Args:
      cfg: the student, with its adapters. teacher_cfg: None if no loss needs a teacher.
      trained: paths of the parameters that train.
      rows, length: of the global batch of one optimizer step, all micro-batches; images: its image or tile slots.
    """
    tokens = rows * length
    student = _weights(cfg, "text/layers/", trained, True) * tokens
    logits = needs_logits(loss)
    student += _weights(cfg, _head(cfg), trained if logits else (), logits) * tokens
    attention = 3 * _causal(cfg, length) * rows
    vision = _vision(cfg, trained, images)
    teacher = 0
    if teacher_cfg is not None and needs_teacher(loss):
        teacher = _weights(teacher_cfg, "text/layers/", (), False) * tokens
        teacher += (_weights(teacher_cfg, _head(teacher_cfg), (), False) if compares_logits(loss) else 0) * tokens
        attention += _causal(teacher_cfg, length) * rows
        vision += _vision(teacher_cfg, (), images) if loss.teacher_inputs == "own" else 0
    return StepFlops(student, teacher, attention, vision)


def batch_flops(
    cfg: ModelConfig, teacher_cfg: ModelConfig | None, loss: LossConfig, trained: Collection[str], *, rows: int
) -> Callable[[Mapping[str, Any]], int]:
    """`step_flops` in all, as a function of one process's arrays of a batch; the global batch has `rows`."""

    @functools.cache
    def count(length: int, slots: int) -> int:
        return step_flops(cfg, teacher_cfg, loss, trained, rows=rows, length=length, images=rows * slots).total

    def of(arrays: Mapping[str, Any]) -> int:
        images = arrays.get("pixel_values", arrays.get("vision_features"))
        return count(arrays["input_ids"].shape[1], 0 if images is None else images.shape[1])

    return of


def _weights(cfg: ModelConfig, prefix: str, trained: Collection[str], passes: bool) -> int:
    """FLOPs per position of the matrix products below a path; `passes`: whether gradients pass their activations."""
    axes, total = param_axes(cfg), 0
    for path, shape in param_shapes(cfg).items():
        leaf = path.rpartition("/")[2]
        is_matrix = leaf != "bias" and len([axis for axis in axes[path] if axis != "layer"]) > 1
        if path.startswith(prefix) and is_matrix:
            total += 2 * math.prod(shape) * (1 + passes + (path in trained))
    return total


def _head(cfg: ModelConfig) -> str:
    return f"text/{'embed_tokens' if cfg.text.tie_embeddings else 'lm_head'}/"


def _causal(cfg: ModelConfig, length: int) -> int:
    """FLOPs of one row's attention, forward: 4 per channel and pair of a query and a key that it may see."""
    pairs = {
        window: sum(min(position + 1, window or length) for position in range(length))
        for window in {shape.window for shape in cfg.text.layers}
    }
    return sum(4 * pairs[shape.window] * shape.q_heads * cfg.text.head_dim for shape in cfg.text.layers)


def _vision(cfg: ModelConfig, trained: Collection[str], images: int) -> int:
    """FLOPs of projector and tower, if it runs, over `images` images or tiles."""
    tower = cfg.vision
    if tower is None or cfg.projector is None:
        return 0
    in_tower = any(path.startswith("vision/") for path in trained)
    in_projector = in_tower or any(path.startswith("projector/") for path in trained)
    projector = _weights(cfg, "projector/", trained, in_projector) * cfg.tokens_per_image
    if not cfg.tower:
        return images * projector
    blocks = _weights(cfg, "vision/layers/", trained, in_tower) * _positions(tower)
    heads = sum(shape.q_heads for shape in tower.layers)
    blocks += 4 * heads * tower.head_dim * _positions(tower) ** 2 * (3 if in_tower else 1)
    patches = _weights(cfg, "vision/patch_embedding/", trained, False) * tower.n_patches
    return images * (blocks + patches + projector)


def _positions(tower: VisionConfig) -> int:
    return tower.n_patches + tower.class_token
