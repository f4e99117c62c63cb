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
    grid: Any,
    times: Any,
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
      grid, times: frames, rows and columns of patches, and seconds between temporal patches, of the images and videos
        of each packed row (see `Packed`); None without images, or if all times are 1.
      tokens: ids of the tokens of images and videos (`ModelConfig.visual_token_ids`).
      merge: patches per side of a token (`merge` x `merge` patches make one token).
      tokens_per_second: see `ModelConfig`.

    Raises UserError for grids that are not multiples of `merge`, or that do not match a row's visual tokens.
    """
    ids = np.asarray(input_ids)
    valid = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    visual = is_visual(ids, tokens) & valid
    grid = np.zeros((1, 0, AXES), np.int64) if grid is None else np.asarray(grid)
    grids = grids_by_row(visual, grid, merge)
    times = np.ones(grid.shape[:-1]) if times is None else np.asarray(times)
    steps = iter(times[grid.any(axis=-1)].astype(np.float32) * np.float32(tokens_per_second))
    positions = np.zeros((len(ids), AXES, ids.shape[1]), np.int32)
    deltas = np.zeros(len(ids), np.int32)
    for row, real in enumerate(valid):
        cells = [(grid // (1, merge, merge), next(steps)) for grid in grids[row]]
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


def grids_by_row(is_image: np.ndarray, grid: Any, merge: int) -> list[list[np.ndarray]]:
    """Return the grids of each batch row, int[3] per image or video, from those of packed rows int[packs, visuals, 3].

    `is_image`, bool[batch, seq], marks the tokens of these images. Raises UserError if grids and tokens differ.
    """
    counts, grids = is_image.sum(axis=1).tolist(), np.asarray(grid)
    for image in grids.reshape(-1, AXES):
        if image.any() and (image.min() < 1 or image[1] % merge or image[2] % merge):
            raise UserError(
                f"image_grid_thw {image.tolist()}: needs at least 1 frame, and rows and columns of patches that are "
                f"multiples of {merge}, the model's spatial_merge_size"
            )
    by_row = list[list[np.ndarray]]()
    for packed, of_pack in zip(grids, np.reshape(counts, (len(grids), -1)), strict=True):
        images = [image for image in packed if image.any()]
        tokens = np.array([tokens_of(image, merge) for image in images], int)
        # the row of its first token; images beyond all tokens, which are refused below, belong to the last row
        rows = np.searchsorted(np.cumsum(of_pack), np.cumsum(tokens) - tokens, side="right")
        rows = np.minimum(rows, np.flatnonzero(of_pack).max(initial=0))
        by_row += [[image for image, n in zip(images, rows, strict=True) if n == row] for row in range(len(of_pack))]
    for row, (count, images) in enumerate(zip(counts, by_row, strict=True)):
        n_tokens = sum(tokens_of(image, merge) for image in images)
        if n_tokens != count:
            raise UserError(
                f"row {row} has {count} image tokens, but its image_grid_thw {[image.tolist() for image in images]} "
                f"need {n_tokens} (one per {merge} x {merge} patches): write that many image ids"
            )
    return by_row


def tokens_of(grid: Any, merge: int) -> int:
    """Return the number of tokens of an image with this patch grid, int[3]."""
    return int(np.prod(np.asarray(grid, np.int64))) // merge**2


def _row_positions(is_image: np.ndarray, grids: Sequence[tuple[Any, np.float32]]) -> tuple[np.ndarray, int]:
    """Return one row's M-RoPE positions, int32[3, tokens], and the position of a text token that follows.

    `grids`: sizes of its images and videos in merged patches, and temporal positions per temporal patch.
    """
    places = np.zeros((AXES, len(is_image)), np.int32)  # of the cells of an image, relative to its position
    lengths = np.ones(len(is_image), np.int32)  # positions from each token to the next
    tokens = np.flatnonzero(is_image)
    for grid, interval in grids:
        cells = np.indices(tuple(map(int, grid))).reshape(AXES, -1)
        cells[0] = cells[0].astype(np.float32) * interval
        image, tokens = tokens[: cells.shape[1]], tokens[cells.shape[1] :]
        if image[-1] - image[0] >= len(image):
            raise UserError(
                f"text tokens interrupt the {len(image)} tokens of an image (by image_grid_thw): write its ids without "
                "a gap"
            )
        places[:, image], lengths[image] = cells, 0
        lengths[image[-1]] = max(grid[1:])
    return np.cumsum(lengths) - lengths + places, int(lengths.sum())
