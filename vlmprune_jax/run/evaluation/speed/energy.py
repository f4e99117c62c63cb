"""Energy from the machine's counters: RAPL of Linux for processors and memory, NVML for NVIDIA GPUs.

TPUs report no energy or power to programs (libtpu 0.0.4x has metrics of use and memory only).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_text

POWERCAP = Path("/sys/class/powercap")
SECONDS = 30.0  # seconds between readings: RAPL counters start again at 0 after minutes under load


@dataclass(frozen=True)
class Counter:
    """One energy counter: `read` returns the accumulated joules, and starts again at 0 after `wraps` joules."""

    name: str
    read: Callable[[], float]
    wraps: float = float("inf")


def find_counters() -> list[Counter]:
    """Return the energy counters that this process may read: of CPU packages, memory and NVIDIA GPUs."""
    return [*_rapl(), *_nvml()]


def _rapl() -> list[Counter]:
    """Return the energy counters of CPU packages and memory (Intel RAPL); most systems let only root read them."""
    found = []
    for zone in sorted(os.listdir(POWERCAP)) if POWERCAP.is_dir() else ():
        path = POWERCAP / zone
        with contextlib.suppress(UserError, ValueError):
            name = read_text(path / "name").strip()
            if zone.startswith("intel-rapl:") and name.startswith(("package", "dram")):
                read = lambda path=path: int(read_text(path / "energy_uj")) / 1e6  # noqa: E731
                read()  # may not be allowed
                found.append(Counter(f"RAPL {name}", read, int(read_text(path / "max_energy_range_uj")) / 1e6))
    return found


def _nvml() -> list[Counter]:
    """Return the energy counters of the machine's NVIDIA GPUs (Volta or newer), if nvidia-ml-py is installed."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    found = []
    with contextlib.suppress(nvml.NVMLError):  # no driver
        nvml.nvmlInit()
        for number in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(number)

            def read(device: object = device) -> float:
                try:
                    return nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1e3
                except nvml.NVMLError as error:
                    raise ValueError(f"energy cannot be measured, since no counter is readable: {error}") from error

            with contextlib.suppress(ValueError):
                read()
                found.append(Counter(f"NVML GPU {number}", read))
    return found


class EnergyMeter:
    """Context that measures the energy which the machine uses inside the context.

    `joules` is None without counters. `counters` has the names of the counters, such as "RAPL package-0, NVML GPU 0".
    """

    def __init__(self) -> None:
        self._counters = find_counters()
        self._last: list[float] = []
        self._sum = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def counters(self) -> str:
        """Names of the energy counters that are read; "" if there are none."""
        return ", ".join(counter.name for counter in self._counters)

    @property
    def joules(self) -> float | None:
        """Energy in joules used inside the context; None without counters, or if a counter failed."""
        return self._sum if self._counters else None

    def __enter__(self) -> EnergyMeter:
        if self._counters:
            self._last = [counter.read() for counter in self._counters]
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counters:
            self._ended.set()
            self._thread.join()
            self._add()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self._add()

    def _add(self) -> None:
        try:
            now = [counter.read() for counter in self._counters]
        except (UserError, ValueError):
            self._counters, now = [], []
        for counter, before, after in zip(self._counters, self._last, now, strict=False):
            self._sum += after - before if after >= before else after - before + counter.wraps
        self._last = now
