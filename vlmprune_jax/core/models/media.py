"""Images, videos and items of encoders in packed rows, from the reader to the tower, and positions of their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.mesh.mesh import mesh_of, place_batch, row_ways

AXES = 3  # frame, row and column
_LEAST = 16  # tokens of the shortest packed row of patches


class Packed(NamedTuple):
    """Images and videos of a batch, or items of an encoder of your own, in packed rows, padded at the end.

    A batch of n rows in p packed rows has the images of its rows 0 to n/p - 1 in the first packed row, and so on, in
    the order of their tokens. Every device thereby inserts the features of its own rows without communication.
    """

    values: Any
    """Tiles or frames of one size float[packs, tiles, channel, height, width], or patches of images of any size
    float[packs, patches, values]. For a model without its tower, features in their place: [packs, tiles, tokens,
    features] or [packs, tokens, features]. Items of another encoder: [packs, items, ...]."""

    grid: Any = None
    """int32[packs, visuals, 3], frames, rows and columns of patches of each image or video (0, 0, 0 = none); None for
    tiles of one size."""

    real: Any = None
    """bool[packs, tiles, rows, columns], True for patches of a tile that are not padding; None without padding."""

    times: Any = None
    """float[packs, visuals], seconds from one temporal patch to the next; None: 1."""


Media = Mapping[str, Packed]  # inputs of the tower ("vision") and of other encoders, by component


class Visual(NamedTuple):
    """One tile, image or video of a batch row, on the host."""

    first: int  # position of its first token in the row
    values: np.ndarray  # patches [patches, values], or one tile [1, channel, height, width]
    grid: Any  # int[3], or None for a tile
    real: Any  # bool[1, rows, columns], see `Packed`, or None
    interval: float  # seconds from one temporal patch to the next


def padded_tokens(tokens: int) -> int:
    """Return the length in image tokens to which a packed row is padded: 16, 32, 48, 64, 96, 128, 192, 256, ...

    There are two lengths per doubling, so that few programs are compiled and at most a third of a row is padding.
    """
    step = max(_LEAST, (1 << max(tokens - 1, 1).bit_length() - 1) // 2)
    return max(-(-tokens // step), 1) * step


def visuals_by_row(
    cfg: ModelConfig,
    input_ids: Any,
    attention_mask: Any,
    images: Packed,
    tokens: Sequence[int] | None = None,
    each: int | None = None,
) -> list[list[Visual]]:
    """Return the tiles, images and videos (or an encoder's items) of every batch row, in the order of their tokens.

    `tokens`: ids that mark the tokens of these images (default: of all images and videos). `each`: tokens of a tile or
    an item (default: of a tile).

    Raises UserError if a row's tokens are not those of its images.
    """
    marks, merge = is_visual(np.asarray(input_ids), cfg.visual_token_ids if tokens is None else tokens), cfg.merge
    each = cfg.tokens_per_image if each is None else each
    if images.grid is None:
        counts, rest = np.divmod(marks.sum(axis=1), each)
        if rest.any():
            row = int(np.argmax(rest > 0))
            raise UserError(
                f"row {row} of input_ids has {marks[row].sum()} image positions, not a multiple of the {each} tokens "
                "of an image"
            )
        grids: list[list[Any]] = [[None] * count for count in counts.tolist()]
    else:
        marks = marks if attention_mask is None else marks & (np.asarray(attention_mask) != 0)
        grids = [[*row] for row in grids_by_row(marks, images.grid, merge)]
    rows, values = list[list[Visual]](), np.asarray(images.values, np.float32)
    for number, row_grids in enumerate(grids):
        packed_row, rows_before = divmod(number, len(marks) // len(values))
        if rows_before == 0:
            start, times = 0, iter(list[float]())
            if images.times is not None:
                times = iter(images.times[packed_row][images.grid[packed_row].any(axis=-1)].tolist())
        visuals, positions = list[Visual](), np.flatnonzero(marks[number])
        for grid in row_grids:
            length, tokens_of_visual = (1, each) if grid is None else (int(grid.prod()), tokens_of(grid, merge))
            patches = slice(start, start + length)
            real = None if images.real is None else images.real[packed_row, patches]
            visuals.append(Visual(int(positions[0]), values[packed_row, patches], grid, real, next(times, 1.0)))
            start, positions = start + length, positions[tokens_of_visual:]
        rows.append(visuals)
    return rows


def pack(cfg: ModelConfig, rows: Sequence[Sequence[Visual]], packs: int, like: Packed) -> Packed:
    """Pack the images of all batch rows into `packs` padded rows, with the arrays that `like` has."""
    size, merge = len(rows) // packs, cfg.merge
    packed = [[visual for row in rows[start : start + size] for visual in row] for start in range(0, len(rows), size)]
    lengths, most = [sum(len(visual.values) for visual in visuals) for visuals in packed], max(1, *map(len, packed))
    room = most if like.grid is None else padded_tokens(-(-max(lengths) // merge**2)) * merge**2
    values = np.zeros((packs, room, *np.shape(like.values)[2:]), np.float32)
    grid = None if like.grid is None else np.zeros((packs, most, AXES), np.int32)
    real = None if like.real is None else np.zeros((packs, room, *np.shape(like.real)[2:]), bool)
    times = None if like.times is None else np.zeros((packs, most), np.float32)
    for number, (visuals, length) in enumerate(zip(packed, lengths, strict=True)):
        if visuals:
            np.concatenate([visual.values for visual in visuals], out=values[number, :length])
            if grid is not None:
                grid[number, : len(visuals)] = [visual.grid for visual in visuals]
            if real is not None:
                real[number, :length] = np.concatenate([visual.real for visual in visuals])
            if times is not None:
                times[number, : len(visuals)] = [visual.interval for visual in visuals]
    return Packed(values, grid, real, times)


def pack_sources(
    cfg: ModelConfig, input_ids: Any, attention_mask: Any, sources: Sequence[tuple[Packed, int]], packs: int
) -> Packed:
    """Pack images and videos, each with the id of its tokens, together into `packs` rows in the order of the tokens."""
    by_source = [visuals_by_row(cfg, input_ids, attention_mask, images, (token,)) for images, token in sources]
    rows = [sorted(itertools.chain(*of_row)) for of_row in zip(*by_source, strict=True)]
    return pack(cfg, rows, packs, sources[-1][0])


def repack(cfg: ModelConfig, input_ids: Any, attention_mask: Any, images: Packed, packs: int) -> Packed:
    """Redistribute the images of a batch over `packs` packed rows (unchanged if it has as many)."""
    if len(images.values) == packs:
        return images
    return pack(cfg, visuals_by_row(cfg, input_ids, attention_mask, images), packs, images)


def packed_rows(batch: int, mesh: Mesh | None) -> int:
    """Return the number of packed rows of images for a batch: one per device group, or 1 if rows do not divide."""
    return row_ways(mesh) if batch % row_ways(mesh) == 0 else 1


def place_inputs(params: Any, cfg: ModelConfig, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Move a batch to the model's devices; images of varying size are packed into one row for each device group.

    Images without `input_ids` stay in their packed rows.
    """
    mesh, ids, media = mesh_of(params), arrays.get("input_ids"), arrays.get("media") or {}
    if ids is not None and "vision" in media and media["vision"].grid is not None:
        images = repack(cfg, ids, arrays.get("attention_mask"), media["vision"], packed_rows(len(ids), mesh))
        arrays = {**arrays, "media": {**media, "vision": images}}
    return place_batch(arrays, mesh)


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


def with_images(cfg: ModelConfig, shown: bool, positions: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Return every token's position, and the number of its image in the row (0 = none), int32[batch, 2, seq].

    An image or a frame of a video is a run of its tokens in `input_ids`, int[batch, seq]. `positions`: int[batch, seq],
    by default counted along the mask. They are returned unchanged if they have image numbers already, no image is
    `shown`, or image tokens do not attend to later tokens of their image (`Attention.sees_images`, Gemma).
    """
    numbered = positions is not None and positions.ndim == 3
    if numbered or not shown or not cfg.text.sees_images:
        return positions
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    is_image = is_visual(jnp.asarray(input_ids), cfg.visual_token_ids)
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
