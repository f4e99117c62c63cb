"""Metrics of a training run: progress bar, metrics.jsonl, loggers, and the check for non-finite values."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

from vlmprune_jax.base.chips import peak_flops
from vlmprune_jax.base.console import make_reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import Count, checked, read_json_lines, replacing
from vlmprune_jax.base.links import check_links
from vlmprune_jax.base.processes import from_all, is_main_process, process_number
from vlmprune_jax.core.recovery.loggers import LOGGERS, TensorBoard, Tracker

METRICS_FILE = "metrics.jsonl"
LISTED_IDS = 16


class _Step(TypedDict):
    step: Count


class _Skipped(_Step):
    """One line of skipped-N.jsonl, the list of records that training skipped."""

    record: str
    reason: str


class Recorder:
    """Writer of training metrics: files and progress bar on process 0.

    `devices`: devices of the run; `mfu` is recorded if their peak FLOP/s are known. `loggers`: names in `LOGGERS`.
    `saved`: the last checkpointed step, for messages. A resumed run drops the lines of steps that it repeats. Process N
    lists its skipped records in the file skipped-N.jsonl.
    """

    def __init__(
        self,
        folder: Path | None,
        first: int,
        total: int,
        log_every: int,
        progress: bool,
        devices: Sequence[jax.Device],
        loggers: Sequence[str] = ("tensorboard",),
    ):
        self.saved, self.last = first, {}
        self._folder, self._total, self._log_every = folder, total, log_every
        peak = peak_flops(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)
        self._tokens = self._counted = self._flops = self._compiling = 0.0
        self._begin = self._mark = time.perf_counter()
        self._steady: float | None = None
        self._file, self._loggers = None, list[TensorBoard | Tracker]()
        self._skipped = 0
        if folder is not None:
            check_links(folder)  # TensorBoard writes through them
            self._skipped_file = folder / f"skipped-{process_number()}.jsonl"
            self._skipped = len(_keep_until(self._skipped_file, first, _Skipped))
        if folder is not None and is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            self._loggers = [LOGGERS[name](folder, first) for name in loggers]
            kept = _keep_until(folder / METRICS_FILE, first, _Step)
            self.last = kept[-1] if kept else {}
            self._file = (folder / METRICS_FILE).open("a")
        self._reporter = make_reporter(progress and is_main_process() and first < total)
        self._bar = self._reporter.bar("train step", total, first)

    def __enter__(self) -> Recorder:
        self._show = self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._bar.__exit__(kind, error, trace)
        for resource in (self._file, *self._loggers):
            # On a full disk closing fails as well; the user should read the first error.
            with contextlib.suppress(*(() if error is None else (OSError,))):
                if resource is not None:
                    resource.close()

    def say(self, text: str) -> None:
        """Print a text as a line above the progress bar."""
        self._reporter.say(f"  train: {text}")

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Context whose duration is added to `compile_seconds` instead of step time."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._mark += seconds
        self._compiling += seconds
        if self._steady is not None:
            self._steady += seconds

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        record_ids: Sequence[str],
        data_seconds: float,
        skipped: Sequence[tuple[str, str]],
        flops: int,
    ) -> None:
        """Record a finished training step: metrics, skipped records (id, reason), and FLOPs over all devices.

        Raises UserError, with the step and records, if the loss or gradient norm is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._skipped += len(skipped)
        if skipped and self._folder is not None:
            self._skipped_file.parent.mkdir(parents=True, exist_ok=True)
            with self._skipped_file.open("a") as file:
                for record, reason in skipped:
                    file.write(json.dumps({"step": step, "record": record, "reason": reason}) + "\n")
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._refuse(step, values, record_ids)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        tokens = values.pop("tokens")
        if self._steady is None:
            self._steady = now  # the first step includes reading the first batch
        else:
            self._counted += tokens
            self._flops += flops
        self._tokens += tokens
        self.last = {"step": step, **values, **self._speeds(tokens, flops, seconds)}
        self.last |= {"seconds": seconds, "data_seconds": data_seconds}
        mfu = f", MFU {100 * self.last['mfu']:.0f} %" if "mfu" in self.last else ""
        speed = f"{self.last['tokens_per_second']:,.0f} tok/s{mfu}"
        self._show(step, f"loss {values['loss']:.4f}, lr {values['learning_rate']:.1e}, {speed}")
        if step % self._log_every == 0 or step == self._total:
            if self._file is not None:
                self._file.write(json.dumps(self.last) + "\n")
                self._file.flush()
            for logger in self._loggers:
                logger.log(step, {name: value for name, value in self.last.items() if name != "step"})

    def _speeds(self, tokens: float, flops: float, seconds: float) -> dict[str, float]:
        """Return tokens/s (without padding), model FLOP/s, and model FLOPs utilisation (share of peak bfloat16)."""
        mfu = {} if self._peak is None else {"mfu": flops / seconds / self._peak}
        return {"tokens_per_second": tokens / seconds, "model_flops_per_second": flops / seconds, **mfu}

    def _refuse(self, step: int, values: Mapping[str, float], record_ids: Sequence[str]) -> None:
        ids = [name for name in record_ids if name]
        listed = ", ".join(ids[:LISTED_IDS]) + (f" and {len(ids) - LISTED_IDS} more" if len(ids) > LISTED_IDS else "")
        remark = ""
        if self._folder is not None:
            path = self._folder / f"nonfinite-{process_number()}.json"
            metrics = {name: str(value) for name, value in values.items()}
            with replacing(path) as file:
                file.write(json.dumps({"step": step, "metrics": metrics, "records": ids}).encode())
            remark = f" (all in {path}); last checkpoint: step {self.saved}"
        loss, norm = values["loss"], values["grad_norm"]
        raise UserError(
            f"step {step}: loss {loss} or gradient norm {norm} is not finite; records {listed}{remark}: check these "
            "records, or lower the learning rate"
        )

    def summary(self) -> dict[str, Any]:
        """Return the run's totals, the metrics of its last step, and the number of skipped records."""
        now = time.perf_counter()
        steady = now - self._steady if self._steady is not None else 0.0
        return {
            "seconds": now - self._begin,
            "compile_seconds": self._compiling,
            "tokens": self._tokens,
            "skipped_rows": sum(from_all(lambda: self._skipped)),
            **self._speeds(self._counted, self._flops, steady or 1.0),
            "last": self.last,
        }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file as rows {name: number}, ignoring a last line that a crash truncated.

    Raises UserError if the file is damaged.
    """
    rows = read_json_lines(path, dict[str, float], cut=True)
    for number, row in enumerate(rows, start=1):
        checked(row, _Step, f"{path}, row {number}", "remove it, and run the same command")
    return rows


def _keep_until(path: Path, step: int, kind: Any) -> list[dict[str, Any]]:
    """Truncate a metrics file after step `step` and return the remaining lines."""
    if not path.exists():
        if path.is_symlink():
            path.unlink()  # a dangling link, through which writes would follow
        return []
    kept = [line for line in read_json_lines(path, kind, cut=True) if line["step"] <= step]
    # A process killed here keeps the old file.
    with replacing(path) as file:
        file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept
