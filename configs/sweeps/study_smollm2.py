"""Study 3: all criteria on a language model, before and after reconstruction, by perplexity.

  vlmprune sweep --config=configs/sweeps/study_smollm2.py:DIR --workdir=runs/study_smollm2

DIR is SmolLM2-135M (default: the folder that tests/cases/smollm2.py makes). All criteria of layers and of widths, {10,
20, 30 % of all parameters} x {none, reconstruct}: 60 runs, 30 plans. Calibration: 16 records of 256 tokens from every
second topic of Python's own language reference (pydoc_data.topics); evaluation: 12 windows of 512 tokens from the other
topics. benchmarks/reconstruction.py measures the same with calibration rows without chat template; its numbers are in
docs/explanation/results.md.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from vlmprune_jax.core.prune.criteria import CRITERIA
from vlmprune_jax.run.cli.config_files import experiment_config
from vlmprune_jax.run.demo.topics import topic_entries, write_shared, write_topics

RATIOS = (0.1, 0.2, 0.3)
BLOCKS = {0.1: 4, 0.2: 8, 0.3: 11}  # layers removed at each ratio
WITHOUT_RECOVERY = {"none": {}, "reconstruct": {"reconstruct.method": "least_squares"}}
TEXTS = Path("runs/texts")  # shared by all sweeps that read them
LETTERS = {"text": 26_000, "record": 1_300}  # characters that give a little more than 12 x 512 and 256 tokens


def get_config(folder: str = ".cache/smollm2-135m") -> ConfigDict:
    """Return settings without training, evaluated by perplexity only."""
    config = experiment_config()
    config.model.hf_dir = folder
    config.data.train = write_records()
    config.data.max_length = 256
    config.score.samples, config.score.batch_size = 16, 8
    config.reconstruct.samples, config.reconstruct.batch_size = 16, 8
    config.recover.method = "none"
    config.evaluate.unrecovered = False
    config.evaluate.batch_size = 4
    config.evaluate.text = write_topics(TEXTS / "topics_1.txt", 1, LETTERS["text"])
    config.export.dtype = "float32"
    return config


def get_hyper(hyper):
    """Return depth plans by all layer criteria and width plans by all width criteria, with all heads kept."""
    cuts = []
    for ratio in RATIOS:
        for name, criterion in CRITERIA.items():
            if "layers" in criterion.scores:
                cuts += block(hyper, ratio) if name == "angular" else cut(hyper, "depth", name, {}, ratio)
            if "widths" in criterion.scores:
                cuts += cut(hyper, "width", name, {"prune.heads": "keep"}, ratio)
    return hyper.product([cuts, hyper.named("recovery", WITHOUT_RECOVERY)])


def cut(hyper, method, criterion, settings, ratio):
    """Return the runs of one criterion at one ratio."""
    return hyper.product(
        [
            hyper.fixed("prune.method", method),
            hyper.named("criterion", {criterion: {f"score.{method}": criterion, **settings}}),
            hyper.fixed("prune.ratio", ratio),
        ]
    )


def block(hyper, ratio):
    """Return the runs of the angular criterion at one ratio; scoring also needs the number of removed layers."""
    layers = BLOCKS[ratio]
    return hyper.product(
        [
            hyper.fixed("prune.method", "depth"),
            hyper.named("criterion", {"angular": {"score.depth": "angular", "score.layers_removed": layers}}),
            hyper.named("ratio", {f"{ratio}": {"prune.layers_removed": layers}}),
        ]
    )


def write_records() -> str:
    """Write the calibration topics as records whose answers fill a row of 256 tokens; return the file's path."""
    return write_shared(TEXTS / "topics_records.json", json.dumps(topic_entries(0, LETTERS["record"])))
