"""Preparation of a training run before its first batch: checks, placement of arrays, the step and its programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from vlmprune_jax.base.checks import one_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.channels import Experts
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import row_ways
from vlmprune_jax.core.mesh.rules import check_divides, sharding
from vlmprune_jax.core.models.fake_quant import FAKE_QUANTS
from vlmprune_jax.core.models.params import Flat, flatten, param_axes, param_shapes, unflatten
from vlmprune_jax.core.models.placement import mesh_of
from vlmprune_jax.core.models.vlm import Model, Params
from vlmprune_jax.core.plans.plan import PrunePlan
from vlmprune_jax.core.prune.surgery import trim_vocabulary
from vlmprune_jax.core.recovery.checkpoint import weights_digest
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.core.recovery.flops import room_of
from vlmprune_jax.core.recovery.losses import Teacher
from vlmprune_jax.core.recovery.step import (
    Step,
    TrainState,
    init_state,
    learning_rates,
    make_optimizer,
    make_step,
    state_shardings,
    step_context,
)
from vlmprune_jax.core.recovery.terms import check_losses, check_teacher, layer_pairs, needs_teacher
from vlmprune_jax.core.recovery.trainable import add_lora, assign_groups, with_lora

BatchShapes = Mapping[str, Any]  # a batch with a jax.ShapeDtypeStruct in place of every array


class Program(NamedTuple):
    """Training step of a run, which does not depend on weight values.

    `cfg`: config of the student, with LoRA adapters and simulated integer rounding. `groups`: optimizer group of each
    trained parameter, by path. `shardings`: shardings of the training state.
    """

    cfg: ModelConfig
    groups: dict[str, str]
    teacher: Teacher | None
    optimizer: optax.GradientTransformation
    shardings: TrainState | None
    step: Step


def make_program(
    cfg: ModelConfig,
    config: RecoverConfig,
    *,
    teacher_cfg: ModelConfig | None,
    kept_layers: Sequence[int] | None,
    mesh: Mesh | None,
    num_steps: int,
) -> Program:
    """Check all settings that need no weights, then build the training step.

    Raises UserError if settings contradict the model, the teacher or the mesh.
    """
    check_losses(config.losses)
    check_teacher(config.losses, cfg, teacher_cfg)
    if mesh is not None:
        check_divides(cfg, mesh)
        ways, rows = row_ways(mesh), config.batch_size // config.accumulation
        if rows % ways:
            raise UserError(
                f"recover: a micro-batch of {rows} rows (batch_size / accumulation) must be a multiple of mesh.data x "
                f"mesh.fsdp = {ways} devices: change batch_size or accumulation"
            )
    if config.adapters is not None:
        cfg = with_lora(cfg, config.adapters)
    if config.quantize != "none":
        if any(isinstance(layer.channel, Experts) for layer in cfg.text.layers):
            raise UserError(
                f"recover.quantize={config.quantize!r}: layers of experts are not rounded in training: "
                'use "none", and export.quantize after it'
            )
        rounding = FAKE_QUANTS[one_of("recover.quantize", config.quantize, FAKE_QUANTS)]
        cfg = dataclasses.replace(cfg, fake_quant=rounding(cfg))
    shapes = param_shapes(cfg)
    groups = assign_groups(list(shapes), config.trainable)
    teacher = None
    if teacher_cfg is not None and needs_teacher(config.losses):
        teacher = Teacher(teacher_cfg, *layer_pairs(config.losses, cfg, teacher_cfg, kept_layers))
    optimizer = make_optimizer(config, groups, num_steps)
    masters = {path: jax.ShapeDtypeStruct(shapes[path], np.float32) for path in groups}
    shardings = state_shardings(masters, optimizer, cfg, mesh)
    step = make_step(cfg, config, teacher, optimizer, learning_rates(config, groups, num_steps), shardings)
    return Program(cfg, groups, teacher, optimizer, shardings, step)


class Run(NamedTuple):
    """Training run that is ready to start: program, original dtypes of trained parameters, and arrays on devices."""

    program: Program
    dtypes: dict[str, Any]
    mesh: Mesh | None
    frozen: Flat
    teacher_params: Params | None
    state: TrainState
    identity: dict[str, Any]


def prepare(
    model: Model,
    config: RecoverConfig,
    teacher: Model | None,
    plan: PrunePlan | None,
    mesh: Mesh | None,
    total: int,
    program: Program | None = None,
) -> Run:
    """Check the run's settings, place the arrays on devices and build the training step, unless `program` has it."""
    mesh = mesh if mesh is not None else mesh_of(model.params)
    if teacher is not None:
        teacher = trim_vocabulary(teacher, getattr(plan, "vocabulary", None))
    if program is None:
        program = make_program(
            model.cfg,
            config,
            teacher_cfg=None if teacher is None else teacher.cfg,
            kept_layers=getattr(plan, "kept_layers", None),
            mesh=mesh,
            num_steps=total,
        )
    if config.adapters is not None:
        model = add_lora(model, config.adapters, jax.random.fold_in(jax.random.key(config.seed), 1))
    flat = place(model, mesh)
    trainable = {path: leaf for path, leaf in flat.items() if path in program.groups}
    frozen = {path: leaf for path, leaf in flat.items() if path not in program.groups}
    taught, teacher_params = program.teacher, None
    if teacher is not None and taught is not None:
        teacher_params = unflatten({p: x.astype(config.compute_dtype) for p, x in place(teacher, mesh).items()})
    with step_context(mesh, config.compute_dtype):
        state = init_state(trainable, program.optimizer, config.seed, program.shardings)
    identity = {
        "config": config.identity(),
        "num_steps": total,
        "model": {"cfg": dataclasses.asdict(model.cfg), "weights": weights_digest(flat)},
        "teacher": taught and {"cfg": dataclasses.asdict(taught.cfg), "weights": weights_digest(teacher_params)},
        "layers": taught and [taught.student_layers, taught.teacher_layers],
    }
    dtypes = {path: leaf.dtype for path, leaf in trainable.items()}
    return Run(program, dtypes, mesh, frozen, teacher_params, state, identity)


