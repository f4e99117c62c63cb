"""Two programs measured in turn: each side is a child process that loads once and repeats its work on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


class Side:
    """A running child, and what each of its turns reported; the first turn (which compiles) comes unasked."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines = [self._read()]

    def turn(self) -> None:
        """Have the work done once more."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.lines.append(self._read())

    def close(self) -> list[dict[str, float]]:
        """What every turn reported."""
        self.process.communicate()
        return self.lines

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)


def serve(work: Callable[[], Mapping[str, float]], **first: float) -> None:
    """The child: one turn at once, whose line has `first` as well, and one per line of standard input."""
    _turn(work, **first)
    for _ in sys.stdin:
        _turn(work)


def _turn(work: Callable[[], Mapping[str, float]], **more: float) -> None:
    """One JSON line: what the work returned, seconds by the clock and of all cores, the peak resident GiB so far."""
    started, used = time.perf_counter(), time.process_time()
    values = work()
    more |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    print(json.dumps({**values, **more, "peak_rss_gib": peak}), flush=True)


def processor() -> str:
    """The processor's model, which speeds depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def rounded(line: Mapping[str, Any]) -> str:
    """A JSON line with three digits after the point."""
    return json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})
