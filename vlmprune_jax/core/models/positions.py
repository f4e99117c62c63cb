"""Positions of text tokens and visual tokens in three rows (M-RoPE, Wang et al. 2024), on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmprune_jax.base.errors import UserError

AXES = 3  # frame, row and column


def mrope_positions(
    input_ids: Any,
    attention_mask: Any,
    image_grid_thw: Any,
    second_per_grid_ts: Any,
    *,
    tokens: Sequence[int],
    merge: int,
    tokens_per_second: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return M-RoPE positions int32[batch, 3, seq] (0 for padding), and int32[batch] offsets of following text.

    A text token increases all three positions by 1. The merged cells of an image at position p have positions (p, p +
    row, p + column), and the next token follows after the longer side of the image. In Qwen3-VL, every temporal patch
    of a video is such an image, after its time as text. In Qwen2.5-VL, a video at position p has (p + floor(time *
    `tokens_per_second`), p + row, p + column), and the next token follows as after an image (reference: transformers
    5.24; 5.2 continues after the last temporal position). A text token of the prompt that follows a row of n real
    tokens has position n + the row's offset. Generated tokens start after the largest position of the prompt, which may
    be that of a video's last temporal patch.

    Args:
      input_ids: int[batch, seq], with one token per feature of an image or video.
      attention_mask: int[batch, seq], 1 = real token, or None.
      image_grid_thw: temporal patches, rows and columns of patches of images and videos, int[visuals, 3] in order of
        appearance over the batch, or int[packs, visuals, 3] by packed row (0, 0, 0 = none; see `patch_rows`), or None.
      second_per_grid_ts: seconds between temporal patches (None: 1), float like `image_grid_thw` without its last axis.
      tokens: ids of the tokens of images and videos (`ModelConfig.visual_token_ids`).
      merge: patches per side of a token (`merge` x `merge` patches make one token).
      tokens_per_second: see `ModelConfig`.

    Raises UserError for grids that are not multiples of `merge`, or that do not match a row's visual tokens.
    """
    ids = np.asarray(input_ids)
    valid = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    visual = is_visual(ids, tokens) & valid
    grids = grids_by_row(visual, image_grid_thw, merge)
    seconds = iter(_seconds(image_grid_thw, second_per_grid_ts, tokens_per_second))
    positions = np.zeros((len(ids), AXES, ids.shape[1]), np.int32)
    deltas = np.zeros(len(ids), np.int32)
    for row, real in enumerate(valid):
        cells = [(grid // (1, merge, merge), next(seconds)) for grid in grids[row]]
        if not tokens_per_second:
            cells = [(np.array([1, *grid[1:]]), interval) for grid, interval in cells for _ in range(grid[0])]
        positions[row][:, real], following = _row_positions(visual[row][real], cells)
        deltas[row] = following - real.sum()
    return positions, deltas


def is_visual(input_ids: Any, tokens: Sequence[int]) -> Any:
    """Return bool[batch, seq], True at `tokens` of images and videos; a NumPy or JAX array, as the ids are."""
    result = input_ids != input_ids
    for token in tokens:
        result = result | (input_ids == token)
    return result


def with_images(positions: Any, input_ids: Any, attention_mask: Any, tokens: Sequence[int]) -> Any:
    """Return every token's position, and the number of its image in the row (0 = none), int32[batch, 2, seq].

    An image or a frame of a video is a run of `tokens` in `input_ids`, int[batch, seq]. `positions`: int[batch, seq],
    by default counted along the mask; positions that already have image numbers are returned unchanged.
    """
    if positions is not None and positions.ndim == 3:
        return positions
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    is_image = is_visual(jnp.asarray(input_ids), tokens)
    begins = is_image & ~jnp.pad(is_image[:, :-1], ((0, 0), (1, 0)))
    return jnp.stack([positions, jnp.where(is_image, jnp.cumsum(begins, axis=1), 0)], axis=1).astype(jnp.int32)


def grids_by_row(is_image: np.ndarray, image_grid_thw: Any, merge: int) -> list[list[np.ndarray]]:
    """Return the grids of each row, int[3] per image or video; `is_image`, bool[batch, seq], marks their tokens."""
    counts = [int(row.sum()) for row in is_image]
    grids = np.zeros((0, AXES), np.int64) if image_grid_thw is None else np.asarray(image_grid_thw)
    packs = len(grids) if grids.ndim == 3 else 1
    if grids.ndim not in (2, 3) or grids.shape[-1] != AXES or not packs or len(counts) % packs:
        raise UserError(
            f"image_grid_thw has shape {list(grids.shape)}, expected [images, 3], or [packs, images, 3] whose packed "
            f"rows divide the {len(counts)} rows of the batch"
        )
    for grid in grids.reshape(-1, AXES):
        if grid.any() and (grid.min() < 1 or grid[1] % merge or grid[2] % merge):
            raise UserError(
                f"image_grid_thw {grid.tolist()}: needs at least 1 frame, and rows and columns of patches that are "
                f"multiples of {merge}, the model's spatial_merge_size"
            )
    by_row, size = [], len(counts) // packs
    for pack, packed in enumerate(grids.reshape(packs, -1, AXES)):
        by_row += _in_order(counts[pack * size : (pack + 1) * size], [grid for grid in packed if grid.any()], merge)
    for row, (count, images) in enumerate(zip(counts, by_row, strict=True)):
        n_tokens = sum(tokens_of(grid, merge) for grid in images)
        if n_tokens != count:
            raise UserError(
                f"row {row} has {count} image tokens, but its image_grid_thw {[grid.tolist() for grid in images]} need "
                f"{n_tokens} (one per {merge} x {merge} patches): write that many image ids"
            )
    return by_row


def tokens_of(grid: Any, merge: int) -> int:
    """Return the number of tokens of an image with this patch grid, int[3]."""
    return int(np.prod(np.asarray(grid, np.int64))) // merge**2


def _in_order(counts: list[int], grids: list[np.ndarray], merge: int) -> list[list[np.ndarray]]:
    """Assign image grids to rows in order, by each row's number of image tokens; the last row gets the rest."""
    by_row: list[list[np.ndarray]] = [[] for _ in counts]
    left = iter(grids)
    for images, count in zip(by_row, counts, strict=True):
        while count > 0 and (grid := next(left, None)) is not None:
            images.append(grid)
            count -= tokens_of(grid, merge)
    last = max((row for row, count in enumerate(counts) if count), default=0)
    if by_row:
        by_row[last] += left
    return by_row


def _seconds(grids: Any, second_per_grid_ts: Any, tokens_per_second: float) -> np.ndarray:
    """Return the temporal position step between successive temporal patches, float32, for each image and video."""
    real = np.asarray(np.zeros((0, AXES)) if grids is None else grids).any(axis=-1)
    seconds = np.ones(real.shape) if second_per_grid_ts is None else np.asarray(second_per_grid_ts)
    if seconds.shape != real.shape:
        raise UserError(
            f"second_per_grid_ts has shape {list(seconds.shape)}, expected {list(real.shape)}: one number per video"
        )
    return seconds[real].astype(np.float32) * np.float32(tokens_per_second)


def _row_positions(is_image: np.ndarray, grids: Sequence[tuple[Any, np.float32]]) -> tuple[np.ndarray, int]:
    """Return one row's M-RoPE positions, int32[3, tokens], and the position of a text token that follows.

    `grids`: sizes of its images and videos in merged patches, and temporal positions per temporal patch.
    """
    positions = np.zeros((AXES, len(is_image)), np.int32)
    at = first = 0  # tokens placed, and the position of the next one
    for grid, interval in grids:
        text = int(np.argmax(is_image[at:]))
        positions[:, at : at + text] = first + np.arange(text)
        at, first = at + text, first + text
        tokens = int(np.prod(grid))
        if not is_image[at : at + tokens].all():
            raise UserError(
                f"text tokens interrupt the {tokens} tokens of an image (by image_grid_thw): write its ids without a "
                "gap"
            )
        place = np.indices(tuple(map(int, grid))).reshape(AXES, tokens)
        place[0] = place[0].astype(np.float32) * interval
        positions[:, at : at + tokens] = first + place
        at, first = at + tokens, first + int(max(grid[1:]))
    rest = len(is_image) - at
    positions[:, at:] = first + np.arange(rest)
    return positions, first + rest
