"""Calibration rows, or images, in batches that pass the layers together; those to fit to and those held out apart."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.models.media import Packed, visuals_by_row
from vlmprune_jax.core.prune.calibration import IMAGE, PADDING, Arrays, stack_rows, weight_of_token_types

_Picture = tuple[np.ndarray, np.ndarray | None, str]  # pixels, patch grid of an image of any size, and a name


@dataclass(frozen=True)
class CalibrationBatch:
    """Calibration rows, or images, that are processed together."""

    inputs: dict[str, Any]
    """Token ids and images that the model embeds."""

    context: dict[str, Any]
    """Arrays for `BlockStack.context_of`."""

    weight: np.ndarray
    """Weight of every token, float32[rows, seq]."""

    token_types: np.ndarray
    """Type of every token, int32[rows, seq], see `calibration.TOKEN_TYPES`."""

    names: list[str]
    """Names of the rows, for messages."""

    held_out: bool = False
    """True if nothing is fitted to these rows."""

    labels: np.ndarray | None = None
    """Labels of text rows, int32[rows, seq], -100 for tokens without a label."""


def names_of_rows(batches: Sequence[Any], checked: Sequence[Arrays]) -> list[str]:
    """Return a name for every calibration row, for messages: the record's id if known."""
    names = list[str]()
    for batch, arrays in zip(batches, checked, strict=True):
        ids = getattr(batch, "record_ids", None) or [""] * len(arrays["token_types"])
        names += [f"record {name}" if name else f"row {len(names) + index}" for index, name in enumerate(ids)]
    return names


def row_batches(
    batches: Sequence[Arrays], settings: Mapping[str, Any], names: Sequence[str] | None = None
) -> list[CalibrationBatch]:
    """Group calibration rows into batches; rows for fitting and held-out rows never share a batch.

    Without a setting `held_out`, no row is held out.

    Raises UserError if there are too few rows, or none of their tokens has weight.
    """
    rows = [
        jax.tree.map(operator.itemgetter(row), arrays) for arrays in batches for row in range(len(arrays["input_ids"]))
    ]
    names = names or [f"row {number}" for number in range(len(rows))]
    rows = [row | {"name": name} for name, row in zip(names, rows, strict=True) if row["attention_mask"].any()]
    # By content, so that the order of the rows is immaterial.
    rows.sort(key=lambda row: hashlib.sha256(row["input_ids"][row["attention_mask"] == 1].tobytes()).digest())
    weight_of, size = weight_of_token_types(settings), len(batches[0]["token_types"])
    grouped = [
        text_batch(stack_rows(part, size), weight_of, [row["name"] for row in part], held_out)
        for chosen, held_out in _parted(rows, settings, "rows")
        for part in (chosen[start : start + size] for start in range(0, len(chosen), size))
    ]
    for held_out in {batch.held_out for batch in grouped}:
        if not any(batch.weight.any() for batch in grouped if batch.held_out == held_out):
            raise UserError(
                f"calibration: no token of the {'held-out ' if held_out else ''}records has a weight above 0: raise "
                "prompt_weight, image_weight or answer_weight, or use more records"
            )
    return grouped


def text_batch(
    arrays: Arrays, weight_of: np.ndarray, names: Sequence[str] = (), held_out: bool = False
) -> CalibrationBatch:
    """Return a batch from rows of `stack_rows`; `weight_of`: float32[types], weight of a token of each type."""
    context = {name: arrays.get(name) for name in ("attention_mask", "position_ids")}
    inputs = {name: array for name, array in arrays.items() if name not in (*context, "token_types", "labels")}
    types = arrays["token_types"]
    return CalibrationBatch(inputs, context, weight_of[types], types, list(names), held_out, arrays.get("labels"))


