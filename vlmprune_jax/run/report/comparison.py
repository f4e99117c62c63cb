"""The page that compares the models of a sweep: `sweep.json` -> `sweep.html`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vlmprune_jax.base.errors import printable
from vlmprune_jax.run.report import comparison_plots as plots
from vlmprune_jax.run.report.comparison_plots import BANDS, DATA, REMOVED, Cost, drawable, series_of, titles_of, way_of
from vlmprune_jax.run.report.page import Figure, Section, Table, write_page
from vlmprune_jax.run.report.speed import LIMITS, RULE
from vlmprune_jax.run.report.style import stack_panels, to_svg
from vlmprune_jax.run.report.tables import (
    P_BEST,
    P_NOTE,
    model_row,
    over,
    p_against,
    set_tables,
    speedup_of,
    table_of_rows,
    unpruned_row,
)
from vlmprune_jax.run.workdir.comparison import averaged_sets, question_parts, show_interval
from vlmprune_jax.run.workdir.result import ModelEvaluation
from vlmprune_jax.run.workdir.sweep import (
    DONE,
    FAILED,
    Group,
    SweepResult,
    SweptModel,
    groups_of,
    read_sweep,
    unpruned_key,
)

FILE = "sweep.html"
ENOUGH = 95.0  # percent retained: the paper's "almost all"
MOST_FIGURES = 6
NOTES = (
    "A row is the mean over seeds. Retained: share of the unpruned model's score{averages}. 95 % interval: over "
    "questions, and over seeds (Student's t) if there are several; a model retains {enough:g} % if all of it is above. "
    "Of control: share of the score of the unpruned model after the same recovery. Size: share of the unpruned "
    "model's parameters. Decoding and prompt: measured speed of the shape, as a multiple of the unpruned model's. "
    "{rule}. Removed: share of all parameters, and of the decoder's. Seconds: scoring, pruning, reconstruction and "
    "training, without evaluation, in whichever run did it."
)
COSTS = (
    Cost("Parameters", "parameters (millions)", lambda model: model.parameters / 1e6),
    Cost("Bytes of the weights", "MiB", lambda model: model.bytes / 2**20),
    Cost("FLOPs of a prompt", "GFLOPs", lambda model: model.forward_flops / 1e9),
)


def _speed(title: str, part: str) -> Cost:
    label = "times the unpruned model's tokens/s"

    def ends(model: SweptModel) -> tuple[float, float]:
        return getattr(model, part).low, getattr(model, part).high

    return Cost(title, label, lambda model: getattr(model, part).ratio, True, ends)


SPEEDS = {part: _speed(title, part) for part, title in (("prefill_speedup", "Prefill"), ("decode_speedup", "Decoding"))}


def build_comparison(workdir: Path) -> Path:
    """Write a sweep's comparison page `sweep.html` (one self-contained file); return its path.

    Raises UserError if `sweep.json` is missing or damaged.
    """
    sweep = read_sweep(workdir)
    groups = groups_of(sweep)
    best, titles = _best(groups), titles_of(groups)
    notes = (NOTES.format(averages=_averages(sweep), enough=ENOUGH, rule=f"{RULE}{LIMITS}") + P_NOTE,)
    sections = [
        Section("Models", tables=tuple(tables_of_sweep(sweep, workdir)), notes=notes, folded=False),
        *_pareto_section(sweep, groups),
        *_ratio_section(groups),
        *_data_section(groups),
        *_open_section(sweep),
    ]
    return write_page(
        workdir / FILE,
        "Comparison of pruned models",
        sections,
        lead=list(_lead(sweep, groups, best, titles)),
        best="" if best is None else titles[best.name],
        origin=f"Made by vlmprune sweep --config={printable(sweep.config)}; numbers: sweep.json, sweep.csv.",
    )


def retention_of(group: Group) -> float:
    return -math.inf if group.retained is None else group.retained[0]


def _best(groups: Sequence[Group]) -> Group | None:
    """Return the group of sweep runs with the highest retention (of equals, the smallest models)."""
    known = [group for group in groups if group.retained is not None]
    return min(known, key=lambda group: (-retention_of(group), group.mean("parameters")), default=None)


def _lead(sweep: SweepResult, groups: Sequence[Group], best: Group | None, titles: Mapping[str, str]) -> Iterator[str]:
    runs = {entry.run: entry.status for entry in sweep.models}
    count = {status: sum(state == status for state in runs.values()) for status in dict.fromkeys(runs.values())}
    left = ", ".join(f"{number} {status}" for status, number in count.items() if status != DONE)
    yield f"{count.get(DONE, 0)} of {len(runs)} runs are done{f' ({left})' if left else ''}: {len(sweep.done)} models."
    if best is None or best.retained is None:
        return
    kept = f"{_shown(best)} {over(sweep.sets)}"
    if best.of_control is not None:
        kept += f" ({best.of_control[0]:.2f} % of the unpruned model's score after the same recovery)"
    yield f"{titles[best.name]} has the highest retention: {kept}, {_smaller(best, sweep)}."
    enough = [group for group in groups if group.retained is not None and group.retained[1] >= ENOUGH]
    smallest = min(enough, key=lambda group: group.mean("parameters"), default=None)
    if smallest is None:
        yield f"No model retains {ENOUGH:g} %."
    elif smallest is not best:
        yield (
            f"The smallest model that retains {ENOUGH:g} % is {titles[smallest.name]}: {_shown(smallest)}, "
            f"{_smaller(smallest, sweep)}."
        )


def _shown(group: Group) -> str:
    """Return a group's retention with its interval as text."""
    _, low, high = group.retained or (0.0, 0.0, 0.0)
    return f"{retention_of(group):.2f} %" + (f" (95 % interval {show_interval(low, high)})" if low < high else "")


