"""Markdown page of a study: conclusions, perplexities and a figure for each sweep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from insights import BY_SETTING, EQUAL, SMALL, Conclusion, conclude
from matplotlib.figure import Figure
from msgspec.structs import replace
from pooling import Effect
from sweep_points import Point, points_of

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.files import read_text, replacing
from vlmprune_jax.base.markup import markdown
from vlmprune_jax.run.evaluation.metrics import METRICS
from vlmprune_jax.run.evaluation.statistics import interval_of_mean, retained_interval
from vlmprune_jax.run.planning.guide import SOLVED
from vlmprune_jax.run.report.figures import drawable, mean_of, series_of
from vlmprune_jax.run.report.plots import Cost, curves_figure, write_png
from vlmprune_jax.run.workdir.comparison import averaged_sets
from vlmprune_jax.run.workdir.evaluation import find_evaluated, read_evaluated
from vlmprune_jax.run.workdir.groups import ModelGroup, groups_of
from vlmprune_jax.run.workdir.result import WITHOUT, Run, Set, recovery_label
from vlmprune_jax.run.workdir.sweep import SweepResult, read_sweep

BEGIN, END = "<!-- vlmprune study: begin -->", "<!-- vlmprune study: end -->"
PAPER = "paper"  # reserved name of a source, not allowed for sweeps
PERPLEXITY = "perplexity"
_HEADING = "### "
DECODER = Cost("decoder's parameters removed (%)", mean_of(lambda model: 100 * (model.decoder_ratio or 0.0)))
_SHARE = f", {100 * SMALL:g} % of the data"


def read_studies(given: Sequence[str]) -> dict[str, tuple[Path, SweepResult]]:
    """Read the sweeps of arguments NAME=SWEEP_DIR: (folder, sweep with intervals computed again) by name.

    Raises:
      UserError: no argument, another form, a repeated or reserved name, or see `read_sweep`.
    """
    studies: dict[str, tuple[Path, SweepResult]] = {}
    for argument in given:
        name, mark, folder = argument.partition("=")
        if not mark or not folder or not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise UserError(f"{argument!r} must be NAME=SWEEP_DIR, as easyvqa=runs/study_easyvqa")
        if name in studies or name == PAPER:
            raise UserError(f"{argument!r}: the name {name!r} is taken: give another")
        studies[name] = (Path(folder), _with_intervals(Path(folder), read_sweep(Path(folder))))
    if not studies:
        raise UserError("no sweep given: python tools/study.py NAME=SWEEP_DIR ...")
    return studies


def _with_intervals(folder: Path, sweep: SweepResult) -> SweepResult:
    """Return a sweep with intervals over questions recomputed by this version, if its evaluations exist."""
    entries = []
    for entry in sweep.models:
        if entry.found is None:
            entries.append(entry)
            continue
        evaluation, path = entry.found.evaluation, Path(entry.found.path)
        ends = {name: _interval_over_questions(folder, path, name, sweep.sets[name]) for name in sweep.sets}
        known = evaluation.retained_interval | {name: pair for name, pair in ends.items() if pair is not None}
        evaluation = replace(evaluation, retained_interval=known)
        entries.append(replace(entry, found=replace(entry.found, evaluation=evaluation)))
    return replace(sweep, models=entries)


def _interval_over_questions(folder: Path, model: Path, name: str, eval_set: Set) -> tuple[float, float] | None:
    """Return the interval of a model's retention on a set; None if scores are missing, or it is no mean."""
    paths = (find_evaluated(folder, str(model), name), find_evaluated(folder / model.parent, None, name))
    metric = METRICS.get(eval_set.name)
    if metric is None or metric.full is None or metric.drawn is not None or metric.drawn_by is not None:
        return None
    scores = [
        [{eval_set.main: score or 0.0} for score in read_evaluated(path).question_scores] for path in paths if path
    ]
    return retained_interval(metric, scores[0], scores[1], ()) if len(scores) == len(paths) else None


