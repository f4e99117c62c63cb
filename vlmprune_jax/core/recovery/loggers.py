"""Loggers of training metrics beside metrics.jsonl: TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmprune_jax.base.errors import UserError, reason
from vlmprune_jax.base.links import real_path

PROJECT = "vlmprune"


class TensorBoard:
    """Logger to TensorBoard event files in the training folder; a resumed run overwrites repeated steps."""

    def __init__(self, folder: Path, first: int):
        from tensorboardX import SummaryWriter  # imports torch where it is installed: 2 s and 0.2 GiB

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log every metric as a TensorBoard scalar."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write all buffered metrics and close the event file."""
        self._writer.close()


class Tracker:
    """Logger to a wandb or trackio run (both have the same functions).

    Environment variables of these packages set project, mode and folder (WANDB_PROJECT, WANDB_MODE=offline,
    TRACKIO_DIR). A resumed training continues the run that its folder names.
    """

    def __init__(self, package: str, folder: Path):
        try:
            self._module = importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"recover.loggers: {package} is not installed: pip install 'vlmprune-jax[{package}]', or leave it out"
            ) from error
        path = real_path(folder)
        name = f"{path.parent.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        project = os.environ.get(f"{package.upper()}_PROJECT", PROJECT)
        options: dict[str, Any] = {"id": name, "dir": str(folder)} if package == "wandb" else {}
        try:
            self._module.init(project=project, name=name, resume="allow", **options)
        except Exception as error:  # its own errors, of its network and of files
            raise UserError(
                f"recover.loggers: {package} cannot start ({reason(error)}): set it up, or leave it out"
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one optimizer step."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all metrics have been sent."""
        self._module.finish()


# Name in `recover.loggers` -> (training folder, first step) -> logger.
LOGGERS: dict[str, Callable[[Path, int], TensorBoard | Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder, first: Tracker("wandb", folder),
    "trackio": lambda folder, first: Tracker("trackio", folder),
}
