"""Numbers of a training run: progress bar, metrics.jsonl, TensorBoard, and the check that they are finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmprune_jax.distributed.mesh import is_main_process
from vlmprune_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
LISTED_IDS = 16


class Recorder:
    """Receives every finished step in order. Files and the bar belong to process 0.

    `saved`: the last step that was checkpointed, for messages. A resumed run drops the lines of steps it repeats.
    """

    def __init__(self, folder: Path | None, first: int, total: int, log_every: int, progress: bool):
        self.saved, self.last = first, {}
        self._folder, self._first, self._total, self._log_every = folder, first, total, log_every
        self._tokens = self._counted = 0.0
        self._begin = self._mark = time.perf_counter()
        self._steady: float | None = None
        self._file = self._board = None
        if folder is not None and is_main_process():
            from tensorboardX import SummaryWriter  # imports torch where it is installed: 2 s and 0.2 GiB

            folder.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(folder / METRICS_FILE, first)
            self.last = kept[-1] if kept else {}
            self._file = (folder / METRICS_FILE).open("w")
            self._file.writelines(json.dumps(line) + "\n" for line in kept)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._bar = _bar() if progress and is_main_process() and first < total else None

    def __enter__(self) -> Recorder:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._total, completed=self._first, loss="", rate="")
        return self

    def __exit__(self, *exception: object) -> None:
        for resource, close in ((self._bar, "stop"), (self._file, "close"), (self._board, "close")):
            if resource is not None:
                getattr(resource, close)()

    def step(self, step: int, metrics: Mapping[str, Any], record_ids: Sequence[str], data_seconds: float) -> None:
        """Take the fetched metrics of a step (counted from 1).

        Raises:
          UserError: loss or gradient norm is not finite; names step and records.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._refuse(step, values, record_ids)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        tokens = values.pop("tokens")
        speed = tokens / seconds
        if self._steady is None:
            self._steady = now  # the first step compiles
        else:
            self._counted += tokens
        self._tokens += tokens
        times = {"tokens_per_second": speed, "seconds": seconds, "data_seconds": data_seconds}
        self.last = {"step": step, **values, **times}
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"loss {values['loss']:.4f}", rate=f"{speed:,.0f} tok/s")
        if step % self._log_every == 0 or step == self._total:
            self._log()

    def _log(self) -> None:
        if self._file is not None:
            self._file.write(json.dumps(self.last) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in self.last.items():
                if name != "step":
                    self._board.add_scalar(name, value, self.last["step"])

    def _refuse(self, step: int, values: Mapping[str, float], record_ids: Sequence[str]) -> None:
        ids = [name for name in record_ids if name]
        listed = ", ".join(ids[:LISTED_IDS]) + (f" and {len(ids) - LISTED_IDS} more" if len(ids) > LISTED_IDS else "")
        where = ""
        if self._folder is not None:
            path = self._folder / f"nonfinite-{jax.process_index()}.json"
            metrics = {name: str(value) for name, value in values.items()}
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, "metrics": metrics, "records": ids}))
            where = f" (all in {path}); the last good checkpoint is of step {self.saved}"
        loss, norm = values["loss"], values["grad_norm"]
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm} not finite; records {listed}{where}; "
            "look at these records, or lower the learning rate"
        )

    def summary(self) -> dict[str, Any]:
        """Totals of this process's run, and the last step's numbers."""
        now = time.perf_counter()
        steady = now - self._steady if self._steady is not None else 0.0
        return {
            "seconds": now - self._begin,
            "tokens": self._tokens,
            "tokens_per_second": self._counted / steady if self._counted else 0.0,
            "last": self.last,
        }


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}  {task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Complete lines of steps up to `step`; a line that a crash cut off is dropped."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["step"] <= step:
            kept.append(line)
    return kept
