"""The page that compares the models of a sweep: `sweep.json` -> `sweep.html`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.evaluation.statistics import holm, interval_of_mean, p_of_difference
from vlmprune_jax.run.report import comparison_plots as plots
from vlmprune_jax.run.report.answers import CHANCE, SIGNIFICANT
from vlmprune_jax.run.report.comparison_plots import BANDS, DATA, REMOVED, drawable, series_of, titles_of, way_of
from vlmprune_jax.run.report.comparison_table import (
    COSTS,
    DECODE,
    MOST_SETS,
    SPEEDUPS,
    interval_of,
    models_table,
    retention_of,
    speedup_of,
    unpruned_names,
)
from vlmprune_jax.run.report.page import Figure, Section, Table, write_page
from vlmprune_jax.run.report.speed import LIMITS, RULE
from vlmprune_jax.run.report.style import stack_panels, to_svg
from vlmprune_jax.run.report.tables import over
from vlmprune_jax.run.workdir.comparison import averaged_sets
from vlmprune_jax.run.workdir.result import ModelEvaluation
from vlmprune_jax.run.workdir.sweep import (
    DONE,
    FAILED,
    Group,
    SweepResult,
    groups_of,
    question_parts,
    read_sweep,
)

FILE = "sweep.html"
ENOUGH = 95.0  # percent retained: the paper's "almost all"
LEAST_RADAR = 3  # minimum number of evaluation sets for a radar chart
MOST_FIGURES = 6
NOTES = (
    "A row is the mean over seeds. Retained: share of the unpruned model's score{averages}. 95 % interval: over "
    "questions, and over seeds (Student's t) if there are several; a model retains {enough:g} % if all of it is above. "
    "Against the best: McNemar's exact test, or for several seeds Student's t over seeds and questions, corrected for "
    "the number of tests (Holm). Of control: share of the score of the unpruned model after "
    "the same recovery. Size: share of the unpruned model's parameters. Decoding: "
    "measured speed of the shape, as a multiple of the unpruned model's. {rule}. Removed: share of all parameters, and "
    "of the decoder's. Seconds: scoring, pruning, reconstruction and training, without evaluation, in whichever run "
    "did it."
)


def build_comparison(workdir: Path) -> Path:
    """Write a sweep's comparison page `sweep.html` (one self-contained file); return its path.

    Raises UserError if `sweep.json` is missing or damaged.
    """
    sweep = read_sweep(workdir)
    groups = groups_of(sweep)
    best, titles, verdicts = _best(groups), titles_of(groups), _against_best(workdir, sweep, groups)
    sections = [
        *_pareto_section(sweep, groups),
        *_ratio_section(groups),
        *_data_section(groups),
        *_images_section(sweep, groups),
        *_radar_section(sweep, groups),
        *_open_section(sweep),
    ]
    rule = f"{RULE}{LIMITS}"
    notes = (NOTES.format(averages=_averages(sweep), enough=ENOUGH, rule=rule),)
    sections.insert(0, Section("Models", tables=(models_table(sweep, groups, verdicts),), notes=notes, folded=False))
    return write_page(
        workdir / FILE,
        "Comparison of pruned models",
        sections,
        lead=list(_lead(sweep, groups, best, titles, verdicts)),
        best=titles[best.name] if best is not None and _is_sure(groups, verdicts) else "",
        origin=f"Made by vlmprune sweep --config={printable(sweep.config)}; numbers: sweep.json, sweep.csv.",
    )


def _best(groups: Sequence[Group]) -> Group | None:
    """Return the group of sweep runs with the highest retention (of equals, the smallest models)."""
    known = [group for group in groups if group.retained is not None]
    return min(known, key=lambda group: (-retention_of(group), group.mean("parameters")), default=None)


def _against_best(workdir: Path, sweep: SweepResult, groups: Sequence[Group]) -> dict[str, str]:
    """Return {group: verdict of the test against the best group}, of groups whose evaluations are in the workdir."""
    best, scores = _best(groups), dict[str, np.ndarray]()
    for group in groups:
        columns = [question_parts(workdir, model, sweep) for model in group.models]
        if all(part is not None for part in columns) and len({len(part) for part in columns if part is not None}) == 1:
            scores[group.name] = np.stack([part for part in columns if part is not None])
    if best is None or best.name not in scores:
        return {}
    reference = scores.pop(best.name)
    others = {name: values for name, values in scores.items() if values.shape[1] == reference.shape[1]}
    adjusted = holm([p_of_difference(reference, values) for values in others.values()])
    return {name: "worse" if p < SIGNIFICANT else CHANCE for name, p in zip(others, adjusted, strict=True)}


def _is_sure(groups: Sequence[Group], verdicts: Mapping[str, str]) -> bool:
    """Return True if all groups but the best one were tested, and are worse."""
    return len(verdicts) == len(groups) - 1 and CHANCE not in verdicts.values()


def _lead(
    sweep: SweepResult,
    groups: Sequence[Group],
    best: Group | None,
    titles: Mapping[str, str],
    verdicts: Mapping[str, str],
) -> Iterator[str]:
    runs = {entry.run: entry.status for entry in sweep.models}
    count = {status: sum(state == status for state in runs.values()) for status in dict.fromkeys(runs.values())}
    left = ", ".join(f"{number} {status}" for status, number in count.items() if status != DONE)
    yield f"{count.get(DONE, 0)} of {len(runs)} runs are done{f' ({left})' if left else ''}: {len(sweep.done)} models."
    if best is None or best.retained is None:
        return
    kept = f"{_shown(best)} {over(sweep.sets)}"
    if best.of_control is not None:
        kept += f" ({best.of_control[0]:.2f} % of the unpruned model's score after the same recovery)"
    others, alike = len(groups) - 1, [*verdicts.values()].count(CHANCE)
    most = "retains most" if _is_sure(groups, verdicts) else "has the highest retention"
    yield f"{titles[best.name]} {most}: {kept}, {_smaller(best, sweep)}."
    if alike:
        yield f"Its lead over {alike} of {others} other models could be chance."
    if len(verdicts) < others:
        untested = others - len(verdicts)
        yield f"Its lead over {untested} of {others} is not tested: answers are missing, or the metric is no mean."
    enough = [group for group in groups if group.retained is not None and group.retained[1] >= ENOUGH]
    smallest = min(enough, key=lambda group: group.mean("parameters"), default=None)
    if smallest is None or smallest.retained is None:
        yield f"No model retains {ENOUGH:g} %."
    elif smallest is not best:
        yield (
            f"The smallest model that retains {ENOUGH:g} % is {titles[smallest.name]}: {_shown(smallest)}, "
            f"{_smaller(smallest, sweep)}."
        )


def _shown(group: Group) -> str:
    """Return a group's retention with its interval as text."""
    ends = interval_of(group)
    return f"{retention_of(group):.2f} %" + (f" (95 % interval {ends})" if ends else "")


