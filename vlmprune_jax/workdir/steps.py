"""`.stages/steps.json`: the steps of a run in order, noted when it begins; what is not there yet is missing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar

from vlmprune_jax.core.errors import reason
from vlmprune_jax.workdir.artefact import Artefact, Part, read_artefact

STEPS = ".stages/steps.json"
_PATTERN = re.compile(r"(?!.*\*\*)\w[\w./*-]*")


class StepRecord(Part, frozen=True, kw_only=True):
    """A stage of one variant. `name`, `recovery`: of the model that it makes, which is `evaluated` or not.

    `variant` and `folder` are the folders of the prune variant and of the outputs, relative to the workdir; `outputs`
    are patterns in `folder`, and `model` is the folder of the model there, "" if the stage makes none.
    """

    stage: str
    name: str
    recovery: str
    about: str
    variant: str
    folder: str
    outputs: list[str] = []
    model: str = ""
    evaluated: bool = True

    @property
    def path(self) -> Path:
        """The model's folder, relative to the workdir."""
        return Path(self.folder) / self.model

    def is_done(self, workdir: Path) -> bool:
        """Return True if all that the step makes is there."""
        made = (*self.outputs, *([self.model] if self.model else []))
        return all(any((workdir / self.folder).glob(pattern)) for pattern in made)


class Steps(Artefact, frozen=True, kw_only=True, tag=1):
    """The file."""

    HINT: ClassVar[str] = "run `vlmprune run` again"
    steps: list[StepRecord]

    def problems(self, folder: Path) -> str | None:
        """Return the first path that leads out of the workdir or that no file can have."""
        for step in self.steps:
            for pattern in (*step.outputs, *([step.model] if step.model else [])):  # both are looked for by glob
                if not _PATTERN.fullmatch(pattern):
                    return f"{pattern[:40]!r} cannot be an output"
            for path in (step.variant, step.folder, step.model, *step.outputs):
                if "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
                    return f"{path!r} lies outside the workdir"
                try:
                    os.lstat(folder.parent / path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except (OSError, ValueError) as error:
                    return f"{path[:40]!r} cannot be a path ({reason(error)})"
        return None


def read_steps(workdir: Path) -> list[StepRecord]:
    """Read the steps of a run; none if it was never begun."""
    path = workdir / STEPS
    return read_artefact(path, Steps).steps if path.is_file() else []
