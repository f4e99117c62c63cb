"""Measurement of the speed of JAX models in this process."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import use_mesh
from vlmprune_jax.core.models.generate import CompiledGeneration, compile_generation
from vlmprune_jax.core.models.media import Packed
from vlmprune_jax.core.models.vlm import Model, Params, mesh_of, place_batch, to_nnx
from vlmprune_jax.run.evaluation.speed.clock import (
    Measurement,
    Program,
    QuestionTime,
    Seconds,
    SpeedConfig,
    measure,
    time_in_turns,
)


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


def measure_questions(
    models: Mapping[str, Model], config: SpeedConfig | None = None, *, batches: Sequence[int] = (1, 16), **options: Any
) -> dict[str, dict[int, QuestionTime]]:
    """Measure how long several models take for each phase of a question (tower, projector, prefill, tokens), in turns.

    Args:
      models, config, options: as for `measure_speed`; tokens are timed over `new_tokens`.
      batches: numbers of questions at once, in place of `batch_size`.

    Returns: {name: {batch size: seconds of every round}}.

    Raises UserError as `measure_speed` does.
    """
    config = override(config or SpeedConfig(), options, "measure_questions")
    if not config.rounds:
        raise UserError("speed.rounds=0: must be at least 1 to measure questions")
    times: dict[str, dict[int, QuestionTime]] = {name: {} for name in models}
    for rows in batches:
        workload = override(config, {"batch_size": rows})
        programs = dict[tuple[str, bool], Program]()
        for name, model in models.items():
            programs[name, False] = _compile(model, workload)
            if config.with_image(model.cfg):
                programs[name, True] = _Images(model, workload)
        seconds = dict(zip(programs, time_in_turns([*programs.values()], config.rounds), strict=True))
        for name in models:
            answer = seconds[name, False]
            image = seconds.get((name, True), [(0.0, 0.0)] * config.rounds)
            times[name][rows] = QuestionTime(
                tower=tuple(tower for tower, _ in image),
                projector=tuple(projector for _, projector in image),
                first_token=tuple(first for first, _ in answer),
                token=tuple(rest / config.new_tokens for _, rest in answer),
            )
    return times


class _Images:
    """Compiled vision tower and projector for the images of one batch of prompts."""

    def __init__(self, model: Model, config: SpeedConfig):
        self.model, self.mesh = model, mesh_of(model.params)
        self.images: Packed = place_batch(make_prompts(model.cfg, config)[1], self.mesh)["vision"]
        self.run()

    def run(self) -> Seconds:
        """Encode and project the images once; return the seconds of the tower, and of the projector."""
        params, cfg = self.model.params, self.model.cfg
        with use_mesh(self.mesh):
            start = time.perf_counter()
            features = jax.block_until_ready(_encode(params, cfg, self.images))
            encoded = time.perf_counter()
            jax.block_until_ready(_project(params, cfg, features))
            return encoded - start, time.perf_counter() - encoded


@functools.partial(jax.jit, static_argnames="cfg")
def _encode(params: Params, cfg: ModelConfig, images: Packed) -> jax.Array:
    values = images.values.astype(params["text"]["embed_tokens"]["weight"].dtype)
    return to_nnx(Model(params, cfg)).vision_features(images._replace(values=values))


@functools.partial(jax.jit, static_argnames="cfg")
def _project(params: Params, cfg: ModelConfig, features: jax.Array) -> jax.Array:
    return to_nnx(Model(params, cfg)).projector(features)


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
