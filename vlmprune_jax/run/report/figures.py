"""The figures of a report, section by section, each with a text alternative."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from vlmprune_jax.base.errors import UserError, printable
from vlmprune_jax.core.layer import stack_title
from vlmprune_jax.core.part import AXES, LAYERS, WRITERS
from vlmprune_jax.core.plans.kept import KeptStack
from vlmprune_jax.core.prune import PrunePlan, Scores
from vlmprune_jax.core.prune.scores import Values
from vlmprune_jax.core.recovery.config import LossConfig
from vlmprune_jax.core.recovery.metrics import read_metrics
from vlmprune_jax.run.report import plots
from vlmprune_jax.run.report.comparison_plots import (
    BANDS,
    COSTS,
    DATA,
    PARAMETERS,
    REMOVED,
    SPEEDS,
    curves_figure,
    drawable,
    pareto_figure,
    series_of,
    way_of,
)
from vlmprune_jax.run.report.page import Figure, Section
from vlmprune_jax.run.report.style import stack_panels, to_svg, write_png
from vlmprune_jax.run.report.tables import speedup_of
from vlmprune_jax.run.workdir.groups import Comparison, ModelGroup
from vlmprune_jax.run.workdir.result import Result
from vlmprune_jax.run.workdir.steps import Variant
from vlmprune_jax.run.workdir.vocabulary import vocabulary_size

T = TypeVar("T")
MOST_UNITS = 1_000_000  # maximum cells of a figure
MOST_DRAWN = 20  # maximum figures of a kind, and curves per figure; tables are complete
MOST_CURVES = 6  # maximum figures of curves over the ratio, and over the data
MOST_LISTED = 40  # maximum numbers in a sentence


def figure_of(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure` (SVG with caption)."""
    return Figure(Markup(to_svg(drawn)), printable(alt), caption)


def _in_panels(drawn: Any, alt: str, caption: str) -> Figure:
    """Convert a matplotlib figure to a report `Figure`: panels side by side, and below each other on a phone."""
    wide = figure_of(drawn, alt, caption)
    stack_panels(drawn)
    svg = Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(wide.svg, Markup(to_svg(drawn)))
    return replace(wide, svg=svg)


def cost_section(comparison: Comparison, png: Path | None) -> Iterator[Section]:
    """Yield a report section that plots retention against costs and measured speed.

    `png`: file for the first figure.
    """
    drawn = drawable(comparison.groups)
    if not drawn:
        return
    known_costs = [model.costs for model in comparison.unpruned.values()]
    known_costs += [model.costs for group in drawn for model in group.models]
    costs = (PARAMETERS,) if None in known_costs else COSTS
    figure = pareto_figure(drawn, [*comparison.unpruned.values()], costs)
    if png is not None:
        write_png(figure, png)
    known = [(group.title, group.retained[0]) for group in drawn[:MOST_LISTED] if group.retained is not None]
    alt = f"{len(drawn)} models: percent retained against {', '.join(cost.title.lower() for cost in costs)}: "
    alt += ", ".join(f"{title} {retained:.1f}" for title, retained in known)
    front = "The line is the Pareto front"
    caption = f"Shape: pruning method; colour: recovery. {front}; the star is the unpruned model."
    figures = [_in_panels(figure, alt, caption)]
    timed = list[ModelGroup]()
    for group in drawn:
        speedups = [speedup_of(group.models, part) for part in SPEEDS]
        timed += [group] if all(speedup is not None and speedup.measurable for speedup in speedups) else []
    if timed:
        alt = f"{len(timed)} models: percent retained against speed, as a multiple of the unpruned model's."
        caption = (
            f"A shape is measured once, in turns with the unpruned model; bars are intervals over the rounds. {front}, "
            "without models that are faster than a better one by less than this interval."
        )
        figures.append(_in_panels(pareto_figure(timed, None, [*SPEEDS.values()]), alt, caption))
    yield Section("Retention and cost", figures=tuple(figures), folded=False)


