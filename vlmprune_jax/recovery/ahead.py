"""The programs of a run, compiled before its first batch: one for each kind of batch that it will meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.recovery.flops import room_of
from vlmprune_jax.recovery.step import place_rows


class Programs:
    """A jitted function's compiled programs, by the sizes and dtypes of its last argument, the arrays of a batch.

    A program that is compiled when its first batch comes lets a pod wait for minutes in mid-run, and what does not fit
    in memory ends the run there.
    """

    def __init__(self, function: Any):
        self._function = function
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def has(self, batch: Mapping[str, Any]) -> bool:
        """Whether the program of such a batch is compiled."""
        return _key(batch) in self._compiled

    def compile(self, *arguments: Any) -> None:
        """Compile for such arguments, in the context in which the program will be called; nothing is computed.

        All processes of a pod compile the same programs in the same order.
        """
        self._compiled[_key(arguments[-1])] = self._function.lower(*arguments).compile()

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, by the program of such a batch."""
        return self._compiled[_key(arguments[-1])](*arguments)


def _key(batch: Mapping[str, Any]) -> Any:
    return frozenset((name, array.shape, array.dtype) for name, array in batch.items())


def stand_in(kind: Mapping[str, tuple[tuple[int, ...], np.dtype]], mesh: Mesh | None) -> dict[str, Any]:
    """Zeros in the place of a batch of a kind (see `TrainBatches.kinds`), on the devices as the batch will be."""
    return place_rows({name: np.zeros(size, dtype) for name, (size, dtype) in kind.items()}, mesh)


def describe(cfg: ModelConfig, batches: Sequence[Mapping[str, Any]]) -> str:
    """Batches for a person: "1,024, 512 tokens", with their images where these differ."""
    sizes = [_sizes(cfg, batch) for batch in batches]
    if len({images for _, images in sizes}) == 1:
        return f"{', '.join(f'{tokens:,}' for tokens, _ in sizes)} tokens"
    return ", ".join(f"{tokens:,} tokens with {images}" for tokens, images in sizes)


def _sizes(cfg: ModelConfig, batch: Mapping[str, Any]) -> tuple[int, str]:
    """Tokens of a row, and what it has of images."""
    images = batch.get("pixel_values", batch.get("vision_features"))
    slots = 0 if images is None else images.shape[1]
    room = f" of {room_of(cfg, batch):,}" if "image_grid_thw" in batch else ""
    return batch["input_ids"].shape[1], f"{slots} image{'s' if slots != 1 else ''}{room}"
