"""Accuracy of the demo's teacher after pruning at once, and after cycles of pruning, reconstruction and training.

  python benchmarks/cycles.py --work=DIR [--methods depth width] [--seeds 3] [--steps 120] [--questions 2000]
  python benchmarks/cycles.py --work=DIR --text

45 or 60 % of the decoder are removed at once, or in cycles of 15 %. Every cycle scores, prunes, reconstructs against
the unpruned model (with the composed plan) and trains the whole decoder (SFT + L2). Each result has `--steps` training
steps in total, divided equally among its cycles. `alternating` removes layers in one cycle, heads and neurons in the
next; at once, it removes half of the target each way. The control is the unpruned model after the same training.
--text compares recovery on questions without their images, by L2 alone because the answers need the image, with
recovery on images. Calibration uses 64 records and reconstruction 512; seeds choose the records and their order. Needs
the [demo] extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_answers import DATA, TEACHER, evaluate

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.plans.plan import compose
from vlmprune_jax.run.demo.easyvqa import write_dataset

STEP = 0.15
TARGETS = (0.45, 0.6)
CRITERIA = {"depth": "block_influence", "width": "taylor"}
METHODS = {"depth": ("depth",), "width": ("width",), "alternating": ("depth", "width")}
L2, SFT_L2 = vp.LossConfig(ce=0.0, l2=1.0, l2_layers=(-1,)), vp.LossConfig(ce=0.5, l2=0.5, l2_layers=(-1,))
BATCH, TRAINED = 32, 1928  # rows of a step; records of 5 % of the data


def rows(work: Path, seed: int, first: int, count: int, images: bool = True) -> list[Any]:
    """Return batches of training records `first` to `first + count` of the seed's order, with or without images."""
    paths = write_dataset(work / "easyvqa")
    records = json.loads(paths["train"].read_text())
    chosen = np.random.default_rng(seed).permutation(len(records))[first : first + count]
    found = [records[i] for i in chosen]
    if not images:
        found = json.loads(json.dumps([{**one, "image": None} for one in found]).replace(r"<image>\n", ""))
    return vp.batches(TEACHER, found, images=paths["images"], batch_size=BATCH, **DATA)


def train(
    model: vp.Model, teacher: vp.Model, plan: Any, batches: list[Any], steps: int, seed: int, losses: Any = SFT_L2
) -> vp.Model:
    """Train a pruned model with distillation from the unpruned teacher; return the trained model."""
    config = vp.RecoverConfig(
        trainable="decoder",
        batch_size=BATCH,
        learning_rate=1e-3,
        seed=seed,
        remat="none",
        losses=losses,
    )
    stream = itertools.cycle([batch for batch in batches if len(batch.arrays["input_ids"]) == BATCH])
    return vp.recover(model, stream, config, teacher=teacher, plan=plan, num_steps=steps, progress=False)[0]


def cut(teacher: vp.Model, method: str, shares: list[float], work: Path, seed: int, steps: int) -> tuple[vp.Model, Any]:
    """Prune in one cycle per share of the unpruned decoder, with `steps` training steps in all; return model, plan."""
    total, decoder = count_params(teacher.cfg), count_params(teacher.cfg, "text")
    calibration, larger, training = (rows(work, seed, 0, 64), rows(work, seed, 0, 512), rows(work, seed, 512, TRAINED))
    model, plan, gone = teacher, None, 0.0
    for share, kind in zip(shares, itertools.cycle(METHODS[method])):
        gone += share
        now = count_params(model.cfg)
        ratio = (
            now - (total - gone * decoder)
        ) / now  # relative to the present model, so that the share `gone` of the unpruned decoder is removed in all
        scores = vp.score(model, calibration, criterion=CRITERIA[kind])
        step = vp.make_plan(scores, model.cfg, method=kind, ratio=ratio)
        model = vp.apply_plan(model, step)
        plan = step if plan is None else compose(plan, step)
        model, _ = vp.reconstruct(model, plan, teacher, larger)
        if steps:
            model = train(model, teacher, plan, training, steps // len(shares), seed)
    return model, plan


def main() -> None:
    """Print a Markdown table of accuracies with a row for each pruning method and target ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["depth", "width"], choices=[*METHODS])
    parser.add_argument("--text", action="store_true", help="compare recovery on text alone with recovery on images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--questions", type=int, default=2000)
    options = parser.parse_args()
    teacher = vp.load(TEACHER)

    def accuracy(model: vp.Model) -> float:
        return 100 * evaluate(model, options.work, options.questions).accuracy

    print(f"unpruned: {accuracy(teacher):.2f} %")
    controls = [
        accuracy(train(teacher, teacher, None, rows(options.work, seed, 512, TRAINED), options.steps, seed))
        for seed in range(options.seeds)
    ]
    print(f"control, by seed: {', '.join(f'{one:.2f}' for one in controls)} %\n", flush=True)
    if options.text:
        return compare_text(options, teacher, accuracy)
    print("| cut | one cut, % | cycles of 15 %, % | difference by seed |\n|---|---|---|---|", flush=True)
    for method, target in itertools.product(options.methods, TARGETS):
        kinds = len(METHODS[method])
        ways = ([target / kinds] * kinds, [STEP] * round(target / STEP))
        found = [
            [accuracy(cut(teacher, method, shares, options.work, seed, options.steps)[0]) for shares in ways]
            for seed in range(options.seeds)
        ]
        means = [f"{statistics.mean(one):.2f}" for one in zip(*found, strict=True)]
        differences = ", ".join(f"{cycles - once:+.2f}" for once, cycles in found)
        print(f"| {method}, {target:.0%} of the decoder | {' | '.join(means)} | {differences} |", flush=True)


def compare_text(options: argparse.Namespace, teacher: vp.Model, accuracy: Any) -> None:
    """Print accuracies after recovery on text and on images: mean over seeds and each seed, one row per plan."""
    arms = {"L2, text alone": (L2, False), "L2": (L2, True), "SFT + L2": (SFT_L2, True)}
    print(f"| cut | reconstructed, % | {' | '.join(f'{name}, %' for name in arms)} |")
    print(f"|---|---|{'---|' * len(arms)}", flush=True)
    for method, target in itertools.product(options.methods, TARGETS):
        found = []
        for seed in range(options.seeds):
            model, plan = cut(teacher, method, [target], options.work, seed, 0)
            found.append([accuracy(model)])
            for losses, images in arms.values():
                batches = rows(options.work, seed, 512, TRAINED, images)
                found[-1].append(accuracy(train(model, teacher, plan, batches, options.steps, seed, losses)))
        cells = (
            f"{statistics.mean(one):.2f} ({', '.join(f'{x:.1f}' for x in one)})" for one in zip(*found, strict=True)
        )
        print(f"| {method}, {target:.0%} of the decoder | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
