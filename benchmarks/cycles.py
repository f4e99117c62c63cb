"""Accuracy of the demo's teacher after one cut, and after cycles of pruning, reconstruction and training.

  python benchmarks/cycles.py --work=DIR [--seeds 3] [--steps 120] [--questions 2000]

45 and 60 % of the decoder go at once, or in steps of 15 % of it. Every step is scored, pruned, reconstructed against
the unpruned model (by the composed plan) and trained (SFT + L2, all of the decoder); all cells train for `--steps`
steps in total, the cycles for an equal share each. The control is the unpruned model trained as one cut is. Calibration
and reconstruction have 64 and 512 records; seeds choose the records and their order. Needs the [demo] extra.
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
from vlmprune_jax.demo.easyvqa import write_dataset
from vlmprune_jax.models.params import count_params
from vlmprune_jax.plans.plan import compose

STEP = 0.15
TARGETS = (0.45, 0.6)
CRITERIA = {"depth": "block_influence", "width": "taylor"}
BATCH, TRAINED = 32, 1928  # rows of a step; records of 5 % of the data


def rows(work: Path, seed: int, first: int, count: int) -> list[Any]:
    """Return batches of `count` training records, from the `first` on in the seed's order."""
    paths = write_dataset(work / "easyvqa")
    records = json.loads(paths["train"].read_text())
    chosen = np.random.default_rng(seed).permutation(len(records))[first : first + count]
    return vp.batches(TEACHER, [records[i] for i in chosen], images=paths["images"], batch_size=BATCH, **DATA)


def train(model: vp.Model, teacher: vp.Model, plan: Any, batches: list[Any], steps: int, seed: int) -> vp.Model:
    """Return the model after SFT + L2 against the unpruned one."""
    config = vp.RecoverConfig(
        trainable="decoder",
        batch_size=BATCH,
        learning_rate=1e-3,
        seed=seed,
        remat="none",
        losses=vp.LossConfig(ce=0.5, l2=0.5, l2_layers=(-1,)),
    )
    stream = itertools.cycle([batch for batch in batches if len(batch.arrays["input_ids"]) == BATCH])
    return vp.recover(model, stream, config, teacher=teacher, plan=plan, num_steps=steps, progress=False)[0]


def cut(teacher: vp.Model, method: str, shares: list[float], work: Path, seed: int, steps: int) -> vp.Model:
    """Return the model after pruning in these shares of the unpruned decoder, with the same number of steps each."""
    total, decoder = count_params(teacher.cfg), count_params(teacher.cfg, "text")
    calibration, larger, training = (rows(work, seed, 0, 64), rows(work, seed, 0, 512), rows(work, seed, 512, TRAINED))
    model, plan, gone = teacher, None, 0.0
    for share in shares:
        gone += share
        now = count_params(model.cfg)
        ratio = (
            now - (total - gone * decoder)
        ) / now  # of the model as it is, so that `gone` of the decoder is reached
        scores = vp.score(model, calibration, criterion=CRITERIA[method])
        step = vp.make_plan(scores, model.cfg, method=method, ratio=ratio)
        model = vp.apply_plan(model, step)
        plan = step if plan is None else compose(plan, step)
        model, _ = vp.reconstruct(model, plan, teacher, larger)
        model = train(model, teacher, plan, training, steps // len(shares), seed)
    return model


def main() -> None:
    """Print a Markdown table with a row for each method and target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
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
    print("| cut | one cut, % | cycles of 15 %, % | difference by seed |\n|---|---|---|---|", flush=True)
    for method, target in itertools.product(CRITERIA, TARGETS):
        ways = ([target], [STEP] * round(target / STEP))
        found = [
            [accuracy(cut(teacher, method, shares, options.work, seed, options.steps)) for shares in ways]
            for seed in range(options.seeds)
        ]
        means = [f"{statistics.mean(one):.2f}" for one in zip(*found, strict=True)]
        differences = ", ".join(f"{cycles - once:+.2f}" for once, cycles in found)
        print(f"| {method}, {target:.0%} of the decoder | {' | '.join(means)} | {differences} |", flush=True)


if __name__ == "__main__":
    main()
