"""FLOPs of a training step: the formula against what the compiled step computes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import recover_cases as cases
from stack_cases import tower_layer

from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.params import param_shapes, unflatten
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.flops import step_flops
from vlmprune_jax.core.recovery.program import make_program, step_context
from vlmprune_jax.core.recovery.terms import needs_teacher
from vlmprune_jax.core.recovery.trainable import partition
from vlmprune_jax.run.planning.ahead_of_time import (
    executed_flops,
)

ROWS, LENGTH = 8, 12


def traced_step(cfg, teacher_cfg, config):
    """The program of a run and the FLOPs of its traced step over ROWS rows of LENGTH tokens with an image each."""
    program = make_program(cfg, config, teacher_cfg=teacher_cfg, kept_layers=None, mesh=None, num_steps=6)
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in param_shapes(program.cfg).items()}
    masters, frozen = partition(shapes, program.groups)
    state = program.init.eval_shape(masters)
    teacher = None
    if program.teacher is not None:
        teacher = unflatten({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in param_shapes(teacher_cfg).items()})
    names = ("input_ids", "attention_mask", "labels")
    batch = {"media": {}} | {name: jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32) for name in names}
    if cfg.vision is not None:
        shape = (3, 6, 6) if cfg.tower else cfg.feature_shape
        batch["media"]["vision"] = Packed(jax.ShapeDtypeStruct((ROWS, 1, *shape), np.float32))
    if top_k := config.losses.teacher_top_k:
        batch["teacher_ids"] = jax.ShapeDtypeStruct((ROWS, LENGTH, top_k), np.int32)
        batch["teacher_logprobs"] = jax.ShapeDtypeStruct((ROWS, LENGTH, top_k + 1), np.float32)
    with step_context(None, "float32"):
        return program, executed_flops(program.step.trace(state, frozen, teacher, batch).jaxpr.jaxpr)


@pytest.mark.parametrize(
    ("model", "trainable"),
    [
        *itertools.product(["vision", "tied", "cached"], ["all", "lora"]),
        ("vision", "projector"),
        ("cached", "projector"),  # a decoder alone has none
    ],
)
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(chunk=4),
        LossConfig(ce=0.5, l2=0.5, kl=0.1, teacher_inputs="own", chunk=4),
        LossConfig(ce=0.0, l2=1.0, chunk=4),
        LossConfig(ce=0.5, kl=0.1, teacher_inputs="own", chunk=4, teacher_top_k=5),
    ],
    ids=["ce", "ce+l2+kl", "l2", "ce+cached kl"],
)
def test_the_formula_counts_what_the_step_computes(model, trainable, loss):
    """A decoder alone is "tied"; features come from a cache where the model is "cached"."""
    changes = {"vision": model != "tied", "tie_embeddings": model == "tied"}
    cfg, teacher_cfg = cases.config(**changes), cases.config(layers=3, **changes) if needs_teacher(loss) else None
    if model == "cached":
        cfg = dataclasses.replace(cfg, tower=False)
        teacher_cfg = teacher_cfg and dataclasses.replace(teacher_cfg, tower=False)
    check_formula(cfg, teacher_cfg, trainable, loss)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_the_formula_counts_a_tower_of_unequal_layers(trainable):
    layers = (tower_layer(2, 2, 16), tower_layer(1, 1, 5), tower_layer(1, 1, 5), tower_layer(2, 2, 3))
    teacher, loss = cases.config(), LossConfig(kl=0.1, teacher_inputs="own", chunk=4)
    check_formula(cases.config().with_layers(layers, "vision"), teacher, trainable, loss)


def check_formula(cfg, teacher_cfg, trainable, loss):
    config = cases.settings(trainable=trainable, lora=cases.LORA, losses=loss, remat="none")
    program, executed = traced_step(cfg, teacher_cfg, config)
    images = 0 if cfg.vision is None else ROWS
    found = step_flops(program.cfg, teacher_cfg, loss, program.groups, rows=ROWS, length=LENGTH, images=images)
    # The formula counts visible pairs of positions, XLA's attention computes all.
    expected = found.total + found.attention * (2 * LENGTH / (LENGTH + 1) - 1)
    # Logits are computed again in the backward pass, the student's and the teacher's.
    text = cfg.text
    head = 2 * text.vocab_size * text.hidden_size * ROWS * LENGTH
    expected += head * bool(loss.ce or loss.kl) + head * bool(loss.kl and needs_teacher(loss))
    # The input of the projector's first layer needs a gradient only if the tower trains.
    if cfg.vision is not None and (trainable != "all" or not cfg.tower):
        expected -= 2 * cfg.vision.hidden_size * text.hidden_size * ROWS * cfg.tokens_per_image
    assert executed == round(expected)


def test_full_recomputation_is_executed_and_not_counted():
    """Everything frozen below the adapters runs once more, and the model FLOPs stay."""
    cfg, loss = cases.config(vision=False), LossConfig(chunk=4)
    executed = {}
    for remat in ("none", "full"):
        config = cases.settings(trainable="lora", lora=cases.LORA, losses=loss, remat=remat)
        executed[remat] = traced_step(cfg, None, config)[1]
    assert 1.15 < executed["full"] / executed["none"] < 1.35
