"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.comparison import averaged_sets, percent, show_interval
from vlmprune_jax.run.workdir.evaluation import Group
from vlmprune_jax.run.workdir.groups import Comparison, ModelGroup, Retention
from vlmprune_jax.run.workdir.result import Model, ModelEvaluation, Result, Run, Set, Sets
from vlmprune_jax.run.workdir.speed import SpeedUp

RETAINED, OF_CONTROL, SIZE = "retained, %", "of control, %", "size, %"
SPEEDUPS = {"decoding, x": "decode_speedup", "prompt, x": "prefill_speedup"}
IN_BRACKETS = " (95 % intervals in brackets)"
REMOVED, COSTS = "removed, % (of decoder)", ("parameters", "active parameters", "MiB", "GFLOPs", "cache, bytes a token")
OTHERS = (*SPEEDUPS, "seeds", REMOVED, "data, %", *COSTS, "seconds", "run")  # columns after the score
SMALLEST_FIRST = (SIZE, *COSTS, "seconds")


def tables_of(comparison: Comparison, *, runs: bool = False) -> list[Table]:
    """Return a table with one row per unpruned model, control and group of seeds, and those of `_set_tables`.

    The models of a run must not contain a model twice (see `Result.distinct`). Important columns come first: a narrow
    terminal leaves out the last columns, and a phone folds all but the first. `runs`: adds the names of the runs, which
    are the names of their folders.
    """
    sets = comparison.sets
    groups = [*comparison.unpruned.values(), *comparison.controls, *comparison.groups]
    rows = [_row(group, comparison) | {"run": printable(group.name) if runs else ""} for group in groups]
    title = "Models" if len(sets) > 1 else f"Models on {next(iter(sets.values())).size}"
    if any(len(group.models) > 1 for group in groups):
        title += ", means over seeds"
    else:
        rows = [{**row, "seeds": ""} for row in rows]
    models = [(group.title, [model.evaluation for model in group.models]) for group in groups]
    return [_table_of_rows(title, rows, sets), *_set_tables(models, sets)]


def _table_of_rows(title: str, rows: Sequence[Mapping[str, str]], sets: Sets) -> Table:
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


def _row(group: ModelGroup, comparison: Comparison) -> dict[str, str]:
    """Return the cells {column: text} of a group of models: means over its seeds."""
    evaluations = [model.evaluation for model in group.models]
    seconds = [model.seconds for model in group.models if model.seconds is not None]
    data, sets, pruned = group.first.data_fraction, comparison.sets, group.first.method != "none"
    return {
        "model": group.title,
        RETAINED: show_retention(group.retained),
        OF_CONTROL: show_retention(group.of_control),
        SIZE: comparison.size(group),
        score_label(sets): _score(evaluations, sets),
        **{column: _show_speedup(speedup_of(group.models, part)) for column, part in SPEEDUPS.items() if pruned},
        "seeds": f"{len(group.models)}" if group.name else "",  # the unpruned model has no name
        REMOVED: _removed(group.models) if pruned else "",
        "data, %": f"{100 * data:g}" if data else "",
        **_costs(group.models),
        "seconds": f"{_mean(seconds):.1f}" if seconds else "",
    }


def score_label(sets: Mapping[str, Set]) -> str:
    """Return the column name of the score: the metric of one evaluation set, or the average over several."""
    return "paper avg, %" if len(sets) > 1 else next(iter(sets.values())).label.replace(" in %", ", %")


def _score(evaluations: Sequence[ModelEvaluation], sets: Sets) -> str:
    """Return the cell of the column `score_label`."""
    if len(sets) == 1:
        return _mean_score(evaluations, next(iter(sets)), sets)
    known = [model.paper_average for model in evaluations if model.paper_average is not None]
    return percent(_mean(known)) if len(known) == len(evaluations) else ""


def _mean_score(evaluations: Sequence[ModelEvaluation], name: str, sets: Sets) -> str:
    """Return the mean of an evaluation set's main value over seeds as text; "" if no model has this value."""
    values = [value for model in evaluations if (value := model.main(name, sets)) is not None]
    return sets[name].show(_mean(values), unit=False) if values else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show_retention(retained: Retention | None, unit: str = "") -> str:
    """Return a mean retention as text, with its interval in brackets if it is known."""
    if retained is None:
        return ""
    mean, low, high = retained
    return percent(mean) + unit + (f" ({show_interval(low, high)})" if low < high else "")


