"""Comparison of models by their evaluations: retention, averages, the best model, and rows of a model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.metrics.texts import BITS
from vlmprune_jax.run.workdir.evaluation import Group, MetricInfo, Values, find_evaluated, read_evaluated
from vlmprune_jax.run.workdir.result import (
    Costs,
    Evaluations,
    ModelEvaluation,
    OfControl,
    Run,
    RunEvaluation,
    Set,
    Sets,
    Unpruned,
)
from vlmprune_jax.run.workdir.speed import MedianSpeed

MOST_GROUPS = 40  # maximum question groups per set; further groups are only in eval/*.json


def describe_sets(teacher: Evaluations, others: Iterable[Evaluations] = ()) -> dict[str, Set]:
    """Return metric and size of all evaluation sets, from the models' evaluations.

    If models split a text into different numbers of tokens, the text's perplexity is compared as bits per byte.
    """
    sets = {
        name: Set(**msgspec.structs.asdict(evaluated.metric), counted=evaluated.counted, count=evaluated.count)
        for name, evaluated in teacher.items()
    }
    for other in others:
        for name, metric in sets.items():
            if metric.counted == "tokens" and other[name].count != metric.count and BITS in other[name].values:
                sets[name] = msgspec.structs.replace(metric, main=BITS)
    return sets


def unpruned_of(
    evaluations: Evaluations, costs: Costs | None = None, speed: MedianSpeed | None = None, passthrough: int = 0
) -> Unpruned:
    """Return the unpruned model's entry in `result.json`."""
    evaluation = ModelEvaluation(scores=_values(evaluations), groups=_groups(evaluations))
    parameters = next(iter(evaluations.values())).parameters
    return Unpruned(parameters=parameters, passthrough=passthrough, evaluation=evaluation, costs=costs, speed=speed)


def compare(
    evaluations: Evaluations, teacher: Evaluations, control: Evaluations | None = None, sets: Sets | None = None
) -> RunEvaluation:
    """Compare a model with the unpruned model, and with its control if there is one.

    `sets`: evaluation sets of all compared models (see `describe_sets`); None = the sets of these evaluations.
    """
    sets, scores = describe_sets(teacher, [evaluations]) if sets is None else sets, _values(evaluations)
    of_control = None
    if control is not None and control.keys() == teacher.keys():
        alike = _compared(scores, _values(control), sets)
        of_control = OfControl(
            scores=_values(control),
            retained=alike["retained"],
            retained_interval=_intervals(evaluations, "control_interval"),
            mean_of_ratios=alike["mean_of_ratios"],
        )
    return RunEvaluation(
        scores=scores,
        groups=_groups(evaluations),
        retained_interval=_intervals(evaluations, "retained_interval"),
        seconds=round(sum(evaluated.seconds for evaluated in evaluations.values()), 2),
        **_compared(scores, _values(teacher), sets),
        control=of_control,
    )


def _intervals(evaluations: Evaluations, name: str) -> dict[str, tuple[float, float]]:
    return {key: ends for key, evaluated in evaluations.items() if (ends := getattr(evaluated, name)) is not None}


def compare_again(model: RunEvaluation, unpruned: ModelEvaluation, sets: Sets) -> RunEvaluation:
    """Return a model's evaluation with retention recomputed from the main metrics in `sets`."""
    control = model.control
    if control is not None:
        anew = _compared(model.scores, control.scores, sets)
        control = msgspec.structs.replace(control, retained=anew["retained"], mean_of_ratios=anew["mean_of_ratios"])
    return msgspec.structs.replace(model, **_compared(model.scores, unpruned.scores, sets), control=control)


def _compared(scores: Mapping[str, Values], original: Mapping[str, Values], sets: Sets) -> dict[str, Any]:
    """Return a model's retention per evaluation set and on average."""
    ours, theirs = _averaged(scores, sets), _averaged(original, sets)
    theirs = {name: value for name, value in theirs.items() if value and math.isfinite(value)}
    ours = {name: ours[name] for name in theirs}
    full = {name: maximum for name in theirs if (maximum := sets[name].full) is not None}
    return {
        "retained": {name: _retained(scores[name], original[name], metric) for name, metric in sets.items()},
        "mean_of_ratios": mean_of_ratios(ours, theirs) if theirs else None,
        "paper_average": paper_average(ours, theirs, full) if theirs and len(full) == len(theirs) else None,
    }


def mean_of_ratios(scores: Mapping[str, float], original: Mapping[str, float]) -> float:
    """Return the mean retention in % over all benchmarks, each with equal weight."""
    return sum(100.0 * scores[name] / value for name, value in original.items()) / len(original)


def paper_average(
    scores: Mapping[str, float], original: Mapping[str, float], full: Mapping[str, float]
) -> float | None:
    """Return the paper's AVG-%: 100 x sum of normalised scores / sum of the unpruned model's (arXiv 2604.24380).

    A score is normalised by the full score (800 for MME cognition, 2000 for MME perception), so benchmarks with high
    scores have more weight than in `mean_of_ratios`.
    """
    ours, theirs = (sum(side[name] / full[name] for name in original) for side in (scores, original))
    return 100.0 * ours / theirs if theirs else None


def average_interval(evaluation: RunEvaluation | OfControl, sets: Sets) -> tuple[float, float] | None:
    """Return the 95 % interval of `mean_of_ratios` over questions of independent sets; None if a set has none."""
    ends = {name: evaluation.retained_interval.get(name) for name in averaged_sets(sets)}
    middles = [evaluation.retained.get(name) for name in ends]
    sides = [
        (*pair, middle) for pair, middle in zip(ends.values(), middles, strict=True) if pair and middle is not None
    ]
    if len(sides) < len(ends) or evaluation.mean_of_ratios is None:
        return None
    below, above = (math.hypot(*(side[end] - side[2] for side in sides)) / len(sides) for end in (0, 1))
    return evaluation.mean_of_ratios - below, evaluation.mean_of_ratios + above


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


