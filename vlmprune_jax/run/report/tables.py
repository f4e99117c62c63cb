"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp
from vlmprune_jax.run.evaluation.statistics import holm, interval_of_mean, p_of_difference
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.comparison import averaged_sets, percent, question_parts, show_interval
from vlmprune_jax.run.workdir.evaluation import Group
from vlmprune_jax.run.workdir.groups import Comparison, ModelGroup, Retention
from vlmprune_jax.run.workdir.result import (
    ModelEvaluation,
    OfControl,
    Result,
    Run,
    RunEvaluation,
    Set,
    Sets,
    Unpruned,
)

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


def tables_of(comparison: Comparison, workdir: Path | None = None) -> list[Table]:
    """Return a table with one row per unpruned model, control and group of seeds, and those of `set_tables`.

    The models of a run must not contain a model twice (see `Result.distinct`). Important columns come first: a narrow
    terminal leaves out the last columns, and a phone folds all but the first. `workdir`: adds names of runs (equal to
    the names of their folders), and p-values from the answers there.
    """
    sets, groups, titles = comparison.sets, comparison.groups, comparison.unpruned_titles
    trained = [*comparison.controls, *groups]
    rows = [_unpruned_row(titles[key], model, sets) for key, model in comparison.unpruned.items()]
    rows += [_model_row(group, comparison) for group in trained]
    if workdir is not None:
        p_values = _p_against_best(comparison, workdir)
        for row, group in zip(rows[len(titles) :], trained, strict=True):
            row |= {P_BEST: p_values.get(group.name, ""), "run": printable(group.name)}
    title = "Models" if len(sets) > 1 else f"Models on {next(iter(sets.values())).size}"
    if any(len(group.models) > 1 for group in groups):
        title += ", means over seeds"
    else:
        rows = [{**row, "seeds": ""} for row in rows]
    models = [(titles[key], [model.evaluation]) for key, model in comparison.unpruned.items()]
    models += [(group.title, [model.evaluation for model in group.models]) for group in trained]
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


def _model_row(group: ModelGroup, comparison: Comparison) -> dict[str, str]:
    """Return the cells {column: text} of a group of models: means over its seeds."""
    evaluations = [model.evaluation for model in group.models]
    seconds = [model.seconds for model in group.models if model.seconds is not None]
    data, sets, pruned = group.first.data_fraction, comparison.sets, group.first.method != "none"
    return {
        "model": group.title,
        RETAINED: show_retention(group.retained),
        OF_CONTROL: show_retention(group.of_control),
        SIZE: f"{100 * group.mean('parameters') / comparison.original(group).parameters:.1f}",
        score_label(sets): _score(evaluations, sets),
        **{column: _show_speedup(speedup_of(group.models, part)) for column, part in SPEEDUPS.items() if pruned},
        P_BEST: "",
        "seeds": f"{len(group.models)}",
        REMOVED: _removed(group.models) if pruned else "",
        "data, %": f"{100 * data:g}" if data else "",
        **_costs(group.models),
        "seconds": f"{_mean(seconds):.1f}" if seconds else "",
    }


def _unpruned_row(label: str, model: Unpruned, sets: Sets) -> dict[str, str]:
    """Return the cells {column: text} of the unpruned model."""
    score = "100.00" if len(sets) > 1 else _score([model.evaluation], sets)
    return {"model": label, RETAINED: "100.00", SIZE: "100.0", score_label(sets): score, **_costs([model])}


def score_label(sets: Mapping[str, Set]) -> str:
    """Return the column name of the score: the metric of one evaluation set, or the average over several."""
    return "paper avg, %" if len(sets) > 1 else next(iter(sets.values())).label.replace(" in %", ", %")


def _score(evaluations: Sequence[ModelEvaluation], sets: Sets) -> str:
    """Return the cell of the column `score_label`."""
    if len(sets) == 1:
        return _mean_score(evaluations, next(iter(sets)), sets)
    averages = [model.paper_average for model in evaluations if isinstance(model, RunEvaluation)]
    known = [value for value in averages if value is not None]
    return percent(_mean(known)) if known and len(known) == len(averages) else ""


def _mean_score(evaluations: Sequence[ModelEvaluation], name: str, sets: Sets) -> str:
    """Return the mean of an evaluation set's main value over seeds as text; "" if no model has this value."""
    values = [value for model in evaluations if (value := model.main(name, sets)) is not None]
    return sets[name].show(_mean(values), unit=False) if values else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show_retention(retained: Retention | None) -> str:
    """Return a mean retention as text, with its interval in brackets if it is known."""
    if retained is None:
        return ""
    mean, low, high = retained
    return percent(mean) + (f" ({show_interval(low, high)})" if low < high else "")


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


