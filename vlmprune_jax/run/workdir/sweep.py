"""`sweep.json`, `sweep.csv` and each run's `run.json` and `error.json`: results of the runs of a sweep."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from msgspec import Meta, field

from vlmprune_jax.base.files import Count, Finite, Positive
from vlmprune_jax.base.markup import cell
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.workdir.artefact import Artefact, Part, read_artefact
from vlmprune_jax.run.workdir.comparison import average_interval
from vlmprune_jax.run.workdir.result import Costs, ModelEvaluation, OfControl, RunEvaluation, Set, Sets

SWEEP = "sweep.json"
DONE, FAILED, PENDING = "done", "failed", "pending"


def unpruned_key(model: str, image_tokens: int | None) -> str:
    """Return the name of an unpruned model in a sweep: its folder, and the limit of tokens per image (if any)."""
    return model if image_tokens is None else f"{model} at {image_tokens} tokens per image"


class UnprunedModel(Part, frozen=True, kw_only=True):
    """Unpruned model of a sweep, evaluated with at most `image_tokens` tokens per image."""

    image_tokens: Count | None = None
    parameters: Positive
    bytes: Count
    forward_flops: Finite
    evaluation: ModelEvaluation

    @property
    def costs(self) -> Costs:
        """Costs of the model, without the size of its cache."""
        return Costs(forward_flops=self.forward_flops, file_bytes=self.bytes)


class SweptModel(Part, frozen=True, kw_only=True):
    """Evaluated model of a sweep run, with the same fields as in `result.json`.

    `model`: folder of the unpruned model. `image_tokens`: setting `data.max_image_tokens`. `bytes`: size of the
    exported weights. `forward_flops`: FLOPs of the prompt in the settings `speed`. `seconds`: time of all stages that
    made the model, in any run. `digest`: hash of the folder at `path`, which is relative to the sweep's workdir.
    """

    model: str
    image_tokens: Count | None = None
    method: str
    criterion: str
    target_ratio: Finite | None = field(name="ratio_asked")  # field name in files of version 0.1.0
    actual_ratio: Finite = field(name="ratio_reached")
    decoder_ratio: Finite
    parameters: Count
    bytes: Count
    forward_flops: Finite
    reconstruct: str
    recovery: str
    data_fraction: Finite
    seconds: Finite
    training_records: Count | None = None
    training_steps: Count | None = None
    prefill_tokens_per_second: Finite | None = None
    decode_tokens_per_second: Finite | None = None
    prefill_speedup: SpeedUp | None = None
    decode_speedup: SpeedUp | None = None
    digest: str
    path: str
    evaluation: RunEvaluation

    @property
    def unpruned(self) -> str:
        """Name (key in `SweepResult.unpruned`) of the unpruned model with which this model is compared."""
        return unpruned_key(self.model, self.image_tokens)

    @property
    def costs(self) -> Costs:
        """Costs of the model, without the size of its cache."""
        return Costs(forward_flops=self.forward_flops, file_bytes=self.bytes)


class Entry(Part, frozen=True, kw_only=True):
    """One model of a sweep, or a run that failed (`error`) or has not run yet.

    `name`: name of the run, or "RUN/pruned" for a model before the last stage; a model that several runs share appears
    under the first run. `group`: the name without seeds. `labels`: parts of the name. `overrides`: settings of the run.
    `seed`: the run's seed, if it sets exactly one.
    """

    name: str
    run: str
    group: str
    labels: dict[str, str]
    overrides: dict[str, Any]
    seed: int | None
    error: str | None = None
    found: SweptModel | None = None

    @property
    def status(self) -> str:
        """State of the sweep run: `done`, `failed` or `pending`."""
        return DONE if self.found is not None else PENDING if self.error is None else FAILED


class SweepResult(Artefact, frozen=True, kw_only=True, tag=1):
    """File `sweep.json`: all models of a sweep, and the config file that lists its runs."""

    HINT: ClassVar[str] = "run `vlmprune sweep` again, or restore the file"
    MAX_BYTES: ClassVar[int] = 2**28  # ten thousand models with groups
    config: str
    sets: dict[str, Set]
    unpruned: dict[str, UnprunedModel]
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
    def done(self) -> list[SweptModel]:
        """Entries of all evaluated models of the sweep."""
        return [entry.found for entry in self.models if entry.found is not None]


class RunRecord(Artefact, frozen=True, kw_only=True, tag=1):
    """File `run.json`: results of one sweep run, and a hash of its settings and inputs."""

    made_from: str
    sets: dict[str, Set]
    unpruned: dict[str, UnprunedModel]
    models: list[SweptModel]


class RunError(Artefact, frozen=True, kw_only=True, tag=1):
    """File `error.json`: the error that stopped a sweep run, in one line."""

    error: str


def read_sweep(workdir: Path) -> SweepResult:
    """Read and check the file `sweep.json` of a sweep's workdir."""
    return read_artefact(workdir / SWEEP, SweepResult, missing="no such file: run `vlmprune sweep` first")