def best_run(runs: Sequence[Run], sets: Sets) -> Run:
    """Return the run with the highest mean retention; among equal ones, the smallest model."""
    if not runs:
        raise UserError("no model was evaluated: set evaluate.unrecovered, or add a recovery")

    def rank(run: Run) -> tuple[float, float, int]:
        scores = _averaged(run.evaluation.scores, sets).values()
        return -(run.evaluation.mean_of_ratios or 0.0), -sum(scores), run.parameters

    return min(runs, key=rank)


def averaged_sets(sets: Sets) -> list[str]:
    """Return the evaluation sets included in averages: those with a maximum score, or all if none has one."""
    return [name for name, metric in sets.items() if metric.full is not None] or list(sets)


def _values(evaluations: Evaluations) -> dict[str, Values]:
    return {name: dict(evaluated.values) for name, evaluated in evaluations.items()}


def _groups(evaluations: Evaluations) -> dict[str, dict[str, Group]]:
    return {
        name: evaluated.groups for name, evaluated in evaluations.items() if 0 < len(evaluated.groups) <= MOST_GROUPS
    }


def _retained(values: Values, original: Values, metric: MetricInfo) -> float | None:
    ours, theirs = values[metric.main], original[metric.main]
    if not metric.higher_is_better:
        ours, theirs = theirs, ours
    return 100.0 * ours / theirs if theirs else None


def _averaged(scores: Mapping[str, Values], sets: Sets) -> dict[str, float]:
    """Return {evaluation set: main value}, inverted if lower is better."""
    mains = {name: scores[name][sets[name].main] for name in averaged_sets(sets)}
    inverses = {name: 1 / value if value else math.inf for name, value in mains.items()}
    return {name: value if sets[name].higher_is_better else inverses[name] for name, value in mains.items()}


def benchmark_rows(run: Run, teacher: Unpruned, sets: Sets) -> list[tuple[str, str, str, str, str]]:
    """Return benchmark rows for the model card: set, both scores, retained %, interval; then measurable speeds.

    After a recovery with a control, each set has a second row, which compares with the unpruned model after training.
    """
    rows, control = list[tuple[str, str, str, str, str]](), run.evaluation.control
    for name, metric in sets.items():
        title = f"{name} ({metric.name}): {metric.label}, {metric.size}"
        ours = metric.show(run.evaluation.main(name, sets), unit=False)
        before = metric.show(teacher.evaluation.main(name, sets), unit=False)
        rows.append((title, before, ours, percent(run.evaluation.retained.get(name)), interval(run.evaluation, name)))
        if control is not None:
            alike = metric.show(control.scores[name].get(metric.main), unit=False)
            kept = percent(control.retained.get(name)), interval(control, name)
            rows.append((f"{name}, unpruned model after the same recovery", alike, ours, *kept))
    if (speed := run.speed) is not None:
        for what, after, speedup in (
            ("prompt", speed.prefill, speed.prefill_speedup),
            ("generated", speed.decode, speed.decode_speedup),
        ):
            label, times = f"{what} tokens per second, vlmprune's JAX forward pass on this run's machine", f"{speedup}"
            if speedup is not None and speedup.measurable:
                rows.append((label, f"{after / speedup.ratio:,.0f}", f"{after:,.0f}", f"{times} times as fast", ""))
            elif speedup is not None:
                rows.append((label, "", "", times, ""))
    return rows


def rounded_rows(
    run: Run, teacher: Unpruned, sets: Sets, rounded: Evaluations | None
) -> list[tuple[str, str, str, str, str]]:
    """Return benchmark rows for the card of a quantised export: scores after rounding, if evaluated, then before it.

    Speeds are left out, because they are those of the model before rounding. `run`: the model before rounding.
    """
    run = msgspec.structs.replace(run, speed=None)
    before = [(f"before rounding: {row[0]}", *row[1:]) for row in benchmark_rows(run, teacher, sets)]
    if rounded is None:
        return before
    control = run.evaluation.control
    if control is not None:
        control = msgspec.structs.replace(control, retained_interval=_intervals(rounded, "control_interval"))
    evaluation = msgspec.structs.replace(
        run.evaluation,
        scores=_values(rounded),
        retained_interval=_intervals(rounded, "retained_interval"),
        control=control,
    )
    evaluation = compare_again(evaluation, teacher.evaluation, sets)
    return benchmark_rows(msgspec.structs.replace(run, evaluation=evaluation), teacher, sets) + before


def percent(value: float | None) -> str:
    """Return a percentage as text without the sign; "" for None."""
    return "" if value is None else f"{value:.2f}"


def interval(evaluation: RunEvaluation | OfControl, name: str) -> str:
    """Return a retention interval as text, such as "95.1 to 97.3"; "" if unknown."""
    ends = evaluation.retained_interval.get(name)
    return "" if ends is None else show_interval(*ends)


def show_interval(low: float, high: float) -> str:
    """Return an interval as text, with one decimal, or as many (up to four) as make its two ends differ."""
    texts = ([f"{end:.{digits}f}" for end in (low, high)] for digits in (1, 2, 3, 4))
    return " to ".join(next((text for text in texts if text[0] != text[1]), [f"{low:.4f}", f"{high:.4f}"]))
