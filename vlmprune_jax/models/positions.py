"""Positions of text and image tokens in three rows (M-RoPE, Wang et al. 2024), on the host."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmprune_jax.core.errors import UserError

AXES = 3  # frame, row and column


def mrope_positions(
    input_ids: Any, attention_mask: Any, image_grid_thw: Any, image_token_id: int, merge: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return M-RoPE positions int32[batch, 3, seq] (0 for padding), and int32[batch] offsets for generated tokens.

    Text increases all three by 1. An image at position p has (p, p + row, p + column) for its merged cells, and takes
    up the longer of its sides. The token after a row of n real tokens is at n + the row's offset.

    Args:
      input_ids: int[batch, seq], an image's tokens expanded.
      attention_mask: int[batch, seq], 1 = real token, or None.
      image_grid_thw: frames, rows and columns of patches, int[images, 3] in order of appearance over the batch, or
        int[packs, images, 3] by packed row (0, 0, 0 = no image; see `patch_rows`), or None.
      image_token_id, merge: of the model; `merge` x `merge` patches make one token.

    Raises UserError for grids that are no multiples of `merge`, or that do not match a row's image tokens.
    """
    ids = np.asarray(input_ids)
    valid = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    is_image = (ids == image_token_id) & valid
    grids = grids_by_row(is_image, image_grid_thw, merge)
    positions = np.zeros((len(ids), AXES, ids.shape[1]), np.int32)
    deltas = np.zeros(len(ids), np.int32)
    for row, real in enumerate(valid):
        row_positions = _row_positions(is_image[row][real], [grid // (1, merge, merge) for grid in grids[row]])
        positions[row][:, real] = row_positions
        deltas[row] = (row_positions.max(initial=-1) + 1) - row_positions.shape[1]
    return positions, deltas


def with_images(positions: Any, input_ids: Any, attention_mask: Any, image_token_id: int | None) -> Any:
    """Return every token's position, and the number of its image in the row (0 = none), int32[batch, 2, seq].

    Images are runs of int[batch, seq] ids `image_token_id`. Positions int[batch, seq] are counted along the mask by
    default; those that have image numbers are returned as they are.
    """
    if positions is not None and positions.ndim == 3:
        return positions
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    is_image = jnp.equal(input_ids, jnp.asarray(image_token_id, input_ids.dtype))
    begins = is_image & ~jnp.pad(is_image[:, :-1], ((0, 0), (1, 0)))
    return jnp.stack([positions, jnp.where(is_image, jnp.cumsum(begins, axis=1), 0)], axis=1).astype(jnp.int32)


def grids_by_row(is_image: np.ndarray, image_grid_thw: Any, merge: int) -> list[list[np.ndarray]]:
    """Return the image grids of each row, int[3] per image; image tokens are marked in `is_image`, bool[batch, seq]."""
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
        if grid[0] > 1:
            raise UserError(
                f"image_grid_thw {grid.tolist()} has several frames: videos are not supported, only images (1 frame)"
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


def _row_positions(is_image: np.ndarray, grids: list[np.ndarray]) -> np.ndarray:
    """Return one row's M-RoPE positions, int32[3, tokens]; `grids` are its images' sizes in merged patches."""
    positions = np.zeros((AXES, len(is_image)), np.int32)
    at = first = 0  # tokens placed, and the position of the next one
    for grid in grids:
        text = int(np.argmax(is_image[at:]))
        positions[:, at : at + text] = first + np.arange(text)
        at, first = at + text, first + text
        tokens = int(np.prod(grid))
        if not is_image[at : at + tokens].all():
            raise UserError(
                f"text tokens interrupt the {tokens} tokens of an image (by image_grid_thw): write its ids without a "
                "gap"
            )
        positions[:, at : at + tokens] = first + np.indices(tuple(map(int, grid))).reshape(AXES, tokens)
        at, first = at + tokens, first + int(max(grid[1:]))
    positions[:, at:] = first + np.arange(len(is_image) - at)
    return positions
