"""python tools/check_study.py: recompute the study's intervals, tests and counts from its rows, and compare the page.

Reads the rows in docs/explanation/data, and the tables of study-tables.md, study.md and results.md; shares no code with
tools/study.py and the benchmarks, which wrote them. Prints how many seeds and different models every cell has, the
verdicts after Holm's correction over the settings of all claims, and every entry of the pages that the rows
contradict; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from archived_runs import BEST, PLAIN, SOLVED, Cell, Run, Runs, read_archive
from crossed_effects import Contrast, Effect, error_ratio, heterogeneity, holm, mean_effect, question_interval
from row_tables import differences
from scipy import stats

PAGES = Path(__file__).parents[1] / "docs" / "explanation"
HOLDS, FAILS, EQUAL, OPEN = "holds", "does not hold", "equal within 1 point", "undecided"
EQUAL_SHORT = EQUAL.partition(" within")[0]  # in tables of settings
HOLM, SIGNS_HOLM = "after Holm", "12 seeds, sign flips (no verdict)"
DEPTH, WIDTH, ALL = ("depth",), ("width",), ("depth", "width", "hybrid")


def show_retention(runs: Sequence[Run]) -> str:
    """Return the mean retained percentage ± half of its 95 % interval over seeds and questions, as on the page."""
    values = np.array([run.parts.mean() for run in runs])
    of_seeds = 0.0 if len(runs) == 1 else stats.t.ppf(0.975, len(runs) - 1) * stats.sem(values)
    ends = np.mean([question_interval(run.correct, run.unpruned) for run in runs], axis=0)
    return f"{values.mean():.1f}±{np.hypot(of_seeds, ends - values.mean()).mean():.1f}"


class Term(NamedTuple):
    """One retained percentage of a contrast; without `method` or `data`, those of the setting."""

    recovery: str
    method: str = ""
    data: int | None = None


@dataclass(frozen=True)
class Claim:
    """Claim that a weighted sum of retained percentages is above `threshold`, or equal within ± margin if given.

    `levels`: lowest and highest share of the decoder (%). `data`: shares of the data (%), or all of the sweep.
    """

    threshold: float
    margin: float | None
    terms: Mapping[Term, float]
    levels: tuple[int, int] = (0, 100)
    methods: tuple[str, ...] = (*DEPTH, *WIDTH)
    data: tuple[int, ...] = (5, 20, 100)
    of_control: bool = False


GAIN = Claim(0, None, {Term(BEST): 1, Term(PLAIN): -1})
CLAIMS = {
    "1": Claim(0, 1, {Term(PLAIN, *WIDTH): 1, Term(PLAIN, *DEPTH): -1}, methods=("",)),
    "2a": Claim(-1, None, {Term(BEST, *DEPTH): 1, Term(BEST, *WIDTH): -1}, (0, 33), ("",)),
    "2b": Claim(0, 1, {Term(BEST, *WIDTH): 1, Term(BEST, *DEPTH): -1}, (43, 100), ("",)),
    "3": Claim(-1, None, {Term("projector"): 1, Term(BEST): -1}, (0, 18)),
    "4a": Claim(0, 1, {Term(BEST): 1, Term("projector"): -1}),
    "4b": Claim(0, 1, {Term(BEST): 1, Term("SFT"): -1}),
    "4c": Claim(0, 1, {Term(BEST): 1, Term("SFT + KL"): -1}),
    "5a": Claim(95, None, {Term(BEST): 1}, (0, 50), ALL, (5,)),
    "5b": Claim(0, None, {Term(BEST): 1, Term(BEST, "", 100): -0.9}, (0, 50), ALL, (5,)),
    "6a": Claim(0, 1, {Term(SOLVED): 1, Term(BEST): -0.5, Term(PLAIN): -0.5}),
    "6b": Claim(0, 1, {Term(f"{SOLVED} + {BEST}"): 1, Term(BEST): -1}),
    "7": Claim(99, None, {Term(BEST): 1}, (0, 50), ALL, (5,), of_control=True),
}


def cells_by_setting(runs: Runs, claim: Claim) -> Iterator[tuple[str, list[Cell], list[int]]]:
    """Yield the settings of a claim, the cells of its terms, and the seeds of which all cells have a model."""
    levels = [level for level in sorted({cell.level for cell in runs}) if claim.levels[0] <= level <= claim.levels[1]]
    for method, level, data in itertools.product(claim.methods, levels, claim.data):
        cells = []
        for term in claim.terms:
            share = 0 if term.recovery in (PLAIN, SOLVED) else term.data or data
            cells.append(Cell(term.method or method, level, term.recovery, share))
        shares = sorted({cell.data for cell in cells} - {0, 5})  # 5 % goes without saying
        setting = f"{method} {level} %".strip() + "".join(f", {share} % of the data" for share in shares)
        yield setting, cells, sorted(set.intersection(*(set(runs.get(cell, {})) for cell in cells)))


def contrasts(runs: Runs, claim: Claim) -> dict[str, Contrast]:
    """Return the contrasts of a claim by setting."""
    by_setting: dict[str, Contrast] = {}
    for setting, cells, seeds in cells_by_setting(runs, claim):
        for seed in seeds:
            of_seed = [runs[cell][seed] for cell in cells]
            parts = sum(weight * run.parts for weight, run in zip(claim.terms.values(), of_seed, strict=True))
            value = of_seed[0].of_control if claim.of_control else float(np.mean(parts))
            if value is not None:
                by_setting.setdefault(setting, {})[seed] = (value, None if claim.of_control else np.asarray(parts))
    return by_setting


def error_table(runs: Runs) -> dict[tuple[str, ...], list[str]]:
    """Return the ratio of the wrong answers of both models of a difference, by claim and setting."""
    table: dict[tuple[str, ...], list[str]] = {}
    for number, claim in CLAIMS.items():
        for setting, cells, seeds in cells_by_setting(runs, claim):
            if len(seeds) > 1 and list(claim.terms.values()) == [1, -1]:
                wrong = [[int((~runs[cell][seed].correct).sum()) for seed in seeds] for cell in cells]
                ratio, low, high, p = error_ratio(*wrong)
                text = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                table["ratio of errors", number, setting] = [str(len(seeds)), text, show_p(p)]
    return table


def verdict(claim: Claim, effect: Effect, p_differs: float, p_equal: float) -> str:
    """Return the verdict at the 5 % level; a significant difference within the margin counts as equal."""
    if min(p_equal, p_differs) >= 0.05:
        return OPEN
    return EQUAL if p_equal < 0.05 else HOLDS if effect.mean > claim.threshold else FAILS


def show_p(p: float) -> str:
    """Return a p-value as on the page."""
    return "<0.001" if p < 1e-3 else f"{p:.3f}"


def adjusted(
    effects: Mapping[Any, tuple[Claim, Effect]], by_signs: Mapping[Any, float] = MappingProxyType({})
) -> dict[Any, tuple[float, float]]:
    """Return the p-values of difference and equivalence, after Holm's correction for all of these tests.

    `by_signs`: p-values of differences by sign flips, in place of Student's t.
    """
    tests = {(key, False): effect.p_differs(claim.threshold) for key, (claim, effect) in effects.items()}
    tests |= {(key, False): p for key, p in by_signs.items()}
    tests |= {(key, True): e.p_equal(claim.margin) for key, (claim, e) in effects.items() if claim.margin is not None}
    p_values = holm(tests)
    return {key: (p_values[key, False], p_values.get((key, True), 1.0)) for key in effects}


def claim_tables(runs: Runs) -> dict[tuple[str, ...], list[str]]:
    """Return the rows of both tables of claims, and of the verdicts after Holm's correction over all settings.

    For settings with 12 seeds, also return the p-values of sign flips, which decide no verdict.
    """
    settings = {number: contrasts(runs, claim) for number, claim in CLAIMS.items()}
    gains = {name: np.mean([value for value, _ in gain.values()]) for name, gain in contrasts(runs, GAIN).items()}
    settings["6a"] = {name: contrast for name, contrast in settings["6a"].items() if gains[name] >= 1}
    pooled = {number: mean_effect([*of_claim.values()]) for number, of_claim in settings.items() if of_claim}
    effects = {number: (CLAIMS[number], effect) for number, effect in pooled.items() if effect is not None}
    by_setting = {
        (number, name): (CLAIMS[number], effect)
        for number in effects
        for name, contrast in settings[number].items()
        if (effect := mean_effect([contrast])) is not None
    }
    p_of_claims, p_of_settings = adjusted(effects), adjusted(by_setting)
    by_signs = {key: e.p_signs(claim.threshold) for key, (claim, e) in by_setting.items() if len(e.values) == 12}
    p_by_signs = adjusted(by_setting, by_signs)
    tables: dict[tuple[str, ...], list[str]] = {
        (SIGNS_HOLM, *key): [f"p {show_p(p)}, after Holm {show_p(p_by_signs[key][0])}"] for key, p in by_signs.items()
    }
    for number, (claim, effect) in effects.items():
        known = {name: e for (of, name), (_, e) in by_setting.items() if of == number}
        rows = {}
        for name, e in known.items():
            p_holm = p_of_settings[number, name]
            decided = verdict(claim, e, *p_holm)
            rows[name] = [str(len(e.values)), str(e), *map(show_p, p_holm), decided.partition(" within")[0]]
            tables[HOLM, number, name] = rows[name]
        i_squared, p_of_q = heterogeneity([*known.values()]) if len(known) > 1 else (0.0, 1.0)
        verdicts = {row[-1] for row in rows.values()} - {OPEN}
        alike = len(known) < 2 or (p_of_q >= 0.1 and len(verdicts) < 2)
        means = sorted(e.mean for e in known.values())
        row = [str(effect) if alike else f"from {means[0]:.2f} to {means[-1]:.2f}"]
        pairs = [len(contrast) for contrast in settings[number].values()]
        seeds = f"{min(pairs)}" if min(pairs) == max(pairs) else f"{min(pairs)} to {max(pairs)}"
        row += [seeds, str(len(pairs)), str(sum(pairs))]
        row += [f"{i_squared:.0f} %", show_p(p_of_q)] if len(known) > 1 else ["", ""]
        decided = verdict(claim, effect, *p_of_claims[number])
        p_value = p_of_claims[number][decided == EQUAL]
        tables["claim", number] = [*row, *([show_p(p_value), decided] if alike else ["", "by setting (next table)"])]
        if not alike:
            tables |= {("setting", number, name): row for name, row in rows.items() if row[-1] != EQUAL_SHORT}
    return tables


def retention_table(runs: Runs) -> dict[tuple[str, ...], list[str]]:
    """Return {(method and removed share, recovery): [retention, seeds and models, as on the page]}."""
    cells: dict[tuple[str, ...], list[str]] = {}
    for cell, of_seed in sorted(runs.items()):
        alike = [run for key, column in runs.items() if key[:2] == cell[:2] for run in column.values()]
        row = f"{cell.method} {np.mean([run.removed for run in alike]):.1f} %"
        count = f"({len(of_seed)}/{len({run.digest for run in of_seed.values()})})"
        column = cell.recovery + (f", {cell.data} %" if cell.data else "")
        cells["decoder removed", row, column] = [f"{show_retention([*of_seed.values()])} {count}"]
    return cells


def page_tables(page: str, study: str) -> dict[tuple[str, ...], list[str]]:
    """Return the rows of a study's three tables on the page, by the same keys."""
    section = page.partition(f"\n### {study}\n")[2].partition("\n### ")[0]
    rows: dict[tuple[str, ...], list[str]] = {}
    header: list[str] = []
    for line in section.splitlines():
        cells = line.strip("|").split("|") if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif header[0] == "decoder removed":
            named = zip(header[1:], cells[1:], strict=False)
            rows |= {(header[0], cells[0], name): [cell] for name, cell in named if cell.strip("-")}
        elif header[:2] == ["claim", "effect (95 % interval)"]:
            rows["claim", cells[0].partition(".")[0]] = [cells[1].partition(": ")[2], *cells[2:]]
        elif header[0] == "claim":
            rows["setting", cells[0], cells[1]] = cells[2:]
    return {key: row for key, row in rows.items() if key[1].strip("-")}


