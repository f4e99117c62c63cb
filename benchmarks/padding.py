"""Share of padding in training batches, with and without grouping and length buckets, and the speed of measuring.

  python benchmarks/padding.py --tokenizer=DIR

Record lengths are synthetic, with the distribution of LLaVA's 665k mix: rows with 576 image tokens and a short or long
conversation, and 6 % text rows of up to 2,048 tokens, in batches of 128. `--tokenizer` is a Hugging Face folder, whose
tokenizer counts the tokens of `--texts` records. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from vlmprune_jax.io.data import batching
from vlmprune_jax.io.data.encoding import Encoder, measure
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.io.families import templates

RECORDS, BATCH, LONGEST, IMAGE = 665_298, 128, 2048, 576
BUCKETS = (768, 1024, 1536, 2048)
# Share of the records, median and spread (of the logarithm) of their text tokens, and whether they have an image.
PARTS = ((0.24, 350, 0.35, True), (0.57, 110, 0.6, True), (0.13, 250, 0.4, True), (0.06, 900, 0.7, False))


def main() -> None:
    """Compute padding shares and measure the tokenizer; print one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=8000)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    kind = draw.choice(len(PARTS), RECORDS, p=[part[0] for part in PARTS])
    medians, spreads, images = (np.array([part[i] for part in PARTS])[kind] for i in (1, 2, 3))
    tokens = np.exp(draw.normal(np.log(medians), spreads)).astype(int) + 40 + IMAGE * images
    sizes = np.stack([np.minimum(tokens, LONGEST), images.astype(int)], 1)
    shuffled = draw.permutation(RECORDS)
    begin = time.perf_counter()
    orders = {name: _order(sizes, name) for name in ("length", "modality_length")}
    seconds = (time.perf_counter() - begin) / len(orders)
    batching.MEGABATCH = 1
    orders["LLaVA's megabatch"] = _order(sizes, "modality_length")
    padding = {"one length": _padding(sizes[shuffled, 0], (LONGEST,)), "buckets": _padding(sizes[shuffled, 0], BUCKETS)}
    padding |= {f"buckets, {name}": _padding(sizes[order, 0], BUCKETS) for name, order in orders.items()}
    print(json.dumps({"padding": padding, "mean_tokens": float(sizes[:, 0].mean()), "order_seconds": round(seconds, 2),
                      **_measuring(options.tokenizer, options.texts)}))  # fmt: skip


def _order(sizes: np.ndarray, group_by: str) -> np.ndarray:
    return batching.grouped_order(sizes, group_by=group_by, batch_size=BATCH, seed=0, epoch=0)


def _padding(lengths: np.ndarray, buckets: tuple[int, ...]) -> float:
    """Return the share of padding tokens in all full batches, each padded to the smallest bucket that holds it."""
    batches = lengths[: len(lengths) // BATCH * BATCH].reshape(-1, BATCH)
    padded = np.array(buckets)[np.searchsorted(buckets, batches.max(1))]
    return round(1 - float(batches.sum() / (padded.sum() * BATCH)), 4)


def _measuring(folder: Path, texts: int) -> dict[str, float]:
    """Return records per second of counting tokens (`count_tokens`) and of tokenising for training."""
    draw = np.random.default_rng(1)
    words = ["the", "a", "man", "is", "riding", "on", "top", "of", "red", "bicycle", "near", "what", "color", "."]
    records = []
    for number in range(texts):
        rounds = int(draw.integers(1, 5))
        turns = [
            (who, " ".join(draw.choice(words, size)))
            for _ in range(rounds)
            for who, size in (("human", 12), ("gpt", 40))
        ]
        records.append(Record(str(number), tuple(turns), ()))
    encoder = Encoder(
        tokenizer=load_tokenizer(folder),
        template=templates()["llava_v1"],
        max_length=0,
        image_loader=None,
        image_token_id=0,
        tokens_per_image=IMAGE,
        max_images=1,
        truncate=False,
    )
    begin = time.perf_counter()
    sizes = measure(records, encoder, on_error="stop", threads=2)
    counted = time.perf_counter()
    for record in records[: texts // 8]:
        encoder.training_tokens(record)
    tokenised = time.perf_counter()
    return {
        "text_tokens": float(sizes[:, 0].mean()),
        "counted_per_second": round(texts / (counted - begin)),
        "tokenised_per_second": round(texts // 8 / (tokenised - counted)),
    }


if __name__ == "__main__":
    main()