def place(model: Model, mesh: Mesh | None) -> Flat:
    """Move flat params to the mesh or default device; arrays that are already there are not copied."""
    flat = flatten(model.params)
    if mesh is None:
        return {path: jax.numpy.asarray(leaf) for path, leaf in flat.items()}
    axes = param_axes(model.cfg)
    return {path: jax.device_put(leaf, sharding(mesh, axes[path], leaf.shape)) for path, leaf in flat.items()}


def shapes_of(batch: Mapping[str, Any]) -> Any:
    """Return the shapes and dtypes of a batch's arrays, for each of which the training step is compiled once."""
    arrays, structure = jax.tree.flatten(batch)
    return structure, tuple((array.shape, array.dtype) for array in arrays)


def describe(cfg: ModelConfig, batches: Sequence[Mapping[str, Any]]) -> str:
    """Return batch shapes in words, such as "sequences of 1,024, 512 tokens", with image counts if they differ."""
    lengths, counts = [f"{batch['input_ids'].shape[1]:,}" for batch in batches], list[str]()
    for images in (batch["media"].get("vision") for batch in batches):
        slots = 0 if images is None else images.values.shape[0] * images.values.shape[1]
        counts.append(f"{slots} image{'s' if slots != 1 else ''}")
        if images is not None and images.grid is not None:
            counts[-1] = f"{len(images.values) * room_of(cfg, images):,} image tokens"
    if len(set(counts)) == 1:
        return f"sequences of {', '.join(lengths)} tokens"
    return "sequences of " + ", ".join(f"{tokens} tokens with {n}" for tokens, n in zip(lengths, counts, strict=True))
