"""Images, videos and items of encoders in packed rows: one form from the reader to the tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.positions import AXES, grids_by_row, is_visual, tokens_of

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


def merge_of(cfg: ModelConfig) -> int:
    """Return the number of patches per side of a token (1 without a vision tower)."""
    return 1 if cfg.vision is None else cfg.vision.merge


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
    marks, merge = is_visual(np.asarray(input_ids), cfg.visual_token_ids if tokens is None else tokens), merge_of(cfg)
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
    size, merge = len(rows) // packs, merge_of(cfg)
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


def repack(cfg: ModelConfig, input_ids: Any, attention_mask: Any, images: Packed, packs: int) -> Packed:
    """Redistribute the images of a batch over `packs` packed rows (unchanged if it has as many)."""
    if len(images.values) == packs:
        return images
    return pack(cfg, visuals_by_row(cfg, input_ids, attention_mask, images), packs, images)
