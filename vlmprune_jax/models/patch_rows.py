"""Images of any size on the host: a processor's patches in packed rows, with the positions of their tokens.

A packed row has the patches of the images of some rows of the batch, image after image, and padding at the end. A batch
of n rows in p packed rows has those of its rows 0 to n/p - 1 in the first one, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.models.positions import AXES, grids_by_row, mrope_positions

_LEAST = 16  # tokens of the shortest packed row


def padded_tokens(tokens: int) -> int:
    """Return the length in image tokens to which a packed row is padded: 16, 32, 48, 64, 96, 128, 192, 256, ...

    Two lengths per doubling, so that few programs are compiled and at most a third of a longer row is padding.
    """
    step = max(_LEAST, (1 << max(tokens - 1, 1).bit_length() - 1) // 2)
    return max(-(-tokens // step), 1) * step


def patch_rows(
    cfg: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    pixel_values: Any,
    image_grid_thw: Any,
    mm_token_type_ids: Any = None,
    *,
    packs: int | None = None,
) -> dict[str, Any]:
    """Return a batch's images in packed rows, and its token positions, for models with images of any size.

    Args:
      cfg: the model.
      input_ids, attention_mask: int[batch, seq]; or no mask.
      pixel_values: float[patches of all images, values], or in packed rows [packs, patches, values], or None.
      image_grid_thw: int[images, 3], or in packed rows [packs, images, 3].
      mm_token_type_ids: int[batch, seq], 1 at image tokens, as processors emit it; only checked.
      packs: number of packed rows to return (None: one per row of the batch, or as they come).

    Returns:
      {"pixel_values": float32[packs, patches, values], "image_grid_thw": int32[packs, images, 3]}, both None without an
      image, and with M-RoPE {"position_ids": int32[batch, 3, seq], "deltas": int32[batch]}, see `mrope_positions`.

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
    valid = True if attention_mask is None else np.asarray(attention_mask) != 0
    by_row = grids_by_row(is_image & valid, grids, merge)
    if pixels.ndim == 4 and grids.ndim == 3:  # padded to the largest image, as in 0.1
        slots = zip(pixels.reshape(-1, *pixels.shape[2:]), grids.reshape(-1, AXES), strict=True)
        pixels = np.concatenate([patches[: grid.prod()] for patches, grid in slots])
    if pixels.ndim == grids.ndim == 3:
        _check_packed(cfg, pixels, grids)
        return placed | repacked(cfg, pixels, grids, packs or len(pixels), by_row)
    sizes = [int(np.prod(row, axis=1).sum()) if row else 0 for row in by_row]
    if pixels.shape != (sum(sizes), _values(cfg)):
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, expected [{sum(sizes)}, {_values(cfg)}] (patches of "
            "image_grid_thw, values per patch)"
        )
    return placed | _packed(np.split(pixels, np.cumsum(sizes)[:-1]), by_row, packs or len(ids), merge)


def repacked(
    cfg: ModelConfig,
    pixels: np.ndarray,
    grids: np.ndarray,
    packs: int,
    by_row: Sequence[Sequence[np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """Return packed rows of patches and their grids in another number of packed rows.

    `by_row`: the image grids of every row of the batch (None: of every packed row, which are only joined).
    """
    if len(pixels) == packs:
        return {"pixel_values": pixels, "image_grid_thw": grids.astype(np.int32)}
    real = [row[: grid.prod(axis=1).sum()] for row, grid in zip(pixels, grids, strict=True)]
    if by_row is None:
        by_row = [[grid for grid in row if grid.any()] for row in grids]
    ends = np.cumsum([sum(int(grid.prod()) for grid in row) for row in by_row])
    return _packed(np.split(np.concatenate(real), ends[:-1]), by_row, packs, _merge(cfg))


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
    """Remove padding from vision features [packs, tokens, embed]; return float[tokens, embed] in order."""
    counts = np.asarray(image_grid_thw).prod(axis=2).sum(axis=1) // _merge(cfg) ** 2
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


def _check_packed(cfg: ModelConfig, pixels: np.ndarray, grids: np.ndarray) -> None:
    values, cell = _values(cfg), _merge(cfg) ** 2
    if len(pixels) != len(grids) or pixels.shape[2] != values:
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)} and image_grid_thw {list(grids.shape)}, expected [packs, "
            f"patches, {values}] and [packs, images, {AXES}]"
        )
    most = int(grids.prod(axis=2).sum(axis=1).max(initial=0))
    if most > pixels.shape[1] or pixels.shape[1] % cell:
        raise UserError(
            f"pixel_values has {pixels.shape[1]} patches in a packed row, expected at least {most} (the images of "
            f"image_grid_thw) and a multiple of {cell}"
        )


def _packed(
    patches: Sequence[np.ndarray], by_row: Sequence[Sequence[np.ndarray]], packs: int, merge: int
) -> dict[str, np.ndarray]:
    """Pack the patches of every row of a batch, [patches, values], and the grids of its images."""
    size = len(by_row) // packs
    sizes = [sum(map(len, patches[at : at + size])) for at in range(0, len(by_row), size)]
    images = [[grid for row in by_row[at : at + size] for grid in row] for at in range(0, len(by_row), size)]
    room = padded_tokens(-(-max(sizes) // merge**2)) * merge**2
    rows = np.zeros((packs, room, patches[0].shape[1]), np.float32)
    grids = np.zeros((packs, max(1, *map(len, images)), AXES), np.int32)
    for pack, (length, of_pack) in enumerate(zip(sizes, images, strict=True)):
        np.concatenate(patches[pack * size : (pack + 1) * size], out=rows[pack, :length])
        grids[pack, : len(of_pack)] = np.reshape(of_pack, (-1, AXES))
    return {"pixel_values": rows, "image_grid_thw": grids}


def _values(cfg: ModelConfig) -> int:
    return 0 if cfg.vision is None else cfg.vision.patch_values
