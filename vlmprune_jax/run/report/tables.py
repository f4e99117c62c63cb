"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.statistics import interval_of_mean
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.comparison import averaged_sets, percent, show_interval
from vlmprune_jax.run.workdir.groups import Comparison, ModelGroup, Retention
from vlmprune_jax.run.workdir.result import Model, ModelEvaluation, Result, Run, Sets
from vlmprune_jax.run.workdir.speed import SpeedUp

RETAINED, SIZE = "retained, %", "size, %"
LEADING = 5  # columns that come first: the model, its retentions, size and score
SPEEDUPS = {"decoding, x": "decode_speedup", "prompt, x": "prefill_speedup"}
SMALLEST_FIRST = (
    SIZE, "parameters", "active parameters", "MiB", "GFLOPs", "cache, bytes a token", "seconds",
)  # fmt: skip
IN_BRACKETS = " (95 % intervals in brackets)"


def tables_of(comparison: Comparison, *, runs: bool = False) -> list[Table]:
    """Return a table with one row per unpruned model, control and group of seeds, and those of `_set_tables`.

    The models of a run must not contain a model twice (see `Result.distinct`). Important columns come first: a narrow
    terminal leaves out the last columns, and a phone folds all but the first. `runs`: adds the names of the runs, which
    are the names of their folders.
    """
    sets, groups = comparison.sets, [*comparison.unpruned.values(), *comparison.controls, *comparison.groups]
    rows = [_row(group, comparison) | {"run": printable(group.name) if runs else ""} for group in groups]
    title = "Models" if len(sets) > 1 else f"Models on {next(iter(sets.values())).size}"
    if any(len(group.models) > 1 for group in groups):
        title += ", means over seeds"
    else:
        rows = [{**row, "seeds": ""} for row in rows]
    header = tuple(name for name in rows[0] if any(row[name] for row in rows))
    for row, group in zip(rows, groups, strict=True):
        row |= dict.fromkeys(SPEEDUPS, "1.00") if group.first.method == "none" else {}  # of the unpruned shape
    title += IN_BRACKETS if any("(" in row[RETAINED] for row in rows) else ""
    lower = tuple(_score_label(sets) for metric in sets.values() if not metric.higher_is_better and len(sets) == 1)
    table = Table(
        title,
        header,
        tuple(tuple(row[name] for name in header) for row in rows),
        first=sum(name in header for name in [*rows[0]][:LEADING]),
        ascending=(*SMALLEST_FIRST, *lower),
    )
    return [
        table,
        *_set_tables([(group.title, [model.evaluation for model in group.models]) for group in groups], sets),
    ]


def _row(group: ModelGroup, comparison: Comparison) -> dict[str, str]:
    """Return {column: cell} of a group of models, important columns first: means over its seeds."""
    models, sets, data = group.models, comparison.sets, group.first.data_fraction
    evaluations, pruned = [model.evaluation for model in models], group.first.method != "none"

    def cost(name: str, form: str, unit: float = 1.0) -> str:
        values = [getattr(model.costs, name, None) for model in models]
        return _mean((value / unit if value else None for value in values), form.format)

    score = _mean((model.paper_average for model in evaluations), percent)
    speedups = {column: speedup_of(models, part) for column, part in SPEEDUPS.items()}
    decoder = _mean((model.decoder_ratio for model in models), lambda ratio: f" ({100 * ratio:.1f})")
    parameters, active = f"{group.mean('parameters'):,.0f}", cost("active_parameters", "{:,.0f}")
    return {
        "model": group.title,
        RETAINED: show_retention(group.retained),
        "of control, %": show_retention(group.of_control),
        SIZE: comparison.size(group),
        _score_label(sets): score if len(sets) > 1 else _mean_score(evaluations, next(iter(sets)), sets),
        **{name: speedup.show(interval=False) if pruned and speedup else "" for name, speedup in speedups.items()},
        "seeds": f"{len(models)}" if group.name else "",  # the unpruned model has no name
        "removed, % (of decoder)": f"{100 * group.mean('actual_ratio'):.1f}{decoder}" if pruned else "",
        "data, %": f"{100 * data:g}" if data else "",
        "parameters": parameters,
        "active parameters": "" if active == parameters else active,
        "MiB": cost("file_bytes", "{:,.2f}", 2**20),
        "GFLOPs": cost("forward_flops", "{:,.3f}", 1e9),
        "cache, bytes a token": cost("kv_bytes_per_token", "{:,.0f}"),
        "seconds": _mean((model.seconds for model in models), "{:.1f}".format),
    }


def _score_label(sets: Sets) -> str:
    """Return the column name of the score: the metric of one evaluation set, or the average over several."""
    return "paper avg, %" if len(sets) > 1 else next(iter(sets.values())).label.replace(" in %", ", %")


def _mean(values: Iterable[float | None], form: Callable[[float], str]) -> str:
    """Return the mean of the known values as text; "" if no value is known."""
    known = [value for value in values if value is not None]
    return form(sum(known) / len(known)) if known else ""


def _mean_score(evaluations: Sequence[ModelEvaluation], name: str, sets: Sets) -> str:
    """Return the mean of an evaluation set's main value over seeds as text; "" if no model has this value."""
    return _mean((model.main(name, sets) for model in evaluations), lambda mean: sets[name].show(mean, unit=False))


def show_retention(retained: Retention | None, unit: str = "") -> str:
    """Return a mean retention as text, with its interval in brackets if it is known."""
    if retained is None:
        return ""
    mean, low, high = retained
    return percent(mean) + unit + (f" ({show_interval(low, high)})" if low < high else "")


def speedup_of(models: Sequence[Run], part: str) -> SpeedUp | None:
    """Return the mean speed-up over seeds; if a seed's is not measurable, that seed's; None if unknown."""
    speedups: list[SpeedUp | None] = [getattr(model.speed, part, None) for model in models]
    known = [speedup for speedup in speedups if speedup is not None and speedup.measurable]
    if len(known) < len(speedups) or len(speedups) < 2:
        return next((speedup for speedup in speedups if speedup not in known), speedups[0])
    ratio = sum(speedup.ratio for speedup in known) / len(known)
    low, high = min(speedup.low for speedup in known), max(speedup.high for speedup in known)
    return SpeedUp(ratio, low, high, spread=0.0)


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
    for name, groups in result.teacher.evaluation.groups.items():
        metric = result.sets[name]
        rows = [("questions", *(f"{values.questions:,}" for values in groups.values()))]
        for key, model in result.models:
            known = {group: row.values.get(metric.main) for group, row in model.evaluation.groups.get(name, {}).items()}
            values = {group: metric.scale * value for group, value in known.items() if value is not None}
            rows.append((result.labels[key], *(_mean([values.get(group)], "{:.1f}".format) for group in groups)))
        title = f"{metric.main[:1].upper()}{metric.main[1:]} by {metric.grouped_by}"
        yield Table(title if len(result.sets) == 1 else f"{name}: {title}", ("model", *groups), tuple(rows))
