"""Free memory of devices and machine."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import read_text

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes that one of this process's devices can allocate; CPU devices share the machine's memory."""
    devices = jax.local_devices()
    limited = [stats for stats in (device.memory_stats() for device in devices) if stats and "bytes_limit" in stats]
    if len(limited) == len(devices):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in limited)
    return min(_of_machine(), _of_container()) // len(devices)


def _of_machine() -> int:
    """Return the bytes available to programs without swapping (Linux); elsewhere half of the built-in memory."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _of_container() -> int:
    """Return the bytes that a container may still allocate."""
    most, used = (_lines(_GROUP / name) for name in ("memory.max", "memory.current"))
    return max(0, int(most[0]) - int(used[0])) if most and used and most[0] != "max" else 2**62


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except UserError:  # not Linux
        return []
