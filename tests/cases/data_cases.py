"""Folders as `save_to_disk` of datasets writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


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
