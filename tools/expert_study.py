"""Expert pruning of a small LLaVA with experts: calibrated on text, on images or on both, by criterion and combination.

python tools/expert_study.py --model=runs/experts/teacher --out=runs/experts/study.jsonl [--seeds=6] [--minutes=60]

One JSON line per pruned model: accuracy and loss on questions about images (right: every token of the answer is the
most probable one), and bits per byte of English text like the training's. Calibration takes a pass per seed and data
set; all plans follow from the sums. --repair adds models repaired by least squares, or by training routers or LoRA,
and the unpruned model trained alike; --summary prints the tables of a file of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pretrain import TEXT_LETTERS, make_encoder

import vlmprune_jax as vp
from vlmprune_jax.core.config import IGNORED
from vlmprune_jax.core.models.vlm import ENCODED, apply
from vlmprune_jax.core.prune.routing import Routing, measure_routing
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.core.sections import LoraConfig
from vlmprune_jax.io.data.batching import Batch, train_batches
from vlmprune_jax.io.data.encoding import measure
from vlmprune_jax.io.data.records import Record, read_records
from vlmprune_jax.run.demo.easyvqa import write_dataset
from vlmprune_jax.run.demo.topics import topic_records

CRITERIA = ("reap", "man", "expert_frequency")
CALIBRATIONS = ("text", "images", "both, pooled", "both, sum", "both, max", "both, floor")
SHARES = (0.25, 0.5)
REPAIRED = ("reap", "both, pooled", SHARES[-1])
LETTERS, BATCH = 80, 25
STEPS = 50  # optimizer steps of a recovery
Batches = list[Batch]
Table = dict[str, list[tuple[float, float]]]  # for one row: column -> (loss, bits per byte) of every seed
_apply = jax.jit(apply, static_argnames="cfg")  # images may be packed, unlike in vp.forward


def batches_of(records: Sequence[Record], encoder: Any) -> Batches:
    """Encode records and return them in batches of `BATCH` rows, padded to the longest record."""
    if not records[0].images:
        encoder = dataclasses.replace(encoder, image_loader=None)
    longest = int(measure(records, encoder, on_error="stop", threads=1)[:, 0].max())
    encoder = dataclasses.replace(encoder, max_length=longest)
    return [*train_batches(records, encoder, batch_size=BATCH, threads=1).batches]


def evaluate(model: vp.Model, questions: Batches, texts: Batches, text_bytes: int) -> dict[str, float]:
    """Return a model's accuracy (%) and loss (nats per answer) on questions, and its bits per byte on texts."""
    right, nats = list[bool](), {"answers": 0.0, "texts": 0.0}
    for batch in (each.arrays for each in (*questions, *texts)):
        inputs = {name: batch.get(name) for name in ENCODED}
        logits = np.asarray(_apply(model.params, model.cfg, batch["input_ids"], **inputs)[0], np.float64)[:, :-1]
        labels = batch["labels"][:, 1:]
        used = labels != IGNORED
        if batch["media"]:
            hits = (logits.argmax(axis=-1) == labels) | ~used
            right += hits.all(axis=1)[used.any(axis=1)].tolist()
        chosen = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        highest = logits.max(axis=-1)
        normal = highest + np.log(np.exp(logits - highest[..., None]).sum(axis=-1))
        nats["answers" if batch["media"] else "texts"] += float((normal - chosen)[used].sum())
    bits = nats["texts"] / math.log(2) / text_bytes
    return {"accuracy": 100 * float(np.mean(right)), "loss": nats["answers"] / len(right), "bits": bits}


def plans(model: vp.Model, routings: dict[str, Routing], share: float, seed: int) -> Iterator[tuple[str, str, Any]]:
    """Yield (criterion, calibration data, plan) for every criterion and data set, at one share of removed experts."""
    kept = round((1 - share) * model.cfg.text.layers[0].sizes["experts"])
    for criterion in CRITERIA:
        for calibration in CALIBRATIONS:
            data, _, combination = calibration.partition(", ")
            scores = vp.score(model, criterion=criterion, routing=routings[data], token_types=combination or "pooled")
            yield criterion, calibration, vp.make_plan(scores, model, method="experts", experts=kept)
    scores = vp.score(model, criterion="random", seed=seed)
    yield "random", "none", vp.make_plan(scores, model, method="experts", experts=kept)


def recover(student: vp.Model, teacher: vp.Model, batches: Batches, trainable: str) -> vp.Model:
    """Train the student by SFT and KL distillation on the batches, in a fixed random order; return it."""
    config = RecoverConfig(
        trainable=trainable,
        lora=LoraConfig(rank=16, alpha=32.0, dropout=0.0),
        learning_rate=1e-3,
        batch_size=BATCH,
        compute_dtype="float32",
        losses=LossConfig(ce=0.5, l2=0.0, kl=0.5),
    )
    rows = itertools.cycle([batches[i] for i in np.random.default_rng(0).permutation(len(batches))])
    return vp.recover(student, rows, config, teacher=teacher, num_steps=STEPS)[0]


