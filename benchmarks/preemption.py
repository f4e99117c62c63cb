"""Test of resuming: a run of two processes is killed at random moments, and must end with the same bytes.

    python benchmarks/preemption.py --work=DIR [--kills=20] [--seed=0]

The run is `vlmprune run` on four layers of the demo's teacher: score, prune, recover (LoRA and distillation, a
checkpoint every second step), evaluate and export, by two processes of four CPU devices each. It runs undisturbed
once. Then both processes are killed in the middle of a step, while a checkpoint is written, while a model folder is
written, while a pass over batches keeps its journal, or at any time; the same command is started again until it ends,
and every file of recovered/ and export/, all answers and the losses of all steps are compared. At the end, each process
is killed alone once: the other process must exit by itself, and the time until then is printed. Prints one line per
kill, and a last JSON line. With the same --work and another --seed the undisturbed run is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "vlmprune_jax/demo/teacher"
LAYERS = 4  # of the teacher's ten
STEPS = 8
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
ALONE_SECONDS = 300  # longest time that a process may outlive its peer
CONFIG = f"""
from vlmprune_jax.run.cli.config_files import experiment_config

def get_config():
    config = experiment_config()
    config.model.hf_dir = "{{root}}/teacher"
    config.data.train = config.data.eval = "{{root}}/records.json"
    config.data.images = "{{root}}"
    config.data.system = ""
    config.data.aspect_ratio = "square"
    config.data.max_length = 88
    config.score.samples = 16
    config.score.batch_size = 8
    config.prune.layers_removed = 1
    config.recover.steps = {STEPS}
    config.recover.batch_size = 8
    config.recover.learning_rate = 1e-3
    config.recover.lora.rank = 4
    config.recover.losses = {{{{"ce": 0.5, "l2": 0.5}}}}
    config.recover.log_every = 1
    config.recover.save_every = 2
    config.evaluate.questions = 16
    config.evaluate.batch_size = 8
    config.evaluate.max_new_tokens = 2
    config.evaluate.unrecovered = False
    config.export.dtype = "float32"
    config.mesh.data = 4
    config.mesh.fsdp = 2
    return config
"""


def make_teacher(folder: Path) -> None:
    """Write the demo's teacher with only its first `LAYERS` decoder layers."""
    shutil.copytree(TEACHER, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    layer = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.")
    tensors = load_file(folder / "model.safetensors")
    kept = {key: x for key, x in tensors.items() if not (m := layer.search(key)) or int(m[1]) < LAYERS}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def make_experiment(root: Path) -> None:
    """Write the teacher, images of coloured circles, questions and the config."""
    root.mkdir(parents=True)
    make_teacher(root / "teacher")
    colors = ("red", "green", "blue", "yellow")
    for color in colors:
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=color)
        image.save(root / f"{color}.png")
    records = [
        {
            "id": f"r{i}",
            "image": f"{colors[i % 4]}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nis there a {colors[i % 3]} circle?"},
                {"from": "gpt", "value": "yes" if i % 4 == i % 3 else "no"},
            ],
        }
        for i in range(32)
    ]
    (root / "records.json").write_text(json.dumps(records))
    (root / "config.py").write_text(CONFIG.format(root=root))


