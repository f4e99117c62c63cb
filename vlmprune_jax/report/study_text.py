"""What a study says of texts: perplexity of every cut before and after recovery, which on images costs the language."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmprune_jax.report.result import main_value
from vlmprune_jax.report.sweep import done

Json = dict[str, Any]
PERPLEXITY = "perplexity"


def perplexity_lines(sweep: Json) -> list[str]:
    """A table for each set that is text, in Markdown: a line for all seeds of what is otherwise equal.

    Means are of logarithms, over seeds. "x cut alone": as a multiple of the same cut to which nothing was done.
    """
    lines: list[str] = []
    for name in (name for name, of in sweep["sets"].items() if of["main"] == PERPLEXITY):
        values = {model: main_value(of, name, sweep["sets"]) for model, of in sweep["unpruned"].items()}
        before = {model: value for model, value in values.items() if value}
        cells: dict[tuple[Any, ...], list[Json]] = {}
        for row in done(sweep):
            if main_value(row, name, sweep["sets"]) is not None and row["model"] in before:
                cells.setdefault((*_cut(row), *_done_to(row)), []).append(row)
        if not cells:
            continue
        told = ", ".join(f"{value:.2f}" for value in before.values())
        lines += [f"**Perplexity of {name}**, {told} unpruned.", ""]
        lines += ["| cut | of the decoder | after | models | perplexity | x unpruned | x cut alone |"]
        lines += ["|---|---|---|---|---|---|---|"]
        means = {key: [main_value(row, name, sweep["sets"]) for row in rows] for key, rows in cells.items()}
        for key in sorted(cells, key=lambda key: (key[1], key[2], key[3])):
            rows, plain = cells[key], means.get((*key[:4], "none", "none", 0.0))
            value = _mean(means[key])
            share = 100 * float(np.mean([row["decoder_ratio"] for row in rows]))
            alone = "" if plain is None or plain is means[key] else f"{value / _mean(plain):.2f}"
            line = (f"{key[1]}, {key[2]}", f"{share:.1f} %", _words(*key[4:]), f"{len(rows)}", f"{value:.2f}")
            lines.append(f"| {' | '.join((*line, f'{value / before[key[0]]:.2f}', alone))} |")
        lines.append("")
    return lines


def _cut(row: Json) -> tuple[Any, ...]:
    asked = row["ratio_asked"]
    return row["model"], row["method"], row["criterion"], row["decoder_ratio"] if asked is None else asked


def _done_to(row: Json) -> tuple[str, str, float]:
    return row["reconstruct"], row["recovery"], row["data_fraction"]


def _words(reconstruct: str, recovery: str, data: float) -> str:
    """What was done to a cut, as the columns of tables have it."""
    parts = [part for part in ("reconstruct" if reconstruct != "none" else "", recovery) if part and part != "none"]
    return " + ".join(parts or ["nothing"]) + (f", {100 * data:g} % of the data" if data else "")


def _mean(values: list[Any]) -> float:
    return float(np.exp(np.mean(np.log(values))))
