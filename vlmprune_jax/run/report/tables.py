"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp
from vlmprune_jax.run.evaluation.statistics import holm, interval_of_mean, p_of_difference
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.comparison import averaged_sets, interval, percent, question_parts, show_interval
from vlmprune_jax.run.workdir.evaluation import UNPRUNED, Group
from vlmprune_jax.run.workdir.result import (
    Control,
    ModelEvaluation,
    OfControl,
    Result,
    Run,
    RunEvaluation,
    Set,
    Sets,
    Unpruned,
)
from vlmprune_jax.run.workdir.sweep import SweptModel, UnprunedModel, mean_retention

RETAINED, OF_CONTROL, SIZE, P_BEST = "retained, %", "of control, %", "size, %", "p against best"
SPEEDUPS = {"decoding, x": "decode_speedup", "prompt, x": "prefill_speedup"}
IN_BRACKETS = " (95 % intervals in brackets)"
REMOVED, COSTS = "removed, % (of decoder)", ("parameters", "active parameters", "MiB", "GFLOPs", "cache, bytes a token")
OTHERS = (*SPEEDUPS, P_BEST, "seeds", REMOVED, "data, %", *COSTS, "seconds", "run")  # columns after the score
P_NOTE = (
    " p against best: probability of a difference at least as large if this model and the best one were equally good "
    "(McNemar's exact test, or for several seeds Student's t over seeds and questions), corrected for the number of "
    "tests (Holm)."
)
SMALLEST_FIRST = (SIZE, *COSTS, "seconds")

Model = Control | Run | SweptModel


def tables_of(result: Result, workdir: Path | None = None) -> list[Table]:
    """Return the report's tables of all models, with scores and retention per evaluation set.

    `result` must not contain a model twice (see `Result.distinct`). Important columns come first: a narrow terminal
    leaves out the last columns, and a phone folds all but the first. `workdir`: adds names of runs (equal to the names
    of their folders), and p-values from the answers there.
    """
    sets, labels, teacher = result.sets, result.labels, result.teacher
    rows = [unpruned_row(labels[UNPRUNED], teacher, sets)]
    rows += [model_row(labels[entry.name], [entry], sets, teacher) for entry in result.entries]
    if workdir is not None:
        unpruned = teacher.evaluation
        questions = {
            run.name: [question_parts(workdir, run.path, run.evaluation, unpruned, sets)] for run in result.runs
        }
        p_values = p_against(result.best, questions)
        for row, entry in zip(rows[1:], result.entries, strict=True):
            row |= {P_BEST: p_values.get(entry.name, ""), "run": printable(entry.name)}
    title = "Models" if len(sets) > 1 else f"Models on {next(iter(sets.values())).size}"
    evaluations = [(labels[name], [model.evaluation]) for name, model in result.models]
    return [table_of_rows(title, rows, sets), *set_tables(evaluations, sets)]


def table_of_rows(title: str, rows: Sequence[Mapping[str, str]], sets: Sets) -> Table:
    """Return a table of rows {column: cell}, without empty columns."""
    for column in SPEEDUPS:
        if any(row.get(column) for row in rows):
            rows = [{column: "1.00", **row} for row in rows]  # the cells of models of the unpruned shape
    columns = ("model", RETAINED, OF_CONTROL, SIZE, score_label(sets), *OTHERS)
    header = tuple(name for name in columns if any(row.get(name) for row in rows))
    lower = tuple(score_label(sets) for metric in sets.values() if not metric.higher_is_better and len(sets) == 1)
    cells = tuple(tuple(row.get(name, "") for name in header) for row in rows)
    first = len({"model", RETAINED, OF_CONTROL, SIZE, score_label(sets)} & {*header})
    title += IN_BRACKETS if any("(" in row[RETAINED] for row in rows) else ""
    return Table(title, header, cells, first=first, ascending=(*SMALLEST_FIRST, *lower))


