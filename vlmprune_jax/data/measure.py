"""What every training record takes of a batch, counted before training: for grouping, buckets and skipped records."""

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
    """Return int32[records, 3]: of each training row the tokens (at most `encoder.max_length`, 0 = any), the image
    slots, and the tokens of the largest image where images are of any size (else 0).

    With `on_error` "skip" a record that cannot be used has zeros. Images are not decoded; `threads` read the headers
    of those that are cut into tiles. `progress` takes the number of records done. Raises UserError naming the record
    ("stop").
    """

    def attempt(compute: Callable[[Record], Any], record: Record) -> Any:
        try:
            return compute(record)
        except UserError:
            if on_error == "stop":
                raise
            return None

    def parts(record: Record) -> tuple[list[ImageShape], list[str]]:
        encoder.room([record])  # refuses what no bucket holds
        images = encoder.shapes(record)
        return images, prompt_pieces(record, encoder.template, images)

    sizes = np.zeros((len(records), 3), np.int32)
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for start in range(0, len(records), _CHUNK):
            chunk = records[start : start + _CHUNK]
            found = list(pool.map(lambda record: attempt(parts, record), chunk))
            texts = iter(count_tokens([pieces for _, pieces in filter(None, found)], encoder.tokenizer).tolist())
            for place, (record, part) in enumerate(zip(chunk, found, strict=True), start):
                if part is None:
                    continue
                tokens = next(texts) + encoder.image_positions(part[0])
                if 0 < (encoder.max_length or encoder.longest) < tokens:
                    cut = attempt(encoder.training_tokens, record)
                    tokens = 0 if cut is None else len(cut[0])
                if tokens:
                    sizes[place] = tokens, slots_of(part[0]), largest(part[0])
            if progress is not None:
                progress(start + len(chunk))
    return sizes
