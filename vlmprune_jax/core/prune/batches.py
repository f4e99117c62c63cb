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

_Image = tuple[np.ndarray, np.ndarray | None, str]  # pixels, patch grid of an image of any size, and its row's name


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


def row_batches(batches: Sequence[Arrays], settings: Mapping[str, Any]) -> list[CalibrationBatch]:
    """Group calibration rows into batches; rows for fitting and held-out rows never share a batch.

    Without a setting `held_out`, no row is held out.

    Raises UserError if there are too few rows, or none of their tokens has weight.
    """
    rows = [
        jax.tree.map(operator.itemgetter(row), arrays) for arrays in batches for row in range(len(arrays["input_ids"]))
    ]
    rows = [row for row in rows if row["attention_mask"].any()]
    # By content, so that the order of the rows is immaterial.
    rows.sort(key=lambda row: hashlib.sha256(row["input_ids"][row["attention_mask"] == 1].tobytes()).digest())
    parts, size = _parted(rows, settings, "rows"), len(batches[0]["token_types"])
    grouped = _in_batches(parts, size, weight_of_token_types(settings))
    for held_out in {batch.held_out for batch in grouped}:
        if not any(batch.weight.any() for batch in grouped if batch.held_out == held_out):
            raise UserError(
                f"calibration: no token of the {'held-out ' if held_out else ''}records has a weight above 0: raise "
                "prompt_weight, image_weight or answer_weight, or use more records"
            )
    return grouped


def tower_batches(
    batches: Sequence[Arrays], settings: Mapping[str, Any], cfg: ModelConfig, stack: str, *, distinct: bool = True
) -> list[CalibrationBatch]:
    """Group images (or inputs of another encoder) into batches of packed rows; none if there are no images.

    `distinct`: take equal images once, and order them by content; so no image is both fitted and held out.
    """
    tower: Any = cfg.stack(stack)
    images, tokens, title = dict[bytes, _Image](), dict[str, Any](), "images"
    if stack == "vision":
        positions = tower.grid**2 + tower.class_token
    else:
        tokens, title = {"tokens": (tower.token_id,), "each": tower.tokens}, f"items of {stack}"
        positions = tower.positions
    for arrays in (arrays for arrays in batches if stack in arrays["media"]):
        ids, mask, packed = arrays["input_ids"], arrays["attention_mask"], arrays["media"][stack]
        for name, visuals in zip(arrays["names"], visuals_by_row(cfg, ids, mask, packed, **tokens), strict=True):
            for visual in visuals:
                content = hashlib.sha256(b"".join(x.tobytes() for x in (visual.values, visual.grid) if x is not None))
                key = content.digest() if distinct else len(images).to_bytes(8)
                images[key] = visual.values, visual.grid, name
    chosen = [images[key] for key in sorted(images)]
    if stack == "vision" and cfg.dynamic_resolution:
        positions = max((len(values) for values, _, _ in chosen), default=0)
    parts = [(_in_packs(part, positions), held_out) for part, held_out in _parted(chosen, settings, title)]
    most = max((len(pack) for packs, _ in parts for pack in packs), default=0)
    rows = [([_packed_row(pack, positions, most, stack) for pack in packs], held_out) for packs, held_out in parts]
    return _in_batches(rows, len(batches[0]["token_types"]))


def _in_packs(images: Sequence[_Image], positions: int) -> list[list[_Image]]:
    """Pack images of varying size in order into rows of `positions` patches; images of fixed size get a row each."""
    packs, room = list[list[_Image]](), 0
    for image in images:
        needed = positions if image[1] is None else len(image[0])
        if needed > room:
            packs.append([])
            room = positions
        packs[-1].append(image)
        room -= needed
    return packs


def _packed_row(images: Sequence[_Image], positions: int, most: int, stack: str) -> Arrays:
    """Return images in one packed row that is padded to `positions` patches and, of any size, to `most` images."""
    values, grids, names = zip(*images, strict=True)
    pixels, filled, grid = np.concatenate(values), positions, None
    if grids[0] is not None:
        filled = len(pixels)
        pixels = np.concatenate([pixels, np.zeros((positions - filled, *pixels.shape[1:]), pixels.dtype)])
        grid = np.concatenate([grids, np.zeros((most - len(grids), 3), np.int32)])
    types = np.where(np.arange(positions) < filled, IMAGE, PADDING)
    return {"media": {stack: Packed(pixels, grid)}, "token_types": types, "names": ", ".join(names)}


def _parted(chosen: Sequence[Any], settings: Mapping[str, Any], title: str) -> tuple[tuple[Sequence[Any], bool], ...]:
    """Return (rows or images to fit to, False) and (those held out, True); raise UserError for fewer than two."""
    if "held_out" not in settings:
        return ((chosen, False),)
    n_held = min(max(1, round(settings["held_out"] * len(chosen))), len(chosen) - 1)
    if n_held < 1:
        raise UserError(
            f"reconstruct needs at least 2 calibration {title}, one for the fit and one held out: add records"
        )
    return (chosen[n_held:], False), (chosen[:n_held], True)


def _in_batches(
    parts: Sequence[tuple[Sequence[Arrays], bool]], size: int, weight_of: np.ndarray | None = None
) -> list[CalibrationBatch]:
    """Return batches of `size` rows each, in order; the last one of a part is padded with empty rows."""
    return [
        batch_of(stack_rows(chosen, size), weight_of, [row["names"] for row in chosen], held_out)
        for rows, held_out in parts
        for chosen in (rows[start : start + size] for start in range(0, len(rows), size))
    ]


def batch_of(
    arrays: Arrays, weight_of: np.ndarray | None = None, names: Sequence[str] = (), held_out: bool = False
) -> CalibrationBatch:
    """Return a batch from rows of `stack_rows`, of the decoder or (without token ids) of a tower.

    `weight_of`: float32[types], weight of a token of each type; by default 1, and 0 for padding.
    """
    context = {name: arrays.get(name) for name in ("attention_mask", "position_ids")}
    inputs: dict[str, Any] = {name: arrays[name] for name in ("input_ids", "media") if name in arrays}
    if "input_ids" not in arrays:
        (images,) = arrays["media"].values()
        context = {"grid": images.grid}
    types = arrays["token_types"]
    weight = (types != PADDING).astype(np.float32) if weight_of is None else weight_of[types]
    return CalibrationBatch(inputs, context, weight, types, list(names), held_out, arrays.get("labels"))
