"""Images of any size and videos on the host: patches in packed rows, with the positions of their tokens.

A packed row has the patches of the images and videos of some rows of the batch, in the order of their tokens, and
padding at the end. A batch of n rows in p packed rows has those of its rows 0 to n/p - 1 in the first one, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.positions import AXES, grids_by_row, is_visual, mrope_positions, tokens_of

_LEAST = 16  # tokens of the shortest packed row
# Arrays of a processor's images, and of its videos.
_IMAGES = ("pixel_values", "image_grid_thw", "image_position_ids", "spatial_shapes")
_VIDEOS = ("pixel_values_videos", "video_grid_thw", "video_position_ids")
VISUALS = (*_IMAGES, *_VIDEOS, "second_per_grid_ts")


def padded_tokens(tokens: int) -> int:
    """Return the length in image tokens to which a packed row is padded: 16, 32, 48, 64, 96, 128, 192, 256, ...

    There are two lengths per doubling, so that few programs are compiled and at most a third of a row is padding.
    """
    step = max(_LEAST, (1 << max(tokens - 1, 1).bit_length() - 1) // 2)
    return max(-(-tokens // step), 1) * step


def patch_rows(
    cfg: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    pixel_values: Any,
    image_grid_thw: Any,
    second_per_grid_ts: Any = None,
    *,
    packs: int | None = None,
) -> dict[str, Any]:
    """Return a batch's images and videos in packed rows, and its token positions, for models with dynamic resolution.

    Args:
      cfg: the model.
      input_ids, attention_mask: int[batch, seq] each; the mask may be None.
      pixel_values: float[patches of all images, values], packed rows [packs, patches, values], or None. Images and
        videos are in the order of their tokens (see `joined`).
      image_grid_thw: int[images, 3], or in packed rows [packs, images, 3].
      second_per_grid_ts: see `mrope_positions`.
      packs: number of packed rows to return (None: as many as passed, or one per row of the batch if not packed).

    Returns:
      {"pixel_values": float32[packs, patches, values], "image_grid_thw": int32[packs, images, 3]}, both None without an
      image, and with M-RoPE {"position_ids": int32[batch, 3, seq], "deltas": int32[batch]}, see `mrope_positions`.

    Raises UserError if pixels, grids and tokens do not have the same number of patches or images.
    """
    ids, merge = np.asarray(input_ids), _merge(cfg)
    if (pixel_values is None) != (image_grid_thw is None):
        given, absent = ("pixel_values", "image_grid_thw")[:: -1 if pixel_values is None else 1]
        raise UserError(f"{given} needs {absent}: pass both, as the processor returns them")
    placed: dict[str, Any] = {}
    if cfg.text.rope.sections:
        positions, deltas = mrope_positions(
            ids,
            attention_mask,
            image_grid_thw,
            second_per_grid_ts,
            tokens=cfg.visual_token_ids,
            merge=merge,
            tokens_per_second=cfg.tokens_per_second,
        )
        placed = {"position_ids": positions, "deltas": deltas}
    if pixel_values is None:
        return {**placed, "pixel_values": None, "image_grid_thw": None}
    pixels, grids = np.asarray(pixel_values, np.float32), np.asarray(image_grid_thw)
    valid = True if attention_mask is None else np.asarray(attention_mask) != 0
    by_row = grids_by_row(is_visual(ids, cfg.visual_token_ids) & valid, grids, merge)
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
    """Redistribute patches and image grids over `packs` packed rows.

    `by_row`: the image grids of every row of the batch (None: the grids of every packed row; packed rows are then only
    joined).
    """
    if len(pixels) == packs:
        return {"pixel_values": pixels, "image_grid_thw": grids.astype(np.int32)}
    if by_row is None:
        by_row = [[grid for grid in row if grid.any()] for row in grids]
    ends = np.cumsum([sum(int(grid.prod()) for grid in row) for row in by_row])
    patches = np.concatenate([pixels[0, :0], *_pieces(pixels, grids)])  # empty slice: in case of no image
    return _packed(np.split(patches, ends[:-1]), by_row, packs, _merge(cfg))


def joined(cfg: ModelConfig, input_ids: Any, attention_mask: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's images and videos as one list, in the order of their tokens.

    Args:
      cfg: the model.
      input_ids, attention_mask: int[batch, seq] each; the mask may be None.
      inputs: arrays by the names of `VISUALS`, flat or in packed rows.

    Returns the arguments pixel_values, image_grid_thw and second_per_grid_ts of `patch_rows` (None if not needed).

    Raises UserError for videos if the model takes none, or if the arrays and tokens have different numbers of images.
    """
    images, videos = (in_cells(cfg, *(inputs.get(name) for name in names)) for names in (_IMAGES, _VIDEOS))
    seconds = inputs.get("second_per_grid_ts")
    if videos[0] is not None and (cfg.video_token_id is None or videos[1] is None):
        raise UserError(
            "pixel_values_videos is not for this model: pass the frames as images in pixel_values"
            if cfg.video_token_id is None
            else "pixel_values_videos needs video_grid_thw: pass both, as the processor returns them"
        )
    if images[0] is None or videos[0] is None:
        pixels, grids = images if videos[0] is None else videos
        return {"pixel_values": pixels, "image_grid_thw": grids, "second_per_grid_ts": seconds}
    rows = [
        [*of_images, *of_videos]
        for of_images, of_videos in zip(
            _visuals(cfg, cfg.image_token_id, input_ids, attention_mask, *images),
            _visuals(cfg, cfg.video_token_id, input_ids, attention_mask, *videos, seconds),
            strict=True,
        )
    ]
    visuals = [visual for row in rows for visual in sorted(row, key=lambda visual: visual.first)]
    return {
        "pixel_values": np.concatenate([visual.patches for visual in visuals]),
        "image_grid_thw": np.array([visual.grid for visual in visuals]),
        "second_per_grid_ts": np.array([visual.interval for visual in visuals]),
    }


