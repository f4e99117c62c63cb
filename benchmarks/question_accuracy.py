"""Accuracy on questions about images by number of bits: pruned and unpruned models in 16, 8 and 4 bits.

  python benchmarks/question_accuracy.py --work=DIR "unpruned=TEACHER" "depth 30 %=RUN/reconstructed" [--questions=1000]
  python benchmarks/question_accuracy.py --saved docs/explanation/data/question_accuracy.jsonl.xz

NAME=FOLDER are checkpoints of one model that answers easy-VQA, such as those of configs/sweeps/study_vlm.py.
Each is rounded to float16, to 8 bits (w8a16, to the nearest) and to 4 bits (w4a16, to the nearest and by GPTQ with 128
training questions), reloaded, and asked the first questions of the test split. Every row goes to DIR/rows.jsonl, and a
second run computes what is missing. Needs the [demo] extra.
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

import vlmprune_jax as vp
from vlmprune_jax.demo.easyvqa import write_dataset
from vlmprune_jax.evaluation.statistics import interval_of_mean

FORMATS = {"float16": {"dtype": "float16"}, "w8a16": {"quantize": "w8a16"}, "w4a16": {"quantize": "w4a16"}}
GPTQ = "w4a16, GPTQ"
CALIBRATION = 128
ONE_TILE: dict[str, Any] = {"system": "", "aspect_ratio": "square"}  # as the models were trained


def measure(work: Path, name: str, folder: Path, form: str, count: int) -> dict[str, Any]:
    """Return the row of a checkpoint in one format: bytes of its weights, and 1 or 0 for each question."""
    paths, out, model = write_dataset(work / "easyvqa"), work / "rounded", vp.load(folder)
    records, images = json.loads(paths["test"].read_text())[:count], {"images": paths["images"], **ONE_TILE}
    options = dict[str, Any](FORMATS.get(form, FORMATS["w4a16"]))
    if form == GPTQ:
        train = json.loads(paths["train"].read_text())
        chosen = [train[place] for place in np.random.default_rng(0).permutation(len(train))[:CALIBRATION]]
        calibration = vp.batches(folder, chosen, batch_size=32, **images)
        options["storage"] = vp.gptq(model, calibration, quantize="w4a16")
    vp.save(model, out, source_dir=folder, overwrite=True, **options)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    asked = vp.questions(folder, records, batch_size=125, **images)
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
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
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
    for name, _, folder in (text.partition("=") for text in options.models):
        for form in (*FORMATS, GPTQ):
            if (name, form, options.questions) not in have:
                rows.append(measure(options.work, name, Path(folder), form, options.questions))
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
