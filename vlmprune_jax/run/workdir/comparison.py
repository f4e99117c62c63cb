"""Comparison of models by their evaluations: retention, averages, the best model, and rows of a model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.run.evaluation.metrics.texts import BITS
from vlmprune_jax.run.workdir.evaluation import Values
from vlmprune_jax.run.workdir.result import Costs, Evaluations, Model, ModelEvaluation, Run, Set, Sets
from vlmprune_jax.run.workdir.speed import MedianSpeed, SpeedUp

CardRow = tuple[str, str, str, str, str]  # cells of the model card's table
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
                sets[name] = replace(metric, main=BITS)
    return sets


def unpruned_of(
    evaluations: Evaluations, costs: Costs | None = None, speed: MedianSpeed | None = None, passthrough: int = 0
) -> Model:
    """Return the unpruned model's entry in `result.json`."""
    known = _evaluation(evaluations)
    evaluation = ModelEvaluation(scores=known.scores, groups=known.groups)
    parameters = next(iter(evaluations.values())).parameters
    return Model(parameters=parameters, passthrough=passthrough, evaluation=evaluation, costs=costs, speed=speed)


def compare(
    evaluations: Evaluations, teacher: Evaluations, control: Evaluations | None = None, sets: Sets | None = None
) -> ModelEvaluation:
    """Compare a model with the unpruned model, and with its control if there is one.

    `sets`: evaluation sets of all compared models (see `describe_sets`); None = the sets of these evaluations.
    """
    sets = describe_sets(teacher, [evaluations]) if sets is None else sets
    trained = None if control is None or control.keys() != teacher.keys() else _evaluation(control).scores
    return compare_again(_evaluation(evaluations, trained), _evaluation(teacher), sets)


def _evaluation(evaluations: Evaluations, control: dict[str, Values] | None = None) -> ModelEvaluation:
    """Return a model's evaluation without retention; `control`: scores of the control."""
    ends = {"retained_interval": dict[str, tuple[float, float]](), "control_interval": {}}
    for name, evaluated in evaluations.items():
        for kind, known in ends.items():
            known |= {} if (pair := getattr(evaluated, kind)) is None else {name: pair}
    trained = None
    if control is not None:
        trained = ModelEvaluation(scores=control, retained_interval=ends["control_interval"])
    groups = {name: evaluated.groups for name, evaluated in evaluations.items()}
    return ModelEvaluation(
        scores={name: dict(evaluated.values) for name, evaluated in evaluations.items()},
        groups={name: values for name, values in groups.items() if 0 < len(values) <= MOST_GROUPS},
        retained_interval=ends["retained_interval"],
        seconds=round(sum(evaluated.seconds for evaluated in evaluations.values()), 2),
        control=trained,
    )


def compare_again(model: ModelEvaluation, unpruned: ModelEvaluation, sets: Sets) -> ModelEvaluation:
    """Return a model's evaluation with retention recomputed from the main metrics in `sets`."""
    control = model.control
    if control is not None:
        control = replace(control, **_retention(model.scores, control.scores, sets))
    return replace(model, **_retention(model.scores, unpruned.scores, sets), control=control)


def _retention(scores: Mapping[str, Values], original: Mapping[str, Values], sets: Sets) -> dict[str, Any]:
    """Return a model's retention per evaluation set and on average."""
    ours, theirs = _averaged(scores, sets), _averaged(original, sets)
    theirs = {name: value for name, value in theirs.items() if value and math.isfinite(value)}
    ours = {name: ours[name] for name in theirs}
    full = {name: maximum for name in theirs if (maximum := sets[name].full) is not None}
    retained = dict[str, float | None]()
    for name, metric in sets.items():
        above, below = scores[name][metric.main], original[name][metric.main]
        above, below = (above, below) if metric.higher_is_better else (below, above)
        retained[name] = 100.0 * above / below if below else None
    return {
        "retained": retained,
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


def average_interval(evaluation: ModelEvaluation, sets: Sets) -> tuple[float, float] | None:
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


def _averaged(scores: Mapping[str, Values], sets: Sets) -> dict[str, float]:
    """Return {evaluation set: main value}, inverted if lower is better."""
    mains = {name: scores[name][sets[name].main] for name in averaged_sets(sets)}
    inverses = {name: 1 / value if value else math.inf for name, value in mains.items()}
    return {name: value if sets[name].higher_is_better else inverses[name] for name, value in mains.items()}


def benchmark_rows(run: Run, teacher: Model, sets: Sets) -> list[CardRow]:
    """Return benchmark rows for the model card: set, both scores, retained %, interval; then measurable speeds.

    After a recovery with a control, each set has a second row, which compares with the unpruned model after training.
    """
    rows, control = list[CardRow](), run.evaluation.control
    for name, metric in sets.items():
        title = f"{name} ({metric.name}): {metric.label}, {metric.size}"
        compared = [(title, teacher.evaluation, run.evaluation)]
        compared += [] if control is None else [(f"{name}, unpruned model after the same recovery", control, control)]
        for title, original, retention in compared:
            before, ours = (metric.show(of.main(name, sets), unit=False) for of in (original, run.evaluation))
            ends = retention.retained_interval.get(name)
            kept = percent(retention.retained.get(name)), "" if ends is None else show_interval(*ends)
            rows.append((title, before, ours, *kept))
    for what, part in (("prompt", "prefill"), ("generated", "decode")):
        speedup: SpeedUp | None = getattr(run.speed, f"{part}_speedup", None)
        if speedup is not None:
            label, after = f"{what} tokens per second, vlmprune's JAX forward pass on this run's machine", ("", "")
            if speedup.measurable:
                speed = getattr(run.speed, part)
                after = f"{speed / speedup.ratio:,.0f}", f"{speed:,.0f}"
            rows.append((label, *after, f"{speedup}{' times as fast' if speedup.measurable else ''}", ""))
    return rows


def rounded_rows(run: Run, teacher: Model, sets: Sets, rounded: Evaluations | None) -> list[CardRow]:
    """Return benchmark rows for the card of a quantised export: scores after rounding, if evaluated, then before it.

    Speeds are left out, because they are those of the model before rounding. `run`: the model before rounding.
    """
    run, control = replace(run, speed=None), run.evaluation.control
    before = [(f"before rounding: {row[0]}", *row[1:]) for row in benchmark_rows(run, teacher, sets)]
    if rounded is None:
        return before
    again = _evaluation(rounded, None if control is None else control.scores)
    evaluation = compare_again(again, teacher.evaluation, sets)
    return benchmark_rows(replace(run, evaluation=evaluation), teacher, sets) + before


def percent(value: float | None) -> str:
    """Return a percentage as text without the sign; "" for None."""
    return "" if value is None else f"{value:.2f}"


def show_interval(low: float, high: float) -> str:
    """Return an interval as text, with one decimal, or as many (up to four) as make its two ends differ."""
    texts = ([f"{end:.{digits}f}" for end in (low, high)] for digits in (1, 2, 3, 4))
    return " to ".join(next((text for text in texts if text[0] != text[1]), [f"{low:.4f}", f"{high:.4f}"]))