def model_row(label: str, models: Sequence[Model], sets: Sets, unpruned: Unpruned | UnprunedModel) -> dict[str, str]:
    """Return the cells {column: text} of a model: means over its seeds."""
    evaluations = [model.evaluation for model in models]
    pruned = [model for model in models if not isinstance(model, Control)]
    sizes = [model.parameters for model in pruned] or [unpruned.parameters]
    data = models[0].data_fraction
    seconds = [model.seconds for model in models if model.seconds is not None]
    return {
        "model": label,
        RETAINED: show_retention(mean_retention(evaluations, sets)),
        OF_CONTROL: show_retention(mean_retention([evaluation.control for evaluation in evaluations], sets)),
        SIZE: f"{100 * _mean(sizes) / unpruned.parameters:.1f}",
        score_label(sets): _score(evaluations, sets),
        **{column: _show_speedup(speedup_of(pruned, part)) for column, part in SPEEDUPS.items() if pruned},
        P_BEST: "",
        "seeds": f"{len(models)}" if isinstance(models[0], SweptModel) else "",
        REMOVED: _removed(pruned),
        "data, %": f"{100 * data:g}" if data else "",
        **(_costs(pruned) if pruned else _costs([unpruned])),
        "seconds": f"{_mean(seconds):.1f}" if seconds else "",
    }


def unpruned_row(label: str, model: Unpruned | UnprunedModel, sets: Sets) -> dict[str, str]:
    """Return the cells {column: text} of the unpruned model."""
    score = "100.00" if len(sets) > 1 else _score([model.evaluation], sets)
    return {"model": label, RETAINED: "100.00", SIZE: "100.0", score_label(sets): score, **_costs([model])}


def score_label(sets: Mapping[str, Set]) -> str:
    """Return the column name of the score: the metric of one evaluation set, or the average over several."""
    return "paper avg, %" if len(sets) > 1 else next(iter(sets.values())).label.replace(" in %", ", %")


def _score(evaluations: Sequence[ModelEvaluation], sets: Sets) -> str:
    """Return the cell of the column `score_label`."""
    if len(sets) == 1:
        return mean_score(evaluations, next(iter(sets)), sets)
    averages = [model.paper_average for model in evaluations if isinstance(model, RunEvaluation)]
    known = [value for value in averages if value is not None]
    return percent(_mean(known)) if known and len(known) == len(averages) else ""


def mean_score(evaluations: Sequence[ModelEvaluation], name: str, sets: Sets) -> str:
    """Return the mean of an evaluation set's main value over seeds as text; "" if no model has this value."""
    values = [value for model in evaluations if (value := model.main(name, sets)) is not None]
    return sets[name].show(_mean(values), unit=False) if values else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show_retention(retained: tuple[float, float, float] | None) -> str:
    """Return a mean retention as text, with its interval in brackets if it is known."""
    if retained is None:
        return ""
    mean, low, high = retained
    return percent(mean) + (f" ({show_interval(low, high)})" if low < high else "")


def speedup_of(models: Sequence[Run | SweptModel], part: str) -> SpeedUp | None:
    """Return the mean speed-up over seeds; if a seed's is not measurable, that seed's; None if unknown."""
    sides = [model.speed if isinstance(model, Run) else model for model in models]
    speedups: list[SpeedUp | None] = [getattr(side, part, None) for side in sides]
    unclear = [speedup for speedup in speedups if speedup is None or not speedup.measurable]
    if unclear or len(speedups) < 2:
        return (unclear or speedups)[0]
    known = [speedup for speedup in speedups if speedup is not None]
    lows, highs = [speedup.low for speedup in known], [speedup.high for speedup in known]
    return SpeedUp(_mean([speedup.ratio for speedup in known]), min(lows), max(highs), spread=0.0)


def _show_speedup(speedup: SpeedUp | None) -> str:
    return "" if speedup is None else speedup.show(interval=False)


def _removed(models: Sequence[Run | SweptModel]) -> str:
    """Return the removed shares of all parameters and of the decoder's as text."""
    if not models:
        return ""
    decoder = [model.decoder_ratio for model in models if model.decoder_ratio is not None]
    whole = f"{100 * _mean([model.actual_ratio for model in models]):.1f}"
    return whole + (f" ({100 * _mean(decoder):.1f})" if decoder else "")


