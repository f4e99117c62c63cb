"""Measurement of two programs in turns, each in a child process that loads once and repeats its work on request."""

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
    """Running child process and its reports, one per repetition; the first one (with compilation) starts on its own."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines = [self._read()]

    def turn(self) -> None:
        """Let the child process repeat its work once."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.lines.append(self._read())

    def close(self) -> list[dict[str, float]]:
        """End the child process and return the reports of all repetitions."""
        self.process.communicate()
        return self.lines

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)


def serve(work: Callable[[], Mapping[str, float]], **first: float) -> None:
    """Run `work` once at the start (its report includes `first`), and once per line of standard input."""
    _turn(work, **first)
    for _ in sys.stdin:
        _turn(work)


def _turn(work: Callable[[], Mapping[str, float]], **more: float) -> None:
    """Run `work`; print a JSON report of its result, wall seconds, CPU seconds and peak memory (GiB)."""
    started, used = time.perf_counter(), time.process_time()
    values = work()
    more |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    print(json.dumps({**values, **more, "peak_rss_gib": peak}), flush=True)


def processor() -> str:
    """Return the name of the CPU model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def rounded(line: Mapping[str, Any]) -> str:
    """Return a report as one line of JSON, with numbers rounded to three decimals."""
    return json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})
