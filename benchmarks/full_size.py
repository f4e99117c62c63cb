"""Time and memory of loading, pruning and exporting full-size checkpoints, compared with `cp` and mergekit.

    python benchmarks/full_size.py --model=llama --work=/big/disk --mergekit=/path/to/venv/bin/mergekit-yaml
    python benchmarks/full_size.py --folder=DIR/llava-1.5-7b-hf --work=/big/disk

Without --folder, the script creates a checkpoint with the true shapes of --model (`models.py`; llama 13.5 GB, llava 14,
qwen3vl_moe 62; --layers=8 uses fewer decoder layers) and random finite bfloat16 weights, in shards of 5 GB. Every step
has its own process and starts with the source out of the page cache. Its wall time includes the start of Python, and
`cp` ends when all data are on the disk. `cat` reads the weights and discards them. `read` reads them into memory, as
every loader must. Prints one JSON line per step, and a last line with the ratios. Needs free disk space of three times
the checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from models import MODELS, shrink

STEPS = ("cp_input", "cat", "read", "load", "inspect", "depth", "cp_output", "width", "mergekit")
DEVICES = 8
DROPPED = 5  # removed layers of 32: middle layers with one kept between them, so that three runs of layers remain


def make_checkpoint(config: dict[str, Any], folder: Path, spread: float | None = None) -> None:
    """Write a checkpoint with random bfloat16 weights, cut from the same 64 MiB of noise at random offsets.

    Their bits are random (below 2), or values are normal with a standard deviation of `spread`.
    """
    import ml_dtypes

    from vlmprune_jax.io.checkpoints.disk.tensors import Tensor, write_weights
    from vlmprune_jax.io.checkpoints.layout import make_slots
    from vlmprune_jax.io.checkpoints.read import read_config
    from vlmprune_jax.io.exports.folder import MAX_SHARD_BYTES

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    family, cfg = read_config(folder)
    if cfg.vision is not None and cfg.family == "llava":  # its files hold the blocks above the feature layer as well
        cfg = cfg.with_layers(cfg.vision.layers[:1] * cfg.vision.n_layers_total, "vision")
    draw = np.random.default_rng(0)
    if spread is None:
        noise = draw.integers(0, 2**16, 2**25, np.uint16) & np.uint16(0xBFFF)
    else:
        noise = draw.normal(0, spread, 2**25).astype(ml_dtypes.bfloat16).view(np.uint16)
    shapes = {slot.key: slot.hf_shape for slot in make_slots(cfg, family)}

    def fill(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(noise[int(draw.integers(0, 2**20)) :], int(np.prod(shape))).view(np.uint8)

    tensors = [
        Tensor(key, "BF16", shape, 2 * int(np.prod(shape)), lambda shape=shape: iter([fill(shape)]))
        for key, shape in shapes.items()
    ]
    write_weights(tensors, folder, MAX_SHARD_BYTES)


def make_plans(folder: Path, work: Path) -> None:
    """Write a depth plan and a width plan for a checkpoint to `depth.json` and `width.json` in `work`."""
    from vlmprune_jax.core.models.params import count_params
    from vlmprune_jax.core.prune import KeptLayer, fingerprint, keep_everything
    from vlmprune_jax.core.prune.width import kept_layer
    from vlmprune_jax.io.checkpoints.read import open_model

    model = open_model(folder)
    sizes, draw = [layer.sizes for layer in model.cfg.text.layers], np.random.default_rng(1)
    middle = len(sizes) // 2
    free = [i for i in range(middle, len(sizes)) if i not in model.cfg.text.producers]
    gone = {middle - 3, *free[: DROPPED - 1]}
    depth = [KeptLayer.whole(i, layer) for i, layer in enumerate(model.cfg.text.layers) if i not in gone]
    width = []
    for i, axes in enumerate(sizes):
        root = model.cfg.text.layers[i].channel.root  # neurons or experts
        shares, heads, units = bool(model.cfg.text.producers), axes["kv_heads"], axes[root]
        order = np.arange(heads) if shares else draw.permutation(heads)
        kept = {
            "kv_heads": np.sort(order[: max(1, heads * 3 // 4)]),
            root: np.sort(draw.permutation(units)[: units * 3 // 4]),
        }
        width.append(kept_layer(i, kept, model.cfg.text.layers[i]))
    mark, before = fingerprint(model), count_params(model.cfg)
    for name, layers in (("depth", depth), ("width", width)):
        plan = keep_everything(model.cfg, mark, before, ["text"]).keeping("text", layers)
        after = count_params(plan.apply_to(model.cfg))
        plan = dataclasses.replace(plan, method=name, criterion="benchmark", parameters_after=after)
        plan.to_json(work / f"{name}.json")


def child(args: argparse.Namespace) -> None:
    """Run one vlmprune step in a child process; the parent stays small, because its memory counts in a child's peak."""
    step, folder, work = args.child, args.folder, args.work
    if step == "make":
        config = MODELS[args.model]
        if args.layers:
            config = {**config, "text_config": {**config["text_config"], "num_hidden_layers": args.layers}}
        make_checkpoint(shrink(config) if args.tiny else config, folder)
        return
    if step == "plan":
        make_plans(folder, work)
        return
    if step == "read":
        held = [np.fromfile(path, np.uint8) for path in sorted(folder.glob("*.safetensors"))]
        assert sum(array.nbytes for array in held)
        return
    import vlmprune_jax as vp

    if step == "load":
        import jax

        from vlmprune_jax.core.mesh.mesh import make_mesh

        model = vp.load(folder, dtype="bfloat16", mesh=make_mesh(1, DEVICES, 1))
        jax.block_until_ready(model.params)
    elif step == "inspect":
        from vlmprune_jax.run.cli.main import main

        sys.exit(main(["inspect", str(folder)]))
    else:
        vp.prune_folder(folder, vp.PrunePlan.from_json(work / f"{step}.json"), work / step)


