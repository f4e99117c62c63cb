"""Measurement of the speed of JAX models in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.generate import CompiledGeneration, compile_generation
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.run.evaluation.speed.clock import Measurement, SpeedConfig, measure


def measure_speed(
    models: Mapping[str, Model], config: SpeedConfig | None = None, **options: Any
) -> dict[str, Measurement]:
    """Measure the prefill and decoding speed of several models in turns.

    All programs are compiled and run once before the measurement. Rows never end early, so that speed depends on the
    shapes of a model and not on its answers.

    Args:
      models: models by name; all must fit in memory together.
      config: workload; `options` override single settings of `SpeedConfig`.

    Raises UserError if a model cannot take the prompt, or a measured time is 0.
    """
    config = override(config or SpeedConfig(), options, "measure_speed")
    if not config.rounds:
        raise UserError("speed.rounds=0: must be at least 1 to measure speed")
    return measure({name: _compile(model, config) for name, model in models.items()}, config)


def _compile(model: Model, config: SpeedConfig) -> CompiledGeneration:
    """Compile a model's generation program and run it once to warm up."""
    if not isinstance(model, Model):
        raise UserError(f"models: must be Model objects, got {type(model).__name__}: pass vp.load(DIR)")
    config.check(model.cfg)
    ids, media = make_prompts(model.cfg, config)
    program = compile_generation(model, ids, media=media, max_new_tokens=config.new_tokens + 1)
    program.run()
    return program


def make_prompts(cfg: ModelConfig, config: SpeedConfig) -> tuple[np.ndarray, dict[str, Packed]]:
    """Return prompts int32[batch, prompt] that repeat one token, and a leading image of noise in each row, if any.

    With dynamic resolution, the image has a typical size.
    """
    rows = config.batch_size
    word = next(token for token in range(1, cfg.text.vocab_size) if token != cfg.image_token_id)
    ids = np.full((rows, config.prompt_tokens), word, np.int32)
    if not config.with_image(cfg) or cfg.vision is None or cfg.image_token_id is None:
        return ids, {}
    ids[:, : cfg.tokens_per_image] = cfg.image_token_id
    vision = cfg.vision
    size = (
        (vision.grid**2, vision.patch_values)
        if cfg.dynamic_resolution
        else (1, vision.channels, vision.image_size, vision.image_size)
    )
    values = np.random.default_rng(0).standard_normal((rows, *size), np.float32)
    grid = np.tile(np.array([1, vision.grid, vision.grid], np.int32), (rows, 1, 1)) if cfg.dynamic_resolution else None
    return ids, {"vision": Packed(values, grid)}
