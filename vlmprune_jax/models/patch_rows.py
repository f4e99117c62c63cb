"""Images of any size on the host: a processor's patches arranged row by row in one shape, with positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.positions import AXES, grids_by_row, mrope_positions

# Rows of patches are padded to multiples of so many merged cells: fewer shapes are compiled.
_CELLS = 16


def patch_rows(
    cfg: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    pixel_values: Any,
    image_grid_thw: Any,
    mm_token_type_ids: Any = None,
) -> dict[str, Any]:
    """Return the images and positions of a batch, for a model whose images are of any size.

    Args:
      cfg: the model.
      input_ids, attention_mask: int[batch, seq]; or no mask.
      pixel_values: float[patches of all images, values of one], or by row [batch, slots, patches, values], or None.
      image_grid_thw: int[images, 3], or [batch, slots, 3] by row.
      mm_token_type_ids: int[batch, seq], 1 at image tokens, as processors emit it; only checked.

    Returns:
      {"pixel_values": float32[batch, slots, patches, values], "image_grid_thw": int32[batch, slots, 3]}, both None
      without an image, and {"position_ids": int32[batch, 3, seq], "deltas": int32[batch]}, see `mrope_positions`.

    Raises:
      UserError: pixels, grids, image tokens or their types that do not fit together, or a video.
    """
    ids, merge = np.asarray(input_ids), _merge(cfg)
    is_image = ids == cfg.image_token_id
    check_types(cfg, ids, mm_token_type_ids)
    if (pixel_values is None) != (image_grid_thw is None):
        given, absent = ("pixel_values", "image_grid_thw")[:: -1 if pixel_values is None else 1]
        raise UserError(f"{given} without {absent}: pass both, as the processor emits them")
    positions, deltas = mrope_positions(ids, attention_mask, image_grid_thw, cfg.image_token_id or 0, merge)
    placed = {"position_ids": positions, "deltas": deltas}
    if pixel_values is None:
        return {**placed, "pixel_values": None, "image_grid_thw": None}
    pixels, grids = np.asarray(pixel_values, np.float32), np.asarray(image_grid_thw)
    if pixels.ndim == 4 and grids.ndim == 3:
        _check_rows(cfg, pixels, grids, len(ids))
        return {**placed, "pixel_values": pixels, "image_grid_thw": grids.astype(np.int32)}
    valid = True if attention_mask is None else np.asarray(attention_mask) != 0
    return placed | _by_row(cfg, pixels, grids_by_row(is_image & valid, grids, merge))


def check_patches(cfg: ModelConfig, input_ids: Any, attention_mask: Any, pixel_values: Any, grids: Any) -> None:
    """Refuse inputs that `patch_rows` refuses."""
    patch_rows(cfg, input_ids, attention_mask, pixel_values, grids)


def real_features(cfg: ModelConfig, features: Any, image_grid_thw: Any) -> np.ndarray:
    """Return float[tokens, embed] in order of appearance, from padded [images, tokens, embed]."""
    counts = np.asarray(image_grid_thw).reshape(-1, AXES).prod(axis=1) // _merge(cfg) ** 2
    array = np.asarray(features)
    return array[np.arange(array.shape[1])[None] < counts[:, None]]


def _merge(cfg: ModelConfig) -> int:
    return 1 if cfg.vision is None else cfg.vision.merge


def check_types(cfg: ModelConfig, input_ids: Any, types: Any) -> None:
    """Refuse videos, and mm_token_type_ids (None: not passed) that disagree with input_ids."""
    ids = np.asarray(input_ids)
    is_image = ids == cfg.image_token_id
    if cfg.video_token_id is not None and (ids == cfg.video_token_id).any():
        row = int(np.argwhere(ids == cfg.video_token_id)[0, 0])
        raise UserError(f"row {row} of input_ids holds video tokens ({cfg.video_token_id}): only images are supported")
    if types is None:
        return
    types = np.asarray(types)
    if (types == 2).any():
        raise UserError("mm_token_type_ids has tokens of a video (2): only images are supported")
    if types.shape != ids.shape or ((types == 1) != is_image).any():
        raise UserError(
            f"mm_token_type_ids does not mark the image tokens (id {cfg.image_token_id}) of input_ids: pass both as "
            "the processor emits them"
        )


def _check_rows(cfg: ModelConfig, pixels: np.ndarray, grids: np.ndarray, rows: int) -> None:
    values = _values(cfg)
    if len(pixels) != rows or pixels.shape[:2] != grids.shape[:2] or pixels.shape[3] != values:
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)} and image_grid_thw {list(grids.shape)}, expected "
            f"[{rows}, slots, patches, {values}] and [{rows}, slots, {AXES}]"
        )
    most = int(grids.prod(axis=2).max(initial=0))
    if most > pixels.shape[2] or pixels.shape[2] % _merge(cfg) ** 2:
        raise UserError(
            f"pixel_values has room for {pixels.shape[2]} patches an image: needs as many as the largest of "
            f"image_grid_thw, {most}, and a multiple of {_merge(cfg) ** 2}"
        )


def _by_row(cfg: ModelConfig, pixels: np.ndarray, by_row: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the slots of each row, filled from the patches [patches, values] of all images in order."""
    sizes = [[int(one.prod()) for one in row] for row in by_row]
    total, values = sum(map(sum, sizes)), _values(cfg)
    if pixels.shape != (total, values):
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, but image_grid_thw and a patch of this model make "
            f"[{total}, {values}]"
        )
    cells = _CELLS * _merge(cfg) ** 2
    room = -(-max((size for row in sizes for size in row), default=1) // cells) * cells
    slots = max(map(len, sizes), default=0) or 1
    rows = np.zeros((len(by_row), slots, room, values), np.float32)
    grids = np.zeros((len(by_row), slots, AXES), np.int32)
    at = 0
    for row, images in enumerate(by_row):
        for slot, one in enumerate(images):
            size = sizes[row][slot]
            rows[row, slot, :size], grids[row, slot] = pixels[at : at + size], one
            at += size
    return {"pixel_values": rows, "image_grid_thw": grids}


def _values(cfg: ModelConfig) -> int:
    return 0 if cfg.vision is None else cfg.vision.patch_values
