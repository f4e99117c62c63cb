"""Evaluated models of a sweep that were pruned with the paper's criteria, as points of the study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmprune_jax.run.planning.guide import SOLVED, read_guide
from vlmprune_jax.run.workdir.comparison import average_interval, averaged_sets
from vlmprune_jax.run.workdir.evaluation import find_evaluated, read_evaluated
from vlmprune_jax.run.workdir.result import NOT_TRAINED, ModelEvaluation, Sets
from vlmprune_jax.run.workdir.sweep import SweepResult

METHODS = ("depth", "width")  # methods that the study compares


@dataclass(frozen=True, eq=False)
class Point:
    """One evaluated model of a sweep; `level` and `reached` are the requested and the removed share of the decoder.

    `of_control`: retention (%) relative to the unpruned model after the same recovery, if there is one. `questions`:
    each question's part of `retained`, float[questions] with it as mean, if the evaluations lie beside the sweep.
    `digest`: hash of the weights; different seeds can choose the same layers.
    """

    model: str
    parameters: int
    method: str
    recovery: str
    level: float
    reached: float
    data: float
    seed: int | None
    retained: float
    interval: tuple[float, float] | None
    of_control: float | None = None
    questions: np.ndarray | None = None
    digest: str = ""


def points_of(sweep: SweepResult, folder: Path | None = None) -> list[Point]:
    """Return the evaluated models of a `sweep.json` that were pruned with the paper's criteria and have an average.

    `folder`: the sweep's workdir, from which scores of single questions are read.
    """
    settings, points = read_guide().settings, []
    criteria = tuple(settings[method]["score"][method] for method in METHODS)  # the claims' criteria only
    for entry in sweep.models:
        row = entry.found
        if row is None or not row.criterion.startswith(criteria):
            continue
        retained = row.evaluation.mean_of_ratios
        if retained is None or not row.actual_ratio:
            continue
        solved = row.reconstruct != "none"
        trained = "none" if row.recovery in NOT_TRAINED else row.recovery
        how = trained if not solved else SOLVED if trained == "none" else f"{SOLVED}+{trained}"
        reached, asked = row.decoder_ratio or 0.0, row.target_ratio
        level = reached if asked is None else asked * reached / row.actual_ratio  # from shares of the whole model
        unpruned = sweep.unpruned[row.unpruned]
        questions = None
        if folder is not None:
            questions = question_parts(folder, row.path, row.evaluation, unpruned.evaluation, sweep.sets)
        point = Point(
            _name(row.model, unpruned.parameters),
            unpruned.parameters,
            row.method,
            how,
            round(level, 2),
            reached,
            row.data_fraction,
            entry.seed,
            retained,
            average_interval(row.evaluation, sweep.sets),
            None if row.evaluation.control is None else row.evaluation.control.mean_of_ratios,
            questions,
            row.digest,
        )
        points.append(point)
    return points


def _name(folder: str, parameters: int) -> str:
    """Return a model's display name: its folder's name and its size, because many folders are named `teacher`."""
    millions = parameters / 1e6
    return f"{Path(folder).name}, {millions:,.{2 if millions < 10 else 0}f} M"


def question_parts(
    workdir: Path, path: str, model: ModelEvaluation, unpruned: ModelEvaluation, sets: Sets
) -> np.ndarray | None:
    """Return each question's contribution to a model's retention in %, float[questions], with the retention as mean.

    The result is None if an evaluation of the model at `path` is not in the workdir, or its scores do not average to
    the metric's value. The contributions of several sets follow one another, and each set has the same weight.
    """
    contributions = []
    for name in (names := averaged_sets(sets)):
        file, original = find_evaluated(workdir, path, name), unpruned.main(name, sets)
        scores = [] if file is None or not original else read_evaluated(file).question_scores
        value = model.main(name, sets)
        if not scores or None in scores or value is None or not sets[name].higher_is_better:
            return None
        column = np.array(scores, float)
        if not math.isclose(column.mean(), value, rel_tol=1e-6, abs_tol=1e-9):
            return None
        contributions.append(100 * column / (original or 1) / len(names) / len(column))
    joined = np.concatenate(contributions)
    return joined * len(joined)