def _smaller(group: Group, sweep: SweepResult) -> str:
    before = sweep.unpruned[group.first.unpruned].parameters
    speedup, times = speedup_of(group.models, "decode_speedup"), ""
    if speedup is not None:
        times = f" and {speedup} times the decoding speed" if speedup.measurable else f" and decoding speed {speedup}"
    return f"with {100 * (1 - group.mean('parameters') / before):.1f} % fewer parameters{times}"


def _timed(group: Group) -> bool:
    """Return True if a group's speed-ups were measured, and are measurable."""
    return all((speedup := speedup_of(group.models, part)) is not None and speedup.measurable for part in SPEEDS)


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
        figure = plots.pareto_figure(timed, None, list(SPEEDS.values()))
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


def _removed(groups: Sequence[Group]) -> str:
    """Return the mean removed share of a group's models (and of their decoders) as text."""
    whole, decoder = (
        100 * sum(group.mean(name) for group in groups) / len(groups) for name in ("actual_ratio", "decoder_ratio")
    )
    return f"{whole:.0f} % removed ({decoder:.0f} % of the decoder)"


def tables_of_sweep(sweep: SweepResult, workdir: Path) -> list[Table]:
    """Return a table with one row per unpruned model and per group of runs, and those of `set_tables`."""
    groups, sets, best = groups_of(sweep), sweep.sets, _best(groups_of(sweep))
    titles, names = titles_of(groups), _unpruned_names(sweep)
    unpruned = sorted(sweep.unpruned.items(), key=lambda item: -(item[1].image_tokens or 0))
    rows = [unpruned_row(names[key], model, sets) for key, model in unpruned]
    rows += [
        model_row(titles[group.name], group.models, sets, sweep.unpruned[group.first.unpruned]) for group in groups
    ]
    questions = {
        group.name: [
            question_parts(workdir, model.path, model.evaluation, sweep.unpruned[model.unpruned].evaluation, sets)
            for model in group.models
        ]
        for group in groups
    }
    p_values = {} if best is None else p_against(best.name, questions)
    for row, group in zip(rows[len(unpruned) :], groups, strict=True):
        row |= {P_BEST: p_values.get(group.name, ""), "run": printable(group.name)}
    evaluations: list[tuple[str, Sequence[ModelEvaluation]]] = [
        (names[key], [model.evaluation]) for key, model in unpruned
    ]
    evaluations += [(titles[group.name], [model.evaluation for model in group.models]) for group in groups]
    return [table_of_rows(f"{len(groups)} models, means over seeds", rows, sets), *set_tables(evaluations, sets)]


def _unpruned_names(sweep: SweepResult) -> dict[str, str]:
    """Return {key in `sweep.unpruned`: name of the model in tables}, with its folder if there are several models."""
    models = {key: key.removesuffix(unpruned_key("", model.image_tokens)) for key, model in sweep.unpruned.items()}
    several, names = len({*models.values()}) > 1, dict[str, str]()
    for key, model in models.items():
        tokens = sweep.unpruned[key].image_tokens
        names[key] = f"unpruned{f' {printable(model)}' if several else ''}"
        names[key] += f", {tokens} image tokens" if tokens else ""
    return names


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
