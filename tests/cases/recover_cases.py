"""Small models and streams that the recovery tests share; importable from the subprocesses that some of them kill."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stack_cases import decoder_layer, text_config, tower_config, tower_layer

from vlmprune_jax.core.config import LoraConfig, ModelConfig, ProjectorConfig
from vlmprune_jax.core.models.params import flatten, init_params
from vlmprune_jax.core.models.vlm import Model
from vlmprune_jax.core.recovery.config import RecoverConfig
from vlmprune_jax.io.data.batching import Batch

IMAGE = 62
LORA = LoraConfig(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "o_proj", "down_proj"))


def config(*, vision: bool = True, layers: int = 2, **changes: Any) -> ModelConfig:
    """A LLaVA with one wide and `layers` - 1 narrow layers (sizes that 8 devices divide), or its decoder alone."""
    shapes = (decoder_layer(4, 2, 24),) + (decoder_layer(2, 2, 16),) * (layers - 1)
    text = text_config(shapes, **{"hidden_size": 16, "vocab_size": 64, **changes})
    if not vision:
        return ModelConfig("llama", "transformers", text)
    tower = tower_config((tower_layer(2, 2, 16),) * 2)
    return ModelConfig("llava", "transformers", text, tower, ProjectorConfig("relu", True), image_token_id=IMAGE)


@functools.lru_cache(maxsize=16)
def model(cfg: ModelConfig, seed: int = 0, dtype: str = "float32") -> Model:
    """Random weights."""
    return Model(_init(cfg, jax.random.key(seed), jnp.dtype(dtype)), cfg)


_init = jax.jit(init_params, static_argnums=(0, 2))


class Stream:
    """An endless, resumable stream of batches: batch i depends on i alone.

    `poison`: number of the batch (from 0) whose pixels make the loss NaN; `end`: how many batches there are.
    """

    def __init__(self, cfg: ModelConfig, rows: int = 8, *, poison: int | None = None, end: int | None = None):
        self.cfg, self.rows, self.length, self.poison, self.end, self.at = cfg, rows, 11, poison, end, 0

    def __iter__(self) -> Stream:
        return self

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __next__(self) -> Batch:
        if self.at == self.end:
            raise StopIteration
        draw = np.random.default_rng(self.at)
        ids = draw.integers(0, 61, (self.rows, self.length)).astype(np.int32)
        mask = (np.arange(self.length)[None] < draw.integers(7, self.length + 1, self.rows)[:, None]).astype(np.int32)
        labels = np.where(mask == 1, ids, -100).astype(np.int32)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.cfg.vision is not None:
            ids[:, 1:5], labels[:, 1:5] = IMAGE, -100
            arrays["pixel_values"] = draw.standard_normal((self.rows, 1, 3, 6, 6)).astype(np.float32)
            if self.at == self.poison:
                arrays["pixel_values"][0] = np.nan
        names = tuple(f"record-{self.at}-{row}" for row in range(self.rows))
        self.at += 1
        return Batch(arrays, names)


class Watched:
    """A stream that calls `event` with the number of each batch before it hands the batch out."""

    def __init__(self, batches: Any, event: Callable[[int], Any]):
        self.batches, self.stream, self.event, self.numbers = batches, iter(batches), event, itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches if name == "kinds" else self.stream, name)

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> Any:
        self.event(next(self.numbers))
        return next(self.stream)


def terminate_at(number: int) -> Callable[[int], None]:
    """Return an event that sends this process SIGTERM at a batch."""
    return lambda at: os.kill(os.getpid(), signal.SIGTERM) if at == number else None


def settings(**changes: Any) -> RecoverConfig:
    """Float32 training of everything for 6 steps of 8 rows.

    eps is large: Adam divides by |gradient| + eps, which blows the rounding of near-zero gradients up to full updates.
    """
    values = {"trainable": "all", "learning_rate": 3e-3, "batch_size": 8, "steps": 6, "compute_dtype": "float32"}
    values |= {"eps": 1e-3, "warmup_ratio": 0.3, "weight_decay": 0.1, "log_every": 1}
    return RecoverConfig(**{**values, **changes})


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every step of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a: Model, b: Model) -> float:
    """Largest absolute difference between two models' parameters."""
    first, second = flatten(jax.device_get(a.params)), flatten(jax.device_get(b.params))
    assert first.keys() == second.keys()
    return max(float(np.abs(first[p].astype(np.float32) - second[p].astype(np.float32)).max()) for p in first)


def assert_bitwise(a: Model, b: Model) -> None:
    """Every array of two models has the same bytes."""
    first, second = flatten(jax.device_get(a.params)), flatten(jax.device_get(b.params))
    assert first.keys() == second.keys()
    different = [p for p in first if first[p].tobytes() != second[p].tobytes()]
    assert not different