class Pair:
    """Two processes that run one command together; their output is added to WORKDIR-0.log and WORKDIR-1.log."""

    def __init__(self, root: Path, workdir: Path, *, fill_cache: bool):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Restarts should be quick: LLVM does not optimise, and process 0 finds its compiled functions (JAX keeps no
        # other's). Only the first run writes them: a process that is killed at it would leave half of one.
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}",
            "JAX_COMPILATION_CACHE_DIR": str(root / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-m", "vlmprune_jax", "run", f"--config={root / 'config.py'}"]
        command += [f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
        self.logs = [workdir.with_name(f"{workdir.name}-{number}.log") for number in (0, 1)]
        self.processes = []
        for number, log in enumerate(self.logs):
            with log.open("a") as file:
                whole = [*command, f"--process_id={number}"]
                self.processes.append(subprocess.Popen(whole, env=environment, stdout=file, stderr=subprocess.STDOUT))

    def running(self) -> bool:
        """Return True if both processes are running."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, *numbers: int) -> None:
        """Kill both processes as simultaneously as possible."""
        for number in numbers:
            self.processes[number].send_signal(signal.SIGKILL)
        for number in numbers:
            self.processes[number].wait()

    def end(self, timeout: float) -> None:
        """Wait until both processes have ended.

        Raises:
          SystemExit: an exit code is not 0, or a process exceeds the timeout; the message has the logs.
        """
        try:
            codes = [process.wait(timeout) for process in self.processes]
        except subprocess.TimeoutExpired:
            codes = [process.poll() for process in self.processes]
            self.kill(0, 1)
        if codes != [0, 0]:
            sys.exit(f"exit codes {codes}\n" + "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in self.logs))


def finished_step(workdir: Path) -> int:
    """Return the number of the last step in metrics.jsonl; 0 if there is none."""
    try:
        lines = (workdir / "training/metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):
        return 0


def being_written(workdir: Path) -> list[str]:
    """Return the names of the checkpoints, model folders and journals that a run is writing or left unfinished."""
    patterns = (
        "training/checkpoints/*.orbax-checkpoint-tmp*",
        ".*.partial*",
        "*/.*.partial*",
        "*.journal",
        "eval/*.journal",
    )
    try:
        return sorted(path.name for pattern in patterns for path in workdir.glob(pattern))
    except FileNotFoundError:  # a folder was renamed or removed between its listing and its turn
        return being_written(workdir)


Come = Callable[[int, set[str]], bool]  # (steps since the start, what was begun since then) -> whether to kill


def moment(draw: random.Random, seconds: float) -> tuple[str, Come, float]:
    """Draw a random moment to kill a run: (phase, function that detects the phase, delay in seconds after it)."""
    phase = draw.choice(("step", "step", "save", "save", "export", "journal", "any"))
    count = draw.randrange(1, 3)
    if phase == "any":
        return phase, lambda steps, begun: True, draw.uniform(0, seconds / 2)  # a warm run is faster
    if phase == "step":
        return phase, lambda steps, begun: steps >= count, draw.uniform(0, 0.5)
    mark = {"save": ".orbax-checkpoint-tmp", "export": ".partial-", "journal": ".journal"}[phase]
    return phase, lambda steps, begun: sum(mark in name for name in begun) >= count, draw.uniform(0, 0.05)


def results(workdir: Path) -> dict[str, Any]:
    """Return digests of all output files of a run, and the losses of its steps."""
    files = [path for name in ("recovered", "export", "eval") for path in sorted((workdir / name).rglob("*"))]
    found: dict[str, Any] = {
        path.relative_to(workdir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if (path.is_file() and path.parent.name != "eval") or path.name.endswith(".answers.jsonl")
    }
    lines = [json.loads(line) for line in (workdir / "training/metrics.jsonl").read_text().splitlines()]
    found["losses"] = [[line["step"], line["loss"], line["grad_norm"]] for line in lines]
    return found


def differing(workdir: Path, expected: dict[str, Any]) -> list[str]:
    """Return the differences from the undisturbed run, including leftover files of a killed process."""
    found = results(workdir)
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return names + being_written(workdir)


def killed_once(pair: Pair, workdir: Path, come: Come, delay: float) -> bool:
    """Kill both processes `delay` seconds after `come` returns True; return False if the run ended before."""
    first, left, begun = finished_step(workdir), set(being_written(workdir)), set[str]()
    until = None
    while until is None or time.monotonic() < until:
        if not pair.running():
            return False
        now = set(being_written(workdir))
        left &= now  # of an earlier kill, until it is cleared away
        begun |= now - left
        if until is None and come(finished_step(workdir) - first, begun):
            until = time.monotonic() + delay
        time.sleep(0.002)
    pair.kill(0, 1)
    return True


def kill_both(root: Path, kills: int, seed: int, seconds: float, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill and resume runs until `kills` kills are done; compare each finished run with the undisturbed one."""
    draw, done, runs, wrong = random.Random(seed), 0, 0, list[str]()
    phases: dict[str, int] = {}
    for left in root.glob(f"seed-{seed}-run-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    workdir, pending = root / f"seed-{seed}-run-0", None
    while True:
        pending = pending or (moment(draw, seconds) if done < kills else None)
        pair = Pair(root, workdir, fill_cache=False)
        if pending is not None and killed_once(pair, workdir, *pending[1:]):
            done += 1
            phases[pending[0]] = phases.get(pending[0], 0) + 1
            there = ", ".join(being_written(workdir)) or "nothing"
            step = finished_step(workdir)
            print(f"kill {done:2} ({pending[0]}): after step {step} of {STEPS}, being written: {there}", flush=True)
            pending = None
            continue
        pair.end(600)
        different = differing(workdir, expected)
        print(f"run {runs} ended: {'; '.join(different) or 'every byte as undisturbed'}", flush=True)
        wrong += different
        runs += 1
        if done == kills:
            return {"kills": done, "phases": phases, "runs": runs, "different": wrong}
        workdir = root / f"seed-{seed}-run-{runs}"


def kill_one(root: Path, number: int, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill one process during training; check that the other ends and that the run then continues."""
    workdir = root / f"alone-{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    pair = Pair(root, workdir, fill_cache=False)
    while finished_step(workdir) < STEPS // 2 and pair.running():
        time.sleep(0.002)
    pair.kill(number)
    start, other = time.monotonic(), 1 - number
    with contextlib.suppress(subprocess.TimeoutExpired):
        pair.processes[other].wait(ALONE_SECONDS)
    seconds, code = round(time.monotonic() - start, 1), pair.processes[other].poll()
    pair.kill(other)
    print(f"process {number} killed: the other ends after {seconds} s with {code}", flush=True)
    Pair(root, workdir, fill_cache=False).end(600)
    return {"killed": number, "seconds": seconds, "code": code, "different": differing(workdir, expected)}


def undisturbed(root: Path) -> tuple[dict[str, Any], float]:
    """Return results and duration (s) of the undisturbed run, which also fills the compilation cache."""
    kept = root / "undisturbed.json"
    if not kept.exists():
        shutil.rmtree(root, ignore_errors=True)
        make_experiment(root)
        start = time.monotonic()
        Pair(root, root / "undisturbed", fill_cache=True).end(600)
        found = results(root / "undisturbed")
        kept.write_text(json.dumps([found, round(time.monotonic() - start, 1)]))
    expected, seconds = json.loads(kept.read_text())
    return expected, seconds


def main() -> None:
    """Run all parts; exit with code 1 if anything differs or a process hangs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder, or one of this script")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-alone", dest="alone", action="store_false", help="do not kill one process only")
    args = parser.parse_args()
    root = args.work.absolute()
    expected, seconds = undisturbed(root)
    print(f"undisturbed: {seconds} s, {len(expected['losses'])} steps, {len(expected) - 1} files", flush=True)
    summary = kill_both(root, args.kills, args.seed, seconds, expected)
    alone = [kill_one(root, number, expected) for number in (0, 1)] if args.alone else []
    print(json.dumps({"seed": args.seed, "undisturbed_seconds": seconds, **summary, "alone": alone}))
    hung = [one for one in alone if one["code"] in (None, 0)]
    sys.exit(bool(summary["different"] or hung or [one for one in alone if one["different"]]))


if __name__ == "__main__":
    main()
