"""Recovery without its vision tower: `data.feature_cache`, filled before training and read in place of pixels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.weight_files import DTYPES
from vlmprune_jax.data import inputs
from vlmprune_jax.data.cache import ArrayCache
from vlmprune_jax.data.config import DataSpec
from vlmprune_jax.data.feature_loader import FeatureLoader
from vlmprune_jax.distributed.mesh import on_process_zero
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
from vlmprune_jax.stages.work import Work

TOWER = "vision"


def cached_features(work: Work, data: DataSpec, config: RecoverConfig, plan: PrunePlan) -> FeatureLoader | None:
    """Fill the cache of image features for all records of a recovery; None without `data.feature_cache`.

    Raises:
      UserError: training would be refused, the tower is none or trains, the teacher has another one, the folder is of
        another tower or cannot be written, or an image cannot be read.
      Stopped: SIGTERM; what is computed stays.
    """
    if data.feature_cache is None:
        return None
    cfg, devices = work.open_model(work.start).cfg, work.devices
    check_frozen(cfg, config)
    teacher_cfg = work.open_model(work.teacher).cfg if needs_teacher(config.losses) else None
    # Settings that training refuses are better refused before a long pass.
    make_program(cfg, config, teacher_cfg=teacher_cfg, kept_layers=plan.kept_layers, mesh=devices, num_steps=1)
    weights = on_process_zero(lambda: _digest(work, config))
    images = inputs.load_inputs(work.model, data, cfg).image_loader
    assert images is not None  # there is a tower
    made_from = {"digest": weights, "dtype": work.model.dtype}
    identity = feature_identity(cfg, made_from, images.preparation.settings, config.compute_dtype)
    dtype: np.dtype = DTYPES[config.compute_dtype]
    shape = cfg.feature_shape[1:] if cfg.any_size else cfg.feature_shape
    loader = FeatureLoader(images, ArrayCache(Path(data.feature_cache), identity), shape, dtype)
    missing = loader.missing(inputs.recovery_records(work.model, data, cfg))
    if missing:
        with work.phase("features", len(missing)) as progress:
            compute_features(
                work.load(work.start, (TOWER,)).params[TOWER],
                cfg,
                loader,
                missing,
                batch_size=config.batch_size // config.accumulation,
                on_error=data.on_error,
                threads=data.threads,
                mesh=devices,
                progress=progress,
            )
    work.say(f"  {data.feature_cache} holds the features of all images ({len(missing):,} computed now)")
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


def _digest(work: Work, config: RecoverConfig) -> str:
    """Hash the student's tower, which must be the teacher's if the teacher looks at images itself."""
    student = content_digest(work.open_model(work.start), f"{TOWER}/")
    looks = needs_teacher(config.losses) or config.losses.teacher_top_k
    own = bool(looks) and config.losses.teacher_inputs == "own"
    if own and content_digest(work.open_model(work.teacher), f"{TOWER}/") != student:
        raise UserError(
            f"data.feature_cache: {work.teacher} and {work.start} have different vision towers: leave feature_cache "
            'out, or use losses.teacher_inputs="student"'
        )
    return student


def parts_beside(features: FeatureLoader | None) -> list[str]:
    """Return the parts of a model to load: without its tower if features are cached."""
    return [part for part in PARTS if features is None or part != TOWER]


def load_for_training(work: Work, config: RecoverConfig, features: FeatureLoader | None) -> tuple[Model, Model | None]:
    """Load the student, and the teacher if a loss needs one, as far as they are needed beside cached features."""
    parts = parts_beside(features)
    teacher = work.load(work.teacher, parts) if needs_teacher(config.losses) else None
    return work.load(work.start, parts), teacher


def with_tower(model: Model, work: Work) -> Model:
    """Add the tower of the model that training started from, if it was trained without."""
    if model.cfg.tower:
        return model
    tower = work.open_model(work.start).params[TOWER]
    return Model({**model.params, TOWER: tower}, dataclasses.replace(model.cfg, tower=True))
