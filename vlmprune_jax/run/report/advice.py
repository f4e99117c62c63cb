"""A recommendation of the guide, for the terminal and for a page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlmprune_jax.base.console import Reporter
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_bytes
from vlmprune_jax.run.planning.guide import METHODS, Evidence, Guide, read_guide
from vlmprune_jax.run.planning.recommend import (
    Advice,
    command,
    decision,
    details,
    evidence,
    percent,
    summarize,
)
from vlmprune_jax.run.planning.rules import Recommendation, Target, recommend
from vlmprune_jax.run.report.page import Section, Table
from vlmprune_jax.run.report.speed import bench_notes, bench_tables
from vlmprune_jax.run.workdir.ledger import write_text
from vlmprune_jax.run.workdir.result import Result

WIDTH = 80  # characters per line of a recommendation


def tell(advice: Advice, guide: Guide, save: str | None, given: Sequence[str], full: bool, reporter: Reporter) -> None:
    """Print a recommendation, the command to run, and the evidence; with `save`, write the config to a file.

    `guide`: the guide of the recommendation. `given`: flags of this command; if `save` is None, the printed command
    repeats them and writes the config. `full`: also print all measurements and the config.
    """
    recommendation = advice.recommendation
    path = saved_as(save, recommendation.target.ratio)
    if save is not None:
        _write(path, advice.config)
    if (ranking := advice.ranking) is not None:
        rows = [(way.name, way.cost, "" if way.gain is None else f"{way.gain:.2f}") for way in ranking.choices]
        reporter.table(*Table(ranking.title, ("model", "least", "times less"), tuple(rows)).printed)
        _say([("note", ranking.note)], reporter)
    _say(decision(advice), reporter)
    first = [] if save is not None else ["vlmprune", "recommend", *given, f"--save={path}", "&&"]
    lines = [*_shell(first), *_shell(command(advice, str(path)))]
    for line in ["", *lines, ""]:
        reporter.say(line)
    _say(evidence(recommendation, guide, advice.own_data), reporter)
    if not full:
        data_hint = "" if advice.own_data else "--train, --images and --eval set your files; "
        _say([("more", f"{data_hint}--evidence prints all evidence and the config")], reporter)
    tables, notes = tables_of(recommendation) if full else [], footnotes(recommendation) if full else []
    if advice.bench is not None:
        tables, notes = tables + bench_tables(advice.bench), notes + bench_notes(advice.bench)
    for line in details(advice) if full else ():
        reporter.say(line)
    for table in tables:
        reporter.table(*table.printed)
    for line in [*notes, *(["", "config:", *advice.config.splitlines()] if full else [])]:
        reporter.say(line)


def saved_as(text: str | None, ratio: float = 0.0) -> Path:
    """Return the path for the recommended config file (default: recommended_30.py for 30 %).

    Raises UserError if the name is not that of a Python file.
    """
    path = Path(text or f"recommended_{100 * ratio:.3g}.py")
    if path.suffix != ".py" or "\0" in path.name:
        raise UserError(f"--save={text}: must be the name of a config file, such as recommended.py")
    return path


def _write(path: Path, config: str) -> None:
    """Write the config file; raise UserError if there is a different one."""
    text = config.encode(errors="backslashreplace")
    same_size = path.is_file() and path.stat().st_size == len(text)
    if path.exists() and not (same_size and read_bytes(path, len(text)) == text):
        raise UserError(f"--save={path}: exists already: choose another name, or remove the file")
    write_text(path, config)


def _say(pairs: Iterable[tuple[str, str]], reporter: Reporter) -> None:
    """Print (label, text) pairs in lines of at most `WIDTH` characters."""
    for label, text in pairs:
        for line in textwrap.wrap(f"{label}: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False):
            reporter.say(line)


def _shell(arguments: Sequence[str]) -> list[str]:
    """Return a shell command in lines of at most `WIDTH` characters, as far as its arguments allow."""
    lines = list[str]()
    for argument in arguments:
        if lines and len(f"{lines[-1]} {argument} \\") <= WIDTH:
            lines[-1] += f" {argument}"
        else:
            lines.append(f"  {argument}" if not lines else f"      {argument}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def tables_of(recommendation: Recommendation) -> list[Table]:
    """Return a recommendation's tables: evidence, and other measurements at similar ratios."""
    header = ("model", "prune + recover", "retained, %", "95 %", "seeds", "decoder removed", "data", "size, M", "from")
    rows = {
        "Measured": recommendation.rows,
        "Other measurements at similar ratios (most similar models first)": recommendation.beside,
    }
    return [Table(title, header, tuple(map(_row, lines))) for title, lines in rows.items() if lines]


def _row(row: Evidence) -> tuple[str, ...]:
    ends = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}"
    data = "unknown" if row.data_fraction is None else percent(row.data_fraction)
    control = "" if row.of_control is None else f" ({row.of_control:.2f} of control)"
    retained = f"{row.retained:.2f}{control}{'' if row.counts else ' *'}"
    setup, size = f"{row.method} + {row.recovery}", f"{row.parameters / 1e6:,.{0 if row.parameters > 1e7 else 2}f}"
    return row.model, setup, retained, ends, str(row.seeds or ""), percent(row.decoder_ratio), data, size, row.source


def footnotes(recommendation: Recommendation) -> list[str]:
    """Return the notes below a recommendation's evidence table."""
    rows = (*recommendation.rows, *recommendation.beside)
    notes = (f"{'' if row.counts else '* '}{row.model}, {_row(row)[1]}: {row.note}" for row in rows if row.note)
    return list(dict.fromkeys(notes))


def advice_section(result: Result) -> Iterator[Section]:
    """Yield a report section that recommends a setup like the best run's (same ratio, data and training)."""
    run = result.best_run
    if result.workload is None or run.decoder_ratio is None or not 0 < run.decoder_ratio <= 1 or not run.actual_ratio:
        return
    trained, guide = run.data_fraction > 0, read_guide()
    removed = dict.fromkeys(METHODS, run.decoder_ratio)
    asked = Target(result.teacher.parameters, result.workload.images > 0, run.actual_ratio, run.decoder_ratio, removed)
    data, compute = min(max(run.data_fraction, 0), 1), "full" if trained else "none"
    recommendation = recommend(asked, data_fraction=data, compute=compute, guide=guide)
    about = (
        f"For the ratio of the best run, {percent(asked.ratio)} of all parameters ({percent(asked.decoder_ratio)} of "
        f"the decoder), {'with the data it was trained on' if trained else 'without training'}; `vlmprune recommend` "
        "answers for other budgets."
    )
    lines = [
        f"recommended: {summarize(recommendation)}",
        *(f"{label}: {text}" for label, text in evidence(recommendation, guide, own_data=True)),
        *(f"conflict: {text}" for text in recommendation.conflicts),
    ]
    notes = tuple(line[:1].upper() + line[1:] for line in (about, *lines, *footnotes(recommendation)))
    yield Section("What the guide recommends", notes=notes, tables=tuple(tables_of(recommendation)))
