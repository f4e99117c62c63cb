"""Loss of temporal and static accuracy by pruning, for a small Qwen3-VL on moving shapes.

python tools/video_study.py --model=runs/qwen_video/teacher --data=runs/moving-shapes --out=runs/video.jsonl

One JSON line per model, seed and number of frames, in order of importance, until --minutes are over; a second call
continues. A row has {kind: [right answers, questions]} of the test set and of its clips with frames in random order.
The seed draws the clips for calibration and training. --summary prints the table alone, also of a file that is
compressed by xz.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from moving_shapes import TEMPORAL

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.params import flatten
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.io.data.batching import Batch

FRAMES, BATCH, CALIBRATION, TRAINING = (8, 4), 32, 96, 480
METHODS = {"depth": "block_influence", "width": "activation"}
RATIOS, RECOVERIES = (0.45, 0.3, 0.15), ("none", "reconstructed", "SFT + L2")
STATIC_FLOOR = 25.0  # accuracy of guessing (%) in questions about one of four colours
LEARNT = 10.0  # points of accuracy that shuffling must cost for a question type to count as learnt
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # quantiles of Student's t for this number of seeds


def cells(seeds: int, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Yield {method, ratio, recovery, seed} for the unpruned model, every pruned model, and the controls."""
    yield {"method": "unpruned", "ratio": 0.0, "recovery": "none", "seed": 0}
    for recovery in RECOVERIES:
        for ratio, method, seed in itertools.product(ratios, METHODS, range(seeds)):
            if recovery == "SFT + L2" and (ratio, method) == (ratios[0], "depth"):
                yield {"method": "unpruned", "ratio": 0.0, "recovery": recovery, "seed": seed}
            yield {"method": method, "ratio": ratio, "recovery": recovery, "seed": seed}