def _costs(models: Sequence[Run | Unpruned]) -> dict[str, str]:
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


def _p_against_best(comparison: Comparison, workdir: Path) -> dict[str, str]:
    """Return {group: p-value as text} of tests against the best group, corrected for their number (Holm).

    Groups with models whose answers are not in the workdir are not tested.
    """
    scores = dict[str, np.ndarray]()
    for group in comparison.groups:
        original = comparison.original(group).evaluation
        seeds = [
            question_parts(workdir, model.path, model.evaluation, original, comparison.sets) for model in group.models
        ]
        known = [part for part in seeds if part is not None]
        if len(known) == len(seeds) and len({len(part) for part in known}) == 1:
            scores[group.name] = np.stack(known)
    if comparison.best is None or comparison.best.name not in scores:
        return {}
    reference = scores.pop(comparison.best.name)
    others = {name: values for name, values in scores.items() if values.shape[1] == reference.shape[1]}
    adjusted = holm([p_of_difference(reference, values) for values in others.values()])
    return {name: f"{p:.3f}" if p >= 0.001 else "< 0.001" for name, p in zip(others, adjusted, strict=True)}


def lead(comparison: Comparison) -> str:
    """Return one sentence on the best model's retention, size and speed; "" if no retention is known."""
    best, sets = comparison.best, comparison.sets
    if best is None:
        return ""
    unpruned, data = comparison.original(best), best.first.data_fraction
    among = f"Best of {len(comparison.groups)} models: " if len(comparison.groups) > 1 else ""
    share = f" (trained on {100 * data:g} % of the data)"
    trained = share if data and not best.title.endswith("of the data") else ""
    kept = f"{_percent_of(best.retained)} of the unpruned score" if best.retained else "an unknown share of the score"
    if best.of_control is not None:
        kept = f"{_percent_of(best.of_control)} of the score of the unpruned model after the same recovery, and {kept}"
    if len(sets) > 1:
        kept += f" {over(sets)}"
    else:
        [(name, metric)] = sets.items()
        ours = metric.show(_mean([model.evaluation.main(name, sets) or 0.0 for model in best.models]))
        theirs = metric.show(unpruned.evaluation.main(name, sets))
        kept += f" ({metric.main} {ours} on {metric.size}, unpruned {theirs})"
    smaller = "" if best.first.method == "none" else f", with {_reduction(best, unpruned)}"
    speeds = ", ".join(f"{name} {speedup}" for name, speedup in _speedups(best).items())
    speed = speeds and f" Speed as a multiple of the unpruned model's: {speeds}."
    return f"{among}{best.title}{trained} retains {kept}{smaller}.{speed}"


def _percent_of(retained: Retention) -> str:
    """Return a mean retention as text, such as "95.00 % (95 % interval 94.0 to 96.0)"."""
    mean, low, high = retained
    return f"{percent(mean)} %" + (f" (95 % interval {show_interval(low, high)})" if low < high else "")


def _reduction(group: ModelGroup, unpruned: Unpruned) -> str:
    """Return by how much models are smaller than the unpruned one: parameters, and size of the weights."""
    size, before = group.mean("parameters"), unpruned.parameters
    ratio = group.mean("decoder_ratio")
    decoder = f", {100 * ratio:.1f} % of the decoder" if ratio else ""
    costs, files = [model.costs.file_bytes for model in group.models if model.costs is not None], ""
    if costs and unpruned.costs is not None:
        files = f"; {unpruned.costs.file_bytes / 1e6:,.3g} to {_mean(costs) / 1e6:,.3g} MB"
    return f"{100 * (1 - size / before):.1f} % fewer parameters ({before:,} to {size:,.0f}{decoder}{files})"


def key_numbers(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the best model's retention, size and speed as (name, value) pairs."""
    best = comparison.best
    if best is None:
        return []
    kept = {"retained": best.retained, "of control": best.of_control}
    numbers = [(name, f"{percent(retained[0])} %") for name, retained in kept.items() if retained]
    numbers.append(("size", f"{100 * best.mean('parameters') / comparison.original(best).parameters:.1f} %"))
    speedups = _speedups(best).items()
    return numbers + [
        (f"{name} speed", f"{speedup.show(interval=False)} x") for name, speedup in speedups if speedup.measurable
    ]


def _speedups(group: ModelGroup) -> dict[str, SpeedUp]:
    """Return the speed-ups of models in decoding and in reading prompts; {} if their speed was not measured."""
    known = {name: speedup_of(group.models, f"{part}_speedup")
             for name, part in {"decoding": "decode", "prompt": "prefill"}.items()}  # fmt: skip
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
