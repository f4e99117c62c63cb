"""Pruning of a small Qwen3.5 by kind of layer and unit: which layers can go first, and what repair recovers.

python tools/hybrid_study.py --model=runs/hybrid/teacher --out=runs/hybrid/study.jsonl [--seeds=3] [--minutes=60]

One JSON line per model: accuracy and loss on questions about images, and bits per byte of English text, as in
tools/expert_study.py. Every single layer is removed, then layers by Block Influence, then units of one kind by Taylor
importance; each model also repaired by least squares, and some trained (SFT + L2, on other questions) beside the
unpruned model trained alike. Results that do not depend on the seed are computed once. Rows in the file are not
computed again; --summary prints the tables alone, also of a file that is compressed by xz.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import lzma
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from expert_study import BATCH, Batches, batches_of, evaluate, texts
from pretrain import make_encoder

import vlmprune_jax as vp
from vlmprune_jax.core.mixers import Attention
from vlmprune_jax.core.models.params import count_params
from vlmprune_jax.core.prune import PrunePlan, fingerprint, keep_everything
from vlmprune_jax.core.prune.width import kept_layer
from vlmprune_jax.core.recovery.config import LossConfig, RecoverConfig
from vlmprune_jax.io.data.records import read_records
from vlmprune_jax.run.demo.easyvqa import write_dataset

DEPTHS = (1, 2, 3)  # layers removed by Block Influence
UNITS = {"mlp": (0.25, 0.5), "delta_groups": (0.25, 0.5), "kv_heads": (0.5,)}  # axis -> removed shares of its units
AFTER = ("pruning", "least squares", "least squares, SFT + L2")
RECOVERED = ("unpruned", "2 layers", "50 % of mlp")
STEPS, LEARNING_RATE = 60, 1e-4  # at 3e-4, SFT + L2 lowers the accuracy of the unpruned model
TRAINED = 900  # questions, 2 % of easy-VQA's, each read once; beside them the texts of calibration's source
NAMES = {"mlp": "MLP neurons", "delta_groups": "delta-net groups", "kv_heads": "attention groups"}


def plan_of(model: vp.Model, layers: Mapping[int, Mapping[str, np.ndarray]]) -> PrunePlan:
    """Return the plan that keeps these layers, with these units along the given axes and all units of other axes."""
    text = model.cfg.text
    kept = tuple(kept_layer(i, units, text.layers[i]) for i, units in layers.items())
    plan = keep_everything(model.cfg, fingerprint(model), count_params(model.cfg))
    plan = plan.keeping("text", kept)
    return dataclasses.replace(plan, parameters_after=count_params(plan.apply_to(model.cfg)))


def cuts(model: vp.Model, batches: Batches) -> Iterator[tuple[str, str, PrunePlan]]:
    """Yield (table group, name, plan): nothing, each single layer, several layers, or units of one axis removed."""
    layers = model.cfg.text.layers
    numbers = range(len(layers))
    yield "unpruned", "unpruned", plan_of(model, {i: {} for i in numbers})
    for dropped in numbers:
        kind = "attention" if isinstance(layers[dropped].mixer, Attention) else "delta net"
        yield kind, f"layer {dropped}", plan_of(model, {i: {} for i in numbers if i != dropped})
    scores = vp.score(model, batches, criterion="block_influence")
    for count in DEPTHS:
        yield "depth", f"{count} layers", vp.make_plan(scores, model, method="depth", layers_removed=count)
    units = vp.score(model, batches, criterion="taylor").values
    for axis, shares in UNITS.items():
        for share in shares:
            kept = dict[int, dict[str, np.ndarray]]({i: {} for i in numbers})
            for key, values in units.items():
                if key.axis == axis and key.layer is not None:
                    kept[key.layer][axis] = np.sort(np.argsort(values)[round(share * len(values)) :])
            yield "width", f"{100 * share:.0f} % of {axis}", plan_of(model, kept)


def study(model: vp.Model, data: Path, out: Path, *, seeds: int, records: int, questions: int, minutes: float) -> None:
    """Evaluate the models that have no row in `out`, seed by seed, and append their rows."""
    files, encoder, started = write_dataset(data), make_encoder(model.cfg, Path(model.source or "")), time.monotonic()
    train, test = (read_records(files[name], files["images"]) for name in ("train", "test"))
    draw = np.random.default_rng(0)
    asked = batches_of([test[i] for i in draw.choice(len(test), questions, replace=False)], encoder)
    held_out = texts()[1::2][: questions // 2]
    written, text_bytes = batches_of(held_out, encoder), sum(len(x.turns[-1][1].encode()) for x in held_out)
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["name"], row["after"], row["seed"]) for row in known}
    sft = RecoverConfig(
        trainable="all",
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        compute_dtype="float32",
        losses=LossConfig(ce=0.5, l2=0.5),
    )
    with out.open("a") as file:
        for seed in range(seeds):
            jax.clear_caches()  # Linux allows a process 65,530 memory maps, and compiled programs have several each
            draw = np.random.default_rng(seed)
            read, order = texts()[::2], draw.permutation(len(train))
            sample = [read[i] for i in draw.choice(len(read), records, replace=False)]
            batches = batches_of(sample, encoder) + batches_of([train[i] for i in order[:records]], encoder)
            training = batches_of(read, encoder) + batches_of([train[i] for i in order[-TRAINED:]], encoder)
            training = [training[i] for i in draw.permutation(len(training))]
            every = [*cuts(model, batches)]
            cells = [(after, *cut) for after in AFTER for cut in every if after != AFTER[2] or cut[1] in RECOVERED]
            for after, group, name, plan in cells:
                drawn = after != AFTER[0] or group in ("depth", "width")
                if (name, after, seed) in done or (seed and not drawn) or (after == AFTER[1] and name == "unpruned"):
                    continue
                if time.monotonic() - started > 60 * minutes:
                    return
                result = vp.apply_plan(model, plan)
                if after != AFTER[0] and name != "unpruned":
                    result = vp.reconstruct(result, plan, model, batches)[0]
                if after == AFTER[2]:
                    config = dataclasses.replace(sft, seed=seed)
                    rows = itertools.cycle(training)
                    result = vp.recover(result, rows, config, teacher=model, plan=plan, num_steps=STEPS)[0]
                removed = 100 * (1 - plan.parameters_after / plan.parameters_before)
                row = {"group": group, "name": name, "after": after, "seed": seed, "removed": removed}
                file.write(json.dumps(row | evaluate(result, asked, written, text_bytes)) + "\n")
                file.flush()


def summary(out: Path) -> None:
    """Print a Markdown table of means over seeds; removals of one layer of the same kind share a row."""
    cells = defaultdict[tuple[str, str], list[dict[str, Any]]](list)
    content = out.read_bytes()
    for row in map(json.loads, (lzma.decompress(content) if out.suffix == ".xz" else content).splitlines()):
        name = f"one {row['group']} layer" if row["name"].startswith("layer ") else row["name"]
        for axis, title in NAMES.items():
            name = name.replace(f"of {axis}", f"of {title}")
        cells[name, row["after"]].append(row)
    print("| removed | % of parameters | after | models | accuracy, % | loss | bits per byte |")
    print("|---|---|---|---|---|---|---|")
    for (name, after), rows in cells.items():
        columns = [np.array([row[key] for row in rows]) for key in ("accuracy", "loss", "bits")]
        numbers = " | ".join(
            f"{values.mean():.{digits}f} ± {values.std(ddof=len(values) > 1):.{digits}f}"
            for values, digits in zip(columns, (1, 3, 2), strict=True)
        )
        print(f"| {name} | {np.mean([row['removed'] for row in rows]):.1f} | {after} | {len(rows)} | {numbers} |")


def main() -> None:
    """Run the study unless --summary is set, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/hybrid/teacher"))
    parser.add_argument("--data", type=Path, default=Path("runs/easyvqa"))
    parser.add_argument("--out", type=Path, default=Path("runs/hybrid/study.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        sizes = {name: getattr(args, name) for name in ("seeds", "records", "questions", "minutes")}
        study(vp.load(args.model), args.data, args.out, **sizes)
    summary(args.out)


if __name__ == "__main__":
    main()
