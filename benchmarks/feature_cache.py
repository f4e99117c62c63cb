"""Time and memory of the demo's recovery step with the vision tower, and with cached features; losses must be equal.

  python benchmarks/feature_cache.py --work=DIR

The demo's teacher without three layers trains on easy-VQA with cross-entropy and hidden-state L2. Each run has its own
process; the first cached run computes the features. Prints one JSON line per side and their ratio. A last line has the
ratio of model FLOPs per step for the full-size families of benchmarks/plan.py (15 % pruned by depth).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = ("tower", "cached")
CONFIG = """
from vlmprune_jax.run.cli.config_files import shipped_config

def get_config(run):
    config = shipped_config("demo")
    config.prune_variants = {{"depth": {{"prune": {{"method": "depth", "ratio": 0.155}}}}}}
    losses = {{"ce": 0.5, "l2": 0.5, "l2_layers": (-1,), "teacher_inputs": "own"}}
    variant = {{"recover": {{"losses": losses, "steps": {steps}}}}}
    if run.startswith("cached"):
        variant["data"] = {{"feature_cache": "{cache}"}}
    config.recover_variants = {{run: variant}}
    return config
"""


def main() -> None:
    """Train with and without cached features in turns, check that losses are equal, and print time and memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True)
    (work / "config.py").write_text(CONFIG.format(steps=options.steps, cache=work / "cache"))
    for command in ("score", "prune"):
        _run(work, command, "tower0")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for n in range(options.rounds):
        for side in SIDES:
            runs[side].append(_recovery(work, f"{side}{n}"))
    losses = [run.pop("losses") for side in SIDES for run in runs[side]]
    assert all(found == losses[0] for found in losses), "the losses differ"
    told = {}
    for side in SIDES:
        values = {name: statistics.median(run[name] for run in runs[side]) for name in runs[side][0]}
        told[side] = {name: round(value, 4) for name, value in values.items()}
        print(json.dumps({"side": side, **told[side]}))
    features = sum(path.stat().st_size for path in (work / "cache").glob("*.safetensors"))
    ratio = {name: round(told["cached"][name] / told["tower"][name], 3) for name in ("step_seconds", "peak_rss_gib")}
    print(json.dumps({"side": "cached/tower", **ratio, "cache_mib": round(features / 2**20, 2)}))
    flops = {family: _flops_ratio(family) for family in ("llava", "bunny", "internvl")}
    print(json.dumps({"side": "cached/tower, model FLOPs", **flops}))


def _flops_ratio(family: str) -> float:
    from models import MODELS
    from plan import DATA, SETTINGS

    from vlmprune_jax.base.settings import override
    from vlmprune_jax.core.models.params import param_shapes
    from vlmprune_jax.core.recovery.flops import step_flops
    from vlmprune_jax.core.recovery.trainable import assign_groups, with_lora
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.run.experiment.arguments import recover_config
    from vlmprune_jax.run.experiment.spec import Experiment
    from vlmprune_jax.run.planning.case import predict_plan

    experiment = override(override(Experiment(), SETTINGS), {"prune": {"method": "depth", "ratio": 0.15}})
    if family == "internvl":  # as its recipe: the teacher looks at the images as well
        experiment = override(experiment, {"recover": {"losses": {"teacher_inputs": "own"}}})
    config = recover_config(experiment.recover)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[family]))
        _, teacher = read_config(Path(folder))
    totals = []
    for tower in (False, True):
        taught = dataclasses.replace(teacher, tower=tower)
        student = with_lora(dataclasses.replace(predict_plan(experiment, teacher).apply_to(teacher), tower=tower),
                            config.lora)  # fmt: skip
        trained = assign_groups(list(param_shapes(student)), config.trainable)
        length, images = (4096, 13) if family in DATA else (1024, 1)
        options = {"rows": config.batch_size, "length": length, "images": config.batch_size * images}
        totals.append(step_flops(student, taught, config.losses, trained, **options).total)
    return round(totals[0] / totals[1], 3)


def _recovery(work: Path, run: str) -> dict[str, Any]:
    """Run one recovery; return median step times (without the first five steps, which compile), memory and losses."""
    wall, peak = _run(work, "recover", run)
    lines = (work / "w/depth" / run / "training/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = {name: statistics.median(step[name] for step in steps[5:]) for name in ("seconds", "data_seconds")}
    return {
        "step_seconds": seconds["seconds"],
        "data_seconds": seconds["data_seconds"],
        "peak_rss_gib": peak,
        "wall_seconds": round(wall, 1),
        "losses": [step["loss"] for step in steps],
    }


def _run(work: Path, command: str, run: str) -> tuple[float, float]:
    """Run one vlmprune command; return its wall time (seconds) and peak memory (GiB)."""
    flags = [f"--config={work / 'config.py'}:{run}", f"--workdir={work / 'w'}"]
    begin = time.perf_counter()
    with (work / f"{command}-{run}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmprune_jax", command, *flags], stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (work / f"{command}-{run}.log").read_text()[-2000:]
    return time.perf_counter() - begin, usage.ru_maxrss / 2**20


if __name__ == "__main__":
    main()
