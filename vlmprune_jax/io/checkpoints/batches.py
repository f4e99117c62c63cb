"""Batches of records for scoring, losses and training, in notebooks and custom training loops."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmprune_jax.base.checks import suggest
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import override
from vlmprune_jax.core.config import ModelConfig
from vlmprune_jax.core.sections import ModelSpec
from vlmprune_jax.io.checkpoints.read import read_config, resolve
from vlmprune_jax.io.data.batching import Batch
from vlmprune_jax.io.data.config import ROW_SETTINGS, DataSpec
from vlmprune_jax.io.data.inputs import Inputs, batches_of, load_inputs, training_records
from vlmprune_jax.io.data.records import Record, make_records

Records = str | Path | Sequence[Mapping[str, Any]]


def open_inputs(
    hf_dir: str | Path,
    vision_dir: str | Path | None,
    images: str | Path | None,
    settings: Mapping[str, Any],
    others: Collection[str] = (),
) -> tuple[ModelConfig, Inputs]:
    """Return a model's config, and its tokenizer, prompt template and image processor, from a folder or hub id.

    `settings`: settings of the section `data`. Raises UserError for settings that do not affect single rows and are not
    in `others`.
    """
    known = (*ROW_SETTINGS, "max_images", "image_buckets", "tile_buckets", *others)
    for name in settings:
        if name not in known:
            raise UserError(f"setting {name!r} is not accepted here{suggest(name, known)}")
    data = override(DataSpec(), {**settings, "images": None if images is None else os.fspath(images)}, "data")
    folder, tower = resolve(hf_dir), None if vision_dir is None else resolve(vision_dir)
    cfg = read_config(folder, tower)[1]
    return cfg, load_inputs(ModelSpec(str(folder), None if tower is None else str(tower)), data, cfg)


def to_records(records: Records, inputs: Inputs) -> list[Record]:
    """Return the records of a data file or of parsed entries; raise UserError if they are malformed or empty."""
    if isinstance(records, (str, os.PathLike)):
        return training_records(dataclasses.replace(inputs.data, train=os.fspath(records)), inputs.template)
    root = None if inputs.data.images is None else Path(inputs.data.images)
    return make_records(records, root, image_lead=inputs.template.image_lead)


def batches(
    hf_dir: str | Path,
    records: Records,
    *,
    images: str | Path | None = None,
    vision_dir: str | Path | None = None,
    batch_size: int = 1,
    samples: int | None = None,
    seed: int = 42,
    **settings: Any,
) -> list[Batch]:
    """Encode records with the model's tokenizer, prompt template and image processor; return batches.

    Args:
      hf_dir: the model's folder, or hub id; no weights are read.
      records: a data file (see docs/how-to/own-data.md), or its entries, {"image": ...,
        "conversations": [{"from": "human", "value": ...}, ...]}.
      images: root folder of the image paths.
      vision_dir: folder of the vision tower, if the model's folder does not describe it.
      batch_size: rows per batch; the last batch is filled up with rows whose mask is 0.
      samples: number of records to draw at random with `seed`, for calibration (None = all, in their order).
      settings: settings of the section `data` that affect single rows, such as max_length=2048 (see
        docs/reference/settings.md).

    Returns:
      Batches of one length; `.arrays` has input_ids, attention_mask and labels
      int32[batch, tokens] and, with a tower, `media["vision"]`, the images in packed rows, one per row (see `Batch`).
      Videos are among the images, in the order of their tokens.

    Raises UserError for malformed, unreadable or too long records, an unknown setting, or batch_size or samples < 1.
    """
    for name, number in (("batch_size", batch_size), ("samples", samples)):
        if number is not None and number < 1:
            raise UserError(f"{name}={number} must be at least 1")
    cfg, inputs = open_inputs(hf_dir, vision_dir, images, settings, ("max_length", "truncate"))
    data, read, encoder = inputs.data, to_records(records, inputs), inputs.training_encoder(cfg)
    if samples is not None:
        drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(read))[:samples]  # as the commands draw
        read = [read[index] for index in drawn]
    return batches_of(read, encoder, batch_size=batch_size, threads=data.threads)
