"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.speed.ratio import SpeedUp
from vlmprune_jax.run.report.page import Table
from vlmprune_jax.run.workdir.comparison import averaged_sets, interval, percent
from vlmprune_jax.run.workdir.evaluation import Group
from vlmprune_jax.run.workdir.result import OfControl, Result, Run, RunEvaluation, Set, Unpruned

SIZE, DECODE, PROMPT, OF_CONTROL = "size, %", "decoding, x", "prompt, x", "of control, %"
IN_BRACKETS = " (95 % intervals of retained in brackets)"
SMALLEST_FIRST = (SIZE, "parameters", "seconds")


def tables_of(result: Result, *, names: bool = False) -> list[Table]:
    """Return the report's summary tables of all models, with scores and retention per evaluation set.

    `result` must not contain a model twice (see `Result.distinct`). Important columns come first: a narrow terminal
    leaves out the last columns, and a phone folds all but the first. `names`: add a column with the names of runs
    (equal to the names of their folders).
    """
    sets, labels, models = result.sets, result.labels, result.models
    columns = [("model", [labels[name] for name, _ in models]), *_quality(result), *_made(result)]
    if names:
        columns.append(("run", ["", *(printable(entry.name) for entry in result.entries)]))
    columns = [(name, cells) for name, cells in columns if any(cells)]
    order = ["model", "retained, %", OF_CONTROL, SIZE, _score_label(sets)]
    columns.sort(key=lambda column: order.index(column[0]) if column[0] in order else len(order))
    has_intervals = any(run.evaluation.retained_interval for run in result.runs)
    rows = tuple(zip(*(cells for _, cells in columns), strict=True))
    lower = tuple(metric.main for metric in sets.values() if not metric.higher_is_better)
    what = "Models"
    if len(sets) == 1:
        what += f" on {next(iter(sets.values())).size}{IN_BRACKETS if has_intervals else ''}"
    header = tuple(name for name, _ in columns)
    summary = Table(what, header, rows, first=len({*order} & {*header}), ascending=(*SMALLEST_FIRST, *lower))
    if len(sets) == 1:
        return [summary]
    scores = [
        (labels[key], *(metric.show(model.evaluation.main(name, sets), unit=False) for name, metric in sets.items()))
        for key, model in models
    ]
    kept = [(labels[entry.name], *(_kept(entry.evaluation, name) for name in sets)) for entry in result.entries]
    kept += [
        (f"{labels[run.name]}, of control", *(_kept(run.evaluation.control, name) for name in sets))
        for run in result.runs
        if run.evaluation.control is not None
    ]
    smallest = tuple(name for name, metric in sets.items() if not metric.higher_is_better)
    titles = ", ".join(f"{name}: {metric.label}" for name, metric in sets.items())
    title = f"Retained of each, in %{IN_BRACKETS if has_intervals else ''}"
    return [
        summary,
        Table(titles, ("model", *sets), tuple(scores), ascending=smallest),
        Table(title, ("model", *sets), tuple(kept)),
    ]


def _quality(result: Result) -> Iterator[tuple[str, list[str]]]:
    """Yield table columns of retention and score: with intervals for one evaluation set, averages for several."""
    models, sets = [entry.evaluation for entry in result.entries], result.sets
    controls = [model.control for model in models]
    if len(sets) > 1:
        kept = [percent(model.mean_of_ratios) for model in models]
        of_control = ["" if control is None else percent(control.mean_of_ratios) for control in controls]
        scores = [percent(value) for value in (100.0, *(model.paper_average for model in models))]
    else:
        [(name, metric)] = sets.items()
        kept = [_kept(model, name) for model in models]
        of_control = ["" if control is None else _kept(control, name) for control in controls]
        scores = [metric.show(model.evaluation.main(name, sets), unit=False) for _, model in result.models]
    yield "retained, %", [percent(100.0), *kept]
    yield OF_CONTROL, ["", *of_control]
    yield _score_label(sets), scores


def _score_label(sets: Mapping[str, Set]) -> str:
    """Return the column name of the score: the metric of one evaluation set, or the average over several."""
    return "paper avg, %" if len(sets) > 1 else next(iter(sets.values())).label.replace(" in %", ", %")


def _made(result: Result) -> Iterator[tuple[str, list[str]]]:
    """Yield table columns with every model's size, speed, pruning method and recovery."""
    runs, teacher, controls = result.runs, result.teacher, [""] * len(result.controls)
    whole = ["100.0"] * (1 + len(controls))
    yield SIZE, [*whole, *(f"{100 * run.parameters / teacher.parameters:.1f}" for run in runs)]
    for column, name in ((DECODE, "decode_speedup"), (PROMPT, "prefill_speedup")):
        known = [None if run.speed is None else getattr(run.speed, name) for run in runs]
        same = ["1.00" if any(known) else ""] * (1 + len(controls))
        yield column, [*same, *("" if speedup is None else speedup.show(interval=False) for speedup in known)]
    yield "removed, % (of decoder)", ["", *controls, *map(_removed, runs)]
    yield "data, %", ["", *(f"{100 * row.data_fraction:g}" if row.data_fraction else "" for row in result.entries)]
    if teacher.costs is None:  # else a table has the costs by shape
        sizes = [teacher.parameters] * (1 + len(controls)) + [run.parameters for run in runs]
        yield "parameters", [f"{size:,}" for size in sizes]
    yield "seconds", ["", *("" if row.seconds is None else f"{row.seconds:.1f}" for row in result.entries)]


def _removed(run: Run) -> str:
    decoder = "" if run.decoder_ratio is None else f" ({100 * run.decoder_ratio:.1f})"
    return f"{100 * run.actual_ratio:.1f}{decoder}"


def _kept(evaluation: RunEvaluation | OfControl, name: str) -> str:
    """Return a model's retention on an evaluation set as text, with its interval."""
    ends = interval(evaluation, name)
    return percent(evaluation.retained.get(name)) + (ends and f" ({ends})")


def upper(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


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
        title = f"{upper(metric.main)} by {metric.grouped_by}"
        yield Table(title if len(sets) == 1 else f"{name}: {title}", ("model", *groups), tuple(rows))


def _group_value(groups: Mapping[str, Group], group: str, metric: Set) -> str:
    value = groups[group].values.get(metric.main) if group in groups else None
    return "" if value is None else f"{metric.scale * value:.1f}"