def tower_batches(
    batches: Sequence[Arrays],
    settings: Mapping[str, Any],
    names: Sequence[str],
    cfg: ModelConfig,
    stack: str,
    *,
    distinct: bool = True,
) -> list[CalibrationBatch]:
    """Group images (or inputs of another encoder) into batches; none if there are no images.

    `distinct`: take equal images once, and order them by content; so no image is both fitted and held out.
    """
    images, names_left = dict[bytes, _Picture](), iter(names)
    tower: Any = cfg.stack(stack)
    tokens: dict[str, Any] = {} if stack == "vision" else {"tokens": (tower.token_id,), "each": tower.tokens}
    for arrays in batches:
        ids, mask, media = arrays["input_ids"], arrays["attention_mask"], arrays.get("media", {})
        rows = visuals_by_row(cfg, ids, mask, media[stack], **tokens) if stack in media else [[]] * len(ids)
        for row in rows:
            name = next(names_left)
            for visual in row:
                key = hashlib.sha256(visual.values.tobytes() + (b"" if visual.grid is None else visual.grid.tobytes()))
                images[key.digest() if distinct else len(images).to_bytes(8)] = visual.values, visual.grid, name
    chosen = [images[key] for key in sorted(images)]
    positions = tower.positions if stack != "vision" else tower.grid**2 + tower.class_token
    if stack == "vision" and cfg.dynamic_resolution:
        positions = max((len(pixels) for pixels, _, _ in chosen), default=0)
    title = "images" if stack == "vision" else f"items of {stack}"
    parts = [(_in_packs(part, positions), held_out) for part, held_out in _parted(chosen, settings, title)]
    most = max((len(pack) for packs, _ in parts for pack in packs), default=0)
    size = len(batches[0]["token_types"])
    return [
        _tower_batch(packs[start : start + size], (size, positions, most), held_out, stack)
        for packs, held_out in parts
        for start in range(0, len(packs), size)
    ]


def _in_packs(images: Sequence[_Picture], positions: int) -> list[list[_Picture]]:
    """Pack images of varying size in order into rows of `positions` patches; images of fixed size get a row each."""
    packs, room = list[list[_Picture]](), 0
    for image in images:
        needed = positions if image[1] is None else len(image[0])
        if needed > room:
            packs.append([])
            room = positions
        packs[-1].append(image)
        room -= needed
    return packs


def _tower_batch(
    packs: Sequence[Sequence[_Picture]], shape: tuple[int, int, int], held_out: bool, stack: str
) -> CalibrationBatch:
    """Return a batch of images in packed rows; `shape`: number of rows, and of positions and images per row."""
    size, positions, most = shape
    first, grid, _ = packs[0][0]
    pixels = np.zeros((size, *(first.shape if grid is None else (positions, *first.shape[1:]))), np.float32)
    real, grids = np.zeros((size, positions), np.float32), np.zeros((size, most, 3), np.int32)
    for row, visuals in enumerate(packs):
        joined = np.concatenate([values for values, _, _ in visuals])
        pixels[row, : len(joined)] = joined
        real[row, : positions if grid is None else len(joined)] = 1
        if grid is not None:
            grids[row, : len(visuals)] = np.array([grid for _, grid, _ in visuals])
    images = Packed(pixels, None if grid is None else grids)
    names = [", ".join(name for _, _, name in visuals) for visuals in packs]
    types = np.where(real > 0, IMAGE, PADDING)
    return CalibrationBatch({"media": {stack: images}}, {"grid": images.grid}, real, types, names, held_out)


def _parted(chosen: Sequence[Any], settings: Mapping[str, Any], title: str) -> tuple[tuple[Sequence[Any], bool], ...]:
    """Return (images to fit to, False) and (held-out images, True); raise UserError for fewer than two images."""
    if "held_out" not in settings:
        return ((chosen, False),)
    n_held = min(max(1, round(settings["held_out"] * len(chosen))), len(chosen) - 1)
    if n_held < 1:
        raise UserError(
            f"reconstruct needs at least 2 calibration {title}, one for the fit and one held out: add records"
        )
    return (chosen[n_held:], False), (chosen[:n_held], True)


def stack_batches(
    batches: Sequence[Arrays], settings: Mapping[str, Any], names: Sequence[str], cfg: ModelConfig, stack: str
) -> list[CalibrationBatch]:
    """Return calibration batches of a stack's inputs: rows for the decoder, images or other items for a tower."""
    if stack == "text":
        return row_batches(batches, settings, names)
    return tower_batches(batches, settings, names, cfg, stack)
