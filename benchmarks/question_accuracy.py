"""Accuracy on questions about images by number of bits: a model and its pruned versions in 16, 8 and 4 bits.

  python benchmarks/question_accuracy.py --work=DIR [--teacher=runs/smollm2_vlm/teacher] [--seeds 1 2 3]
  python benchmarks/question_accuracy.py --saved docs/explanation/data/question_accuracy.jsonl.xz

The teacher answers easy-VQA: the demo's LLaVA, or another model of tools/pretrain.py. Pruned versions are chosen by
Block Influence (depth) or Taylor (width), and reconstructed on 128 training questions (a seed chooses them), but not
trained. Each is rounded to float16, to 8 bits (w8a16, to the nearest) and to 4 bits (w4a16, GPTQ on the same
questions), reloaded, and asked the first questions of the test split. Every row goes to DIR/rows.jsonl, and a second
run computes what is missing. Needs the [demo] extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from question_time import cut

import vlmprune_jax as vp
from vlmprune_jax.run.cli.config_files import shipped_config
from vlmprune_jax.run.demo.easyvqa import write_dataset
from vlmprune_jax.run.evaluation.statistics import interval_of_mean

CUTS = ("unpruned", *(f"{method} {percent} %" for percent in (15, 30, 45, 60) for method in ("depth", "width")))
FORMATS = {"float16": {"dtype": "float16"}, "w8a16": {"quantize": "w8a16"}, "w4a16": {"quantize": "w4a16"}}
CALIBRATION = 128
DEMO = Path(shipped_config("demo").model.hf_dir)
ONE_TILE: dict[str, Any] = {"system": "", "aspect_ratio": "square"}  # as the teacher was trained


class Subject:
    """The teacher, calibration and test questions, and the folder of the pruned versions."""

    def __init__(self, work: Path, teacher: Path, seed: int, count: int):
        paths = write_dataset(work / "easyvqa")
        train, self.records = (json.loads(paths[split].read_text()) for split in ("train", "test"))
        chosen = [train[place] for place in np.random.default_rng(seed).permutation(len(train))[:CALIBRATION]]
        self.images: dict[str, Any] = {"images": paths["images"], **ONE_TILE}
        self.calibration = vp.batches(teacher, chosen, batch_size=32, **self.images)
        self.work, self.teacher, self.seed, self.records = work, teacher, seed, self.records[:count]

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a pruned version, made once."""
        folder = self.teacher if name == "unpruned" else self.work / f"{name.replace(' ', '_')}-{self.seed}"
        if not folder.exists():
            pruned = cut(vp.load(self.teacher), name, self.calibration)
            vp.save(pruned, folder, source_dir=self.teacher, dtype="float32")
        return folder

    def measure(self, name: str, form: str) -> dict[str, Any]:
        """Return the row of a version in one format: bytes of its weights, and the share of right answers."""
        model, out, options = vp.load(self.checkpoint(name)), self.work / "rounded", dict[str, Any](FORMATS[form])
        if form == "w4a16":
            options["storage"] = vp.gptq(model, self.calibration, quantize=form)
        vp.save(model, out, source_dir=self.teacher, overwrite=True, **options)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        asked = vp.questions(self.teacher, self.records, batch_size=125, **self.images)
        accuracy = vp.evaluate(vp.load(out), asked, max_new_tokens=4).values["accuracy"]
        shutil.rmtree(out)
        row = {"model": name, "seed": self.seed, "format": form, "bytes": size}
        return row | {"questions": len(self.records), "accuracy": accuracy}


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Print accuracy, and its difference from 16 bits, by model and format: means and 95 % intervals over seeds."""
    by_seed = dict[tuple[str, str], dict[int, dict[str, Any]]]()
    for row in rows:
        by_seed.setdefault((row["model"], row["format"]), {})[row["seed"]] = row
    print("| model | format | MB | accuracy, % | more than in 16 bits, points |\n|---|---|---|---|---|")
    for (name, form), of_seed in by_seed.items():
        base = by_seed[name, "float16"]
        changes = [100 * (row["accuracy"] - base[seed]["accuracy"]) for seed, row in of_seed.items() if seed in base]
        cells = [statistics.mean(row["bytes"] for row in of_seed.values()) / 1e6]
        cells.append(statistics.mean(100 * row["accuracy"] for row in of_seed.values()))
        mean, low, high = interval_of_mean(changes) if len(changes) > 1 else (changes[0],) * 3
        change = "" if form == "float16" else f"{mean:.2f} ({low:.2f} to {high:.2f})"
        print(f"| {name} | {form} | {cells[0]:.2f} | {cells[1]:.2f} | {change} |", flush=True)


def main() -> None:
    """Answer the missing questions, and print a row per checkpoint and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--teacher", type=Path, default=DEMO)
    parser.add_argument("--cuts", nargs="+", default=CUTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--saved", type=Path, help="compressed result rows to print, without a measurement")
    options = parser.parse_args()
    if options.saved:
        return print_table(map(json.loads, lzma.open(options.saved, "rt")))
    file = options.work / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    have = {(row["model"], row["seed"], row["format"]) for row in rows}
    for seed in options.seeds:
        subject = Subject(options.work, options.teacher, seed, options.questions)
        for name, form in itertools.product(options.cuts, FORMATS):
            if (name, seed, form) not in have:
                rows.append(subject.measure(name, form))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
