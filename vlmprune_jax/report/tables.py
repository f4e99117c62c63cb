"""Tables of all models and evaluation sets, for the terminal and the page, and sentences about the best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlmprune_jax.core.errors import printable
from vlmprune_jax.report.page import Table
from vlmprune_jax.workdir.evaluation import UNPRUNED, Group
from vlmprune_jax.workdir.result import Result, Run, Set, Unpruned, averaged_sets, interval, percent


def tables_of(result: Result, *, names: bool = False) -> list[Table]:
    """Return the summary of all models; with several evaluation sets also scores and retained percentages by set.

    `names`: add a column with the names of runs, which are those of their folders.
    """
    sets, runs, labels = result.sets, result.runs, result.labels
    has_intervals = any(run.evaluation.retained_interval for run in runs)
    if len(sets) == 1:
        [(name, of)] = sets.items()
        columns = (of.main, "retained", *(("95 % interval",) if has_intervals else ()))
        worth = [_score_cells(result, model, name, of)[: len(columns)] for _, model in result.models]
        title = f"{upper(of.label)}, retained in %"
    else:
        columns = ("retained", "paper avg")
        averages = ((run.evaluation.mean_of_ratios, run.evaluation.paper_average) for run in runs)
        worth = [tuple(map(percent, pair)) for pair in ((100.0, 100.0), *averages)]
        title = f"Retained {over(sets)}, and the paper's average, in %"
    rows: list[tuple[str, ...]] = [(UNPRUNED, "", f"{result.teacher.parameters:,}", "", *worth[0], "")]
    rows += [(labels[run.name], *_summary(run, cells)) for run, cells in zip(runs, worth[1:], strict=True)]
    header: tuple[str, ...] = ("model", "data", "parameters", "removed", *columns, "seconds")
    if names:
        header = (*header, "run")
        rows = [(*row, name) for row, name in zip(rows, ("", *(printable(run.name) for run in runs)), strict=True)]
    summary = Table(f"{title}; removed: share of all parameters", header, tuple(rows))
    if len(sets) == 1:
        return [summary]
    scores = [
        (labels[key], *(of.show(model.evaluation.main(name, sets), unit=False) for name, of in sets.items()))
        for key, model in result.models
    ]
    kept = [(labels[run.name], *(_kept(run, name) for name in sets)) for run in runs]
    return [
        summary,
        Table(", ".join(f"{name}: {of.label}" for name, of in sets.items()), ("model", *sets), tuple(scores)),
        Table(
            f"Retained of each, in %{', and 95 % intervals' if has_intervals else ''}", ("model", *sets), tuple(kept)
        ),
    ]


def _score_cells(result: Result, model: Run | Unpruned, name: str, of: Set) -> tuple[str, ...]:
    """The score of a set, what is retained of it, and the interval."""
    score = of.show(model.evaluation.main(name, result.sets), unit=False)
    if isinstance(model, Unpruned):
        return score, "100.00", ""
    return score, percent(model.evaluation.mean_of_ratios), interval(model.evaluation, name)


def _summary(run: Run, worth: tuple[str, ...]) -> tuple[str, ...]:
    return (
        f"{100 * run.data_fraction:g} %" if run.data_fraction else "",
        f"{run.parameters:,}",
        f"{run.ratio_reached:.3f}",
        *worth,
        "" if run.seconds is None else f"{run.seconds:.1f}",
    )


def _kept(run: Run, name: str) -> str:
    """Format the retention on a set, with its interval in brackets."""
    ends = interval(run.evaluation, name)
    return percent(run.evaluation.retained.get(name)) + (ends and f" ({ends})")


def upper(text: str) -> str:
    """Capitalise the first letter."""
    return text[:1].upper() + text[1:]


def lead(result: Result) -> str:
    """Describe the best model in a sentence."""
    run, teacher = result.best_run, result.teacher
    smaller = 1 - run.parameters / teacher.parameters
    among = f"Best of {len(result.runs)} models: " if len(result.runs) > 1 else ""
    trained = f" ({100 * run.data_fraction:g} % of the training data)" if run.data_fraction else ""
    return (
        f"{among}{result.labels[run.name]}{trained} has {run.parameters:,} of {teacher.parameters:,} parameters "
        f"({100 * smaller:.1f} % fewer) and {_scores(run, result)}."
    )


def _scores(run: Run, result: Result) -> str:
    sets = result.sets
    if len(sets) > 1:
        kept = percent(run.evaluation.mean_of_ratios)
        share = f"{kept} % of the unpruned model's score" if kept else "an unknown share of the score"
        return f"retains {share} {over(sets)}"
    [(name, of)] = sets.items()
    ours, theirs = (of.show(model.evaluation.main(name, sets)) for model in (run, result.teacher))
    return f"reaches {ours} {of.main} on {of.size}; the unpruned model reaches {theirs}"


def over(sets: Mapping[str, Set]) -> str:
    """Say which sets an average is over."""
    averaged = averaged_sets(sets)
    return f"on {averaged[0]}" if len(averaged) == 1 else f"on average over {len(averaged)} evaluation sets"


def groups_of(result: Result) -> Iterator[Table]:
    """Return one table for each set that has groups of questions: their values for every model."""
    runs, sets = result.runs, result.sets
    for name, groups in result.teacher.evaluation.groups.items():
        of = sets[name]
        models = [groups, *(run.evaluation.groups.get(name, {}) for run in runs)]
        rows = [
            (group, f"{values.questions:,}", *(_group_value(model, group, of) for model in models))
            for group, values in groups.items()
        ]
        title, what = f"{upper(of.main)} by {of.grouped_by}", str(of.grouped_by)
        header = (what, "questions", *result.labels.values())
        yield Table(title if len(sets) == 1 else f"{name}: {title}", header, tuple(rows))


def _group_value(groups: Mapping[str, Group], group: str, of: Set) -> str:
    value = groups[group].values.get(of.main) if group in groups else None
    return "" if value is None else f"{of.scale * value:.1f}"
