"""From a workdir to `report.html` and `report.png`: of a finished run, or what an unfinished one has so far."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlmprune_jax.core.errors import printable
from vlmprune_jax.core.files import read_text
from vlmprune_jax.report import figures, plots
from vlmprune_jax.report.advice import advice_section
from vlmprune_jax.report.answers import comparison_section
from vlmprune_jax.report.page import Section, Table, write_page
from vlmprune_jax.report.samples import shown_samples
from vlmprune_jax.report.speed import bench_notes, bench_tables, speed_notes, speed_tables, together
from vlmprune_jax.report.tables import groups_of, lead, tables_of
from vlmprune_jax.workdir.result import RESULT, Costs, Result, read_result
from vlmprune_jax.workdir.samples import read_samples
from vlmprune_jax.workdir.speed import BENCH, read_bench, read_speed
from vlmprune_jax.workdir.tpu_plan import NOTES as PLAN_NOTES
from vlmprune_jax.workdir.tpu_plan import as_rows, read_tpu_plan
from vlmprune_jax.workdir.unfinished import Variant, read_unfinished

NOTES = (
    "Data: share of the training records used for recovery. Removed: share of all parameters. "
    "Retained: share of the unpruned model's score, in percent{averages}. Seconds: scoring, pruning and training, "
    "without evaluation."
)
AVERAGES = (
    ", of several evaluation sets the mean. Paper avg: the sum of all scores, each divided by a perfect model's, as a "
    "share of the unpruned model's sum"
)
INTERVALS = (
    " Intervals: 95 % of the samples of a paired bootstrap over the questions, which the unpruned model answered too."
)
COMMAND = "vlmprune run --config=FILE.py --workdir={}{}"


def build_report(workdir: Path, *, more: Sequence[Section] = ()) -> Path:
    """Write `report.html` (one file without external resources) and, if models were evaluated, `report.png`.

    Args:
      workdir: of a run, finished or not.
      more: sections at the end of the page.

    Returns:
      The page's path.

    Raises:
      UserError: nothing of a run is there, or a file is damaged.
    """
    path = workdir / RESULT
    if path.exists() or path.is_symlink():
        result: Result | None = read_result(workdir)
        unfinished, missing = None, []
    else:
        unfinished = read_unfinished(workdir)
        result, missing = unfinished.result, unfinished.missing
    finished = unfinished is None
    variants = _variants(result) if unfinished is None else unfinished.variants
    return write_page(
        "template.html",
        workdir / "report.html",
        title="Structural pruning report",
        lead=lead(result) if finished and result else "This run is not finished: what is there so far.",
        missing=missing,
        tables=() if result is None else tables_of(result, names=True),
        best=result.labels[result.best] if finished and result else "",
        notes="" if result is None else _notes(result),
        sections=[*_sections(workdir, result, variants, finished), *more],
        result_json=read_text(path) if finished else "",
    )


def _variants(result: Result | None) -> list[Variant]:
    return [] if result is None else [Variant(run.name, run.method, run.plan, run.scores) for run in result.runs]


def _sections(workdir: Path, result: Result | None, variants: Sequence[Variant], finished: bool) -> Iterator[Section]:
    labels = {} if result is None else result.labels
    if result is not None and result.runs:
        measured = figures.measured_of(result)
        first = plots.score_figure(result, measured[0])
        plots.write_png(first, workdir / "report.png")
        yield from figures.score_sections(result, measured, first)
        yield from comparison_section(workdir, result)
    yield from _samples(workdir, labels, finished)
    yield from _costs(workdir, result, finished)
    yield from figures.removed_section(workdir, variants)
    yield from figures.importance_section(workdir, variants)
    yield from figures.kinds_section(workdir, variants)
    if result is not None:
        yield from figures.loss_section(workdir, result)
        groups = tuple(groups_of(result))
        if groups:
            yield Section("By group of questions", tables=groups)
    planned = read_tpu_plan(workdir)
    if planned:
        facts = tuple((printable(name), tuple(as_rows(recovery))) for name, recovery in planned.items())
        yield Section("Recovery on a TPU slice", facts=facts, notes=(PLAN_NOTES,))
    if finished and result is not None:
        yield from advice_section(result)
        yield _export(result)


def _export(result: Result) -> Section:
    if result.export is None:  # a run of a sweep
        missing = f"Nothing is exported, the best model is {result.labels[result.best]}"
        return Section("Export", missing=missing, command="vlmprune export")
    note = (
        f"Exported: {result.export.path} ({result.labels[result.best]}), reloaded and compared: largest difference of "
        f"any logit {result.export.max_abs_logit_difference:.2g}."
    )
    return Section("Export", notes=(note,))


def _notes(result: Result) -> str:
    notes = NOTES.format(averages=AVERAGES if len(result.sets) > 1 else "")
    return notes + (INTERVALS if any(run.evaluation.retained_interval for run in result.runs) else "")


def _samples(workdir: Path, labels: Mapping[str, str], finished: bool) -> Iterator[Section]:
    sets = read_samples(workdir)
    title = "Questions and what every model answers"
    if not sets and finished:
        command = COMMAND.format(workdir, "").replace(" run ", " evaluate ")
        yield Section(title, missing="No questions were kept for this page", command=command)
    for name, samples in sets.items():
        shown = tuple(shown_samples(samples, labels))
        if shown:
            notes = () if any(sample.images for _, mine in shown for sample in mine) else ("These have no images.",)
            yield Section(title if len(sets) == 1 else f"{title}: {name}", samples=shown, notes=notes)


def _costs(workdir: Path, result: Result | None, finished: bool) -> Iterator[Section]:
    """Costs by shape, and measured speed."""
    measured, tables, notes = read_speed(workdir), list[Table](), list[str]()
    labels = {} if result is None else result.labels
    if result is not None and result.teacher.costs is not None and result.workload is not None:
        workload = result.workload
        tables.append(_cost_table(result, result.teacher.costs))
        notes.append(
            f"FLOPs: a forward pass of {workload.length:,} tokens, those of {workload.images} image(s) among them; a "
            f"multiply-add is two. Cache and file as {workload.dtype}."
        )
    if measured is not None:
        tables += speed_tables(measured, labels)
        notes += speed_notes(measured, labels)
    if os.path.lexists(workdir / BENCH):
        bench = read_bench(workdir / BENCH)
        tables += bench_tables(bench)
        notes += bench_notes(bench)
    if tables or finished:
        yield Section(
            "Cost and speed",
            notes=tuple(notes),
            tables=tuple(tables),
            missing="" if measured is not None else "Speed was not measured",
            command="" if measured is not None else COMMAND.format(workdir, " --config.speed.rounds=5"),
        )


def _cost_table(result: Result, unpruned: Costs) -> Table:
    teacher, labels = result.teacher, result.labels

    def row(parameters: int, costs: Costs) -> tuple[str, ...]:
        cells = [f"{parameters:,}", f"{100 * parameters / teacher.parameters:.1f}"]
        for key, scale in (("forward_flops", 1e9), ("kv_bytes_per_token", 1), ("file_bytes", 1e6)):
            ours, theirs = getattr(costs, key), getattr(unpruned, key)
            value, share = ours / scale, 100 * ours / theirs if theirs else 100.0
            cells += [f"{value:,.2f}" if scale > 1 else f"{value:,.0f}", f"{share:.1f}"]
        return tuple(cells)

    shapes = dict[tuple[str, ...], list[str]]()
    for run in result.runs:
        if run.costs is not None:
            shapes.setdefault(row(run.parameters, run.costs), []).append(labels[run.name])
    header = ("model", "parameters", "%", "GFLOPs", "%", "cache, bytes a token", "%", "file, MB", "%")
    rows = [("unpruned", *row(teacher.parameters, unpruned))]
    rows += [(together(names), *cells) for cells, names in shapes.items()]
    return Table("Cost by shape, and in % of the unpruned model's", header, tuple(rows))
