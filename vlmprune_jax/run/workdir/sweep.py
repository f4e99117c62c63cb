"""`sweep.json`, `sweep.csv` and each run's `error.json`: results of the runs of a sweep."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from vlmprune_jax.base.markup import cell
from vlmprune_jax.run.workdir.artefact import Artefact, Part, read_artefact
from vlmprune_jax.run.workdir.result import Model, Run, Set, Sets

SWEEP = "sweep.json"
DONE, FAILED, PENDING = "done", "failed", "pending"
# Columns of `sweep.csv` that are fields of `Run`.
_FIELDS = (
    "model", "image_tokens", "method", "criterion", "target_ratio", "actual_ratio", "decoder_ratio", "parameters",
    "reconstruct", "recovery", "data_fraction", "seconds", "training_records", "training_steps", "digest", "path",
)  # fmt: skip


class Entry(Part, frozen=True, kw_only=True):
    """One model of a sweep, or a run that failed (`error`) or has not run yet.

    `name`: name of the run, or "RUN/pruned" for a model before the last stage; a model that several runs share appears
    under the first run. `group`: the name without seeds. `labels`: parts of the name. `overrides`: settings of the run.
    `seed`: the run's seed, if it sets exactly one. `found`: the evaluated model; its paths are relative to the sweep's
    workdir.
    """

    name: str
    run: str
    group: str
    labels: dict[str, str]
    overrides: dict[str, Any]
    seed: int | None
    error: str | None = None
    found: Run | None = None

    @property
    def status(self) -> str:
        """State of the sweep run: `done`, `failed` or `pending`."""
        return DONE if self.found is not None else PENDING if self.error is None else FAILED


class SweepResult(Artefact, frozen=True, kw_only=True, tag=2):
    """File `sweep.json`: all models of a sweep, and the config file that lists its runs."""

    HINT: ClassVar[str] = "run `vlmprune sweep` again, or restore the file"
    MAX_BYTES: ClassVar[int] = 2**28  # ten thousand models with groups
    config: str
    sets: dict[str, Set]
    unpruned: dict[str, Model]
    models: Annotated[list[Entry], Meta(min_length=1, max_length=100_000)]

    def problems(self, folder: Path) -> str | None:
        """Return an error message if an unpruned model or a set's value is missing; None otherwise."""
        for entry in self.models:
            if (model := entry.found) is not None:
                missing = [name for name in self.sets if model.evaluation.main(name, self.sets) is None]
                if model.unpruned not in self.unpruned or missing:
                    return f"{entry.name}: there are no results of {missing[0] if missing else model.unpruned!r}"
        return None

    @property
    def done(self) -> list[Run]:
        """Entries of all evaluated models of the sweep."""
        return [entry.found for entry in self.models if entry.found is not None]


class RunError(Artefact, frozen=True, kw_only=True, tag=1):
    """File `error.json`: the error that stopped a sweep run, in one line."""

    error: str


def read_sweep(workdir: Path) -> SweepResult:
    """Read and check the file `sweep.json` of a sweep's workdir."""
    return read_artefact(workdir / SWEEP, SweepResult, missing="no such file: run `vlmprune sweep` first")


def as_csv(sweep: SweepResult) -> str:
    """Return the content of `sweep.csv`, one line per model of the sweep; without speed-ups that are not measurable."""
    rows = []
    for entry in sweep.models:
        row = {name: getattr(entry, name) for name in ("name", "run", "group", "seed", "status", "error")}
        row |= {f"label.{label}": value for label, value in entry.labels.items()}
        rows.append(row if entry.found is None else row | _cells(entry.found, sweep.sets))
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(map(cell, columns))
    lines.writerows([cell(row.get(name)) for name in columns] for row in rows)
    return text.getvalue()


def _cells(run: Run, sets: Sets) -> dict[str, Any]:
    """Return {column of `sweep.csv`: value} of a model."""
    cells: dict[str, Any] = {name: getattr(run, name) for name in _FIELDS}
    if run.costs is not None:
        cells |= {"bytes": run.costs.file_bytes, "forward_flops": run.costs.forward_flops}
    for part in () if run.speed is None else ("prefill", "decode"):
        cells[f"{part}_tokens_per_second"] = getattr(run.speed, part)
        speedup = getattr(run.speed, f"{part}_speedup")
        if speedup is not None and speedup.measurable:
            named = {"": speedup.ratio, "_low": speedup.low, "_high": speedup.high}
            cells |= {f"{part}_speedup{end}": value for end, value in named.items()}
    evaluation, control = run.evaluation, run.evaluation.control
    cells |= {"evaluation_seconds": evaluation.seconds, "retained": evaluation.mean_of_ratios}
    cells |= {"of_control": control and control.mean_of_ratios, "paper_average": evaluation.paper_average}
    for name in sets:
        low, high = evaluation.retained_interval.get(name) or (None, None)
        cells |= {f"{name}.score": evaluation.main(name, sets), f"{name}.retained": evaluation.retained.get(name)}
        cells |= {f"{name}.low": low, f"{name}.high": high}
    return cells