def make_model(model: vp.Model, batches: Sequence[Batch], cell: dict[str, Any], steps: int) -> vp.Model:
    """Prune a model, reconstruct it (for both repairs) and train it (for SFT + L2), as the cell says; return it."""
    student, plan, calibration = model, None, batches[: CALIBRATION // BATCH]
    if cell["method"] != "unpruned":
        scores = vp.score(model, calibration, criterion=METHODS[cell["method"]])
        leaves = flatten(model.params)
        decoder = sum(leaves[path].size for path in leaves if path.startswith("text/layers/"))
        ratio = cell["ratio"] * decoder / vp.count_params(model)  # of all parameters
        plan = vp.make_plan(scores, model, method=cell["method"], ratio=ratio)
        student = vp.apply_plan(model, plan)
        if cell["recovery"] != "none":
            student = vp.reconstruct(student, plan, model, calibration)[0]
    if cell["recovery"] == "SFT + L2":
        losses = LossConfig(ce=1.0, l2=1.0)
        config = RecoverConfig(
            trainable="all", learning_rate=3e-4, batch_size=BATCH, compute_dtype="float32", remat="none", losses=losses
        )
        rows = itertools.cycle(batches)
        student = vp.recover(student, rows, config, teacher=model, plan=plan, num_steps=steps, progress=False)[0]
    return student


def correct(model: vp.Model, batches: Sequence[Batch]) -> list[bool]:
    """Return for each row whether every token of its answer is the most probable one."""
    rows = list[bool]()
    for arrays in (batch.arrays for batch in batches):
        inputs = {
            name: values for name, values in arrays.items() if name not in ("input_ids", "labels", "position_ids")
        }
        logits = np.asarray(vp.forward(model, arrays["input_ids"], **inputs)[0])[:, :-1]
        labels = arrays["labels"][:, 1:]
        used = labels != IGNORED
        rows += ((logits.argmax(axis=-1) == labels) | ~used).all(axis=1)[used.any(axis=1)].tolist()
    return rows


def study(
    folder: Path, data: Path, out: Path, *, seeds: int, ratios: Sequence[float], steps: int, minutes: float
) -> None:
    """Evaluate all models that have no row in `out`, until `minutes` have passed; append a row per number of frames."""
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    model, started, last = vp.load(folder), time.monotonic(), None
    tests = {name: json.loads((data / f"{name}.json").read_text()) for name in ("test", "test_shuffled")}
    tests["test_shuffled"] = [record for record in tests["test_shuffled"] if record["question_type"] in TEMPORAL]
    kinds = {name: np.array([record["question_type"] for record in records]) for name, records in tests.items()}
    sets = {
        (name, frames): vp.batches(folder, records, images=data, batch_size=100, video_frames=frames)
        for (name, records), frames in itertools.product(tests.items(), FRAMES)
    }
    train = json.loads((data / "train.json").read_text())
    for cell in cells(seeds, ratios):
        if any(cell.items() <= row.items() for row in known):
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        if cell["seed"] != last:
            chosen = np.random.default_rng(cell["seed"]).choice(len(train), TRAINING, replace=False)
            batches = vp.batches(folder, [train[at] for at in chosen], images=data, batch_size=BATCH)
            last = cell["seed"]
        student = make_model(model, batches, cell, steps)
        with out.open("a") as file:
            for frames in FRAMES:
                row = {**cell, "frames": frames}
                for name in tests:
                    hits = np.array(correct(student, sets[name, frames]))
                    groups = {kind: hits[kinds[name] == kind] for kind in (*TEMPORAL, "static")}
                    row[name] = {kind: [int(group.sum()), len(group)] for kind, group in groups.items() if len(group)}
                file.write(json.dumps(row) + "\n")


def summary(out: Path) -> None:
    """Print means over seeds, with 95 % intervals, as a Markdown table.

    Temporal accuracy covers the question types that the unpruned model has learnt: its accuracy falls by at least
    `LEARNT` points on shuffled frames. "Kept" is the retained share of the unpruned model's lead over a floor, which is
    its accuracy on shuffled frames, or chance (static questions about colours).
    """
    content = out.read_bytes()
    lines = (lzma.decompress(content) if out.suffix == ".xz" else content).splitlines()
    rows = [json.loads(line) for line in lines]
    teachers = {row["frames"]: row for row in rows if row["method"] == "unpruned" and row["recovery"] == "none"}
    whole = teachers[FRAMES[0]]
    learnt = [
        kind
        for kind in TEMPORAL
        if _accuracy(whole, "test", [kind]) - _accuracy(whole, "test_shuffled", [kind]) >= LEARNT
    ]
    columns = {"temporal": ("test", learnt), "static": ("test", ["static"]), "shuffled": ("test_shuffled", learnt)}
    groups = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for row in rows:
        groups[-row["frames"], row["ratio"], row["method"], row["recovery"]].append(row)
    print(f"Questions about time: {', '.join(learnt)}.\n")
    print("| frames | model | recovery | seeds | temporal, % | static, % | shuffled, % | temporal kept | static kept |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (frames, ratio, method, recovery), group in sorted(groups.items()):
        values = {name: [_accuracy(row, *column) for row in group] for name, column in columns.items()}
        floors = {"temporal": _accuracy(teachers[-frames], *columns["shuffled"]), "static": STATIC_FLOOR}
        cells = [_interval(accuracies) for accuracies in values.values()]
        for name, floor in floors.items():
            lead = _accuracy(teachers[-frames], *columns[name]) - floor
            cells.append(f"{(np.mean(values[name]) - floor) / lead:.2f}" if lead > 0 else "")
        model = f"{method} {100 * ratio:.0f} %" if ratio else method
        print(f"| {-frames} | {model} | {recovery} | {len(group)} | {' | '.join(cells)} |")


def _accuracy(row: dict[str, Any], name: str, kinds: Sequence[str]) -> float:
    """Return the accuracy (%) in a result row on the questions of these types in the test set `name`."""
    right, total = np.sum([row[name][kind] for kind in kinds], axis=0)
    return float(100 * right / total)


def _interval(values: Sequence[float]) -> str:
    half = T_95.get(len(values), 0.0) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{np.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def main() -> None:
    """Run the study unless --summary is set, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/qwen_video/teacher"))
    parser.add_argument("--data", type=Path, default=Path("runs/moving-shapes"))
    parser.add_argument("--out", type=Path, default=Path("runs/video.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        sizes = {name: getattr(args, name) for name in ("seeds", "ratios", "steps", "minutes")}
        study(args.model, args.data, args.out, **sizes)
    summary(args.out)


if __name__ == "__main__":
    main()
