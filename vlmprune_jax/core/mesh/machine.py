"""Name of the hardware in use, which is recorded with every measured time, and its free memory."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path

import jax

from vlmprune_jax.base.errors import UserError, printable
from vlmprune_jax.base.files import read_text

_GROUP = Path("/sys/fs/cgroup")


def processor() -> str:
    """Return the run's devices as text, such as "8 x TPU v5 lite", or "AMD EPYC 9B45, 2 cores" on a CPU."""
    kinds = Counter(device.device_kind for device in jax.devices())
    if set(kinds) == {"cpu"}:
        return f"{cpu()}, {cores()} cores"
    return ", ".join(f"{count} x {printable(kind)}" for kind, count in kinds.items())


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """Return the CPU's name, such as "AMD EPYC 9B45"."""
    lines = _lines(Path("/proc/cpuinfo"))
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return printable(names[0] if names else platform.processor() or platform.machine())


def free_memory() -> int:
    """Return the bytes still free on each device of this process (CPU devices share the machine's memory)."""
    devices = jax.local_devices()
    limited = [stats for stats in (device.memory_stats() for device in devices) if stats and "bytes_limit" in stats]
    if len(limited) == len(devices):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in limited)
    available = [line.split()[1] for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")]
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(available[0]) * 1024 if available else installed // 2  # half of it if this is not Linux
    return min(free, _of_container()) // len(devices)


def _of_container() -> int:
    """Return the bytes that this container may still allocate; 2**62 if it has no limit."""
    most, used = (_lines(_GROUP / name) for name in ("memory.max", "memory.current"))
    return max(0, int(most[0]) - int(used[0])) if most and used and most[0] != "max" else 2**62


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except UserError:  # not Linux
        return []
