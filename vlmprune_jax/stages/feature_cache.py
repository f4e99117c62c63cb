"""Recovery without its vision tower: `data.feature_cache`, filled before training and read in place of pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.source import ModelSpec
from vlmprune_jax.data import inputs
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.distributed.config import MeshSpec
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.hf.disk.dtypes import DTYPES
from vlmprune_jax.hf.layout import PARTS
from vlmprune_jax.models.params import param_shapes
from vlmprune_jax.models.vlm import Model
from vlmprune_jax.prune import PrunePlan
from vlmprune_jax.prune.fingerprint import content_digest
from vlmprune_jax.recovery.config import RecoverConfig
from vlmprune_jax.recovery.feature_pass import compute_features, feature_identity
from vlmprune_jax.recovery.objective import needs_teacher
from vlmprune_jax.recovery.program import make_program
from vlmprune_jax.recovery.trainable import assign_groups
from vlmprune_jax.stages.context import Context, load_model, mesh_of, open_folder, teacher_folder

TOWER = "vision"


def cached_features(
    model: ModelSpec,
    data: DataSpec,
    mesh: MeshSpec,
    config: RecoverConfig,
    plan: PrunePlan,
    pruned: Path,
    context: Context,
) -> FeatureLoader | None:
    """What recovery reads images from, complete for its records; None without `data.feature_cache`.

    Raises:
      UserError: training would be refused, the tower is none or trains, the teacher has another one, the folder is of
        another tower or cannot be written, or an image cannot be read.
      Stopped: SIGTERM; what is computed stays.
    """
    if data.feature_cache is None:
        return None
    cfg, devices = open_folder(model, pruned).cfg, mesh_of(mesh)
    check_frozen(cfg, config)
    teacher_cfg = open_folder(model, teacher_folder(model)).cfg if needs_teacher(config.losses) else None
    # Settings that training refuses are better refused before a long pass.
    make_program(cfg, config, teacher_cfg=teacher_cfg, kept_layers=plan.kept_layers, mesh=devices, num_steps=1)
    weights = on_process_zero(lambda: _digest(model, config, pruned))
    images = inputs.load_inputs(model, data, cfg).image_loader
    assert images is not None  # there is a tower
    made_from = {"digest": weights, "dtype": model.dtype}
    identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
    dtype: np.dtype = DTYPES[config.compute_dtype]
    shape = cfg.feature_shape[1:] if cfg.any_size else cfg.feature_shape
    loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache), identity), shape, dtype)
    missing = loader.missing(inputs.recovery_records(model, data, cfg))
    if missing:
        with context.phase("features", len(missing)) as progress:
            compute_features(
                load_model(model, mesh, pruned, (TOWER,)).params[TOWER],
                cfg,
                loader,
                missing,
                batch_size=config.batch_size // config.accumulation,
                on_error=data.on_error,
                threads=data.threads,
                mesh=devices,
                progress=progress,
            )
    context.reporter.say(f"  {data.feature_cache} holds the features of all images ({len(missing):,} computed now)")
    return loader


def check_frozen(cfg: ModelConfig, config: RecoverConfig) -> None:
    """Refuse cached features where they would not stay what they are.

    Raises:
      UserError: the model has no tower, or it trains.
    """
    if cfg.vision is None:
        raise UserError("data.feature_cache: this model has no vision tower: leave it out")
    trained = assign_groups(list(param_shapes(cfg)), config.trainable)
    if any(path.startswith(f"{TOWER}/") for path in trained):
        raise UserError(
            f"data.feature_cache: recover.trainable={config.trainable!r} trains the vision tower, whose features then "
            "change: leave feature_cache out, or train less (decoder, lora, projector)"
        )


def _digest(model: ModelSpec, config: RecoverConfig, pruned: Path) -> str:
    """Of the student's tower, which must be the teacher's where that looks at images itself."""
    student = content_digest(open_folder(model, pruned), f"{TOWER}/")
    looks = needs_teacher(config.losses) or config.losses.teacher_top_k
    if looks and config.losses.teacher_inputs == "own":
        teacher = teacher_folder(model)
        if content_digest(open_folder(model, teacher), f"{TOWER}/") != student:
            raise UserError(
                f"data.feature_cache: {teacher} and {pruned} have different vision towers: leave feature_cache out, or "
                'use losses.teacher_inputs="student"'
            )
    return student


def parts_beside(features: FeatureLoader | None) -> list[str]:
    """What is loaded of a model: its tower only where no cached features stand for it."""
    return [part for part in PARTS if features is None or part != TOWER]


def load_for_training(
    model: ModelSpec, mesh: MeshSpec, config: RecoverConfig, pruned: Path, features: FeatureLoader | None
) -> tuple[Model, Model | None]:
    """Student, and teacher if a loss needs one, as far as they are needed beside cached features."""
    parts = parts_beside(features)
    teacher = None
    if needs_teacher(config.losses):
        teacher = load_model(model, mesh, teacher_folder(model), parts)
    return load_model(model, mesh, pruned, parts), teacher


def with_tower(model: Model, spec: ModelSpec, folder: Path) -> Model:
    """The model with the tower that lies in a folder, if it was trained without."""
    if model.cfg.tower:
        return model
    tower = open_folder(spec, folder).params[TOWER]
    return Model({**model.params, TOWER: tower}, dataclasses.replace(model.cfg, tower=True))
