"""Names of the hardware that computes, recorded with every time and speed."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import jax

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import read_text


def processor() -> str:
    """Return the devices of the run, such as "8 x TPU v5 lite", or the CPU: "AMD EPYC 9B45, 2 cores"."""
    kinds = Counter(device.device_kind for device in jax.devices())
    if set(kinds) == {"cpu"}:
        return f"{cpu()}, {cores()} cores"
    return ", ".join(f"{count} x {printable(kind)}" for kind, count in kinds.items())


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """Return the name of the CPU, such as "AMD EPYC 9B45"."""
    try:
        lines = read_text(Path("/proc/cpuinfo")).splitlines()
    except UserError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return printable(names[0] if names else platform.processor() or platform.machine())