def separated(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Move a batch's videos from the images' packed rows to arrays of their own, named as by a processor."""
    ids = arrays["input_ids"]
    if cfg.video_token_id is None or not (ids == cfg.video_token_id).any():
        return {name: array for name, array in arrays.items() if name != "second_per_grid_ts"}
    result = {name: array for name, array in arrays.items() if name not in VISUALS}
    pixels, grids, seconds = arrays[_IMAGES[0]], arrays[_IMAGES[1]], arrays.get("second_per_grid_ts")
    rows = _visuals(cfg, None, ids, arrays["attention_mask"], pixels, grids, seconds)
    for token, names in ((cfg.image_token_id, _IMAGES), (cfg.video_token_id, _VIDEOS)):
        visuals = [[v for v in row if ids[at, v.first] == token] for at, row in enumerate(rows)]
        if any(visuals):
            patches = [np.concatenate([pixels[0, :0], *(visual.patches for visual in row)]) for row in visuals]
            packed = _packed(patches, [[visual.grid for visual in row] for row in visuals], len(pixels), _merge(cfg))
            result |= {names[0]: packed["pixel_values"], names[1]: packed["image_grid_thw"]}
    if seconds is not None:
        result["second_per_grid_ts"] = np.zeros(result["video_grid_thw"].shape[:2], np.float32)
        size = len(rows) // len(pixels)
        for pack, row in enumerate(result["second_per_grid_ts"]):
            intervals = [visual.interval for row in visuals[pack * size : (pack + 1) * size] for visual in row]
            row[: len(intervals)] = intervals
    return result


def rejoined(cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose images and videos share packed rows (undoes `separated`)."""
    if "pixel_values_videos" not in arrays:
        return dict(arrays)
    ids, mask, packs = arrays["input_ids"], arrays["attention_mask"], len(arrays["pixel_values_videos"])
    packed = patch_rows(cfg, ids, mask, **joined(cfg, ids, mask, arrays), packs=packs)
    others = {name: array for name, array in arrays.items() if name not in VISUALS}
    return others | {name: array for name, array in packed.items() if name != "deltas"}


class _Visual(NamedTuple):
    """Image or video in a batch row: position of its first token, grid, patches, seconds between temporal patches."""

    first: int
    grid: np.ndarray
    patches: np.ndarray
    interval: float


def _visuals(
    cfg: ModelConfig,
    token: int | None,
    input_ids: Any,
    attention_mask: Any,
    pixels: Any,
    grids: Any,
    seconds: Any = None,
) -> list[list[_Visual]]:
    """Return the images or videos of each batch row, by the token id that marks them (None: images and videos)."""
    ids, grids, pixels = np.asarray(input_ids), np.asarray(grids), np.asarray(pixels, np.float32)
    valid = True if attention_mask is None else np.asarray(attention_mask) != 0
    marks = (is_visual(ids, cfg.visual_token_ids) if token is None else ids == token) & valid
    intervals = np.ones(grids.shape[:-1]) if seconds is None else np.asarray(seconds)
    if intervals.shape != grids.shape[:-1]:
        raise UserError(f"second_per_grid_ts has shape {list(intervals.shape)}, expected {list(grids.shape[:-1])}")
    if pixels.ndim != grids.ndim:
        raise UserError(
            f"pixels have shape {list(pixels.shape)}, but their grids {list(grids.shape)}: pass both as the processor "
            "returns them"
        )
    by_row, pieces = grids_by_row(marks, grids, _merge(cfg)), _pieces(pixels, grids)
    if grids.ndim == 2 and len(pixels) != grids.prod(axis=1).sum():
        raise UserError(f"pixels have {len(pixels)} patches, but their grids need {grids.prod(axis=1).sum()}")
    rest = iter(zip(pieces, intervals[grids.any(axis=-1)].tolist(), strict=True))
    rows = []
    for row, row_grids in zip(marks, by_row, strict=True):
        starts = np.cumsum([0, *(tokens_of(grid, _merge(cfg)) for grid in row_grids)])[:-1]
        firsts = np.flatnonzero(row)[starts].tolist()
        rows.append([_Visual(first, grid, *next(rest)) for first, grid in zip(firsts, row_grids, strict=True)])
    return rows


def _pieces(pixels: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
    """Return the patches of each image or video, without padding.

    They are [patches, values] for grids [visuals, 3], or packed rows [packs, patches, values] for [packs, visuals, 3].
    """
    if grids.ndim == 2:
        pixels, grids = pixels[None], grids[None]
    pieces = []
    for row, row_grids in zip(pixels, grids, strict=True):
        sizes = row_grids.prod(axis=1)
        pieces += np.split(row, np.cumsum(sizes[sizes > 0]))[:-1]
    return pieces


def in_cells(
    cfg: ModelConfig, pixel_values: Any, image_grid_thw: Any, image_position_ids: Any, spatial_shapes: Any = None
) -> tuple[Any, Any]:
    """Reorder the patches of all images by merged cell; return [patches, values] and image grids int[images, 3].

    `image_position_ids`: int[images, patches, 2], column and row of each patch (-1: padding). `spatial_shapes`:
    int[images, 2], numbers of rows and columns. Without either, pixels and grids are returned unchanged.

    Raises UserError if the positions are not a complete grid of cells, or their number differs from the patches'.
    """
    if spatial_shapes is not None:
        image_position_ids = _row_by_row(np.asarray(spatial_shapes), np.shape(pixel_values))
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


def _row_by_row(shapes: np.ndarray, pixels: tuple[int, ...]) -> np.ndarray:
    """Return the column and row of every patch of images whose patches come row by row, then padding (-1)."""
    if len(pixels) != 3 or shapes.shape != (pixels[0], 2) or (shapes.prod(axis=1) > pixels[1]).any():
        raise UserError(
            f"spatial_shapes has shape {list(shapes.shape)} and pixel_values {list(pixels)}: pass both as the "
            "processor returns them"
        )
    at, columns = np.arange(pixels[1])[None], np.maximum(shapes[:, 1:], 1)
    places = np.stack([at % columns, at // columns], axis=-1)
    return np.where((at < shapes.prod(axis=1)[:, None])[..., None], places, -1)


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
    """Raise UserError for mm_token_type_ids that contradict input_ids (1: image tokens, 2: video tokens)."""
    if types is None:
        return
    ids, types = np.asarray(input_ids), np.asarray(types)
    for number, name, token in ((1, "image", cfg.image_token_id), (2, "video", cfg.video_token_id)):
        if types.shape != ids.shape or ((types == number) != (ids == token)).any():
            raise UserError(
                f"mm_token_type_ids does not mark the {name} tokens (id {token}) of input_ids by {number}: pass both "
                "as the processor returns them"
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
    """Pack patches [patches, values] and image grids of all batch rows into `packs` padded rows."""
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