def own(args: argparse.Namespace, step: str, folder: Path, work: Path) -> list[str]:
    """Return the command line that runs one vlmprune step in a child process."""
    options = [
        f"--model={args.model}",
        f"--layers={args.layers}",
        f"--folder={folder}",
        f"--work={work}",
        *["--tiny"] * args.tiny,
    ]
    return [sys.executable, __file__, *options, f"--child={step}"]


def commands(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, list[str]]:
    """Return {step: command line} of all steps that are possible for this checkpoint."""
    copy = 'cp -r "$0" "$1" && sync -f "$1" && for f in "$1"/*; do sync "$f"; done'
    found = {
        "cp_input": ["sh", "-c", copy, str(folder), str(work / "cp_input")],
        "cat": ["sh", "-c", 'cat "$0"/*.safetensors > /dev/null', str(folder)],
        "cp_output": ["sh", "-c", copy, str(work / "depth"), str(work / "cp_output")],
    }
    found |= {step: own(args, step, folder, work) for step in ("read", "load", "inspect", "depth", "width")}
    vision = "vision_config" in json.loads((folder / "config.json").read_text())
    if args.mergekit and not vision:  # mergekit slices decoders only
        import vlmprune_jax as vp

        kept = vp.PrunePlan.from_json(work / "depth.json").kept_layers
        starts = [i for i in range(len(kept)) if i == 0 or kept[i] != kept[i - 1] + 1]
        ends = [*starts[1:], len(kept)]
        slices = [
            {"sources": [{"model": str(folder), "layer_range": [kept[a], kept[b - 1] + 1]}]}
            for a, b in zip(starts, ends, strict=True)
        ]
        recipe = work / "mergekit.yml"  # JSON is YAML
        recipe.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
        options = ["--lazy-unpickle", "--no-copy-tokenizer", "--out-shard-size=5B"]
        found["mergekit"] = [args.mergekit, str(recipe), str(work / "mergekit"), *options]
    return {step: found[step] for step in STEPS if step in found}


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command with `folder` out of the page cache; return wall and CPU seconds, and peak memory (GiB)."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": processor, "peak_rss_gib": usage.ru_maxrss / 2**20}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the ratios of pruning to copying, loading to reading, and pruning to mergekit, of the measured steps."""
    seconds, result = {step: one["seconds"] for step, one in found.items()}, {}
    if {"depth", "cp_input", "cp_output"} <= set(seconds):
        copies = seconds["cp_input"] + seconds["cp_output"]
        result["depth_to_cp_of_input_and_output"] = seconds["depth"] / copies
    for base in ("read", "cat"):
        if {"load", base} <= set(seconds):
            result[f"load_to_{base}"] = seconds["load"] / seconds[base]
    if {"depth", "mergekit"} <= set(seconds):
        result["depth_to_mergekit"] = seconds["depth"] / seconds["mergekit"]
        result["depth_rss_to_mergekit"] = found["depth"]["peak_rss_gib"] / found["mergekit"]["peak_rss_gib"]
    return {name: round(value, 3) for name, value in result.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--folder", type=Path, help="an existing folder instead of a random one")
    parser.add_argument("--work", type=Path, required=True, help="folder for outputs, which are removed at the end")
    parser.add_argument("--mergekit", help="path of mergekit-yaml (decoders only); without it, no such step")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the benchmark itself")
    parser.add_argument("--keep", action="store_true", help="leave the random checkpoint in --work")
    parser.add_argument("--child", choices=(*STEPS, "make", "plan"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Create checkpoint and plans, then measure every step in --steps."""
    args = arguments()
    if args.child:
        child(args)
        return
    name = args.folder.name if args.folder else f"{args.model}{'_tiny' if args.tiny else ''}"
    folder = (args.folder or args.work / name).resolve()
    work = args.work.resolve() / f"{name}_results"
    shutil.rmtree(work, ignore_errors=True)  # results of a failed run
    work.mkdir(parents=True)
    try:
        if not folder.exists():
            subprocess.run(own(args, "make", folder, work), check=True)
        subprocess.run(own(args, "plan", folder, work), check=True)
        run(args, name, folder, work)
    finally:
        shutil.rmtree(work)
    if not args.folder and not args.keep:
        shutil.rmtree(folder)


def run(args: argparse.Namespace, name: str, folder: Path, work: Path) -> None:
    """Measure all steps in order; print one JSON line per step, and one with the ratios."""
    found = {}
    for step, command in commands(args, folder, work).items():
        if step not in args.steps.split(","):
            continue
        found[step] = measure(command, folder)
        line: dict[str, Any] = {"model": name, "step": step, "input_bytes": size_of(folder)}
        line |= {key: round(value, 3) for key, value in found[step].items()}
        if (work / step).is_dir():
            line["output_bytes"] = size_of(work / step)
            if step != "depth":  # its result is copied next
                shutil.rmtree(work / step)
        print(json.dumps(line), flush=True)
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(json.dumps({"model": name, "step": "ratios", **ratios(found), "load_average": load}), flush=True)


if __name__ == "__main__":
    main()
