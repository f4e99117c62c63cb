"""From a workdir to `report.html` and `report.png`: what a run found, or as far as an unfinished one has come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmprune_jax.core.errors import printable
from vlmprune_jax.core.files import read_text
from vlmprune_jax.report import figures, fit, plots
from vlmprune_jax.report.advice import advice_section
from vlmprune_jax.report.answers import comparison_section
from vlmprune_jax.report.page import Section, Table, write_page
from vlmprune_jax.report.result import read_result
from vlmprune_jax.report.samples import read_samples, shown_samples
from vlmprune_jax.report.speed import (
    BENCH,
    bench_notes,
    bench_tables,
    read_bench,
    read_speed,
    speed_notes,
    speed_tables,
    together,
)
from vlmprune_jax.report.tables import groups_of, lead, tables_of
from vlmprune_jax.report.unfinished import read_unfinished

__all__ = ["build_report", "tables_of"]

Json = dict[str, Any]
NOTES = (
    "Data: share of the training records used for recovery. Asked, reached: share of all parameters to remove. "
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
    """Write `report.html` (one file, nothing external) and, where models were evaluated, `report.png`.

    Args:
      workdir: of a run, finished or not.
      more: sections that end the page, of what is known elsewhere: what to do next, by what everything was made.

    Returns:
      The page's path.

    Raises:
      UserError: nothing of a run is there, or a file is damaged.
    """
    finished = (workdir / "result.json").exists() or (workdir / "result.json").is_symlink()
    result = read_result(workdir) if finished else read_unfinished(workdir)
    best = printable(result["best"]) if finished else ""
    return write_page(
        "template.html",
        workdir / "report.html",
        title="Structural pruning report",
        lead=lead(result) if finished else "This run is not finished: what is there so far.",
        missing=result.get("missing", ()),
        tables=tables_of(result) if result["teacher"] is not None else (),
        best=best,
        notes=_notes(result),
        sections=[*_sections(workdir, result, finished), *more],
        result_json=read_text(workdir / "result.json") if finished else "",
    )


def _sections(workdir: Path, result: Json, finished: bool) -> Iterator[Section]:
    runs = result["runs"]
    variants = runs if finished else result["variants"]
    if runs:
        measured = figures.measured_of(result)
        first = plots.score_figure(result, measured[0])
        plots.write_png(first, workdir / "report.png")
        yield from figures.score_sections(result, measured, first)
        yield from comparison_section(workdir, result)
    yield from _samples(workdir, finished)
    yield from _costs(workdir, result, finished)
    yield from figures.removed_section(workdir, variants)
    yield from figures.importance_section(workdir, variants)
    yield from figures.kinds_section(workdir, variants)
    yield from figures.loss_section(workdir, runs)
    groups = tuple(groups_of(result)) if result["teacher"] is not None else ()
    if groups:
        yield Section("By group of questions", tables=groups)
    yield from _planned(workdir)
    yield from advice_section(result)
    if finished and "export" not in result:  # a run of a sweep
        yield Section(
            "Export", missing=f"Nothing is exported, the best model is {result['best']}", command="vlmprune export"
        )
    elif finished:
        export = result["export"]
        told = (
            f"Exported: {export['path']} (the model {result['best']}), reloaded and compared: largest difference of "
            f"any logit {export['max_abs_logit_difference']:.2g}."
        )
        yield Section("Export", notes=(told,))


def _notes(result: Json) -> str:
    told = NOTES.format(averages=AVERAGES if len(result["sets"]) > 1 else "")
    return told + (INTERVALS if any("retained_interval" in run["evaluation"] for run in result["runs"]) else "")


def _samples(workdir: Path, finished: bool) -> Iterator[Section]:
    found = read_samples(workdir)
    title = "Questions and what every model answers"
    if not found and finished:
        command = COMMAND.format(workdir, "").replace(" run ", " evaluate ")
        yield Section(title, missing="No questions were kept for this page", command=command)
    for name, of in found.items():
        shown = tuple(shown_samples(of))
        if shown:
            notes = () if any(sample["images"] for _, mine in shown for sample in mine) else ("These have no images.",)
            yield Section(title if len(found) == 1 else f"{title}: {name}", samples=shown, notes=notes)


def _costs(workdir: Path, result: Json, finished: bool) -> Iterator[Section]:
    """What models cost by their shapes, and by the clock."""
    measured, tables, notes = read_speed(workdir), list[Table](), list[str]()
    teacher, runs = result["teacher"], result["runs"]
    if teacher is not None and "costs" in teacher and "workload" in result:
        of = result["workload"]
        tables.append(_cost_table(teacher, [run for run in runs if "costs" in run]))
        notes.append(
            f"FLOPs: a forward pass of {of['length']:,} tokens, those of {of['images']} image(s) among them; a "
            f"multiply-add is two. Cache and file as {of['dtype']}."
        )
    if measured is not None:
        tables += speed_tables(measured)
        notes += speed_notes(measured)
    if os.path.lexists(workdir / BENCH):
        found = read_bench(workdir / BENCH)
        tables += bench_tables(found)
        notes += bench_notes(found)
    if tables or finished:
        yield Section(
            "Cost and speed",
            notes=tuple(notes),
            tables=tuple(tables),
            missing="" if measured is not None else "Speed was not measured",
            command="" if measured is not None else COMMAND.format(workdir, " --config.speed.rounds=5"),
        )


def _cost_table(teacher: Json, runs: Sequence[Json]) -> Table:
    def row(model: Json) -> tuple[str, ...]:
        costs, whole = model["costs"], teacher["costs"]
        cells = [f"{model['parameters']:,}", f"{100 * model['parameters'] / teacher['parameters']:.1f}"]
        for key, scale in (("forward_flops", 1e9), ("kv_bytes_per_token", 1), ("file_bytes", 1e6)):
            value = costs[key] / scale
            share = 100 * costs[key] / whole[key] if whole[key] else 100.0
            cells += [f"{value:,.2f}" if scale > 1 else f"{value:,.0f}", f"{share:.1f}"]
        return tuple(cells)

    shapes = dict[tuple[str, ...], list[str]]()
    for run in runs:
        shapes.setdefault(row(run), []).append(printable(run["name"]))
    header = ("model", "parameters", "%", "GFLOPs", "%", "cache, bytes a token", "%", "file, MB", "%")
    rows = [("unpruned", *row(teacher)), *((together(names), *cells) for cells, names in shapes.items())]
    return Table("Cost by shape, and in % of the unpruned model's", header, tuple(rows))


def _planned(workdir: Path) -> Iterator[Section]:
    planned = fit.read_planned(workdir)
    if planned:
        facts = tuple((run["name"], tuple(run["rows"])) for run in planned)
        yield Section("Recovery on a TPU slice", facts=facts, notes=(fit.NOTES,))
