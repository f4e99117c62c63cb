"""Study 2 with text among the calibration records, without training: its effect on the language.

  vlmprune sweep --config=configs/sweeps/study_vlm_text.py:DIR --workdir=runs/study_vlm_text

Like study_vlm.py, but half of the calibration records are pieces of Python's language reference, from the topics that
are not used for perplexity. {depth, width} x {15, 30, 45 % of the decoder} x {none, reconstruct}: 12 runs.
"""

import json
import random
from pathlib import Path

import study_vlm
from ml_collections import ConfigDict
from study_easyvqa import RECONSTRUCTED, of_decoder

from vlmprune_jax.base.files import replacing
from vlmprune_jax.run.demo.easyvqa import write_dataset
from vlmprune_jax.run.demo.topics import topic_entries

DATA = Path("runs/easyvqa")
LETTERS = 500  # characters per piece, about 130 tokens
_folder = ""


def get_config(folder: str = "") -> ConfigDict:
    """Return study 2's settings with records of questions and text."""
    global _folder
    config, _folder = study_vlm.get_config(folder), folder
    files = write_dataset(DATA)
    config.data.source = "files"
    config.data.train = write_records(files["train"])
    config.data.eval, config.data.images = str(files["test"]), str(files["images"])
    config.recover.method = "none"
    return config


def get_hyper(hyper):
    """Return the runs of the sweep: every pruning with and without reconstruction, highest ratio first."""
    return hyper.product(
        [
            hyper.named("decoder", of_decoder(_folder, study_vlm.SHARES[::-1])),
            hyper.sweep("prune.method", ["depth", "width"]),
            hyper.named("recovery", {"none": {}, "reconstruct": RECONSTRUCTED}),
        ]
    )


def write_records(questions: Path) -> str:
    """Write a shuffled mix of text pieces and as many questions; return the path."""
    texts = topic_entries(0, LETTERS)
    entries = json.loads(questions.read_text(encoding="utf-8"))
    random.Random(0).shuffle(entries)
    records = entries[: len(texts)] + texts
    random.Random(1).shuffle(records)
    path = DATA / "questions_and_text.json"
    with replacing(path) as file:
        file.write(json.dumps(records).encode())
    return str(path)