def _costs(models: Sequence[Run | SweptModel | Unpruned | UnprunedModel]) -> dict[str, str]:
    """Return the cells of parameters and of the costs of a prompt."""
    sizes, costs = [model.parameters for model in models], [model.costs for model in models]
    cells = {"parameters": f"{_mean(sizes):,.0f}"}
    known = [cost for cost in costs if cost is not None]
    if not known:
        return cells
    active = [cost.active_parameters for cost in known if cost.active_parameters is not None]
    cache = _mean([cost.kv_bytes_per_token for cost in known])
    return cells | {
        "active parameters": f"{_mean(active):,.0f}" if active and active != sizes else "",
        "MiB": f"{_mean([cost.file_bytes for cost in known]) / 2**20:,.2f}",
        "GFLOPs": f"{_mean([cost.forward_flops for cost in known]) / 1e9:,.3f}",
        "cache, bytes a token": f"{cache:,.0f}" if cache else "",
    }


def set_tables(models: Sequence[tuple[str, Sequence[ModelEvaluation]]], sets: Sets) -> list[Table]:
    """Return tables of scores and of retention per evaluation set, if there are several.

    `models`: (name, evaluations of its seeds), the unpruned model first.
    """
    if len(sets) == 1:
        return []
    scores = [(label, *(mean_score(seeds, name, sets) for name in sets)) for label, seeds in models]
    kept = list[tuple[str, ...]]()
    for label, seeds in models:
        runs = [model for model in seeds if isinstance(model, RunEvaluation)]
        controls = [model.control for model in runs if model.control is not None]
        for title, compared in ((label, runs), (f"{label}, of control", controls)):
            if compared:
                kept.append((title, *(_retained(compared, name) for name in sets)))
    smallest = tuple(name for name, metric in sets.items() if not metric.higher_is_better)
    titles = ", ".join(f"{name}: {metric.label}" for name, metric in sets.items())
    title = f"Retained of each, in %{IN_BRACKETS if any('(' in cell for _, *row in kept for cell in row) else ''}"
    return [
        Table(titles, ("model", *sets), tuple(scores), ascending=smallest),
        Table(title, ("model", *sets), tuple(kept)),
    ]


def _retained(models: Sequence[RunEvaluation | OfControl], name: str) -> str:
    """Return the mean retention of seeds on an evaluation set as text, with its interval."""
    values = [value for model in models if (value := model.retained.get(name)) is not None]
    intervals = [model.retained_interval.get(name) for model in models]
    return show_retention(interval_of_mean(values, intervals)) if len(values) == len(models) else ""


def p_against(best: str, questions: Mapping[str, Sequence[np.ndarray | None]]) -> dict[str, str]:
    """Return {model: p-value as text} of tests against the model `best`, corrected for their number (Holm).

    `questions`: every model's `question_parts`, one array per seed. Models with missing answers are not tested.
    """
    scores = dict[str, np.ndarray]()
    for name, seeds in questions.items():
        known = [part for part in seeds if part is not None]
        if known and len(known) == len(seeds) and len({len(part) for part in known}) == 1:
            scores[name] = np.stack(known)
    if best not in scores:
        return {}
    reference = scores.pop(best)
    others = {name: values for name, values in scores.items() if values.shape[1] == reference.shape[1]}
    adjusted = holm([p_of_difference(reference, values) for values in others.values()])
    return {name: f"{p:.3f}" if p >= 0.001 else "< 0.001" for name, p in zip(others, adjusted, strict=True)}


def lead(result: Result) -> str:
    """Return one sentence on the best model's retention, size and speed."""
    run, teacher = result.best_run, result.teacher
    among = f"Best of {len(result.runs)} models: " if len(result.runs) > 1 else ""
    trained = f" (trained on {100 * run.data_fraction:g} % of the data)" if run.data_fraction else ""
    decoder = "" if run.decoder_ratio is None else f", {100 * run.decoder_ratio:.1f} % of the decoder"
    size = f"{100 * (1 - run.parameters / teacher.parameters):.1f} % fewer parameters"
    files = ""
    if run.costs is not None and teacher.costs is not None:
        files = f"; {teacher.costs.file_bytes / 1e6:,.3g} to {run.costs.file_bytes / 1e6:,.3g} MB"
    speeds = ", ".join(f"{name} {speedup}" for name, speedup in _speedups(run).items())
    speed = speeds and f" Speed as a multiple of the unpruned model's: {speeds}."
    smaller = f", with {size} ({teacher.parameters:,} to {run.parameters:,}{decoder}{files})"
    return (
        f"{among}{result.labels[run.name]}{trained} {_scores(run, result)}{'' if run.method == 'none' else smaller}."
        f"{speed}"
    )


