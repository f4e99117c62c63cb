"""Expansion of image placeholders: one id per image in prompts, one id per image feature in the decoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.models.vlm import Model, config_of


def expand_images(
    input_ids: Any,
    cfg: ModelConfig | Model,
    *,
    attention_mask: Any = None,
    labels: Any = None,
    tiles: Any = None,
    image_grid_thw: Any = None,
) -> dict[str, np.ndarray]:
    """Return arrays for `vp.forward` and `vp.score`, from sequences with one `cfg.image_token_id` per image.

    This is only needed for ids from a tokenizer; transformers processors expand images themselves. Rows are padded on
    the right to the longest row, with id 0.

    Args:
      input_ids: int[batch, seq], image positions not expanded.
      cfg: the model or its config; an image has `cfg.tokens_per_image` positions per tile, or the positions of its grid
        if images have varying size.
      attention_mask: int[batch, seq], 1 = real token; default all 1. Padding is dropped on either side.
      labels: int[batch, seq], -100 for positions without loss; image positions always get -100.
      tiles: int[images], number of tiles of each image, in order of appearance; default 1.
      image_grid_thw: int[images, 3], frames, rows and columns of patches, for images of varying size.

    Returns input_ids and attention_mask int32[batch, longest], and labels if passed. Raises UserError if the model
    takes no images, shapes differ, or the number of `tiles` or grids is not that of images.
    """
    ids, cfg = np.asarray(input_ids), config_of(cfg)
    if cfg.image_token_id is None or not cfg.tokens_per_image:
        raise UserError("expand_images: this model takes no images: call it for vision-language models only")
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids) if attention_mask is None else attention_mask}
    inputs |= {} if labels is None else {"labels": labels}
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    wrong = {name: array.shape for name, array in arrays.items() if array.shape != ids.shape or ids.ndim != 2}
    if wrong:
        raise UserError(f"expand_images: arrays must have one shape [batch, seq], got {wrong or ids.shape}")
    real = arrays["attention_mask"] == 1
    is_image = (ids == cfg.image_token_id) & real
    times = real.astype(np.int64)
    times[is_image] = _tokens(cfg, int(is_image.sum()), tiles, image_grid_thw)
    if labels is not None:
        arrays["labels"] = np.where(is_image, IGNORED, arrays["labels"])
    longest = int(times.sum(axis=1).max(initial=0))
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    result = {name: np.full((len(ids), longest), fill[name], np.int32) for name in arrays}
    for row, repeats in enumerate(times):
        for name, array in arrays.items():
            result[name][row, : repeats.sum()] = np.repeat(array[row], repeats)
    return result


def _tokens(cfg: ModelConfig, images: int, tiles: Any, image_grid_thw: Any) -> np.ndarray:
    if (tiles if cfg.dynamic_resolution else image_grid_thw) is not None:
        wanted, passed = ("image_grid_thw", "tiles") if cfg.dynamic_resolution else ("tiles", "image_grid_thw")
        raise UserError(f"expand_images: this model takes {wanted}, not {passed}: omit {passed}")
    if cfg.dynamic_resolution:
        assert cfg.projector is not None
        grids = np.asarray(np.zeros((0, 3)) if image_grid_thw is None else image_grid_thw, np.int64)
        if grids.shape != (images, 3) or (grids < 1).any():
            raise UserError(f"expand_images: image_grid_thw must be {images} x 3 numbers above 0, got {image_grid_thw}")
        return grids.prod(axis=1) // cfg.projector.downsample**2
    counts = np.ones(images, np.int64) if tiles is None else np.asarray(tiles, np.int64)
    if counts.shape != (images,) or (counts < 1).any():
        raise UserError(f"expand_images: tiles must be {images} positive numbers, one per image, got {tiles}")
    return counts * cfg.tokens_per_image