def ratio_section(groups: Sequence[ModelGroup]) -> Iterator[Section]:
    """Yield a report section with curves of retention over the pruning ratio, if there are several ratios."""
    groups = drawable(groups)
    if len({_ratio(group) for group in groups}) < 2:
        return
    series, figures = series_of(groups), []
    for fraction in sorted({group.first.data_fraction for group in groups})[:MOST_CURVES]:
        some = [group for group in groups if group.first.data_fraction == fraction]
        training = f"Trained on {100 * fraction:g} % of the data" if fraction else "Without training"
        figure = curves_figure(some, way_of, lambda group: series[group.name], REMOVED, "linear")
        alt = f"{training}: percent retained over the share of parameters removed, {len(some)} points."
        figures.append(_in_panels(figure, alt, f"{training}. {BANDS}"))
    yield Section("Over the ratio", figures=tuple(figures))


def data_section(groups: Sequence[ModelGroup]) -> Iterator[Section]:
    """Yield a report section with curves of retention over the share of the data, if there are several shares."""
    trained = [group for group in drawable(groups) if group.first.data_fraction]
    if len({group.first.data_fraction for group in trained}) < 2:
        return
    series, figures = series_of(groups), []
    removed = dict[tuple[str, float], str]()
    for group in trained:
        whole, decoder = (100 * group.mean(name) for name in ("actual_ratio", "decoder_ratio"))
        text = f"{whole:.0f} % removed ({decoder:.0f} % of the decoder)"
        removed.setdefault((series[group.name], _ratio(group)), text)
    for name in list(dict.fromkeys(series[group.name] for group in trained))[:MOST_CURVES]:
        some = sorted((group for group in trained if series[group.name] == name), key=_ratio)
        figure = curves_figure(some, lambda group: removed[series[group.name], _ratio(group)], way_of, DATA, "log")
        alt = f"{name}: percent retained over the share of the training data, {len(some)} points."
        figures.append(_in_panels(figure, alt, f"{name}. {BANDS}"))
    yield Section("Over the training data", figures=tuple(figures))


def _ratio(group: ModelGroup) -> float:
    """Return the pruning ratio by which a group is compared: the requested one, or the mean ratio reached."""
    asked = group.first.target_ratio
    return round(group.mean("actual_ratio"), 3) if asked is None else asked


def removed_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield report sections with maps of removed layers, heads and neurons."""
    plans = list[tuple[list[str], PrunePlan]]()  # plans that keep the same units share an entry
    for name in dict.fromkeys(run.plan for run in variants if run.plan):
        plan = PrunePlan.from_json(workdir / name)
        names = next((names for names, known in plans if known.stacks == plan.stacks), None)
        if names is None:
            plans.append((names := [], plan))
        names.append(name)
    figures = list[Figure]()
    for names, plan in plans:
        for stack, kept in plan.stacks.items():
            if not kept.is_whole and len(figures) < MOST_DRAWN:
                layers = {layer.index: _by_branch(layer.kept, ()) for layer in kept.layers}
                widths = [_by_branch(sizes, 0) for sizes in kept.sizes_before]
                component = stack_title(stack)
                drawn = plots.removed_figure(f"{plan.method}: what is left of the {component}", widths, layers)
                caption = f"{', '.join(names[:MOST_LISTED])}, by {plan.criterion}"
                figures.append(figure_of(drawn, _removed_alt(component, kept), caption))
    if figures:
        yield Section("What was removed", figures=tuple(figures))


def _by_branch(values: Mapping[str, T], absent: T) -> tuple[T, T]:
    """Split a layer's values by axis into those of its mixer and of its channel mixer, without parent axes."""
    parents = {AXES[axis].parent for axis in values}
    branches = {WRITERS[axis]: value for axis, value in values.items() if axis not in parents}
    return branches.get("o_proj", absent), branches.get("down_proj", absent)


def _removed_alt(component: str, kept: KeptStack) -> str:
    before = kept.sizes_before
    gone = ", ".join(map(str, kept.removed_layers[:MOST_LISTED])) or "none"
    left, whole = ([_by_branch(sizes, 0) for sizes in layers] for layers in (kept.sizes, before))
    heads, neurons = (
        f"{sum(sizes[branch] for sizes in left):,} of {sum(sizes[branch] for sizes in whole):,}" for branch in (0, 1)
    )
    return (
        f"Map of the {component}: {len(kept.layers)} of {len(before)} layers stay, removed layers: {gone}; "
        f"{heads} heads and {neurons} neurons stay"
    )


