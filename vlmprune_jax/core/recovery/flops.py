"""Model FLOPs of one optimizer step, for MFU and the planner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.models.flops import causal_flops, head_of, vision_flops, weight_flops
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.terms import needs_teacher, terms_of


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step by model part, summed over all devices (a multiply-add counts as two).

    `student`, `teacher`: matrix products of decoder and output head. `attention`: scores and weighted sums in both
    decoders. `vision`: towers and projectors.
    """

    student: int
    teacher: int
    attention: int
    vision: int

    @property
    def total(self) -> int:
        """Sum of the FLOPs of all model parts."""
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
    image_tokens: int = 0,
    looked_at: int | None = None,
) -> StepFlops:
    """Return the model FLOPs of a training step: 6 N_student + 2 N_teacher per token, plus attention and vision.

    FLOPs are counted as in PaLM (arXiv 2204.02311, B): recomputation in the backward pass is excluded and padding is
    included, so that MFU describes the program and the metric `padding` describes the data. Logits are included only at
    positions that a loss uses. N counts the weights of matrix products, including the output head but not lookup
    tables. Of the 6 N, 2 N are the forward pass, 2 N the gradients of activations (always computed in the decoder), and
    2 N the gradients of trained weights: a frozen weight above an adapter costs 4 N. Attention counts only keys that a
    query attends to (causal, within its window), three times if gradients pass.

    Args:
      cfg: the student, with its adapters.
      teacher_cfg: the teacher; None if no loss needs one.
      loss: loss terms.
      trained: paths of the trained parameters.
      rows, length: rows and sequence length of the global batch of one optimizer step (all micro-batches).
      images: number of images or tiles in this batch, padding included.
      image_tokens: tokens per image, for images of varying size.
      looked_at: number of positions whose logits are needed; None = all.
    """
    tokens = rows * length
    looked_at = tokens if looked_at is None else looked_at
    student = weight_flops(cfg, "text/layers/", trained, True) * tokens
    logits = bool(terms_of(loss, hidden=False))
    student += weight_flops(cfg, head_of(cfg), trained if logits else (), logits) * looked_at
    attention = 3 * causal_flops(cfg, length) * rows
    vision = vision_flops(cfg, trained, images, image_tokens)
    teacher = 0
    if teacher_cfg is not None and needs_teacher(loss):
        teacher = weight_flops(teacher_cfg, "text/layers/", (), False) * tokens
        if terms_of(loss, teacher=True, hidden=False):
            teacher += weight_flops(teacher_cfg, head_of(teacher_cfg), (), False) * looked_at
        attention += causal_flops(teacher_cfg, length) * rows
        vision += vision_flops(teacher_cfg, (), images, image_tokens) if loss.teacher_inputs == "own" else 0
    return StepFlops(student, teacher, attention, vision)


def batch_flops(
    cfg: ModelConfig, teacher_cfg: ModelConfig | None, loss: LossConfig, trained: Collection[str], *, rows: int
) -> Callable[[Mapping[str, Any]], int]:
    """Return a function that computes the FLOPs of a training step from a process's batch arrays.

    The rows of other processes are assumed to have equally many image tokens and, if losses use only labelled
    positions, equally many labels. Padding after the images of packed rows is not counted.
    """
    count = functools.cache(functools.partial(step_flops, cfg, teacher_cfg, loss, trained))
    terms = terms_of(loss, reported=True).values()
    only_at_labels = loss.kl_positions == "labels" or all(term.counts != "positions" for term in terms)

    def of_images(arrays: Mapping[str, Any]) -> int:
        images = arrays["media"].get("vision")
        if images is None:
            return 0
        images_only = {"rows": 0, "length": 0, "looked_at": 0}
        if images.grid is None:
            return count(**images_only, images=images.values.shape[0] * images.values.shape[1]).total
        frames, cells = images.grid[..., 0], images.grid[..., 1:].prod(axis=-1) // cfg.merge**2
        sizes = zip(frames.ravel().tolist(), cells.ravel().tolist(), strict=True)
        return sum(count(**images_only, images=patches, image_tokens=size).total for patches, size in sizes if size)

    def count_batch(arrays: Mapping[str, Any]) -> int:
        mine, length = arrays["input_ids"].shape
        looked_at = rows * length
        if only_at_labels:
            looked_at = int(np.count_nonzero(arrays["labels"][:, 1:] != IGNORED)) * rows // mine
        text = {"rows": rows, "length": length, "images": 0}
        nowhere, once = (count(**text, looked_at=positions).total for positions in (0, 1))
        return of_images(arrays) * rows // mine + nowhere + looked_at * (once - nowhere)

    return count_batch


def room_of(cfg: ModelConfig, images: Packed) -> int:
    """Return the tokens of a packed row of images of any size, padding included; the row may hold features."""
    return int(images.values.shape[1]) // (cfg.merge**2 if cfg.tower else 1)
