"""Records and encoder of the golden LLaVA, and folders as `save_to_disk` of datasets writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmprune_jax.io.data.config import DataSpec
from vlmprune_jax.io.data.encoding import Encoder
from vlmprune_jax.io.data.images import load_image_processor
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.io.families import templates

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
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


def write_split(
    folder: Path, rows: Sequence[dict[str, Any]], images: Sequence[str] = ("image",), *, files: int = 1, batch: int = 2
) -> Path:
    """Rows in so many Arrow streams, cut into batches; `images` are the columns whose values are encoded bytes.

    Made with pyarrow alone, and compared with datasets in test_datasets.py.
    """
    folder.mkdir(parents=True)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in images:
            values = [value and {"bytes": value, "path": None} for value in values]
        columns[name] = pa.array(values, IMAGE if name in images else None)
    table, share = pa.table(columns), -(-len(rows) // files)
    listed = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    for number, name in enumerate(listed):
        with (folder / name).open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(number * share, share), max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in listed]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder
