"""Data sets of the Hugging Face hub by name, stored once as a folder that `datasets.py` reads."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.io.data.datasets import PREFIX as DATASETS

PREFIX = "hub:"
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?:([\w.-]+)(?:\[:(\d+)\])?")


def is_hub(text: str | None) -> bool:
    """Return True if a setting's value names a data set on the Hugging Face hub."""
    return text is not None and text.startswith(PREFIX)


def fetch_dataset(text: str, folder: Path, what: str, scratch: Path | None = None) -> str:
    """Download a hub data set into `folder` if it is missing, and return "datasets:FOLDER".

    `text` is "hub:ORG/NAME:SPLIT", or "hub:ORG/NAME/CONFIG:SPLIT" for a configuration. With "[:N]" at the end, only the
    first N rows are streamed, so that the rest of a large data set is never downloaded. `what`: name of the setting,
    for messages. `scratch`: folder for a missing data set, instead of `folder` (None = none). Raises UserError for
    another form, or if the package datasets is missing, or the hub has no such data set or cannot be reached.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{what}={text}: expected hub:ORG/NAME:SPLIT, as hub:lmms-lab/VQAv2:validation[:5000]")
    name, config, split, rows = match.groups()
    target = folder / re.sub(r"[^\w.-]+", "--", text).strip("-")
    if scratch is not None and not target.is_dir():
        target = scratch / target.name
    if target.is_dir():
        return f"{DATASETS}{target}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}={text}: needs the package datasets: pip install 'vlmprune-jax[hub]'") from error
    building = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=rows is not None)
        if rows is not None:
            first = list(dataset.take(int(rows)))
            dataset = datasets.Dataset.from_list(first, features=dataset.features)
        building.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_to_disk(str(building))
    except Exception as error:  # its own errors, of the hub's client, of the network and of files
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(
            f"{what}={text}: not available from the hub ({reason(error)}): check name, split and connection, or give "
            "files or a folder written by save_to_disk"
        ) from error
    os.replace(building, target)
    return f"{DATASETS}{target}"
