"""Calibration batches: checked once on the host before anything is compiled for them; types of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlmprune_jax.base.errors import UserError, error_context
from vlmprune_jax.core.config import IGNORED, ModelConfig
from vlmprune_jax.core.models.inputs import batch_media, read_inputs
from vlmprune_jax.core.models.media import Packed, repack, with_images
from vlmprune_jax.core.prune.config import ScoreConfig

Arrays = dict[str, Any]  # arrays by name, and "media": `Packed` by component
# Token types; an answer is a token with a label. Frames of models without a video token are images.
TYPES = PADDING, PROMPT, IMAGE, ANSWER, VIDEO = tuple(range(5))
TOKEN_TYPES = {"image": IMAGE, "prompt": PROMPT, "answer": ANSWER, "video": VIDEO}
_FILLS = {"input_ids": 0, "attention_mask": 0, "token_types": PADDING, "labels": IGNORED}
TOKEN_TYPE_WEIGHTS = {name: getattr(ScoreConfig(), name) for name in ("image_weight", "prompt_weight", "answer_weight")}


def calibration_batches(batches: Iterable[Any], cfg: ModelConfig, *, labels: bool) -> Iterator[Arrays]:
    """Yield each calibration batch as checked arrays: input_ids, attention_mask, token types, images, labels, names.

    `batches`: mappings, or objects with such a mapping as `.arrays`. `labels`: require labels in every batch. Names of
    the rows are for messages: the `.record_ids` of a batch if it has them, otherwise the number of the row.
    Images, and items of other encoders, are returned under "media" in the form of `Packed`, one packed row for each
    row. Raises UserError if there is no batch, an array is missing, or the model cannot read the shapes, ids, images or
    labels.
    """
    rows = 0
    for number, batch in enumerate(batches):
        arrays = getattr(batch, "arrays", batch)
        with error_context(f"calibration batch {number}"):
            if not isinstance(arrays, Mapping):
                raise UserError(f"must be a mapping of arrays, got {type(batch).__name__}: make it with vp.batches")
            checked = _checked({name: array for name, array in arrays.items() if array is not None}, cfg, labels)
        ids = getattr(batch, "record_ids", None) or [""] * len(checked["input_ids"])
        names = [f"record {name}" if name else f"row {rows + index}" for index, name in enumerate(ids)]
        rows += len(names)
        yield checked | {"names": np.array(names)}
    if not rows:
        raise UserError("there are no calibration batches: pass at least one")


def stack_rows(rows: Sequence[Mapping[str, Any]], size: int) -> Arrays:
    """Regroup the rows of batches into arrays of `size` rows, right-padded to the longest row.

    The result has the ids, mask, token types, labels, positions and media that any of the rows has.
    """
    longest = max(len(row["token_types"]) for row in rows)

    def stacked(parts: Sequence[Any], name: str = "") -> np.ndarray:
        """Stack arrays, None for rows that have none; those with a name are as long as the longest row."""
        present = [part for part in parts if part is not None]
        shape = np.max([part.shape for part in present], axis=0) if present else (longest,)
        shape = (*shape[:-1], longest) if name else shape
        array = np.full((size, *shape), _FILLS.get(name, 0), present[0].dtype if present else np.int32)
        for index, part in enumerate(parts):
            if part is not None:
                array[index][tuple(map(slice, part.shape))] = part
        return array

    names = [name for name in (*_FILLS, "position_ids") if any(name in row for row in rows)]
    arrays: Arrays = {name: stacked([row.get(name) for row in rows], name) for name in names}
    media = dict[str, Packed]()
    for name in dict.fromkeys(name for row in rows for name in row["media"]):
        fields = zip(*(row["media"].get(name, Packed(None)) for row in rows), strict=True)
        media[name] = Packed(*(None if all(part is None for part in parts) else stacked(parts) for parts in fields))
    return arrays | {"media": media}


def weight_of_token_types(options: Mapping[str, float]) -> np.ndarray:
    """Return the weight of each token type, float32[types], from a criterion's options; padding has weight 0."""
    weights = np.zeros(len(TYPES), np.float32)
    for name, number in TOKEN_TYPES.items():
        weights[number] = options["image_weight" if number == VIDEO else f"{name}_weight"]
    return weights


def types_in(counts: np.ndarray) -> list[str]:
    """Return the names of the token types that occur, given their counts int[types]; () if only one type occurs."""
    names = [name for name, number in TOKEN_TYPES.items() if counts[number]]
    return names if len(names) > 1 else []


def positive(count: Any) -> Any:
    """Return `count`; raise UserError if it is zero, since a score needs at least one token."""
    if count == 0:
        raise UserError("the calibration batches contain only padding: every attention_mask is 0")
    return count


def _checked(arrays: Arrays, cfg: ModelConfig, labels: bool) -> Arrays:
    names = ("input_ids", "attention_mask", "labels")
    missing = [name for name in names[: 3 if labels else 2] if name not in arrays]
    if missing:
        raise UserError(f"a batch lacks {', '.join(missing)} (found {', '.join(arrays)}): make batches with vp.batches")
    result: Arrays = {name: np.asarray(arrays[name], np.int32) for name in names if name in arrays}
    shape = result["input_ids"].shape
    for name, array in result.items():
        if array.shape != shape:
            raise UserError(f"{name} has shape {array.shape}, but input_ids has shape {shape}")
    ids, mask = result["input_ids"], result["attention_mask"]
    inputs = read_inputs(cfg, ids, mask, batch_media(cfg, arrays), len(ids))
    media = dict(inputs.media)
    if any(packed.real is not None for packed in media.values()):
        raise UserError(
            "pixel_attention_mask hides parts of images, but scoring needs whole images: resize the images first"
        )
    targets = result.get("labels", np.zeros((0, 0), np.int32))
    wrong = np.argwhere((targets != IGNORED) & ((targets < 0) | (targets >= cfg.text.vocab_size)))
    for row, column in wrong[:1]:
        raise UserError(
            f"labels[{row}, {column}] = {targets[row, column]} is neither {IGNORED} (ignored) nor below "
            f"{cfg.text.vocab_size}"
        )
    if "vision" in media:
        media["vision"] = repack(cfg, ids, mask, media["vision"], len(ids))._replace(times=None)
    if inputs.positions is not None:
        result["position_ids"] = inputs.positions
    if cfg.text.sees_images:
        result["position_ids"] = np.asarray(with_images(cfg, True, None, ids, mask))
    return {**result, "media": media, "token_types": _token_types(result, cfg)}


def _token_types(arrays: Arrays, cfg: ModelConfig) -> np.ndarray:
    """Return the type of every token (padding, prompt, image, answer, video) as int32[batch, seq]."""
    types = np.full(arrays["input_ids"].shape, PROMPT, np.int32)
    if "labels" in arrays:
        types[arrays["labels"] != IGNORED] = ANSWER
    encoders = ((encoder.token_id, IMAGE) for _, encoder in cfg.encoders)
    for token, name in ((cfg.image_token_id, IMAGE), (cfg.video_token_id, VIDEO), *encoders):
        if token is not None:
            types[arrays["input_ids"] == token] = name
    types[arrays["attention_mask"] == 0] = PADDING
    return types
