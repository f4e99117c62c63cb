"""Compilation of all programs of a run before its first batch: one program per batch shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.recovery.flops import room_of
from vlmprune_jax.recovery.step import place_rows


class Programs:
    """Compiled programs of a jitted function, by the shapes and dtypes of its last argument, the arrays of a batch.

    Compiling ahead avoids pauses of minutes on a pod in the middle of a run, and shows at the start if a program does
    not fit in memory.
    """

    def __init__(self, function: Any):
        self._function = function
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def has(self, batch: Mapping[str, Any]) -> bool:
        """Return True if the program for a batch of this shape is compiled."""
        return _key(batch) in self._compiled

    def compile(self, *arguments: Any) -> None:
        """Compile for arguments of these shapes, in the context of the later call; nothing is computed.

        All processes of a pod must compile the same programs in the same order.
        """
        self._compiled[_key(arguments[-1])] = self._function.lower(*arguments).compile()

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled program for a batch of this shape."""
        return self._compiled[_key(arguments[-1])](*arguments)


def _key(batch: Mapping[str, Any]) -> Any:
    return frozenset((name, array.shape, array.dtype) for name, array in batch.items())


def stand_in(kind: Mapping[str, tuple[tuple[int, ...], np.dtype]], mesh: Mesh | None) -> dict[str, Any]:
    """Return zeros with the shapes of a kind of batch (see `TrainBatches.kinds`), placed on devices like the batch."""
    return place_rows({name: np.zeros(size, dtype) for name, (size, dtype) in kind.items()}, mesh)


def describe(cfg: ModelConfig, batches: Sequence[Mapping[str, Any]]) -> str:
    """Describe batch shapes in words: "1,024, 512 tokens", with the number of images if it differs."""
    sizes = [_sizes(cfg, batch) for batch in batches]
    if len({images for _, images in sizes}) == 1:
        return f"{', '.join(f'{tokens:,}' for tokens, _ in sizes)} tokens"
    return ", ".join(f"{tokens:,} tokens with {images}" for tokens, images in sizes)


def _sizes(cfg: ModelConfig, batch: Mapping[str, Any]) -> tuple[int, str]:
    """Return the tokens of a row, and its image slots in words."""
    images = batch.get("pixel_values", batch.get("vision_features"))
    slots = 0 if images is None else images.shape[1]
    room = f" of {room_of(cfg, batch):,}" if "image_grid_thw" in batch else ""
    return batch["input_ids"].shape[1], f"{slots} image{'s' if slots != 1 else ''}{room}"