def speedup_of(models: Sequence[Run], part: str) -> SpeedUp | None:
    """Return the mean speed-up over seeds; if a seed's is not measurable, that seed's; None if unknown."""
    speedups: list[SpeedUp | None] = [getattr(model.speed, part, None) for model in models]
    unclear = [speedup for speedup in speedups if speedup is None or not speedup.measurable]
    if unclear or len(speedups) < 2:
        return (unclear or speedups)[0]
    known = [speedup for speedup in speedups if speedup is not None]
    lows, highs = [speedup.low for speedup in known], [speedup.high for speedup in known]
    return SpeedUp(_mean([speedup.ratio for speedup in known]), min(lows), max(highs), spread=0.0)


def _show_speedup(speedup: SpeedUp | None) -> str:
    return "" if speedup is None else speedup.show(interval=False)


def _removed(models: Sequence[Run]) -> str:
    """Return the removed shares of all parameters and of the decoder's as text."""
    decoder = [model.decoder_ratio for model in models if model.decoder_ratio is not None]
    whole = f"{100 * _mean([model.actual_ratio for model in models]):.1f}"
    return whole + (f" ({100 * _mean(decoder):.1f})" if decoder else "")


def _costs(models: Sequence[Model]) -> dict[str, str]:
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


def _set_tables(models: Sequence[tuple[str, Sequence[ModelEvaluation]]], sets: Sets) -> list[Table]:
    """Return tables of scores and of retention per evaluation set, if there are several.

    `models`: (name, evaluations of its seeds), the unpruned model first.
    """
    if len(sets) == 1:
        return []
    scores = [(label, *(_mean_score(seeds, name, sets) for name in sets)) for label, seeds in models]
    kept = list[tuple[str, ...]]()
    for label, seeds in models:
        controls = [model.control for model in seeds if model.control is not None]
        for title, compared in ((label, seeds), (f"{label}, of control", controls)):
            if compared and compared[0].retained:
                kept.append((title, *(_retained(compared, name) for name in sets)))
    smallest = tuple(name for name, metric in sets.items() if not metric.higher_is_better)
    titles = ", ".join(f"{name}: {metric.label}" for name, metric in sets.items())
    title = f"Retained of each, in %{IN_BRACKETS if any('(' in cell for _, *row in kept for cell in row) else ''}"
    return [
        Table(titles, ("model", *sets), tuple(scores), ascending=smallest),
        Table(title, ("model", *sets), tuple(kept)),
    ]


def _retained(models: Sequence[ModelEvaluation], name: str) -> str:
    """Return the mean retention of seeds on an evaluation set as text, with its interval."""
    values = [value for model in models if (value := model.retained.get(name)) is not None]
    intervals = [model.retained_interval.get(name) for model in models]
    return show_retention(interval_of_mean(values, intervals)) if len(values) == len(models) else ""


def key_numbers(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the best model's retention, size and speed as (name, value) pairs; [] if no retention is known."""
    best = comparison.best
    if best is None:
        return []
    averaged = averaged_sets(comparison.sets)
    mean = f" (mean of {len(averaged)} sets)" if len(averaged) > 1 else ""
    numbers = {
        f"retained{mean}": show_retention(best.retained, " %"),
        "of control": show_retention(best.of_control, " %"),
        "size": f"{comparison.size(best)} %",
        "decoding speed-up": str(speedup_of(best.models, "decode_speedup") or ""),
        "prompt speed-up": str(speedup_of(best.models, "prefill_speedup") or ""),
    }
    return [(name, value) for name, value in numbers.items() if value]


def lead(comparison: Comparison) -> str:
    """Return one line with the best model and its key numbers; "" if no retention is known."""
    best, numbers = comparison.best, map(" ".join, key_numbers(comparison))
    among = f"Best of {len(comparison.groups)} models: " if len(comparison.groups) > 1 else ""
    return "" if best is None else "; ".join([f"{among}{best.title}", *numbers])


def parameter_note(teacher: Model) -> str:
    """Return a note if transformers counts more parameters for a model than vlmprune does."""
    if not teacher.passthrough:
        return ""
    return (
        f"Parameters are those that the model computes with, and ratios refer to them. num_parameters() of "
        f"transformers also counts {teacher.passthrough:,} in unused tower layers or an audio tower "
        f"({teacher.parameters + teacher.passthrough:,} unpruned)."
    )


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