def _smaller(group: Group, sweep: SweepResult) -> str:
    before = sweep.unpruned[group.first.unpruned].parameters
    speedup, times = speedup_of(group, DECODE), ""
    if speedup is not None:
        times = f" and {speedup} times the decoding speed" if speedup.measurable else f" and decoding speed {speedup}"
    return f"with {100 * (1 - group.mean('parameters') / before):.1f} % fewer parameters{times}"


def _timed(group: Group) -> bool:
    """Return True if a group's speed-ups were measured, and are measurable."""
    return all((speedup := speedup_of(group, part)) is not None and speedup.measurable for part in SPEEDUPS)


def _averages(sweep: SweepResult) -> str:
    names = averaged_sets(sweep.sets)
    return "" if len(names) == 1 else f", the mean over {', '.join(names)}"


def _pareto_section(sweep: SweepResult, groups: Sequence[Group]) -> Iterator[Section]:
    drawn = drawable(groups)
    if not drawn:
        return
    models = [*sweep.unpruned.values()]
    figures = [
        _figure_of(
            plots.pareto_figure(groups, models, COSTS),
            f"{len(drawn)} models: retained percent against parameters, bytes and FLOPs; the table has the numbers.",
            "Shape: pruning method; colour: recovery. The line is the Pareto front; the star is the unpruned model.",
        )
    ]
    timed = list(filter(_timed, drawn))
    if timed:
        figure = plots.pareto_figure(timed, None, list(SPEEDUPS.values()))
        alt = f"{len(timed)} models: retained percent against speed, as a multiple of the unpruned model's."
        caption = (
            "A shape is measured once, in turns with the unpruned model; bars are intervals over the rounds. The line "
            "leaves out models that are faster than a better one by less than this interval."
        )
        figures.append(_figure_of(figure, alt, caption))
    yield Section("Retention and cost", figures=tuple(figures), folded=False)


