"""Forward KL with a running teacher and with cached top-k logits: time, memory, cache size and recovered accuracy.

  python benchmarks/teacher_cache.py --work=DIR [--part=steps | accuracy] [--rows=4 --length=256]

steps: `vlmprune recover` of SmolLM2-135M (22 of 30 layers kept, adapters of rank 16, 0.5 CE + 0.5 KL at the positions
before labels, float32), each variant in its own process. Step seconds are the median without the first two steps, which
compile. Peak memory is the process's resident set, including the pass that computes the cache, if any.

accuracy: the demo (a LLaVA, 5 % of easy-VQA), pruned by width and recovered with 0.5 CE + 0.5 KL in each variant.

Prints one JSON line per variant. `kl`: the teacher runs in every step. `k`: number of cached tokens per position.
`again`: a second run, which finds the cache complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REMOVED = 8
STEPS = """
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{folder}"
    config.data.train = "{work}/records.json"
    config.data.template = "bunny"
    config.data.max_length = {length}
    config.score.depth = "random"
    config.prune.layers_removed = {removed}
    config.recover.batch_size = {rows}
    config.recover.steps = 5
    config.recover.lora.rank = 16
    config.recover.lora.dropout = 0.0
    config.recover.log_every = 1
    config.recover.losses = {losses}
    return config
"""
ACCURACY = """
from vlmprune_jax.run.cli.config_files import shipped_config

def get_config():
    config = shipped_config("demo")
    config.recover.epochs = 2.0
    losses = {losses}
    config.prune_variants = {{"width": {{"prune": {{"method": "width", "ratio": 0.155}}}}}}
    config.recover_variants = {{"kl": {{"recover": {{"losses": losses}}}}}} | {{
        f"k{{k}}": {{"recover": {{"losses": losses, "teacher_top_k": k, "teacher_cache": f"{work}/demo-top{{k}}"}}}}
        for k in (1, 8, 64)
    }}
    return config
"""
LOSSES = {"ce": 0.5, "kl": 0.5, "teacher_inputs": "own", "kl_positions": "labels"}


def steps(args: argparse.Namespace) -> None:
    """Measure recovery steps of SmolLM2 in each variant; print one JSON line each."""
    sys.path.insert(0, str(ROOT / "tests/cases"))
    from smollm2 import english_text, smollm2_folder

    piece = 4 * args.length
    text = english_text(5 * args.rows * piece)
    pairs = [text[at : at + piece] for at in range(0, 5 * args.rows * piece, piece)]
    talk = [[{"from": "human", "value": x[: piece // 4]}, {"from": "gpt", "value": x[piece // 4 :]}] for x in pairs]
    records = [{"id": str(number), "conversations": turns} for number, turns in enumerate(talk)]
    (args.work / "records.json").write_text(json.dumps(records))
    facts = {"folder": smollm2_folder(ROOT), "work": args.work, "losses": LOSSES, "removed": REMOVED}
    config = args.work / "steps.py"
    config.write_text(STEPS.format(**facts, rows=args.rows, length=args.length))
    start = args.work / "start"
    for stage in ("score", "prune"):
        child(stage, config, start)
    for name, k in (("kl", None), ("k", 8), ("k", 64), ("again", 64)):
        workdir, cache = args.work / f"{name}{k}", args.work / f"top{k}"
        shutil.copytree(start, workdir)
        peak, seconds = child("recover", config, workdir, *with_cache(k, cache))
        lines = [json.loads(line) for line in (workdir / "training/metrics.jsonl").read_text().splitlines()]
        report(
            {"way": name, "k": k, "step_seconds": statistics.median(line["seconds"] for line in lines[2:])},
            {"peak_rss_gib": peak, "command_seconds": seconds, "first_kl": lines[0]["kl"], "last_kl": lines[-1]["kl"]},
            {} if k is None else disk(cache),
        )


def accuracy(args: argparse.Namespace) -> None:
    """Measure the accuracy of the demo after recovery in each variant; print one JSON line each."""
    from vlmprune_jax.run.workdir.result import read_result

    config, workdir = args.work / "accuracy.py", args.work / "demo"
    config.write_text(ACCURACY.format(losses=LOSSES, work=args.work))
    child("run", config, workdir)
    for run in read_result(workdir).runs:
        folder = args.work / f"demo-top{run.recovery[1:]}"
        facts = {"name": run.name, "seconds": run.seconds, **run.evaluation.scores["questions"]}
        metrics = workdir / "width" / run.recovery / "training/metrics.jsonl"
        if metrics.exists():
            seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
            facts["step_seconds"] = statistics.median(seconds[2:])
        report(facts, disk(folder) if folder.exists() else {})


def with_cache(k: int | None, folder: Path) -> list[str]:
    return [] if k is None else [f"--config.recover.teacher_cache={folder}", f"--config.recover.teacher_top_k={k}"]


def child(command: str, config: Path, workdir: Path, *flags: str) -> tuple[float, float]:
    """Run a vlmprune command in a child process; return (peak memory in GiB, wall seconds)."""
    code = (
        "import resource, sys; from vlmprune_jax.run.cli.main import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    argv = [sys.executable, "-c", code, command, f"--config={config}", f"--workdir={workdir}", *flags]
    begin = time.perf_counter()
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return int(done.stdout.split()[-1]) / 2**20, time.perf_counter() - begin


def disk(folder: Path) -> dict[str, Any]:
    """Return the size of a teacher cache in bytes, in total and per position in the loss."""
    from vlmprune_jax.base.weight_files import read_header

    shards = sorted(folder.glob("*.safetensors"))
    entries = {key: entry for shard in shards for key, entry in read_header(shard).items()}
    positions = sum(entry.shape[0] for key, entry in entries.items() if key.endswith(".ids"))
    size = sum(shard.stat().st_size for shard in shards)
    return {"cache_bytes": size, "positions": positions, "bytes_per_position": size / positions}


def report(*facts: dict[str, Any]) -> None:
    told = {name: value for part in facts for name, value in part.items()}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in told.items()}
    print(json.dumps(rounded), flush=True)


def main() -> None:
    """Run the parts that --part selects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=("steps", "accuracy"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    for part in (steps, accuracy):
        if args.part in (None, part.__name__):
            part(args)


if __name__ == "__main__":
    main()
