"""How much memory is free."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from vlmprune_jax.core.errors import UserError
from vlmprune_jax.core.files import read_text

_GROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that one of this process's devices can still take; devices that are CPUs share what the machine has."""
    devices = jax.local_devices()
    known = [stats for stats in (device.memory_stats() for device in devices) if stats and "bytes_limit" in stats]
    if len(known) == len(devices):
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in known)
    return min(_of_machine(), _of_container()) // len(devices)


def _of_machine() -> int:
    """What Linux says that programs can have without swapping; elsewhere half of what is built in."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _of_container() -> int:
    """What a container may take beyond what it has."""
    most, used = (_lines(_GROUP / name) for name in ("memory.max", "memory.current"))
    return max(0, int(most[0]) - int(used[0])) if most and used and most[0] != "max" else 2**62


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except UserError:  # another system
        return []
