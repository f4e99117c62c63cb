"""Cells of tables of study.md and results.md, recomputed from the rows in docs/explanation/data; for check_study.py."""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Cells = dict[tuple[str, str], tuple[str, int]]  # (row, column) of a table -> text, and number of seeds or repetitions
FORMATS = {"float16": "float16", "w8a16": "w8a16", "w4a16": "w4a16, GPTQ"}
LAYERS = "layer 0 (delta net)", "layer 1 (delta net)", "layer 3 (attention)", "layer 7 (attention)"
HYBRIDS = {label.partition(" (")[0]: label for label in LAYERS} | {
    "unpruned": "nothing",
    "layer 6": "layer 6 (delta net), first by Block Influence",
    "2 layers": "2 layers by Block Influence",
    "3 layers": "3 layers by Block Influence",
    "50 % of mlp": "50 % of MLP neurons",
    "50 % of delta_groups": "50 % of delta-net groups",
    "50 % of kv_heads": "50 % of attention groups",
}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a compressed file of JSON lines."""
    return [json.loads(line) for line in lzma.open(path, "rt")]


def cut_name(model: str) -> str:
    """Return a model's row, such as "30 % by depth" for "depth 30 %"."""
    method, _, share = model.partition(" ")
    # a tenth layer is 9.3 % of the demo's decoder: six of them are 55.8 %
    share = "56 %" if model == "depth 60 %" else share
    return f"{share} by {method}" if share else "none"


def by_bits(data: Path) -> Cells:
    """Return accuracies (%) by number of bits, and sizes in MB, means over seeds."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in read_lines(data / "question_accuracy.jsonl.xz"):
        groups.setdefault(cut_name(row["model"]), {}).setdefault(row["format"], []).append(row)
    cells: Cells = {}
    for name, formats in groups.items():
        for form, rows in formats.items():
            cells[name, FORMATS[form]] = f"{100 * np.mean([row['accuracy'] for row in rows]):.2f}", len(rows)
        sizes = (f"{np.mean([row['bytes'] for row in rows]) / 1e6:.2f}" for rows in formats.values())
        cells[name, "size of the three, MB"] = ", ".join(sizes), len(formats["float16"])
    return cells


def by_tokens(data: Path) -> Cells:
    """Return gaps to the control in bits per byte by training tokens, with 95 % intervals over texts."""
    rows = [row for row in read_lines(data / "recovery_tokens.jsonl.xz") if row["format"] == "float32"]
    bits = {(row["model"], row["seed"], row["tokens"]): np.array(row["bits"]) for row in rows}
    cells: Cells = {}
    for (model, seed, tokens), values in bits.items():
        control = bits.get(("unpruned", seed, tokens))
        if model != "unpruned" and control is not None:
            gap = values - control
            half = stats.t.ppf(0.975, len(gap) - 1) * stats.sem(gap)
            cells[f"{tokens:,}", f"{model.split()[0]}, seed {seed}"] = f"{gap.mean():.3f} ± {half:.3f}", 1
    return cells


def by_seconds(data: Path) -> Cells:
    """Return medians of seconds per question in llama.cpp, and the range of the rounds in percent of the median."""
    files = ("question_time.json.xz", "question_time_16.json.xz")
    sessions = [session for file in files for session in json.loads(lzma.decompress((data / file).read_bytes()))]
    cells: Cells = {}
    for number, session in enumerate(sessions, 1):
        for name, row in session["rows"].items():
            model, form = name.split(" | ")
            questions = {key: np.array(times) for key, times in row.items() if "+" in key}
            spread = max(100 * np.ptp(times) / np.median(times) for times in questions.values())
            times = next(times for key, times in questions.items() if key.endswith("+16"))
            text = f"{np.median(times):.{2 if np.median(times) < 10 else 1}f} ({spread:.0f})"
            cells[f"{number}, {model.replace('unpruned', 'nothing')}", form] = text, len(times)
    return cells


def by_layer(data: Path) -> Cells:
    """Return accuracy (%) and bits per byte of the hybrid, means over seeds."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read_lines(data / "hybrid.jsonl.xz"):
        if row["name"] in HYBRIDS:
            column = row["after"].replace("pruning", "pruned")
            groups.setdefault((HYBRIDS[row["name"]], column), []).append((row["accuracy"], row["bits"]))
    means = {key: np.mean(values, axis=0) for key, values in groups.items()}
    return {key: (f"{accuracy:.1f}, {bits:.2f}", len(groups[key])) for key, (accuracy, bits) in means.items()}


def by_expert(data: Path, *, repaired: bool) -> Cells:
    """Return losses and bits per byte without experts, means over seeds, by calibration or (`repaired`) by repair."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read_lines(data / "study_experts.jsonl.xz"):
        criterion, _, repair = row["criterion"].partition(", ")
        name = (repair or "none") if repaired else row["calibration"]
        if row["calibration"] not in ("none", "both", "both, pooled") if repaired else repair:
            continue
        if criterion == "random":
            criterion, name = "reap", "random experts"
        groups.setdefault((name, f"{criterion}, {100 * row['share']:.0f} %"), []).append((row["loss"], row["bits"]))
    means = {key: np.mean(values, axis=0) for key, values in groups.items()}
    return {key: (f"{loss:.3f}, {bits:.2f}", len(groups[key])) for key, (loss, bits) in means.items()}


# page, beginning of the table's header, and the function that recomputes its cells
TABLES: tuple[tuple[str, str, Callable[[Path], Cells]], ...] = (
    ("study.md", "|decoder removed|float16|", by_bits),
    ("study.md", "|tokens|", by_tokens),
    ("study.md", "|session, removed|", by_seconds),
    ("results.md", "|removed|parameters, %|", by_layer),
    ("results.md", "|calibration|", partial(by_expert, repaired=False)),
    ("results.md", "|repair|", partial(by_expert, repaired=True)),
)


def table_cells(page: str, header: str) -> dict[tuple[str, str], str]:
    """Return {(row, column): text} of the page's table whose header begins with `header`; {} without such a table."""
    lines = page[at:].splitlines() if (at := page.find(f"\n{header}") + 1) else []
    table = [
        line.removeprefix("|").removesuffix("|").split("|")
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines)
    ]
    return {
        (row[0], column): text for row in table[2:] for column, text in zip(table[0][1:], row[1:], strict=True) if text
    }


def differences(pages: Path, data: Path) -> Iterator[str]:
    """Yield a line per table with its numbers of seeds or repetitions, and one per cell that the rows contradict."""
    for page, header, recompute in TABLES:
        cells, written = recompute(data), table_cells((pages / page).read_text(), header)
        shown = {key: text for key, text in written.items() if key[1] in {column for _, column in cells}}
        counts = sorted({cells[key][1] for key in shown if key in cells})
        yield f"{page}, table {header}...: {len(shown)} cells; seeds or repetitions: {', '.join(map(str, counts))}"
        for key, text in shown.items():
            recomputed, _ = cells.get(key, ("no rows", 0))
            if recomputed != text:
                yield f"  DIFFERS {' | '.join(key)}: the page has {text}, the rows give {recomputed}"
