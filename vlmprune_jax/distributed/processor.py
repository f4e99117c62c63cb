"""What computes, by name: a time or a speed means nothing without it."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import jax

from vlmprune_jax.core.errors import UserError, printable
from vlmprune_jax.core.files import read_text


def processor() -> str:
    """ "8 x TPU v5 lite", "AMD EPYC 9B45, 2 cores": all devices of the run, or the processor that they are."""
    kinds = Counter(device.device_kind for device in jax.devices())
    if set(kinds) == {"cpu"}:
        return f"{cpu()}, {cores()} cores"
    return ", ".join(f"{count} x {printable(kind)}" for kind, count in kinds.items())


def cores() -> int:
    """Cores of the processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """ "AMD EPYC 9B45": the processor's name."""
    try:
        lines = read_text(Path("/proc/cpuinfo")).splitlines()
    except UserError:  # another system
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return printable(named[0] if named else platform.processor() or platform.machine())
