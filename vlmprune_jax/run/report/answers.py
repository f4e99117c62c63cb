"""Significance of differences between models, question by question (`eval/*.json`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.statistics import holm, mcnemar
from vlmprune_jax.run.report.page import Section, Table
from vlmprune_jax.run.workdir.evaluation import UNPRUNED, find_evaluated, read_evaluated
from vlmprune_jax.run.workdir.result import Result, Run

MOST_COMPARED = 40  # maximum number of models in a table
SIGNIFICANT, CHANCE = 0.05, "could be chance"  # p below which a difference is reported, and the verdict above it
Right = Mapping[str, Sequence[float]]  # by model: 1 (right) or 0 (wrong) for every question


def length_section(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield a report section with every model's answer length in tokens."""
    models = [(UNPRUNED, None), *((result.labels[entry.name], entry.path) for entry in result.entries[:MOST_COMPARED])]
    tables, header = list[Table](), ("model", "tokens per answer", "x unpruned")
    for key, metric in result.sets.items():
        rows, before = list[tuple[str, ...]](), None
        for label, folder in models:
            path = find_evaluated(workdir, folder, key)
            answers = None if path is None else read_evaluated(path)
            if answers is None or answers.mean_generated_tokens is None or not answers.count:
                continue
            before = before or answers
            times = answers.mean_generated_tokens / before.mean_generated_tokens if before.mean_generated_tokens else 1
            rows.append((label, f"{answers.mean_generated_tokens:.2f}", f"{times:.2f}"))
        if rows:
            title = "Means over all questions" if len(result.sets) == 1 else f"{key}: means over {metric.size}"
            tables.append(Table(title, header, tuple(rows), ascending=header[1:]))
    if tables:
        note = "Tokens include the end token; an answer that reaches `max_new_tokens` is cut."
        yield Section("Answer length", tables=tuple(tables), notes=(note,))


def comparison_section(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield a report section with McNemar tests between the runs and the unpruned model."""
    tables, left_out, labels = list[Table](), list[str](), result.labels
    for key, metric in result.sets.items():
        if metric.counted != "questions" or metric.full is None:
            continue
        prefix = "" if len(result.sets) == 1 else f"{key}: "
        right = _right_by_model(workdir, result.runs, key)
        if len(right) < 2 or UNPRUNED not in right:
            left_out.append(key)
            continue
        tables.append(_against(f"{prefix}Against the unpruned model", UNPRUNED, right, labels, result.runs))
        if result.best in right and len(right) > 2:
            others = {name: scores for name, scores in right.items() if name != UNPRUNED}
            title = f"{prefix}Against {labels[result.best]}, the best"
            tables.append(_against(title, result.best, others, labels))
    notes = [
        "McNemar's exact test on the questions that only one of both models got right: p is the probability of a split "
        "at least as uneven if both were equally good, corrected for the number of tests in the table (Holm). It "
        "generalises to other questions of the kind, not to another pruning, calibration or training."
    ]
    if left_out:
        names = printable(", ".join(left_out))
        notes.append(f"Not for {names}: the test needs answers of both models that are either right or wrong.")
    if tables:
        yield Section("Is one really better?", notes=tuple(notes), tables=tuple(tables))


def _right_by_model(workdir: Path, runs: Sequence[Run], key: str) -> Right:
    """Return {model: 1 (right) or 0 (wrong) per question} of the models that answered all questions."""
    right: dict[str, list[float]] = {}
    for name, folder in [(UNPRUNED, None), *((run.name, run.path) for run in runs[:MOST_COMPARED])]:
        path = find_evaluated(workdir, folder, key)
        if path is None:
            continue
        scores = read_evaluated(path).question_scores
        fits = all(score in (0, 1) for score in scores) and len(scores) == len(right.get(UNPRUNED, scores))
        if scores and fits:
            right[name] = [float(score or 0) for score in scores]
    return right


def _against(title: str, reference: str, right: Right, labels: Mapping[str, str], runs: Sequence[Run] = ()) -> Table:
    """Return a table of McNemar tests of all models against the model `reference`."""
    names = [name for name in right if name != reference]
    tests = [mcnemar(right[reference], right[name]) for name in names]
    pruned_of = {run.plan: run.name for run in runs if run.recovery == "none" and run.name in right}
    plans = {run.name: run.plan for run in runs}
    rows = []
    for name, test, p in zip(names, tests, holm([test.p_value for test in tests]), strict=True):
        better = "better" if test.only_second > test.only_first else "worse"
        row = [labels[name], f"{test.only_first:,}", f"{test.only_second:,}", _probability(p)]
        row.append(better if p < SIGNIFICANT else CHANCE)
        if runs:
            pruned = pruned_of.get(plans[name])
            row.append("" if pruned in (None, name) else _repaired(right[reference], right[str(pruned)], right[name]))
        rows.append(tuple(row))
    header = ("model", f"only {labels[reference]} right", "only this right", "p", "verdict")
    return Table(title, (*header, *(("repaired, of the answers that pruning broke",) if runs else ())), tuple(rows))


def _repaired(reference: Sequence[float], pruned: Sequence[float], recovered: Sequence[float]) -> str:
    broken = [question for question, right in enumerate(reference) if right and not pruned[question]]
    repaired = sum(recovered[question] > 0 for question in broken)
    return f"{100 * repaired / len(broken):.1f} % of {len(broken):,}" if broken else ""


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
