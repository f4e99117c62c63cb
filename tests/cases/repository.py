"""Where this checkout lies, what benchmarks have, and work for processes: nothing here imports jax."""

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
WORKERS = Path(__file__).parent
# Tiny checkpoints and reference outputs.
GOLDENS = Path(os.environ.get("VLMPRUNE_GOLDENS", ROOT / "tests/goldens"))
HANG = 600  # seconds after which a process hangs: far more than any takes, on however busy a machine


def full_size_models() -> dict[str, dict[str, Any]]:
    """Return the configs of models at their true sizes, by the names that benchmarks give them."""
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks/models.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.MODELS


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file, which is closed again."""
    with np.load(path) as file:
        return dict(file)


def start_counting():
    """What a process does: an item is a number, "sleep", "fail", or "die"."""
    done = []

    def work(item):
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "sleep":
            time.sleep(0.2)
        done.append(item)
        return "it failed" if item == "fail" else f"{os.getpid()} {len(done)}"

    return work
