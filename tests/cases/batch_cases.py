"""Records and encoder of the golden LLaVA, for tests of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

# Options of `train_batches`: whole batches in random order.
ORDERED: dict[str, Any] = {"batch_size": 4, "seed": 3, "drop_remainder": True}


def golden_records(goldens: Path) -> list[Record]:
    """Return the golden samples (images and text, 1 to 3 rounds), and one with two images."""
    records = read_records(goldens / "data/samples.json", goldens / "data/images")
    two = Record("two", (("human", "<image>\n<image>\nSame?"), ("gpt", "No.")), records[0].images + records[2].images)
    return [*records, two]


def golden_encoder(goldens: Path, **changes: Any) -> Encoder:
    """Return an encoder for rows with up to two images."""
    images = load_image_processor(goldens / "ckpt/clip_tower", DataSpec(aspect_ratio="pad", cache_megabytes=1))
    options = {"max_images": 2, "truncate": False, "image_token_id": -200, "tokens_per_image": 16, **changes}
    tokenizer, template = load_tokenizer(goldens / "tokenizers/llava"), templates()["llava_v1"]
    return Encoder(tokenizer=tokenizer, template=template, image_loader=images, **options)
