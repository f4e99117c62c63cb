"""A recommendation in words: lines and tables for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator

from vlmprune_jax.report.guide import Evidence, Recommendation, read_guide, recommend_for
from vlmprune_jax.report.page import Section, Table
from vlmprune_jax.workdir.result import Result

_CUTS = {"depth": "remove whole layers by Block Influence", "width": "remove neurons and heads by Taylor importance"}
_TRAINED = {"projector": "the projector alone", "sft_l2": "adapters and projector, SFT + L2 distillation,"}


def in_words(found: Recommendation) -> str:
    """What to do, in one sentence."""
    words = []
    for method, settings in found.variants.items():
        words.append(f"{_CUTS[method]}{', solve for the kept weights' if 'reconstruct' in settings else ''}")
    cut = "; and beside it ".join(words)
    if found.rule.recovery == "none":
        return f"{cut}; no training"
    return f"{cut}; then train {_TRAINED[found.rule.recovery]} on {percent(found.data_fraction)} of the data"


def advised(found: Recommendation) -> list[str]:
    """What to do, or that nothing supports it, why, and from where that is."""
    rule = found.rule
    return [
        f"{'recommended' if rule.supported else 'nothing supports this; the nearest'}: {in_words(found)}",
        f"  why: {rule.why}",
        f"  from: {rule.source} ({rule.label})",
    ]


def what_to_know(found: Recommendation) -> list[str]:
    """What to expect, source by source, notes, and what in the sources speaks against each other."""
    lines = []
    for one in found.expected:
        beside = "" if one.alike else " (of another kind of model)"
        kinds = " and ".join(dict.fromkeys(row.recovery for row in one.rows))
        low = "at most " if one.low is None else "" if one.low == one.high else f"{one.low:.1f} to "
        said = f"{one.source.measure}{beside}, after {kinds} [{one.source.title}]"
        lines.append(f"  expect {low}{one.high:.1f} % retained: {said}")
    lines += [f"  note: {note}" for note in found.notes]
    return lines + [f"  conflict: {text}" for text in found.conflicts]


def tables_of(found: Recommendation) -> list[Table]:
    """What the expectation is from, what else was measured at a like ratio, and speeds where they matter."""
    header = ("model", "prune + recover", "from", "of decoder", "data", "retained, %", "95 %", "seeds")
    rows = {
        "Expected from": [row for one in found.expected for row in one.rows],
        "Beside it, at a like ratio": list(found.beside),
    }
    tables = [Table(title, header, tuple(map(_row, of))) for title, of in rows.items() if of]
    if found.speed:
        fast = [
            (f"{one.model}, {one.format}, llama.cpp", one.method, percent(one.removed), f"{one.decode:.2f}")
            for one in found.speed
        ]
        tables.append(Table("Decoding, times the unpruned speed", ("model", "prune", "of all", "times"), tuple(fast)))
    return tables


def advice_section(result: Result) -> Iterator[Section]:
    """What the guide would have advised for the cut of the best run, with the data and training that the run had."""
    run = result.best_run
    if result.workload is None or run.decoder_ratio is None or not 0 < run.decoder_ratio <= 1:
        return
    trained = run.data_fraction > 0
    found = recommend_for(
        run.ratio_reached,
        run.decoder_ratio,
        result.workload.images > 0,
        data_fraction=min(max(run.data_fraction, 0), 1),
        compute="full" if trained else "none",
        speed=False,
        guide=read_guide(),
    )
    asked = (
        f"For the cut of the best run, {percent(found.ratio)} of all parameters and {percent(found.decoder_ratio)} of "
        f"the decoder, {'with the data it was trained on' if trained else 'without training'}; `vlmprune recommend` "
        "answers for other budgets."
    )
    lines = [line.strip() for line in (*advised(found), *what_to_know(found))]
    notes = tuple(line[:1].upper() + line[1:] for line in (asked, *lines, *footnotes(found)))
    yield Section("What the guide recommends", notes=notes, tables=tuple(tables_of(found)))


def _row(row: Evidence) -> tuple[str, ...]:
    interval = "" if row.interval is None else f"{row.interval[0]:.2f} to {row.interval[1]:.2f}"
    data = "not told" if row.data_fraction is None else percent(row.data_fraction)
    retained = f"{row.retained:.2f}{'' if row.counts else ' *'}"
    cut = f"{row.method} + {row.recovery}"
    return (row.model, cut, row.source, percent(row.decoder_ratio), data, retained, interval, str(row.seeds or ""))


def footnotes(found: Recommendation) -> list[str]:
    """What is to be known of rows of the tables; those with a star are left out of ranges."""
    rows = [*(row for one in found.expected for row in one.rows), *found.beside]
    noted = (
        f"{'' if row.counts else '* '}{row.model}, {row.method} + {row.recovery}: {row.note}"
        for row in rows
        if row.note
    )
    return list(dict.fromkeys(noted))


def percent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.4g} %"
