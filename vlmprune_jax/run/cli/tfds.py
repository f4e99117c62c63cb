"""vlmprune tfds --data=FILE.json --images=DIR --out=DIR: pack records and images into a tensorflow-datasets data set.

Writes a few large ArrayRecord files, without TensorFlow. --config.data.train=tfds:DIR reads the data set.
"""

from __future__ import annotations

from typing import Any

from absl import flags as absl_flags

from vlmprune_jax.run.cli.flags import Flags


def define(values: Flags) -> None:
    """Define the command-line flags of `vlmprune tfds`."""
    absl_flags.DEFINE_string("data", None, "JSON or JSON-lines file of records in LLaVA's format", flag_values=values)
    absl_flags.DEFINE_string(
        "images", None, "folder to which image paths in the records are relative", flag_values=values
    )
    absl_flags.DEFINE_string("out", None, "folder to write", flag_values=values)


def run(flags: Any) -> None:
    """Convert a JSON data file and its images to a TFDS data set."""
    from pathlib import Path

    from vlmprune_jax.base.console import make_reporter
    from vlmprune_jax.base.errors import UserError
    from vlmprune_jax.io.data.records import read_records
    from vlmprune_jax.io.data.tfds import write_tfds

    if not flags.data or not flags.out:
        raise UserError("tfds needs --data=FILE.json and --out=DIR (and --images=DIR if records have images)")
    if "://" in flags.out:
        raise UserError(
            f"--out={flags.out}: must be a local folder: write DIR, then run gcloud storage cp -r DIR {flags.out}"
        )
    root = None if flags.images is None else Path(flags.images)
    # image_lead: a prompt template may add missing placeholders later
    records = read_records(Path(flags.data), root, image_lead=True)
    images = len({image for record in records for image in record.images})
    reporter = make_reporter(True)
    with reporter.bar("write", len(records) + images) as progress:
        write_tfds(records, Path(flags.out), image_root=root, progress=progress)
    reporter.say(f"{flags.out}: {len(records):,} records, {images:,} images; use --config.data.train=tfds:{flags.out}")
