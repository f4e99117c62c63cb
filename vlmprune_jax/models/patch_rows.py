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
    """Return a batch's images and token positions as padded arrays per row, for models with images of any size.

    Args:
      cfg: the model.
      input_ids, attention_mask: int[batch, seq]; or no mask.
      pixel_values: float[patches of all images, values of one], or by row [batch, slots, patches, values], or None.
      image_grid_thw: int[images, 3], or [batch, slots, 3] by row.
      mm_token_type_ids: int[batch, seq], 1 at image tokens, as processors emit it; only checked.

    Returns:
      {"pixel_values": float32[batch, slots, patches, values], "image_grid_thw": int32[batch, slots, 3]}, both None
      without an image, and with M-RoPE {"position_ids": int32[batch, 3, seq], "deltas": int32[batch]}, see
      `mrope_positions`.

    Raises UserError for pixels, grids, image tokens or their types that do not fit together, or a video.
    """
    ids, merge = np.asarray(input_ids), _merge(cfg)
    is_image = ids == cfg.image_token_id
    check_types(cfg, ids, mm_token_type_ids)
    if (pixel_values is None) != (image_grid_thw is None):
        given, absent = ("pixel_values", "image_grid_thw")[:: -1 if pixel_values is None else 1]
        raise UserError(f"{given} needs {absent}: pass both, as the processor returns them")
    placed: dict[str, Any] = {}
    if cfg.text.rope.sections:
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


def in_cells(cfg: ModelConfig, pixel_values: Any, image_grid_thw: Any, image_position_ids: Any) -> tuple[Any, Any]:
    """Reorder the patches of all images by merged cell; return [patches, values] and image grids int[images, 3].

    Without `image_position_ids`, int[images, patches, 2] columns and rows (-1: padding), pixels and grids are returned
    as they are.

    Raises UserError for positions that are no whole grid of cells, or not those of the pixels.
    """
    if image_position_ids is None:
        return pixel_values, image_grid_thw
    pixels, places, merge = np.asarray(pixel_values, np.float32), np.asarray(image_position_ids), _merge(cfg)
    if image_grid_thw is not None or pixels.ndim != 3 or places.shape != (*pixels.shape[:2], 2):
        raise UserError(
            f"image_position_ids has shape {list(places.shape)} and pixel_values {list(pixels.shape)}: pass both as "
            "the processor returns them, without image_grid_thw"
        )
    patches, grids = [], []
    for image, at in zip(pixels, places, strict=True):
        real = (at >= 0).all(axis=1)
        columns, rows = (int(at[real, axis].max(initial=-1)) + 1 for axis in (0, 1))
        order = np.lexsort((at[real, 0], at[real, 1]))
        if real.sum() != rows * columns or rows % merge or columns % merge or rows < 1:
            raise UserError(
                f"image_position_ids of an image have {int(real.sum())} patches in {rows} rows and {columns} columns: "
                f"expected a full grid whose sides are multiples of {merge}"
            )
        cells = image[real][order].reshape(rows // merge, merge, columns // merge, merge, -1)
        patches.append(cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1))
        grids.append((1, rows, columns))
    return np.concatenate(patches), np.array(grids)


def with_places(cfg: ModelConfig, pixels: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert patches and grids to a processor's pixel_values and image_position_ids (undoes `in_cells`)."""
    sizes, merge = grids.prod(axis=1), _merge(cfg)
    padded = np.zeros((len(grids), sizes.max(), pixels.shape[1]), pixels.dtype)
    places = np.full((*padded.shape[:2], 2), -1, np.int64)
    image_patches = np.split(pixels, np.cumsum(sizes)[:-1])
    for at, (_, rows, columns) in enumerate(grids):
        cells = image_patches[at].reshape(rows // merge, columns // merge, merge, merge, -1)
        padded[at, : sizes[at]] = cells.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        places[at, : sizes[at]] = np.indices((rows, columns))[::-1].reshape(2, -1).T
    return padded, places


def check_patches(cfg: ModelConfig, input_ids: Any, attention_mask: Any, pixel_values: Any, grids: Any) -> None:
    """Raise UserError for image inputs that `patch_rows` does not accept."""
    patch_rows(cfg, input_ids, attention_mask, pixel_values, grids)


def real_features(cfg: ModelConfig, features: Any, image_grid_thw: Any) -> np.ndarray:
    """Remove padding from vision features [images, tokens, embed]; return float[tokens, embed] in order."""
    counts = np.asarray(image_grid_thw).reshape(-1, AXES).prod(axis=1) // _merge(cfg) ** 2
    array = np.asarray(features)
    return array[np.arange(array.shape[1])[None] < counts[:, None]]


def _merge(cfg: ModelConfig) -> int:
    return 1 if cfg.vision is None else cfg.vision.merge


def check_types(cfg: ModelConfig, input_ids: Any, types: Any) -> None:
    """Raise UserError for video inputs, or for mm_token_type_ids that contradict input_ids."""
    ids = np.asarray(input_ids)
    is_image = ids == cfg.image_token_id
    if cfg.video_token_id is not None and (ids == cfg.video_token_id).any():
        row = int(np.argwhere(ids == cfg.video_token_id)[0, 0])
        raise UserError(f"row {row} of input_ids has video tokens ({cfg.video_token_id}): only images are supported")
    if types is None:
        return
    types = np.asarray(types)
    if (types == 2).any():
        raise UserError("mm_token_type_ids marks video tokens (2): only images are supported")
    if types.shape != ids.shape or ((types == 1) != is_image).any():
        raise UserError(
            f"mm_token_type_ids does not mark the image tokens (id {cfg.image_token_id}) of input_ids: pass both as "
            "the processor returns them"
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
            f"pixel_values has {pixels.shape[2]} patches per image, expected at least {most} (the largest image of "
            f"image_grid_thw) and a multiple of {_merge(cfg) ** 2}"
        )


def _by_row(cfg: ModelConfig, pixels: np.ndarray, by_row: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Distribute the patches of all images [patches, values] to padded arrays of each row's images."""
    sizes = [[int(grid.prod()) for grid in row] for row in by_row]
    total, values = sum(map(sum, sizes)), _values(cfg)
    if pixels.shape != (total, values):
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, expected [{total}, {values}] (patches of image_grid_thw, "
            "values per patch)"
        )
    cells = _CELLS * _merge(cfg) ** 2
    room = -(-max((size for row in sizes for size in row), default=1) // cells) * cells
    slots = max(map(len, sizes), default=0) or 1
    rows = np.zeros((len(by_row), slots, room, values), np.float32)
    grids = np.zeros((len(by_row), slots, AXES), np.int32)
    at = 0
    for row, images in enumerate(by_row):
        for slot, grid in enumerate(images):
            size = sizes[row][slot]
            rows[row, slot, :size], grids[row, slot] = pixels[at : at + size], grid
            at += size
    return {"pixel_values": rows, "image_grid_thw": grids}


def _values(cfg: ModelConfig) -> int:
    return 0 if cfg.vision is None else cfg.vision.patch_values