def key_numbers(result: Result) -> list[tuple[str, str]]:
    """Return the best model's retention, size and speed as (name, value) pairs."""
    run = result.best_run
    kept = {"retained": run.evaluation, "of control": run.evaluation.control}
    numbers = [
        (name, f"{percent(evaluation.mean_of_ratios)} %")
        for name, evaluation in kept.items()
        if evaluation and evaluation.mean_of_ratios
    ]
    numbers.append(("size", f"{100 * run.parameters / result.teacher.parameters:.1f} %"))
    speedups = _speedups(run).items()
    return numbers + [
        (f"{name} speed", f"{speedup.show(interval=False)} x") for name, speedup in speedups if speedup.measurable
    ]


def _speedups(run: Run) -> dict[str, SpeedUp]:
    """Return a model's speed-ups in decoding and in reading prompts; {} if its speed was not measured."""
    speed = run.speed
    known = {} if speed is None else {"decoding": speed.decode_speedup, "prompt": speed.prefill_speedup}
    return {name: speedup for name, speedup in known.items() if speedup is not None}


def parameter_note(teacher: Unpruned) -> str:
    """Return a note if transformers counts more parameters for a model than vlmprune does."""
    if not teacher.passthrough:
        return ""
    return (
        f"Parameters are those that the model computes with, and ratios refer to them. num_parameters() of "
        f"transformers also counts {teacher.passthrough:,} in unused tower layers or an audio tower "
        f"({teacher.parameters + teacher.passthrough:,} unpruned)."
    )


def _scores(run: Run, result: Result) -> str:
    sets, kept = result.sets, _share(run.evaluation, result.sets)
    share = f"retains {kept} of the unpruned score" if kept else "retains an unknown share of the score"
    control = run.evaluation.control
    if control is not None and control.mean_of_ratios is not None:
        alike = f"{_share(control, sets)} of the score of the unpruned model after the same recovery"
        share = f"retains {alike}, and {kept} of the unpruned score"
    if len(sets) > 1:
        return f"{share} {over(sets)}"
    [metric] = sets.values()
    ours, theirs = (metric.show(model.evaluation.main(name, sets)) for name in sets for model in (run, result.teacher))
    return f"{share} ({metric.main} {ours} on {metric.size}, unpruned {theirs})"


def _share(evaluation: RunEvaluation | OfControl, sets: Mapping[str, Set]) -> str:
    """Return the mean retention as text, for one evaluation set with its interval; "" if unknown."""
    kept, ends = percent(evaluation.mean_of_ratios), ""
    if len(sets) == 1:
        ends = interval(evaluation, next(iter(sets)))
    return kept and f"{kept} %{f' (95 % interval {ends})' if ends else ''}"


def over(sets: Mapping[str, Set]) -> str:
    """Return text naming the evaluation sets over which an average is taken."""
    averaged = averaged_sets(sets)
    return f"on {averaged[0]}" if len(averaged) == 1 else f"on average over {len(averaged)} evaluation sets"


def groups_of(result: Result) -> Iterator[Table]:
    """Yield one table per evaluation set with grouped questions: values by group, one row per model."""
    sets = result.sets
    for name, groups in result.teacher.evaluation.groups.items():
        metric = sets[name]
        rows = [
            (
                result.labels[key],
                *(_group_value(model.evaluation.groups.get(name, {}), group, metric) for group in groups),
            )
            for key, model in result.models
        ]
        rows.insert(0, ("questions", *(f"{values.questions:,}" for values in groups.values())))
        title = f"{metric.main[:1].upper()}{metric.main[1:]} by {metric.grouped_by}"
        yield Table(title if len(sets) == 1 else f"{name}: {title}", ("model", *groups), tuple(rows))


def _group_value(groups: Mapping[str, Group], group: str, metric: Set) -> str:
    value = groups[group].values.get(metric.main) if group in groups else None
    return "" if value is None else f"{metric.scale * value:.1f}"