def show(row: Sequence[str]) -> str:
    """Return a table's row as text."""
    return " | ".join(row)


def main() -> int:
    """Print counts, verdicts and differences of all archived sweeps; return 1 if the page differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=PAGES / "data", help="folder of the archives study_*.tar.xz")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages")
    options = parser.parse_args()
    page, contradicted = (options.pages / "study-tables.md").read_text(), 0
    for archive in sorted(options.data.glob("study_*.tar.xz")):
        study, runs = archive.name.partition(".")[0], read_archive(archive)
        tables, written = retention_table(runs) | claim_tables(runs), page_tables(page, study)
        print(f"{study}: {sum(map(len, runs.values()))} models")
        for key, row in (tables | error_table(runs)).items():
            if key[0] not in ("claim", "setting"):
                print(f"  {show(key)}: {show(row)}")
        for key in dict.fromkeys([*written, *tables]):
            row = tables.get(key, ["no rows"])[: len(written.get(key, ()))] or ["no rows"]
            if key[0] not in (HOLM, SIGNS_HOLM) and row != written.get(key):
                contradicted += 1
                old = show(written.get(key, ["nothing"]))
                print(f"  DIFFERS {show(key)}: the page has {old}, the rows give {show(row)}")
    for line in differences(options.pages, options.data):
        contradicted += line.startswith("  DIFFERS")
        print(line)
    return min(1, contradicted)


if __name__ == "__main__":
    sys.exit(main())