@dataclass(frozen=True)
class Group:
    """Models that differ only in seeds, with their mean retention (%) and its 95 % interval over seeds and questions.

    `retained` is relative to the unpruned model, `of_control` to the unpruned model after the same recovery. If the
    interval is unknown, both of its ends equal the mean.
    """

    name: str
    labels: Mapping[str, str]
    models: Sequence[SweptModel]
    retained: tuple[float, float, float] | None
    of_control: tuple[float, float, float] | None = None

    @property
    def first(self) -> SweptModel:
        """First model of the group, for properties that all its models share."""
        return self.models[0]

    def mean(self, field: str) -> float:
        """Return the mean of a numeric property over the group's models."""
        return sum(getattr(model, field) for model in self.models) / len(self.models)


def groups_of(sweep: SweepResult) -> list[Group]:
    """Group a sweep's models that differ only in seeds."""
    by_group: dict[str, list[Entry]] = {}
    for entry in sweep.models:
        if entry.found is not None:
            by_group.setdefault(entry.group, []).append(entry)
    groups = []
    for name, entries in by_group.items():
        labels = {label: value for label, value in entries[0].labels.items() if label.rpartition(".")[2] != "seed"}
        models = [entry.found for entry in entries if entry.found is not None]
        evaluations = [model.evaluation for model in models]
        retained = mean_retention(evaluations, sweep.sets)
        of_control = mean_retention([evaluation.control for evaluation in evaluations], sweep.sets)
        groups.append(Group(name, labels, models, retained, of_control))
    return groups


def mean_retention(
    evaluations: Sequence[RunEvaluation | OfControl | None], sets: Sets
) -> tuple[float, float, float] | None:
    """Return the mean retention with its 95 % interval over seeds and questions; None if a value is unknown."""
    known = [evaluation for evaluation in evaluations if evaluation is not None]
    values = [evaluation.mean_of_ratios for evaluation in known if evaluation.mean_of_ratios is not None]
    if len(values) < len(evaluations):
        return None
    return interval_of_mean(values, [average_interval(evaluation, sets) for evaluation in known])


def as_csv(sweep: SweepResult) -> str:
    """Return the content of `sweep.csv`, one line per model of the sweep; without speed-ups that are not measurable."""
    labels = list(dict.fromkeys(label for model in sweep.models for label in model.labels))
    speedups = ("prefill_speedup", "decode_speedup")
    facts = [name for name in SweptModel.__struct_fields__ if name not in ("evaluation", *speedups)]
    ends = [f"{name}{end}" for name in speedups for end in ("", "_low", "_high")]
    set_columns = [f"{name}.{part}" for name in sweep.sets for part in ("score", "retained", "low", "high")]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    entry = ("name", "run", "group", "seed", "status", "error")
    scores = ("evaluation_seconds", "retained", "of_control", "paper_average")
    lines.writerow(map(cell, [*entry, *facts, *ends, *(f"label.{label}" for label in labels), *scores, *set_columns]))
    for model in sweep.models:
        row = [*(getattr(model, name) for name in entry), *(getattr(model.found, name, None) for name in facts)]
        for speedup in (getattr(model.found, name, None) for name in speedups):
            row += (
                [speedup.ratio, speedup.low, speedup.high] if speedup is not None and speedup.measurable else [None] * 3
            )
        row += [model.labels.get(label) for label in labels]
        row += (
            ["" for _ in (*scores, *set_columns)]
            if model.found is None
            else _scores(model.found.evaluation, sweep.sets)
        )
        lines.writerow(map(cell, row))
    return text.getvalue()


def _scores(evaluation: RunEvaluation, sets: Sets) -> Iterator[float | None]:
    of_control = None if evaluation.control is None else evaluation.control.mean_of_ratios
    yield from (evaluation.seconds, evaluation.mean_of_ratios, of_control, evaluation.paper_average)
    for name in sets:
        ends = evaluation.retained_interval.get(name) or (None, None)
        yield from (evaluation.main(name, sets), evaluation.retained.get(name), *ends)
