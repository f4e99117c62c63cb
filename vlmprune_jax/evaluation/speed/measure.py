"""How fast models are here and now: prefill and decoding by the clock, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.distributed.mesh import on_process_zero
from vlmprune_jax.evaluation.speed.clock import TRIES, Program, often, reading
from vlmprune_jax.models.generate import CompiledGeneration, compile_generation
from vlmprune_jax.models.vlm import Model


@dataclass(frozen=True)
class Speed:
    """What was measured of one model, a value a round.

    `prefill`: tokens per second of the prompts, what they show included. `decode`: new tokens per second of all rows
    together, without the prefill. `first_token`: seconds from the prompts to the first token of every row.
    `peak_bytes`: what the compiled program takes of a device's memory, weights and cache included; None if unknown.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    first_token: tuple[float, ...]
    peak_bytes: int | None


def measure_speed(
    models: Mapping[str, Model], *, prompt: int, new_tokens: int, batch_size: int, rounds: int, image: bool
) -> dict[str, Speed]:
    """Prefill and decoding speed of models by the clock, each read once a round, every other round in reverse.

    What else the machine does then slows all of them alike: compare what the same rounds found. Programs are compiled
    and run once before. Rows never end early; a model is the faster for a shape, not for what it answers.

    Args:
      models: by name; all must fit in memory together.
      prompt: tokens of a row, those of its image included.
      new_tokens: tokens that a row generates after its first one.
      batch_size: rows that are answered together.
      rounds: how often each model is measured.
      image: whether a prompt begins with an image; the vision tower is then a part of the prefill.

    Raises:
      UserError: see `check_workload`; or decoding takes no time that can be measured.
    """
    if min(prompt, new_tokens, batch_size, rounds) < 1:
        raise UserError(
            f"speed of {rounds} rounds, {batch_size} rows, {prompt} + {new_tokens} tokens: each must be at least 1"
        )
    programs = {name: _compiled(model, prompt, new_tokens, batch_size, image) for name, model in models.items()}
    times = {name: often(program, agreed=_of_process_zero) for name, program in programs.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in range(rounds):
        for name in list(models)[:: -1 if number % 2 else 1]:
            found[name].append(_reading(name, programs[name], times[name]))
    return {
        name: Speed(
            prefill=tuple(batch_size * prompt / first for first, _ in pairs),
            decode=tuple(batch_size * new_tokens / rest for _, rest in pairs),
            first_token=tuple(first for first, _ in pairs),
            peak_bytes=programs[name].peak_bytes,
        )
        for name, pairs in found.items()
    }


def check_workload(cfg: ModelConfig, *, prompt: int, new_tokens: int, image: bool, named: str = "speed.") -> None:
    """Refuse a workload that `measure_speed` cannot give to a model; `named` is what precedes names of settings.

    Raises:
      UserError: a row is too long for the model, or too short for an image, or the model sees none.
    """
    cfg.check_row(f"{named}prompt_tokens + new_tokens + 1", prompt + new_tokens + 1)
    if image and (cfg.vision is None or cfg.image_token_id is None):
        raise UserError(f"speed with an image: this model sees none ({named}image=False)")
    if image and cfg.tokens_per_image >= prompt:
        raise UserError(
            f"{named}prompt_tokens={prompt} must be more than the {cfg.tokens_per_image} tokens of an image: raise it, "
            f"or set {named}image=False"
        )


def _compiled(model: Model, prompt: int, new_tokens: int, batch_size: int, image: bool) -> CompiledGeneration:
    """The program, run once."""
    check_workload(model.cfg, prompt=prompt, new_tokens=new_tokens, image=image)
    ids, pixels = prompts(model.cfg, prompt, batch_size, image)
    grids = None if pixels is None else grids_of(model.cfg, batch_size)
    program = compile_generation(model, ids, pixel_values=pixels, image_grid_thw=grids, max_new_tokens=new_tokens + 1)
    program.generate()
    return program


def prompts(cfg: ModelConfig, prompt: int, batch_size: int, image: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """What is measured: int32[batch, prompt] ids, perhaps of an image first, and its pixels or None.

    float32[batch, 1, channels, height, width], or of a typical image where they are of any size, with `grids_of`,
    [batch, 1, patches, values].
    """
    word = next(token for token in range(1, cfg.text.vocab_size) if token != cfg.image_token_id)
    ids = np.full((batch_size, prompt), word, np.int32)
    if not image or cfg.vision is None or cfg.image_token_id is None:
        return ids, None
    ids[:, : cfg.tokens_per_image] = cfg.image_token_id
    side = cfg.vision.image_size
    size = (cfg.vision.n_patches, cfg.vision.patch_values) if cfg.any_size else (cfg.vision.channels, side, side)
    return ids, np.random.default_rng(0).standard_normal((batch_size, 1, *size), np.float32)


def grids_of(cfg: ModelConfig, batch_size: int) -> np.ndarray | None:
    """int32[batch, 1, 3] grids of the images of `prompts`, None where images are of one size."""
    if cfg.vision is None or not cfg.any_size:
        return None
    return np.tile(np.array([1, cfg.vision.grid, cfg.vision.grid], np.int32), (batch_size, 1, 1))


def _reading(name: str, program: Program, times: int) -> tuple[float, float]:
    """Seconds of the prefill and of all new tokens but the first."""
    found = reading(program, times, _of_process_zero)
    if found is None:
        raise UserError(
            f"{name}: generating tokens took no longer than the prompt alone, {TRIES} times: generate more of them "
            "(speed.new_tokens), or leave speed out (speed.rounds=0)"
        )
    return found


def _of_process_zero(seconds: float) -> float:
    """What process 0 measured: all processes must run a program equally often."""
    return float(on_process_zero(lambda: seconds))
