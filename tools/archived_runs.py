"""Archived sweeps as answers to single questions, for tools/check_study.py."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PLAIN, SOLVED, BEST = "without recovery", "reconstructed", "SFT + L2"
RECOVERIES = {
    "none": PLAIN, "reconstructed": PLAIN, "projector": "projector", "sft": "SFT", "sft_kl": "SFT + KL", "sft_l2": BEST,
}  # fmt: skip


class Cell(NamedTuple):
    """Models of one cell of the retention table: requested share of the decoder and share of the data in percent."""

    method: str
    level: int
    recovery: str
    data: int


@dataclass(frozen=True)
class Run:
    """One evaluated model: questions that it and the unpruned model answer correctly, bool[questions].

    `removed`: removed share of the decoder (%). `of_control`: retained accuracy relative to the control (%).
    """

    removed: float
    correct: np.ndarray
    unpruned: np.ndarray
    of_control: float | None
    digest: str

    @property
    def parts(self) -> np.ndarray:
        """Return each question's part of the retained percentage, float[questions] with it as mean."""
        return 100 * self.correct / self.unpruned.mean()


Runs = dict[Cell, dict[int, Run]]  # cell -> seed -> run


def read_archive(archive: Path) -> Runs:
    """Return the runs of an archived sweep that were pruned by Block Influence or Taylor."""
    with tarfile.open(archive) as tar:
        files = ((member.name.partition("/")[2], tar.extractfile(member)) for member in tar)
        texts = {name: json.load(file) for name, file in files if file is not None}
    runs: Runs = {}
    for entry in texts["sweep.json"]["models"]:
        model = entry.get("found")
        if model is None or not model["criterion"].startswith(("block_influence", "taylor")):
            continue
        recovery = RECOVERIES[model["recovery"]]
        if model["reconstruct"] != "none":
            recovery = SOLVED if recovery == PLAIN else f"{SOLVED} + {recovery}"
        cell = Cell(model["method"], int(entry["labels"]["decoder"]), recovery, round(100 * model["data_fraction"]))
        folder, _, name = model["path"].rpartition("/")
        files_of_both = (f"{folder}/eval/{stem}.json" for stem in (name, "teacher"))
        correct, unpruned = (np.array(texts[file]["scores"]["accuracy"], bool) for file in files_of_both)
        of_control = (model["evaluation"].get("control") or {}).get("mean_of_ratios")
        run = Run(100 * model["decoder_ratio"], correct, unpruned, of_control, model["digest"])
        runs.setdefault(cell, {})[entry["seed"]] = run
    return runs