def as_markdown(name: str, sweep: SweepResult, folder: Path | None = None, *, settings: bool = True) -> str:
    """Return the conclusions of one sweep as a section of a page; `folder`: see `points_of`.

    `settings`: True to list the effects in all settings, also for insights whose settings do not differ.
    """
    points = points_of(sweep, folder)
    seeds, different = len({point.seed for point in points} - {None}) or 1, len({point.digest for point in points})
    counts = f"{seeds} seed{'s' * (seeds > 1)}, {different} different models"
    about = f"The {len(points)} runs ({counts}) are scored by {markdown(measured(sweep))}."
    lines = [f"{_HEADING}{name}", "", about, "", *retention_lines(points)]
    return "\n".join([*lines, *insight_lines(conclude(points), settings=settings), *perplexity_lines(sweep)])


def insight_lines(conclusions: Sequence[Conclusion], *, settings: bool = True) -> list[str]:
    """Return a table with a row per insight, and one with a row per insight and setting.

    `settings`: if False, the second table leaves out claims whose settings do not differ, and settings that are equal.
    """
    known = [
        conclusion
        for conclusion in conclusions
        if conclusion.effect is not None and conclusion.effect.interval is not None
    ]
    lines = []
    if known:
        lines = [
            "Effects, in points of retained %, are means over settings, with 95 % intervals over seeds and questions.",
            "If settings differ (Welch's test of Q, p < 0.1, or opposite verdicts), each setting has its own verdict.",
            "All p-values are adjusted by Holm's method: over the claims, or over the settings of all claims.",
            "They are of Student's t.",
            "",
            "|claim|effect (95 % interval)|seeds|settings|pairs|I²|p of Q|p|verdict|",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for conclusion in known:
        assert conclusion.effect is not None
        counts = [row.pairs for row in conclusion.comparisons]
        size = f"{_span(counts)}|{len(counts)}|{sum(counts)}"
        means = sorted(row.effect.mean for row in conclusion.comparisons)
        effect = _effect(conclusion.effect) if conclusion.pooled else f"from {means[0]:.2f} to {means[-1]:.2f}"
        spread, p = conclusion.heterogeneity, _probability(conclusion.p_value) if conclusion.pooled else ""
        of_spread = "|" if spread is None else f"{spread.i_squared:.0f} %|{_probability(spread.p_value)}"
        verdict = conclusion.verdict if conclusion.verdict != BY_SETTING else "by setting (next table)"
        lines.append(f"|{markdown(conclusion.claim)}|{conclusion.measure}: {effect}|{size}|{of_spread}|{p}|{verdict}|")
    lines += [""] if known else []
    shown = [conclusion for conclusion in known if settings or not conclusion.pooled]
    if shown:
        lines += [f"|claim|setting ({_SHARE[2:]} if trained)|seeds|effect (95 % interval)|p|p of equality|verdict|"]
        lines += ["|---|---|---|---|---|---|---|"]
    for conclusion in shown:
        for row in conclusion.comparisons:
            if row.effect.interval is None or not (settings or row.verdict != EQUAL):
                continue
            label = f"{_numbers([conclusion.claim])}|{markdown(row.setting.removesuffix(_SHARE))}"
            p = "|".join(map(_probability, (row.p_differs, row.p_equal)))
            lines.append(f"|{label}|{row.pairs}|{_effect(row.effect)}|{p}|{row.verdict.partition(' within')[0]}|")
    lines += [""] if shown else []
    single = _numbers(
        conclusion.claim for conclusion in conclusions if conclusion.comparisons and conclusion not in known
    )
    silent = _numbers(conclusion.claim for conclusion in conclusions if not conclusion.comparisons)
    lines += [f"Claims with only one seed, so undecided: {single}.", ""] if single else []
    return lines + ([f"Claims that this sweep does not test: {silent}.", ""] if silent else [])


def _span(counts: Sequence[int]) -> str:
    """Return the smallest and the largest count as text."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _probability(p: float) -> str:
    return "<0.001" if p < 1e-3 else f"{p:.3f}"


def _effect(effect: Effect) -> str:
    low, high = effect.interval or (effect.mean, effect.mean)
    return f"{effect.mean:.2f} ({low:.2f} to {high:.2f})"


def _numbers(claims: Iterable[str]) -> str:
    return ", ".join(claim.partition(".")[0] for claim in claims)


def retention_lines(points: Sequence[Point]) -> list[str]:
    """Return a table of retained percentages: a row for each method and level, a column for each recovery.

    A cell is the mean over seeds, half of its 95 % interval over seeds and questions (over questions for one seed) if
    that is known, the number of seeds, and how many different models they made.
    """
    columns = sorted({(point.data, point.recovery) for point in points}, key=lambda key: (key[0], len(key[1]), key[1]))
    cells: dict[tuple[float, str, str], dict[tuple[float, str], list[Point]]] = {}
    for point in points:
        row = cells.setdefault((point.level, point.method, point.model), {})
        row.setdefault((point.data, point.recovery), []).append(point)
    if not cells:
        return []
    heads = [markdown(_recovery(recovery)) + (f", {100 * data:g} %" if data else "") for data, recovery in columns]
    lines = [
        "Retained score (%), mean ± half of the 95 % interval (number of seeds/different models):",
        "",
    ]
    lines += [f"|decoder removed|{'|'.join(heads)}|", "|---" * (len(heads) + 1) + "|"]
    several = len({model for *_, model in cells}) > 1
    for (_, method, model), row in sorted(cells.items()):
        reached = 100 * float(np.mean([point.reached for cell in row.values() for point in cell]))
        label = f"{method} {reached:.1f} %" + (f", {model}" if several else "")
        lines.append(f"|{markdown(label)}|{'|'.join(_retained(row.get(column, ())) for column in columns)}|")
    return [*lines, ""]


def _recovery(name: str) -> str:
    """Return a point's recovery in words, such as "reconstructed + SFT" for "reconstruct+sft"."""
    first, _, trained = name.partition("+") if name.startswith(SOLVED) else ("", "", name)
    return recovery_label(trained or "none", reconstructed=bool(first))


def _retained(points: Sequence[Point]) -> str:
    if not points:
        return ""
    mean, low, high = interval_of_mean([point.retained for point in points], [point.interval for point in points])
    counts = f"({len(points)}/{len({point.digest for point in points})})"
    return f"{mean:.1f}±{(high - low) / 2:.1f} {counts}" if low < high else f"{mean:.1f} {counts}"


def measured(sweep: SweepResult) -> str:
    """Return the names of the metrics behind the retained percentages (perplexity only if no set has questions)."""
    return ", ".join(f"{sweep.sets[name].main} on {name}" for name in averaged_sets(sweep.sets))


def update_page(path: Path, studies: Mapping[str, tuple[Path, SweepResult]]) -> None:
    """Write conclusions between the BEGIN and END comments of a page, replacing those of sweeps with the same names.

    Effects in single settings are only printed if settings do not differ. A sweep's figure, NAME.png, is beside it.

    Raises:
      UserError: the page has no such comments.
      OSError: the page cannot be written.
    """
    before, begin, rest = read_text(path).partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: has no lines {BEGIN} and {END}, between which conclusions go: add them")
    sections = {part.partition("\n")[0]: part for part in re.split(f"(?m)^{_HEADING}", old)[1:]}
    for name, (folder, sweep) in studies.items():
        title, _, text = as_markdown(name, sweep, folder, settings=False).removeprefix(_HEADING).partition("\n")
        figure = study_figure(sweep)
        if figure is not None:
            write_png(figure, path.with_name(f"{name}.png"))
            text = f"\n![Plot of retained score (%) against removed decoder parameters (%), {name}]({name}.png)\n{text}"
        sections[name] = f"{title}\n{text}".strip()
    with replacing(path) as file:
        blocks = (f"{_HEADING}{part.strip()}\n" for part in sections.values())
        file.write("\n".join([f"{before}{begin}\n", *blocks, f"{end}{after}"]).encode())


def study_figure(sweep: SweepResult) -> Figure | None:
    """Plot retention over the removed share of the decoder, one panel per method; None with fewer than two shares.

    Lines are recoveries; if several criteria are compared, lines are criteria and panels are method and recovery.
    """
    groups = drawable(groups_of(sweep))
    if len({round(group.mean("decoder_ratio"), 2) for group in groups}) < 2:
        return None
    series = series_of(groups)
    several = len(set(series.values())) > len({group.first.method for group in groups})
    shares = {group.first.data_fraction for group in groups} - {0.0}

    def way(group: ModelGroup) -> str:
        share = group.first.data_fraction
        return f"{group.recovery}, {100 * share:g} %" if share and len(shares) > 1 else group.recovery

    if several:
        return curves_figure(
            groups,
            lambda group: f"{group.first.method}, {way(group)}",
            lambda group: series[group.name].removeprefix(f"{group.first.method}, "),
            DECODER,
            "linear",
        )
    return curves_figure(groups, lambda group: series[group.name], way, DECODER, "linear")


def perplexity_lines(sweep: SweepResult) -> list[str]:
    """Return a table for each set that is text: a row for each plan, a column for each recovery, means over seeds.

    Means are of logarithms.
    """
    lines: list[str] = []
    for name in (name for name, metric in sweep.sets.items() if metric.main == PERPLEXITY):
        values = {model: unpruned.evaluation.main(name, sweep.sets) for model, unpruned in sweep.unpruned.items()}
        before = {model: value for model, value in values.items() if value}
        cells: dict[tuple[Any, ...], dict[tuple[float, str], list[Run]]] = {}
        for row in sweep.done:
            if row.evaluation.main(name, sweep.sets) is not None and row.unpruned in before:
                cells.setdefault(_cut(row), {}).setdefault(_done_to(row), []).append(row)
        if not cells:
            continue
        columns = sorted({column for row in cells.values() for column in row}, key=lambda c: (c[0], c[1] != WITHOUT, c))
        perplexities = ", ".join(_short(value) for value in before.values())
        lines += [f"Perplexity on {markdown(name)} (number of seeds/different models; unpruned: {perplexities}):", ""]
        lines += [f"|method, criterion, decoder removed|{'|'.join(markdown(words) for _, words in columns)}|"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        for cut in sorted(cells, key=lambda cut: cut[1:]):
            by_column = cells[cut]
            share = 100 * float(np.mean([row.decoder_ratio or 0.0 for rows in by_column.values() for row in rows]))
            shown = "|".join(_perplexity(by_column.get(column, ()), name, sweep) for column in columns)
            lines.append(f"|{markdown(f'{cut[1]}, {cut[2]}')}, {share:.1f} %|{shown}|")
        lines.append("")
    return lines


def _perplexity(rows: Sequence[Run], name: str, sweep: SweepResult) -> str:
    """Return a cell: the mean perplexity on a set (of logarithms), and the numbers of seeds and of different models."""
    if not rows:
        return ""
    value = float(np.exp(np.mean([np.log(row.evaluation.main(name, sweep.sets) or np.nan) for row in rows])))
    return f"{_short(value)} ({len(rows)}/{len({row.digest for row in rows})})"


def _short(value: float) -> str:
    """Format a perplexity with two decimals, or none from 1,000 on; very small values with one significant digit."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _cut(row: Run) -> tuple[Any, ...]:
    return row.model, row.method, row.criterion, row.decoder_ratio if row.target_ratio is None else row.target_ratio


def _done_to(row: Run) -> tuple[float, str]:
    """Return the share of training data, and a model's repair and recovery in words, as a column of the table."""
    data = row.data_fraction
    return data, row.after_pruning + (f", {100 * data:g} %" if data else "")
