"""Sizes of all training records, measured before training: for grouping, buckets and skipping records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlmprune_jax.core.config import ImageShape
from vlmprune_jax.core.errors import UserError
from vlmprune_jax.data.encoding import Encoder, largest, slots_of
from vlmprune_jax.data.prompts import count_tokens, prompt_pieces
from vlmprune_jax.data.records import Record

_CHUNK = 4096  # records whose texts are tokenised in one call, which spreads them over all cores


def measure(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    on_error: str,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return int32[records, 3]: tokens, image slots and tokens of the largest image of each training row.

    Tokens are at most `encoder.max_length` (0 = no limit); tokens of an image are 0 if images have one size. With
    `on_error` "skip" an unusable record has zeros; with "stop" it raises UserError naming the record. Images are not
    decoded; `threads` read the headers of images with tiles. `progress` takes the number of records done.
    """

    def attempt(compute: Callable[[Record], Any], record: Record) -> Any:
        try:
            return compute(record)
        except UserError:
            if on_error == "stop":
                raise
            return None

    def parts(record: Record) -> tuple[list[ImageShape], list[str]]:
        encoder.room([record])  # refuses records that no bucket holds
        images = encoder.shapes(record)
        return images, prompt_pieces(record, encoder.template, images)

    sizes = np.zeros((len(records), 3), np.int32)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(records), _CHUNK):
            chunk = records[start : start + _CHUNK]
            images_and_pieces = list(pool.map(lambda record: attempt(parts, record), chunk))
            pieces = [pieces for _, pieces in filter(None, images_and_pieces)]
            text_tokens = iter(count_tokens(pieces, encoder.tokenizer).tolist())
            for place, (record, part) in enumerate(zip(chunk, images_and_pieces, strict=True), start):
                if part is None:
                    continue
                tokens = next(text_tokens) + encoder.image_positions(part[0])
                if 0 < (encoder.max_length or encoder.longest) < tokens:
                    cut = attempt(encoder.training_tokens, record)
                    tokens = 0 if cut is None else len(cut[0])
                if tokens:
                    sizes[place] = tokens, slots_of(part[0]), largest(part[0])
            if progress is not None:
                progress(start + len(chunk))
    return sizes
