"""Computing an image once for all questions about it: benchmarks ask several, and the image is most of the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmprune_jax.data.batching import GenerationBatch
from vlmprune_jax.models.generate import SharedPrefix


def prompt_arguments(batch: GenerationBatch, image_token_id: int | None) -> dict[str, Any]:
    """Arguments of `generate` for a batch of left-padded prompts, with equal beginnings computed once.

    A row's beginning is what stands up to its last image position; rows with the same one and the same images share
    it. Beginnings and remainders are padded to few different shapes, so that few programs are compiled. Without an
    image, or when fewer than half of the beginnings can be saved, the rows are passed as they are.
    """
    ids, mask = batch.arrays["input_ids"], batch.arrays["attention_mask"]
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": batch.arrays.get("pixel_values")}
    is_image = ids == image_token_id
    if whole["pixel_values"] is None or not is_image.any(axis=1).all():
        return whole
    ends = ids.shape[1] - is_image[:, ::-1].argmax(axis=1)
    if (ends >= ids.shape[1]).any():
        return whole
    seen: dict[tuple[bytes, bytes], int] = {}
    owners, rows = [], []
    for row, end in enumerate(ends):
        key = (ids[row, :end][mask[row, :end] == 1].tobytes(), whole["pixel_values"][row].tobytes())
        if key not in seen:
            seen[key] = len(owners)
            owners.append(row)
        rows.append(seen[key])
    count = 1 << (len(owners) - 1).bit_length()
    if count > len(ids) // 2:
        return whole
    owners += owners[:1] * (count - len(owners))
    prefix_mask = mask[owners] * (np.arange(ids.shape[1])[None] < ends[owners][:, None])
    rest_mask = mask * (np.arange(ids.shape[1])[None] >= ends[:, None])
    prefix_ids, prefix_mask = _compact(ids[owners], prefix_mask)
    rest_ids, rest_mask = _compact(ids, rest_mask)
    return {
        "input_ids": rest_ids,
        "attention_mask": rest_mask,
        "pixel_values": whole["pixel_values"][owners],
        "prefix": SharedPrefix(prefix_ids, prefix_mask, np.array(rows, np.int32)),
    }


def _compact(ids: np.ndarray, mask: np.ndarray, multiple: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens at the right of as few columns as they need, rounded up to a `multiple`."""
    longest = int(mask.sum(axis=1).max())
    width = min(-(-longest // multiple) * multiple, ids.shape[1])
    order = np.argsort(mask, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1)[:, -width:], np.take_along_axis(mask, order, axis=1)[:, -width:]
