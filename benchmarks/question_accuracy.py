"""Accuracy on questions about images by number of bits: a model and its pruned versions in 16, 8 and 4 bits.

  python benchmarks/question_accuracy.py --work=DIR --teacher=runs/smollm2_vlm/teacher [--questions=500]
  python benchmarks/question_accuracy.py --saved docs/explanation/data/question_accuracy.jsonl.xz

The teacher answers easy-VQA, such as the SmolVLM that tools/pretrain.py trains for study 2. Pruned versions have the
widths of benchmarks/question_time.py, and are reconstructed on 128 training questions, but not trained. Each is rounded
to float16, to 8 bits (w8a16, to the nearest) and to 4 bits (w4a16, GPTQ on the same questions), reloaded, and asked the
first questions of the test split. Every row goes to DIR/rows.jsonl, and a second run computes what is missing. Needs
the [demo] extra.
"""

from __future__ import annotations

import argparse
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
from vlmprune_jax.demo.easyvqa import write_dataset
from vlmprune_jax.evaluation.statistics import interval_of_mean

CUTS = ("unpruned", *(f"{method} {percent} %" for percent in (30, 45, 15) for method in ("depth", "width")))
FORMATS = {"float16": {"dtype": "float16"}, "w8a16": {"quantize": "w8a16"}, "w4a16": {"quantize": "w4a16"}}
CALIBRATION = 128
ONE_TILE: dict[str, Any] = {"system": "", "aspect_ratio": "square"}  # as the teacher was trained


class Subject:
    """The teacher, its questions, and the folder of the results."""

    def __init__(self, work: Path, teacher: Path, count: int):
        paths = write_dataset(work / "easyvqa")
        train, self.records = (json.loads(paths[split].read_text()) for split in ("train", "test"))
        chosen = [train[place] for place in np.random.default_rng(0).permutation(len(train))[:CALIBRATION]]
        self.images: dict[str, Any] = {"images": paths["images"], **ONE_TILE}
        self.calibration = vp.batches(teacher, chosen, batch_size=32, **self.images)
        self.work, self.teacher, self.records = work, teacher, self.records[:count]

    def checkpoint(self, name: str) -> Path:
        """Return the folder of a pruned version, made once."""
        folder = self.teacher if name == "unpruned" else self.work / name.replace(" ", "_")
        if not folder.exists():
            pruned = cut(vp.load(self.teacher), name, self.calibration)
            vp.save(pruned, folder, source_dir=self.teacher, dtype="float32")
        return folder

    def measure(self, name: str, form: str) -> dict[str, Any]:
        """Return the row of a version in one format: bytes of its weights, and 1 or 0 for each question."""
        model, out, options = vp.load(self.checkpoint(name)), self.work / "rounded", dict[str, Any](FORMATS[form])
        if form == "w4a16":
            options["storage"] = vp.gptq(model, self.calibration, quantize=form)
        vp.save(model, out, source_dir=self.teacher, overwrite=True, **options)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        asked = vp.questions(self.teacher, self.records, batch_size=125, **self.images)
        answers = vp.evaluate(vp.load(out), asked, max_new_tokens=4).answers
        shutil.rmtree(out)
        return {"model": name, "format": form, "bytes": size, "right": [int(one.scores["accuracy"]) for one in answers]}


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Print accuracy, and its difference from 16 bits (mean and 95 % interval over questions), by model and format."""
    base = dict[str, list[int]]()
    print("| model | format | MB | accuracy, % | more than in 16 bits, points |\n|---|---|---|---|---|")
    for row in rows:
        right = row["right"]
        other = base.setdefault(row["model"], right)
        mean, low, high = interval_of_mean([100 * (mine - theirs) for mine, theirs in zip(right, other, strict=True)])
        change = "" if other is right else f"{mean:.1f} ({low:.1f} to {high:.1f})"
        size, accuracy = row["bytes"] / 1e6, 100 * statistics.mean(right)
        print(f"| {row['model']} | {row['format']} | {size:.0f} | {accuracy:.1f} | {change} |", flush=True)


def main() -> None:
    """Answer the missing questions, and print a row per checkpoint and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--cuts", nargs="+", default=CUTS)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--saved", type=Path, help="rows of an earlier run, in place of a measurement")
    options = parser.parse_args()
    if options.saved:
        content = options.saved.read_bytes()
        text = lzma.decompress(content) if options.saved.suffix == ".xz" else content
        return print_table(map(json.loads, text.decode().splitlines()))
    file = options.work / "rows.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    have = {(row["model"], row["format"], len(row["right"])) for row in rows}
    subject = Subject(options.work, options.teacher, options.questions)
    for name in options.cuts:
        for form in FORMATS:
            if (name, form, options.questions) not in have:
                rows.append(subject.measure(name, form))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
                print(name, form, statistics.mean(rows[-1]["right"]), flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