def importance_section(workdir: Path, variants: Sequence[Variant]) -> Iterator[Section]:
    """Yield report sections with importance scores, one per scores file and plan."""
    figures = dict[str, Figure]()
    for plan_file, method, name in dict.fromkeys(
        (run.plan, run.method, name) for run in variants for name in run.scores
    ):
        if len(figures) < MOST_DRAWN:
            scores = Scores.load(workdir / name)
            plan = None if plan_file is None else PrunePlan.from_json(workdir / plan_file)
            caption = name if method is None else f"{method}: {name}"
            figure = figure_of(importance_figure(scores, plan), _importance_alt(scores), caption)
            figures.setdefault(figure.svg, figure)  # variants of one plan have equal scores
    if figures:
        yield Section("Importance", figures=tuple(figures.values()))


def importance_figure(scores: Scores, plan: PrunePlan | None) -> Any:
    """Plot importance scores, and mark the layers and heads that a plan removes.

    Raises UserError if there are too many scores for a figure, or the plan has no entry for their stack.
    """
    component = scores.components[0]
    if plan is not None and component not in plan.stacks:
        raise UserError(f"{scores.criterion} scores are for the {component} stack, which the plan does not contain")
    kept_of = None if plan is None else plan.stacks[component]
    what = scores.criterion if component == "text" else f"{scores.criterion} of the tower"
    by_layer = scores.along(LAYERS) and plan is not None and plan.method == "depth"
    heads, experts = heads_of(scores.values), scores.along("experts")
    if not (heads or experts) or by_layer:
        gone = () if kept_of is None else kept_of.removed_layers
        return plots.layer_importance_figure(f"{what} per layer", scores.layers, gone)
    rows, unit = (heads, "attention head") if heads else (experts, "expert")
    if len(rows) * (widest := max(map(len, rows))) > MOST_UNITS:
        raise UserError(
            f"{scores.criterion} scores are of {len(rows):,} layers with up to {widest:,} {unit}s, too many for a "
            "figure: score again"
        )
    if kept_of is None:
        kept = {i: (set(range(len(heads))), 1, 1) for i, heads in enumerate(rows)}
    else:
        kept = {
            layer.index: (
                set(layer.kept[next(axis for axis in scores.axes if axis in layer.kept)]),
                _by_branch(layer.sizes, 0)[1],
                _by_branch(kept_of.sizes_before[layer.index], 0)[1],
            )
            for layer in kept_of.layers
        }
    return plots.width_importance_figure(f"{what} per {unit}", rows, kept, unit)


def _importance_alt(scores: Scores) -> str:
    if heads := heads_of(scores.values):
        return f"Importance by {scores.criterion} of the attention heads of {len(heads)} layers"
    if experts := scores.along("experts"):
        return f"Importance by {scores.criterion} of the experts of {len(experts)} layers"
    order = sorted(range(len(scores.layers)), key=lambda layer: scores.layers[layer])
    listed = ", ".join(map(str, order[:MOST_LISTED])) + (", ..." if len(order) > MOST_LISTED else "")
    return f"Importance by {scores.criterion} of {len(order)} layers, least first: {listed}"


def loss_section(workdir: Path, result: Result) -> Iterator[Section]:
    """Yield a report section with the training loss curves of each recovery."""
    curves, titles = dict[int | None, dict[str, list[dict[str, Any]]]](), dict[str, str]()
    for run in result.entries:
        titles |= run.loss_terms or {name: name for name in LossConfig().weights()}
        path = workdir / run.metrics if run.metrics else None
        if path is not None and path.is_file() and sum(map(len, curves.values())) < MOST_DRAWN:
            tokens = vocabulary_size((workdir / run.plan).parent) if run.plan else None
            curves.setdefault(tokens, {})[result.labels[run.name]] = read_metrics(path)
    figures = []
    for tokens, lines in curves.items():  # losses are per token, so those of different vocabularies do not compare
        drawn = plots.loss_figure(lines, titles)
        if drawn is not None:
            steps = max(row["step"] for rows in lines.values() for row in rows)
            note = "" if len(curves) == 1 else f" Vocabulary: {'whole' if tokens is None else f'{tokens:,} tokens'}."
            alt = f"Training losses over {steps:,} steps of {', '.join(lines)}.{note}"
            figures.append(figure_of(drawn, alt, f"Mean over each logged batch; logarithmic.{note}"))
    if figures:
        yield Section("Recovery training", figures=tuple(figures))


def heads_of(values: Values) -> list[np.ndarray]:
    """Return the scores of units of several channels (such as attention heads), layer by layer."""
    return [scores for key, scores in values.items() if key.layer is not None and AXES[key.axis].channels]
