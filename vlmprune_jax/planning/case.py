"""One recovery on a TPU slice: the real step, compiled ahead of time without weights and without TPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.buckets import image_buckets, length_buckets, tile_buckets, within_row
from vlmprune_jax.data.images import load_image_processor
from vlmprune_jax.distributed.mesh import make_mesh
from vlmprune_jax.distributed.rules import sharding
from vlmprune_jax.experiment.arguments import plan_config, recover_config
from vlmprune_jax.experiment.spec import Experiment
from vlmprune_jax.families import family_of
from vlmprune_jax.hf.read import read_config
from vlmprune_jax.models.params import param_axes, param_shapes, unflatten
from vlmprune_jax.planning.ahead_of_time import Compiled, Slice, compile_for_tpu, make_slice
from vlmprune_jax.prune import PrunePlan, Scores, make_plan
from vlmprune_jax.prune.criteria.random import random_scores
from vlmprune_jax.prune.fingerprint import shape_digest
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.flops import StepFlops, step_flops
from vlmprune_jax.recovery.objective import needs_teacher
from vlmprune_jax.recovery.program import Program, make_program
from vlmprune_jax.recovery.step import abstract_state, batch_sharding, step_context
from vlmprune_jax.stages.feature_cache import check_frozen
from vlmprune_jax.stages.work import teacher_folder


@dataclass(frozen=True)
class Case:
    """One recovery on one slice: student, teacher and training settings, and the shape of a row.

    `lengths`: tokens per row of every bucket, ascending; `slots`: the same for images (or tiles), and `image_tokens`
    for the tokens of one where images are of any size (else empty). The step is that of the largest of all.
    """

    cfg: ModelConfig
    teacher_cfg: ModelConfig | None
    kept_layers: tuple[int, ...]
    config: RecoverConfig
    dtype: str
    mesh: tuple[int, int, int]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    slice: Slice
    image_tokens: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.lengths[-1]

    @property
    def images(self) -> int:
        """Images (or tiles) per row."""
        return self.slots[-1]

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image has room for where images are of any size, or 0."""
        return self.image_tokens[-1] if self.image_tokens else 0

    def make_mesh(self) -> Mesh:
        """The mesh over the slice's devices."""
        return make_mesh(*self.mesh, devices=self.slice.devices)


@dataclass(frozen=True)
class Estimate:
    """What the step of a case needs, as compiled, and its model FLOPs. Times are lower bounds."""

    case: Case
    compiled: Compiled
    model: StepFlops

    @property
    def free(self) -> float:
        """Bytes of HBM per chip that the step leaves."""
        return self.case.slice.chip.hbm - self.compiled.arguments - self.compiled.temporaries

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step if only this limited it: arithmetic, memory, links between chips.

        Memory: arguments are read and temporaries and what other chips send are written and read, once at least.
        """
        received = sum(self.compiled.received.values())
        traffic = self.compiled.arguments + 2 * (self.compiled.temporaries + received)
        return self.case.slice.chip.seconds(self.compiled.flops / len(self.case.slice.devices), traffic, received)

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the three, the others hidden behind it."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in that time."""
        return self.model.total / (self.step_seconds * len(self.case.slice.devices) * self.case.slice.chip.flops)


def make_case(experiment: Experiment, folder: Path | None, topology: str) -> Case:
    """The case that a config describes; of the model's folder only JSON files are read.

    `folder`: where the prune stage leaves plan.json; without one the pruned shapes are predicted from the config.

    Raises:
      UserError: an unknown topology, or settings that leave shapes open.
    """
    target = make_slice(topology)
    model = experiment.model
    hf_dir, tower = teacher_folder(model), None if model.vision_dir is None else Path(model.vision_dir)
    _, cfg = read_config(hf_dir, tower)
    made = None if folder is None else folder / "plan.json"
    plan = predict_plan(experiment, cfg) if made is None or not made.is_file() else PrunePlan.from_json(made)
    config = recover_config(experiment.recover)
    lengths = length_buckets(experiment.data, cfg)
    if not lengths:
        raise UserError("data.max_length is not set: planning needs the tokens per row (--config.data.max_length=2048)")
    slots, image_tokens = _image_slots(experiment, cfg, hf_dir)
    if experiment.data.feature_cache is not None:
        check_frozen(cfg, config)
        cfg = dataclasses.replace(cfg, tower=False)
    return Case(
        cfg=plan.apply_to(cfg),
        teacher_cfg=cfg if needs_teacher(config.losses) else None,
        kept_layers=plan.kept_layers,
        config=config,
        dtype=model.dtype,
        mesh=dataclasses.astuple(experiment.mesh),
        lengths=lengths,
        slots=slots,
        slice=target,
        image_tokens=within_row(image_tokens, lengths[-1]),
    )