def _figure_of(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure`: panels side by side, and below each other on a phone."""
    wide = to_svg(drawn)
    stack_panels(drawn)
    svg = Markup('<div class="wide">{}</div><div class="narrow">{}</div>')
    return Figure(svg.format(Markup(wide), Markup(to_svg(drawn))), printable(alt), caption)


def _asked(group: Group) -> Any:
    """Return the pruning ratio by which a group is compared: the requested one, or the mean ratio reached."""
    asked = group.first.target_ratio
    return round(group.mean("actual_ratio"), 3) if asked is None else asked


def _ratio_section(groups: Sequence[Group]) -> Iterator[Section]:
    if len({_asked(group) for group in drawable(groups)}) < 2:
        return
    series, figures = series_of(groups), []
    fractions = sorted({group.first.data_fraction for group in drawable(groups)})
    for fraction in fractions[:MOST_FIGURES]:
        some = [group for group in drawable(groups) if group.first.data_fraction == fraction]
        training = f"Trained on {100 * fraction:g} % of the data" if fraction else "Without training"
        figure = plots.curves_figure(some, way_of, lambda group: series[group.name], REMOVED, "linear")
        figures.append(
            _figure_of(
                figure,
                f"{training}: retained percent over the share of parameters removed, {len(some)} points.",
                f"{training}. {BANDS}",
            )
        )
    yield Section("Over the ratio", figures=tuple(figures))


def _data_section(groups: Sequence[Group]) -> Iterator[Section]:
    trained = [group for group in drawable(groups) if group.first.data_fraction]
    if len({group.first.data_fraction for group in trained}) < 2:
        return
    series, figures = series_of(groups), []
    shares = {(series[group.name], _asked(group)): _removed([group]) for group in trained}
    for name in list(dict.fromkeys(series[group.name] for group in trained))[:MOST_FIGURES]:
        some = sorted((group for group in trained if series[group.name] == name), key=_asked)
        figure = plots.curves_figure(some, lambda group: shares[series[group.name], _asked(group)], way_of, DATA, "log")
        alt = f"{name}: retained percent over the share of the training data, {len(some)} points."
        figures.append(_figure_of(figure, alt, f"{name}. {BANDS}"))
    yield Section("Over the training data", figures=tuple(figures))


def _images_section(sweep: SweepResult, groups: Sequence[Group]) -> Iterator[Section]:
    """Yield a report section that plots scores against tokens per image, if the sweep varies them."""
    limited = [group for group in groups if group.first.image_tokens]
    if len({group.first.image_tokens for group in limited}) < 2:
        return
    series, lines = series_of(groups, by_images=False), dict[str, dict[int, list[ModelEvaluation]]]()
    names = unpruned_names(sweep)
    for key, unpruned in sweep.unpruned.items():
        if unpruned.image_tokens:
            lines.setdefault(names[key], {})[unpruned.image_tokens] = [unpruned.evaluation]
    for group in limited:
        name = f"{series[group.name]} {100 * _asked(group):.3g} %, {way_of(group)}"
        lines.setdefault(name, {})[group.first.image_tokens or 0] = [model.evaluation for model in group.models]
    figures = []
    for name, metric in itertools.islice(sweep.sets.items(), MOST_FIGURES):
        label = f"{metric.label} on {name}"
        points = {
            line: [
                (tokens, interval_of_mean([metric.scale * value for value in values]), len(values))
                for tokens, models in at.items()
                if (values := [value for model in models if (value := model.main(name, sweep.sets)) is not None])
            ]
            for line, at in lines.items()
        }
        alt = f"{label} over the maximum number of tokens per image, {len(lines)} lines."
        caption = f"Percentages: removed share of the parameters. {BANDS}"
        figures.append(_figure_of(plots.images_figure(points, label), alt, caption))
    note = (
        "Models are trained and evaluated at the same limit; retention is relative to the unpruned model at that limit."
    )
    yield Section("Over the tokens per image", figures=tuple(figures), notes=(note,))


def _removed(groups: Sequence[Group]) -> str:
    """Return the mean removed share of a group's models (and of their decoders) as text."""
    whole, decoder = (
        100 * sum(group.mean(name) for group in groups) / len(groups) for name in ("actual_ratio", "decoder_ratio")
    )
    return f"{whole:.0f} % removed ({decoder:.0f} % of the decoder)"


def _radar_section(sweep: SweepResult, groups: Sequence[Group]) -> Iterator[Section]:
    """Yield a report section with a radar chart of each method's best models."""
    names = [name for name in sweep.sets if all(_kept(group, name) is not None for group in drawable(groups))]
    names = names[:MOST_SETS]
    if len(names) < LEAST_RADAR:
        return
    series, chosen = series_of(groups), dict[Any, dict[str, Group]]()
    for group in sorted(drawable(groups), key=_asked):
        at = chosen.setdefault(_asked(group), {})
        known = at.get(series[group.name])
        if known is None or retention_of(group) > retention_of(known):
            at[series[group.name]] = group
    panels: dict[str, Mapping[str, Mapping[str, float]]] = {}
    for at in chosen.values():
        panels[_removed(list(at.values()))] = {
            name: {set_name: _kept(group, set_name) or 0.0 for set_name in names} for name, group in at.items()
        }
    figure = plots.radar_figure(panels, names)
    alt = f"Radar of retention on {', '.join(names)}, for the model of each method and ratio with the highest mean."
    caption = "The model of each method and ratio with the highest mean; dashed: the unpruned model."
    yield Section("Every benchmark", figures=(_figure_of(figure, alt, caption),))


def _kept(group: Group, name: str) -> float | None:
    values = [model.evaluation.retained.get(name) for model in group.models]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def table_of(sweep: SweepResult, workdir: Path) -> Table:
    """Return a table with one row per unpruned model and per group of runs."""
    groups = groups_of(sweep)
    return models_table(sweep, groups, _against_best(workdir, sweep, groups))


def _open_section(sweep: SweepResult) -> Iterator[Section]:
    """Yield a report section that lists the runs without a result, with reasons."""
    rows = [
        (printable(entry.run), entry.status, printable(entry.error or ""))
        for entry in sweep.models
        if entry.status != DONE
    ]
    if rows:
        failed = sum(row[1] == FAILED for row in rows)
        table = Table(f"{failed} failed, {len(rows) - failed} pending", ("run", "state", "error"), tuple(rows))
        note = "The same `vlmprune sweep` command runs pending runs, and tries failed runs again."
        yield Section("Runs without a result", tables=(table,), notes=(note,))
