"""Calibration batches: checked once, on the host, before anything is compiled for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vlmprune_jax.config import ModelConfig
from vlmprune_jax.errors import UserError
from vlmprune_jax.models.vlm import check_inputs

Arrays = dict[str, np.ndarray]
IGNORED = -100


def calibration_batches(batches: Iterable[Any], cfg: ModelConfig, *, labels: bool) -> Iterator[Arrays]:
    """Arrays of each batch: input_ids, attention_mask, perhaps pixel_values, and labels if asked for.

    `batches`: mappings, or objects with such a mapping as `.arrays`; pixel_values are per row [batch, images, 3, H, W].

    Raises:
      UserError: there is no batch, an array is missing, or shapes, ids, images or labels do not fit the model.
    """
    number = -1
    for number, batch in enumerate(batches):
        arrays = dict(getattr(batch, "arrays", batch))
        try:
            yield _checked(arrays, cfg, labels)
        except UserError as error:
            raise UserError(f"calibration batch {number}: {error}") from None
    if number < 0:
        raise UserError("there are no calibration batches: pass at least one")


def _checked(arrays: Arrays, cfg: ModelConfig, labels: bool) -> Arrays:
    wanted = ("input_ids", "attention_mask", "labels") if labels else ("input_ids", "attention_mask")
    missing = [name for name in wanted if arrays.get(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing (it has {', '.join(arrays)})")
    result = {name: np.asarray(arrays[name], np.int32) for name in wanted}
    shape = result["input_ids"].shape
    for name, array in result.items():
        if array.shape != shape:
            raise UserError(f"{name} has shape {array.shape} but input_ids {shape}")
    pixels = arrays.get("pixel_values")
    if pixels is not None and np.ndim(pixels) != 5:
        raise UserError(f"pixel_values must be float[batch, images per row, 3, H, W], got shape {np.shape(pixels)}")
    check_inputs(cfg, result["input_ids"], pixels)
    if labels:
        wrong = (result["labels"] != IGNORED) & ((result["labels"] < 0) | (result["labels"] >= cfg.text.vocab_size))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"labels[{row}, {column}] = {result['labels'][row, column]} is neither {IGNORED} (ignored) nor below "
                f"{cfg.text.vocab_size}"
            )
    if pixels is not None:
        result["pixel_values"] = np.asarray(pixels, np.float32)
    return result