def predict_plan(experiment: Experiment, cfg: ModelConfig) -> PrunePlan:
    """A plan with the shapes that the config's prune section leads to, from scores that know nothing.

    Equal widths and the number of layers do not depend on scores; which layers go, widths chosen over all layers at
    once (`selection="global"`), and how many heads go under `heads="auto"` (here: their share) do.
    """
    config = plan_config(experiment.prune, experiment.model, experiment.export)
    gqa = experiment.score.gqa
    scores = Scores("none", f"{shape_digest(cfg)}-", {"gqa": gqa}, **random_scores(cfg, seed=0, gqa=gqa))
    pair = (scores, scores) if config.method == "hybrid" else scores
    if config.heads == "auto":
        config = dataclasses.replace(config, heads="proportional")
    return make_plan(pair, cfg, config)


def _image_slots(experiment: Experiment, cfg: ModelConfig, folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Images or tiles per row that a batch can have, and tokens of an image where these are of any size."""
    data, preparation = experiment.data, None
    if cfg.vision is None:
        return (0,), ()
    if family_of(cfg).images != "whole":
        tiling = {name: getattr(data, name) for name in ("min_tiles", "max_tiles", "thumbnail")}
        preparation = load_image_processor(
            folder,
            aspect_ratio=data.aspect_ratio,
            max_pixels=data.max_image_pixels,
            cache_bytes=0,
            tiling=tiling,
            max_image_tokens=data.max_image_tokens,
        ).preparation
    return tile_buckets(data, preparation) or (data.max_images,), image_buckets(data, preparation) or ()


def estimate(case: Case) -> Estimate:
    """Compile the step of a case.

    Raises:
      DoesNotFit: it needs more HBM than a chip has.
      UserError: settings that do not fit the model or the slice.
    """
    mesh = case.make_mesh()
    config = case.config
    steps = config.steps or 1000  # of the schedule, which has the same operations for any number
    program = make_program(
        case.cfg, config, teacher_cfg=case.teacher_cfg, kept_layers=case.kept_layers, mesh=mesh, num_steps=steps
    )
    arguments = _arguments(case, program, mesh)
    with step_context(mesh, config.compute_dtype):
        compiled = compile_for_tpu(program.step, *arguments)
    model = step_flops(
        program.cfg,
        case.teacher_cfg,
        config.losses,
        program.groups,
        rows=config.batch_size,
        length=case.length,
        images=config.batch_size * case.images,
        image_tokens=case.tokens_per_image,
    )
    return Estimate(case, compiled, model)


def _arguments(case: Case, program: Program, mesh: Mesh) -> tuple[Any, ...]:
    """The step's arguments, as shapes with shardings."""

    def leaves(cfg: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        axes = param_axes(cfg)
        return {
            path: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding(mesh, axes[path]))
            for path, shape in param_shapes(cfg).items()
        }

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape)))

    student = leaves(program.cfg, case.dtype)
    frozen = {path: leaf for path, leaf in student.items() if path not in program.groups}
    trained = {path: leaf for path, leaf in student.items() if path in program.groups}
    assert program.shardings is not None  # there is a mesh
    state = abstract_state(trained, program.optimizer, program.shardings)
    teacher = None
    if program.teacher is not None:
        teacher = unflatten(leaves(program.teacher.cfg, case.config.compute_dtype))
    n_rows = case.config.batch_size
    batch = {name: rows((n_rows, case.length), np.int32) for name in ("input_ids", "attention_mask", "labels")}
    vision, projector = case.cfg.vision, case.cfg.projector
    each = (n_rows, case.images)
    if vision is not None and vision.any_size:
        batch["position_ids"] = rows((n_rows, 3, case.length), np.int32)
        if case.images:
            batch["image_grid_thw"] = rows((*each, 3), np.int32)
    if vision is not None and projector is not None and case.images and not case.cfg.tower:
        tokens, features = case.cfg.feature_shape
        shape, dtype = (*each, case.tokens_per_image or tokens, features), case.config.compute_dtype
        batch["vision_features"] = rows(shape, jnp.dtype(dtype))
    elif vision is not None and projector is not None and case.images:
        image: tuple[int, ...] = (vision.channels, vision.image_size, vision.image_size)
        if vision.any_size:
            image = (case.tokens_per_image * projector.downsample**2, vision.patch_values)
        batch["pixel_values"] = rows((*each, *image), np.float32)
    if top_k := case.config.losses.teacher_top_k:
        batch["teacher_ids"] = rows((n_rows, case.length, top_k), np.int32)
        batch["teacher_logprobs"] = rows((n_rows, case.length, top_k + 1), jnp.dtype(case.config.compute_dtype))
    return state, frozen, teacher, batch