def repairs(model: vp.Model, pruned: vp.Model, plan: Any, batches: Batches) -> Iterator[tuple[str, vp.Model]]:
    """Yield (repair, model) for least squares, least squares and LoRA, training of routers, and LoRA alone.

    For the unpruned model (`plan` is None), yield only the trained ones: the controls after the same training.
    """
    if plan is not None:
        solved = vp.reconstruct(pruned, plan, model, batches)[0]
        yield "least squares", solved
        yield "least squares, LoRA", recover(solved, model, batches, "lora")
    yield "routers", recover(pruned, model, batches, "routers")
    yield "LoRA", recover(pruned, model, batches, "lora")


def texts() -> list[Record]:
    """Return the pieces of English text that the model was trained on, truncated as in its training."""
    pieces = topic_records(0, TEXT_LETTERS)
    return [dataclasses.replace(x, turns=(x.turns[0], ("gpt", x.turns[1][1][:LETTERS]))) for x in pieces]


def study(
    model: vp.Model,
    data: Path,
    out: Path,
    *,
    seeds: int,
    records: int,
    questions: int,
    minutes: float,
    repair: bool,
) -> None:
    """Evaluate all pruned models, seed by seed, until `minutes` have passed; append result rows to `out`.

    `repair`: instead evaluate the repairs of the model pruned by `REPAIRED` (criterion, calibration, share).
    """
    files, encoder, started = write_dataset(data), make_encoder(model.cfg, Path(model.source or "")), time.monotonic()
    train, test = (read_records(files[name], files["images"]) for name in ("train", "test"))
    fitted, held_out = texts()[::2], texts()[1::2][: questions // 2]
    draw = np.random.default_rng(0)
    asked = [test[i] for i in draw.choice(len(test), questions, replace=False)]
    sets = batches_of(asked, encoder), batches_of(held_out, encoder)
    text_bytes = sum(len(record.turns[-1][1].encode()) for record in held_out)
    known = dict[Any, dict[str, float]]()
    with out.open("a") as file:

        def note(pruned: vp.Model, kept: Any, **row: Any) -> None:
            if kept not in known:
                known[kept] = evaluate(pruned, *sets, text_bytes)
            file.write(json.dumps({**row, **known[kept]}) + "\n")
            file.flush()

        note(model, None, criterion="unpruned", calibration="none", share=0.0, seed=0)
        for seed in range(seeds):
            draw = np.random.default_rng(seed)
            routings, batches = {}, Batches()
            for name, source in (("text", fitted), ("images", train)):
                chosen = [source[i] for i in draw.choice(len(source), records, replace=False)]
                of_set = batches_of(chosen, encoder)
                routings[name], batches = measure_routing(model, of_set), batches + of_set
            routings["both"] = measure_routing(model, batches)
            if repair:
                for name, trained in repairs(model, model, None, batches):
                    row = {"criterion": f"unpruned, {name}", "calibration": "both", "share": 0.0, "seed": seed}
                    note(trained, (name, seed), **row)
            for share in SHARES:
                for criterion, calibration, plan in plans(model, routings, share, seed):
                    if time.monotonic() - started > 60 * minutes:
                        return
                    row = {"criterion": criterion, "calibration": calibration, "share": share, "seed": seed}
                    pruned, kept = vp.apply_plan(model, plan), tuple(layer.kept["experts"] for layer in plan.layers)
                    if not repair:
                        note(pruned, kept, **row)
                    elif (criterion, calibration, share) == REPAIRED:
                        for name, repaired in repairs(model, pruned, plan, batches):
                            note(repaired, (name, seed, kept), **row | {"criterion": f"reap, {name}"})


def summary(out: Path) -> None:
    """Print two Markdown tables of losses and bits per byte (means over seeds): by calibration data, and by repair."""
    by_calibration, by_repair = dict[str, Table](), dict[str, Table]()
    content = out.read_bytes()
    for row in map(json.loads, (lzma.decompress(content) if out.suffix == ".xz" else content).splitlines()):
        criterion, _, repair = row["criterion"].partition(", ")
        column, values = f"{criterion}, {100 * row['share']:.0f} %", (row["loss"], row["bits"])
        if criterion == "random":
            row["calibration"], column = "random experts", column.replace("random", "reap")
        if not repair and row["share"]:
            by_calibration.setdefault(row["calibration"], {}).setdefault(column, []).append(values)
        if repair or not row["share"] or (criterion, row["calibration"], row["share"]) == REPAIRED:
            by_repair.setdefault(repair or "none", {}).setdefault(column, []).append(values)
    for title, table in (("calibration", by_calibration), ("repair", by_repair)):
        columns = dict.fromkeys(column for cells in table.values() for column in cells)
        print("|".join(["", title, *columns, ""]), "|---" * (len(columns) + 1) + "|", sep="\n")
        for name, cells in table.items():
            means = [np.mean(cells.get(column, [(np.nan, np.nan)]), axis=0) for column in columns]
            numbers = ("" if np.isnan(loss) else f"{loss:.3f}, {bits:.2f}" for loss, bits in means)
            print("|".join(["", name, *numbers, ""]))
        print()


def main() -> None:
    """Run the study unless --summary is set, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/experts/teacher"))
    parser.add_argument("--data", type=Path, default=Path("runs/easyvqa"))
    parser.add_argument("--out", type=Path, default=Path("runs/experts/study.jsonl"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        sizes = {name: getattr(args, name) for name in ("seeds", "records", "questions", "minutes", "repair")}
        study(vp.load(args.model), args.data, args.out, **sizes)
    summary(args.out)


if __name__ == "__main__":
    main()
